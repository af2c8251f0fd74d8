//! Products with int8 or binary16 rows on AVX2. One token: as [`super::dense_avx512`] with vectors of half the width, and without masks: a
//! row's last values are copied to where zeros follow them. Several: rows become floats once for all tokens, a strip of columns
//! at a time that stays in the first cache, and the same numbers are added in the same order.

use core::arch::x86_64::*;

use pulp::Simd;
use pulp::x86::V3;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_run};

/// Values of a vector.
const LANES: usize = 8;
/// Columns of a strip.
const STRIP: usize = 256;
/// Tokens that meet a strip together: with [`ROWS`] rows, twelve chains of additions.
const TOKENS: usize = 3;

/// Proof that the machine has AVX2, FMA and F16C, and is allowed to use them.
#[derive(Clone, Copy)]
pub(super) struct Avx2(V3);

impl Avx2 {
    /// A token, where the machine has what it takes: every one with AVX2 that is known has F16C.
    pub(super) fn detect() -> Option<Avx2> {
        let there = Isa::detect() >= Isa::Avx2 && std::is_x86_feature_detected!("f16c");
        if there { V3::try_new().map(Avx2) } else { None }
    }
}

/// Values of a row as they are stored.
pub(super) trait Stored: Copy + Default {
    /// Eight values.
    ///
    /// # Safety
    /// AVX2 and F16C are there, and eight values can be read.
    unsafe fn load(at: *const Self) -> __m256;
}

impl Stored for i8 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(at: *const i8) -> __m256 {
        // SAFETY: eight bytes, as the caller vouches.
        let codes = unsafe { _mm_loadl_epi64(at.cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
    }
}

impl Stored for u16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(at: *const u16) -> __m256 {
        // SAFETY: sixteen bytes, as the caller vouches.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }
}

/// The products of [`ROWS`] rows of `x.len()` values with one token.
///
/// # Panics
/// When `rows` is not as long.
#[inline(always)]
pub(super) fn dots<T: Stored>(simd: Avx2, rows: &[T], x: &[f32]) -> [f32; ROWS] {
    assert_eq!(rows.len(), ROWS * x.len(), "rows");
    // SAFETY: `simd` is proof of the features, and the lengths were checked.
    unsafe { sums(simd, rows, x) }
}

/// # Safety
/// `rows` has [`ROWS`] times `x.len()` values.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<T: Stored>(simd: Avx2, rows: &[T], x: &[f32]) -> [f32; ROWS] {
    let cols = x.len();
    let (whole, line) = (cols / LANES * LANES, 64 / size_of::<T>());
    let mut acc = [_mm256_setzero_ps(); ROWS];
    for at in (0..whole).step_by(LANES) {
        // SAFETY: columns `at .. at + LANES` are in `x` and in all rows.
        let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(at)) };
        for (r, acc) in acc.iter_mut().enumerate() {
            let row = rows.as_ptr().wrapping_add(r * cols + at);
            if at % line == 0 {
                prefetch_run(row.cast());
            }
            // SAFETY: as above.
            *acc = _mm256_fmadd_ps(unsafe { T::load(row) }, x, *acc);
        }
    }
    if whole < cols {
        let mut last = [0.0; LANES];
        last[..cols - whole].copy_from_slice(&x[whole..]);
        // SAFETY: an array of eight.
        let x = unsafe { _mm256_loadu_ps(last.as_ptr()) };
        for (r, acc) in acc.iter_mut().enumerate() {
            let mut values = [T::default(); LANES];
            values[..cols - whole].copy_from_slice(&rows[r * cols + whole..(r + 1) * cols]);
            // SAFETY: an array of eight.
            *acc = _mm256_fmadd_ps(unsafe { T::load(values.as_ptr()) }, x, *acc);
        }
    }
    // `map` would leave the features of this function behind.
    let mut sums = [0.0; ROWS];
    for (to, sum) in sums.iter_mut().zip(acc) {
        *to = simd.0.reduce_sum_f32s(bytemuck::cast(sum));
    }
    sums
}

/// The sums of one token with [`ROWS`] rows before their lanes are added up.
type Sums = [__m256; ROWS];
/// Columns of [`ROWS`] rows as floats.
type Strip = [[__m256; STRIP / LANES]; ROWS];

/// What [`many`] works in, kept from call to call.
pub(super) struct Room {
    strip: Strip,
    sums: Vec<Sums>,
}

impl Room {
    /// For a machine that has what it takes.
    pub(super) fn new(_: Avx2) -> Room {
        // SAFETY: zeros are floats.
        Room { strip: unsafe { core::mem::zeroed() }, sums: Vec::new() }
    }
}

/// The products of [`ROWS`] rows of `cols` values with the tokens `x` `[tokens, width]`, zeros behind `cols`: `emit(token, products)`.
///
/// # Panics
/// When a slice does not have its size.
#[inline(always)]
pub(super) fn many<T: Stored>(
    _: Avx2,
    rows: &[T],
    (cols, width): (usize, usize),
    x: &[f32],
    room: &mut Room,
    emit: impl FnMut(usize, [f32; ROWS]),
) {
    assert!(
        rows.len() == ROWS * cols && cols.next_multiple_of(LANES) <= width && x.len().is_multiple_of(width),
        "rows"
    );
    // SAFETY: the token is proof of the features, and the lengths were checked.
    unsafe { strips(rows, (cols, width), x, room, emit) }
}

/// # Safety
/// As [`many`] has checked.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strips<T: Stored>(
    rows: &[T],
    (cols, width): (usize, usize),
    x: &[f32],
    Room { strip, sums: room }: &mut Room,
    mut emit: impl FnMut(usize, [f32; ROWS]),
) {
    // What is not written before it is read: the first strip starts from zero.
    room.resize(x.len() / width, [_mm256_setzero_ps(); ROWS]);
    for from in (0..cols).step_by(STRIP) {
        let len = STRIP.min(cols - from);
        for (r, strip) in strip.iter_mut().enumerate() {
            let row = &rows[r * cols + from..][..len];
            let (whole, last) = row.as_chunks::<LANES>();
            for (k, (to, values)) in strip.iter_mut().zip(whole).enumerate() {
                if (k * LANES).is_multiple_of(64 / size_of::<T>()) {
                    prefetch_run(values.as_ptr().cast());
                }
                // SAFETY: eight values.
                *to = unsafe { T::load(values.as_ptr()) };
            }
            if !last.is_empty() {
                let mut values = [T::default(); LANES];
                values[..last.len()].copy_from_slice(last);
                // SAFETY: eight values.
                strip[whole.len()] = unsafe { T::load(values.as_ptr()) };
            }
        }
        let part = Part { strip, vectors: len.div_ceil(LANES), first: from == 0, last: from + len == cols };
        let mut token = 0;
        for (sums, x) in room.chunks_mut(TOKENS).zip(x.chunks(TOKENS * width)) {
            let mut emit = |t: usize, sums: [f32; ROWS]| emit(token + t, sums);
            // SAFETY: `x` has a row for each of the sums, with the part's vectors from column `from` on.
            unsafe {
                match sums {
                    [a, b, c] => add(&part, [a, b, c], x.as_ptr().add(from), width, &mut emit),
                    [a, b] => add(&part, [a, b], x.as_ptr().add(from), width, &mut emit),
                    [a] => add(&part, [a], x.as_ptr().add(from), width, &mut emit),
                    _ => unreachable!("chunks of TOKENS"),
                }
            }
            token += TOKENS;
        }
    }
}

/// A strip, and its place among those of its rows.
struct Part<'a> {
    strip: &'a Strip,
    /// Vectors of it that are in use
    vectors: usize,
    first: bool,
    last: bool,
}

/// Adds a strip's products to the sums of `N` tokens, and emits them if the strip is the last.
///
/// # Safety
/// `x` and the `N - 1` rows that follow at distances of `width` have as many vectors as the part.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add<const N: usize>(
    part: &Part,
    sums: [&mut Sums; N],
    x: *const f32,
    width: usize,
    emit: &mut impl FnMut(usize, [f32; ROWS]),
) {
    let mut acc = [[_mm256_setzero_ps(); ROWS]; N];
    if !part.first {
        for t in 0..N {
            acc[t] = *sums[t];
        }
    }
    for k in 0..part.vectors.min(STRIP / LANES) {
        // Three of these, one vector of weights and twelve sums are the sixteen registers.
        let mut values = [_mm256_setzero_ps(); N];
        for t in 0..N {
            // SAFETY: as the caller vouches.
            values[t] = unsafe { _mm256_loadu_ps(x.add(t * width + k * LANES)) };
        }
        for r in 0..ROWS {
            for t in 0..N {
                acc[t][r] = _mm256_fmadd_ps(part.strip[r][k], values[t], acc[t][r]);
            }
        }
    }
    for t in 0..N {
        if part.last {
            emit(t, reduce(acc[t]));
        } else {
            *sums[t] = acc[t];
        }
    }
}

/// The sum of the lanes of each, in the order of pulp's `reduce_sum_f32s`: halves, then halves of these, then the last two.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce([a, b, c, d]: Sums) -> [f32; ROWS] {
    let half = |x| _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let quarters = |a, b| _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    let (ab, cd) = (quarters(half(a), half(b)), quarters(half(c), half(d)));
    let sums = _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ab, cd), _mm_shuffle_ps::<0b11_01_11_01>(ab, cd));
    bytemuck::cast(sums)
}
