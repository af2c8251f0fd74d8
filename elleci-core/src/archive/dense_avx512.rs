//! Products with binary16 rows on AVX-512: values go from memory through a conversion into the multiply-add, without
//! standing in memory as float32 in between. The conversions are repeated for every group of tokens: where it is whole, six
//! multiply-adds share one. The additions are those of [`crate::ops::lanes::dots`], in the same order.

use core::arch::x86_64::*;

use pulp::x86::V4;

use super::dense::ROWS;
use crate::simd::{Isa, prefetch_run};

/// Values of a vector.
const LANES: usize = 16;
/// Tokens that meet weights together: with [`ROWS`] rows, 24 chains of additions in the 32 registers.
const GROUP: usize = 6;

/// The vectors of the machine, where it has AVX-512 and is allowed to use it.
pub(super) fn detect() -> Option<V4> {
    if Isa::detect() >= Isa::Avx512 { V4::try_new() } else { None }
}

/// The products of rows of `cols` values, a multiple of [`ROWS`] of them, with the tokens `x` `[tokens, width]`:
/// `emit(row, token, products)` for rows `row .. row + ROWS` and as many tokens as there are products, from `token` on.
///
/// # Panics
/// When a slice does not have its size.
#[inline(always)]
pub(super) fn dots(
    _: V4,
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    mut emit: impl FnMut(usize, usize, &[[f32; ROWS]]),
) {
    assert!(rows.len().is_multiple_of(ROWS * cols) && cols <= width && x.len().is_multiple_of(width), "rows");
    let tokens = x.len() / width;
    let groups = tokens.div_ceil(GROUP);
    // All rows pass a group before the next: its values, which have more bytes than the weights that they meet, stay near.
    for group in 0..groups {
        let (from, to) = (group * tokens / groups, (group + 1) * tokens / groups);
        let x = &x[from * width..to * width];
        let emit = |row: usize, sums: &[[f32; ROWS]]| emit(row, from, sums);
        // SAFETY: `V4` is proof of the features, and the lengths were checked.
        unsafe {
            match to - from {
                1 => blocks::<1>(rows, (cols, width), x, emit),
                2 => blocks::<2>(rows, (cols, width), x, emit),
                3 => blocks::<3>(rows, (cols, width), x, emit),
                4 => blocks::<4>(rows, (cols, width), x, emit),
                5 => blocks::<5>(rows, (cols, width), x, emit),
                _ => blocks::<GROUP>(rows, (cols, width), x, emit),
            }
        }
    }
}

/// All rows with `N` tokens.
///
/// # Safety
/// AVX-512 F, BW and VL are there, `x` is `[N, width]`, and `cols` at most `width`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn blocks<const N: usize>(
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    mut emit: impl FnMut(usize, &[[f32; ROWS]]),
) {
    for (b, rows) in rows.chunks_exact(ROWS * cols).enumerate() {
        let mut acc = [[_mm512_setzero_ps(); ROWS]; N];
        let (whole, line) = (cols / LANES * LANES, 64 / size_of::<u16>());
        for at in (0..whole).step_by(LANES) {
            if at % line == 0 {
                for r in 0..ROWS {
                    prefetch_run(rows.as_ptr().wrapping_add(r * cols + at).cast());
                }
            }
            // SAFETY: columns `at .. at + LANES` are in all rows and tokens.
            unsafe { add(&mut acc, rows, (cols, width), x, at, u16::MAX) };
        }
        if whole < cols {
            // SAFETY: the mask has the columns that are left.
            unsafe { add(&mut acc, rows, (cols, width), x, whole, u16::MAX >> (whole + LANES - cols)) };
        }
        // All of them before a call, which would send vectors to the stack.
        let mut sums = [[0.0; ROWS]; N];
        for t in 0..N {
            sums[t] = reduce(acc[t]);
        }
        emit(b * ROWS, &sums);
    }
}

/// Adds the products of those of the columns `at .. at + LANES` that have bits in `mask`.
///
/// # Safety
/// As [`blocks`], and the columns of the mask are in all rows and tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add<const N: usize>(
    acc: &mut [[__m512; ROWS]; N],
    rows: &[u16],
    (cols, width): (usize, usize),
    x: &[f32],
    at: usize,
    mask: u16,
) {
    let mut weights = [_mm512_setzero_ps(); ROWS];
    for r in 0..ROWS {
        // SAFETY: as the caller vouches.
        weights[r] =
            _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, rows.as_ptr().add(r * cols + at).cast()) });
    }
    for t in 0..N {
        // SAFETY: as the caller vouches.
        let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(t * width + at)) };
        for r in 0..ROWS {
            acc[t][r] = _mm512_fmadd_ps(weights[r], x, acc[t][r]);
        }
    }
}

/// The sum of the lanes of each, in the order of pulp's `reduce_sum_f32s`: halves, then halves of these, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce([a, b, c, d]: [__m512; ROWS]) -> [f32; ROWS] {
    // The halves of two vectors stand side by side, then the quarters of all four.
    let halves =
        |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
    let (ab, cd) = (halves(a, b), halves(c, d));
    let quarters =
        _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
    let pairs = _mm512_add_ps(quarters, _mm512_permute_ps::<0b11_10_11_10>(quarters));
    let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0b01_01_01_01>(pairs));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    bytemuck::cast(_mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sums)))
}
