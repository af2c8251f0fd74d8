//! One token with int8 or binary16 rows on AVX-512: values go from memory through a conversion into the multiply-add, without
//! standing in memory as float32 in between. The additions are those of [`crate::ops::lanes::dots`], in the same order.

use core::arch::x86_64::*;

use pulp::Simd;
use pulp::x86::V4;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_run};

/// Values of a vector.
const LANES: usize = 16;

/// Values of a row as they are stored.
pub(super) trait Stored: Copy {
    /// The 16 values of which `mask` has bits, the others 0.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL are there, and the values of the mask can be read.
    unsafe fn load(at: *const Self, mask: u16) -> __m512;
}

impl Stored for i8 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(at: *const i8, mask: u16) -> __m512 {
        // SAFETY: the caller vouches for the values of the mask; others are not read.
        let codes = unsafe { _mm_maskz_loadu_epi8(mask, at) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
    }
}

impl Stored for u16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(at: *const u16, mask: u16) -> __m512 {
        // SAFETY: as above.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, at.cast()) };
        _mm512_cvtph_ps(bits)
    }
}

/// The vectors of the machine, where it has AVX-512 and is allowed to use it.
pub(super) fn detect() -> Option<V4> {
    if Isa::detect() >= Isa::Avx512 { V4::try_new() } else { None }
}

/// The products of [`ROWS`] rows of `x.len()` values with one token.
///
/// # Panics
/// When `rows` is not as long.
#[inline(always)]
pub(super) fn dots<T: Stored>(simd: V4, rows: &[T], x: &[f32]) -> [f32; ROWS] {
    assert_eq!(rows.len(), ROWS * x.len(), "rows");
    // SAFETY: `simd` is proof of the features, and the lengths were checked.
    unsafe { sums(simd, rows, x) }
}

/// # Safety
/// AVX-512 F, BW and VL are there, and `rows` has [`ROWS`] times `x.len()` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn sums<T: Stored>(simd: V4, rows: &[T], x: &[f32]) -> [f32; ROWS] {
    let cols = x.len();
    let mut acc = [_mm512_setzero_ps(); ROWS];
    // SAFETY: `add` is called with the columns of every mask in `x` and in all rows.
    let mut add = |at: usize, mask: u16| unsafe {
        let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at));
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = _mm512_fmadd_ps(T::load(rows.as_ptr().add(r * cols + at), mask), x, *acc);
        }
    };
    let line = 64 / size_of::<T>();
    let whole = cols / line * line;
    for first in (0..whole).step_by(line) {
        for r in 0..ROWS {
            prefetch_run(rows.as_ptr().wrapping_add(r * cols + first).cast());
        }
        for at in (first..first + line).step_by(LANES) {
            add(at, u16::MAX);
        }
    }
    for at in (whole..cols).step_by(LANES) {
        add(at, u16::MAX >> LANES.saturating_sub(cols - at));
    }
    // `map` would leave the features of this function behind.
    let mut sums = [0.0; ROWS];
    for (to, sum) in sums.iter_mut().zip(acc) {
        *to = simd.reduce_sum_f32s(bytemuck::cast(sum));
    }
    sums
}
