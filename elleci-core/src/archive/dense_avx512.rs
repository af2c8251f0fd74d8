//! One token with int8 or binary16 rows on AVX-512: values go from memory through a conversion into the multiply-add, without
//! standing in memory as float32 in between. The additions are those of [`crate::ops::lanes::dots`], in the same order.

use core::arch::x86_64::*;

use pulp::Simd;
use pulp::x86::V4;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_line};

/// Bytes that are asked for before they are needed.
const AHEAD: usize = 8192;

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
    let mut at = 0;
    while at < cols {
        let mask = if cols - at < 16 { (1u16 << (cols - at)) - 1 } else { u16::MAX };
        // SAFETY: the mask has a bit for every column from `at` to the end, at most 16.
        let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)) };
        for r in 0..ROWS {
            // SAFETY: row r begins at `r * cols` and has the columns of the mask.
            let values = unsafe {
                let row = rows.as_ptr().add(r * cols + at);
                prefetch_line(row.cast::<u8>().wrapping_add(AHEAD));
                T::load(row, mask)
            };
            acc[r] = _mm512_fmadd_ps(values, x, acc[r]);
        }
        at += 16;
    }
    acc.map(#[inline(always)] |sum| simd.reduce_sum_f32s(bytemuck::cast(sum)))
}
