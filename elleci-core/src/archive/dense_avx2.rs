//! Products with binary16 rows on AVX2. With a few tokens, weights become floats as they are multiplied. With
//! more, rows become floats once for all tokens, a strip of columns at a time that stays in the first cache. Both add the same numbers
//! in the same order.

use core::arch::x86_64::*;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_run};

/// Values of a vector.
const LANES: usize = 8;
/// Tokens that meet weights as these become floats, which is as fast as strips with twice as many.
const FEW: usize = 2 * GROUP;
/// How many of them at a time.
const GROUP: usize = 4;
/// Columns of a strip.
const STRIP: usize = 256;
/// Tokens that meet a strip together: with [`ROWS`] rows, twelve chains of additions.
const TOKENS: usize = 3;

/// Proof that the machine has AVX2, FMA and F16C, and is allowed to use them.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// A token, where the machine has what it takes: every one with AVX2 that is known has F16C.
    pub(super) fn detect() -> Option<Avx2> {
        let there = Isa::detect() >= Isa::Avx2 && std::is_x86_feature_detected!("f16c");
        there.then_some(Avx2(()))
    }
}

/// Eight values of a row.
///
/// # Safety
/// AVX2 and F16C are there, and eight values can be read.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load(at: *const u16) -> __m256 {
    // SAFETY: sixteen bytes, as the caller vouches.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
}

/// [`ROWS`] rows with one token or two.
///
/// # Safety
/// `rows` is `[ROWS, cols]`, `x` `[N, width]`, and `cols`, rounded up to whole vectors, at most `width`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<const N: usize>(
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    mut emit: impl FnMut(usize, [f32; ROWS]),
) {
    // SAFETY: as the caller vouches.
    let acc = unsafe { sums::<ROWS, N>(rows.as_ptr(), (cols, width), x.as_ptr()) };
    for (t, sums) in acc.into_iter().enumerate() {
        emit(t, reduce(sums));
    }
}

/// [`ROWS`] rows, two at a time, with three or four tokens: with the sums of four LLVM spills.
///
/// # Safety
/// As [`block`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_of_pairs<const N: usize>(
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    mut emit: impl FnMut(usize, [f32; ROWS]),
) {
    const { assert!(ROWS == 4) };
    // SAFETY: as the caller vouches.
    let lower = unsafe { sums::<2, N>(rows.as_ptr(), (cols, width), x.as_ptr()) };
    // SAFETY: likewise: rows 2 and 3.
    let upper = unsafe { sums::<2, N>(rows.as_ptr().add(2 * cols), (cols, width), x.as_ptr()) };
    for (t, ([a, b], [c, d])) in lower.into_iter().zip(upper).enumerate() {
        emit(t, reduce([a, b, c, d]));
    }
}

/// The products of `R` rows with `N` tokens, `[N][R]`, before their lanes are added up: in a lane every eighth column, in their order.
///
/// # Safety
/// `rows` points to `[R, cols]`, `x` to `[N, width]`, and `cols`, rounded up to whole vectors, is at most `width`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<const R: usize, const N: usize>(
    rows: *const u16,
    (cols, width): (usize, usize),
    x: *const f32,
) -> [[__m256; R]; N] {
    let mut acc = [[_mm256_setzero_ps(); R]; N];
    let (whole, line) = (cols / LANES * LANES, 64 / size_of::<u16>());
    for at in (0..whole).step_by(LANES) {
        let row = |r: usize| rows.wrapping_add(r * cols + at);
        if at % line == 0 {
            (0..R).for_each(|r| prefetch_run(row(r).cast()));
        }
        // The fewer of the two are held in registers while the others pass.
        if R <= N {
            let mut weights = [_mm256_setzero_ps(); R];
            for r in 0..R {
                // SAFETY: columns `at .. at + LANES` are in all rows.
                weights[r] = unsafe { load(row(r)) };
            }
            for t in 0..N {
                // SAFETY: and in all tokens.
                let x = unsafe { _mm256_loadu_ps(x.add(t * width + at)) };
                for r in 0..R {
                    acc[t][r] = _mm256_fmadd_ps(weights[r], x, acc[t][r]);
                }
            }
        } else {
            let mut values = [_mm256_setzero_ps(); N];
            for t in 0..N {
                // SAFETY: as above.
                values[t] = unsafe { _mm256_loadu_ps(x.add(t * width + at)) };
            }
            for r in 0..R {
                // SAFETY: as above.
                let weights = unsafe { load(row(r)) };
                for t in 0..N {
                    acc[t][r] = _mm256_fmadd_ps(weights, values[t], acc[t][r]);
                }
            }
        }
    }
    if whole < cols {
        for r in 0..R {
            let mut last = [0u16; LANES];
            // SAFETY: `cols - whole` values are left of row r, and fewer than LANES.
            unsafe { last.as_mut_ptr().copy_from_nonoverlapping(rows.add(r * cols + whole), cols - whole) };
            // SAFETY: an array of eight.
            let weights = unsafe { load(last.as_ptr()) };
            for t in 0..N {
                // SAFETY: a token has whole vectors.
                let x = unsafe { _mm256_loadu_ps(x.add(t * width + whole)) };
                acc[t][r] = _mm256_fmadd_ps(weights, x, acc[t][r]);
            }
        }
    }
    acc
}

/// The sums of one token with [`ROWS`] rows before their lanes are added up.
type Sums = [__m256; ROWS];
/// Columns of [`ROWS`] rows as floats.
type Strip = [[__m256; STRIP / LANES]; ROWS];

/// What products with many tokens work in, kept from call to call.
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
pub(super) fn dots(
    _: Avx2,
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    room: &mut Room,
    mut emit: impl FnMut(usize, [f32; ROWS]),
) {
    assert!(
        rows.len() == ROWS * cols && cols.next_multiple_of(LANES) <= width && x.len().is_multiple_of(width),
        "rows"
    );
    let tokens = x.len() / width;
    if tokens > FEW {
        // SAFETY: the token is proof of the features, and the lengths were checked.
        return unsafe { strips(rows, (cols, width), x, room, emit) };
    }
    let groups = tokens.div_ceil(GROUP);
    for group in 0..groups {
        let (from, to) = (group * tokens / groups, (group + 1) * tokens / groups);
        let x = &x[from * width..to * width];
        let emit = |t: usize, sums: [f32; ROWS]| emit(from + t, sums);
        // SAFETY: as above.
        unsafe {
            match to - from {
                1 => block::<1>(rows, (cols, width), x, emit),
                2 => block::<2>(rows, (cols, width), x, emit),
                3 => block_of_pairs::<3>(rows, (cols, width), x, emit),
                _ => block_of_pairs::<GROUP>(rows, (cols, width), x, emit),
            }
        }
    }
}

/// # Safety
/// As [`dots`] has checked.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strips(
    rows: &[u16],
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
                if (k * LANES).is_multiple_of(64 / size_of::<u16>()) {
                    prefetch_run(values.as_ptr().cast());
                }
                // SAFETY: eight values.
                *to = unsafe { load(values.as_ptr()) };
            }
            if !last.is_empty() {
                let mut values = [0u16; LANES];
                values[..last.len()].copy_from_slice(last);
                // SAFETY: eight values.
                strip[whole.len()] = unsafe { load(values.as_ptr()) };
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
