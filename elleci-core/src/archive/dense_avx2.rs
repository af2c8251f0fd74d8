//! One token with int8 or binary16 rows on AVX2: as [`super::dense_avx512`] with vectors of half the width, and without masks: a
//! row's last values are copied to where zeros follow them.

use core::arch::x86_64::*;

use pulp::Simd;
use pulp::x86::V3;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_run};

/// Values of a vector.
const LANES: usize = 8;

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
