//! AVX2: `vpmaddwd` and an addition, with the widened codes of two rows and three tokens at a time, or of four rows and fewer tokens.

use core::arch::x86_64::*;

use super::{Activations, Outputs, ROWS, Tokens, ask_for};
use crate::ternary::int16::avx2::Avx2;

/// Values of a vector.
const LANES: usize = 16;
/// Tokens that meet rows together at most.
const GROUP: usize = 3;

/// All rows of `codes` with all tokens.
pub(super) fn rows(_: Avx2, codes: &[i8], cols: usize, x: &Activations, mut out: Outputs) {
    let whole = codes.len() / cols / ROWS * ROWS;
    let tokens = x.check(cols);
    let groups = tokens.div_ceil(GROUP);
    for row in (0..whole).step_by(ROWS) {
        let codes = &codes[row * cols..(row + ROWS) * cols];
        for group in 0..groups {
            let (from, to) = (group * tokens / groups, (group + 1) * tokens / groups);
            let x = x.tokens(from);
            // SAFETY: the token is proof of the feature; `codes` is ROWS rows, and the group's tokens are there.
            unsafe {
                match to - from {
                    1 => block::<1>(codes, cols, x, |t, sums| out.put(row, from + t, sums)),
                    2 => block::<2>(codes, cols, x, |t, sums| out.put(row, from + t, sums)),
                    _ => block_of_pairs::<GROUP>(codes, cols, x, |t, sums| out.put(row, from + t, sums)),
                }
            }
        }
    }
    for row in whole..codes.len() / cols {
        let codes = &codes[row * cols..(row + 1) * cols];
        for t in 0..tokens {
            let x = x.tokens(t);
            // SAFETY: as above, of one row and token.
            let [[sums]] = unsafe { sums::<1, 1>(codes.as_ptr(), cols, x) };
            // SAFETY: as above.
            let [sum, ..] = unsafe { reduce([sums; ROWS]) };
            out.put(row, t, [sum]);
        }
    }
}

/// [`ROWS`] rows with one token or two.
///
/// # Safety
/// `codes` is `[ROWS, cols]`, and there are `N` tokens of whole vectors and at least as many columns.
#[target_feature(enable = "avx2")]
unsafe fn block<const N: usize>(codes: &[i8], cols: usize, x: Tokens, mut emit: impl FnMut(usize, [i32; ROWS])) {
    // SAFETY: as the caller vouches.
    let acc = unsafe { sums::<ROWS, N>(codes.as_ptr(), cols, x) };
    for (t, sums) in acc.into_iter().enumerate() {
        emit(t, reduce(sums));
    }
}

/// [`ROWS`] rows, two at a time, with three tokens. With four LLVM spills, which takes a third of the speed.
///
/// # Safety
/// As [`block`].
#[target_feature(enable = "avx2")]
unsafe fn block_of_pairs<const N: usize>(
    codes: &[i8],
    cols: usize,
    x: Tokens,
    mut emit: impl FnMut(usize, [i32; ROWS]),
) {
    const { assert!(ROWS == 4) };
    // SAFETY: as the caller vouches.
    let lower = unsafe { pair::<N>(codes.as_ptr(), cols, x) };
    // SAFETY: likewise: rows 2 and 3.
    let upper = unsafe { pair::<N>(codes.as_ptr().add(2 * cols), cols, x) };
    for (t, ([a, b], [c, d])) in lower.into_iter().zip(upper).enumerate() {
        emit(t, reduce([a, b, c, d]));
    }
}

/// [`sums`] of two rows. Not inlined: LLVM would keep the sums of both pairs in registers, and spill inside of the loops.
///
/// # Safety
/// As [`sums`].
#[inline(never)]
#[target_feature(enable = "avx2")]
unsafe fn pair<const N: usize>(codes: *const i8, cols: usize, x: Tokens) -> [[__m256i; 2]; N] {
    // SAFETY: as the caller vouches.
    unsafe { sums::<2, N>(codes, cols, x) }
}

/// The products of `R` rows with `N` tokens, `[N][R]`, before their lanes are added up.
///
/// # Safety
/// `codes` points to `[R, cols]`, and there are `N` tokens of whole vectors and at least as many columns.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sums<const R: usize, const N: usize>(codes: *const i8, cols: usize, x: Tokens) -> [[__m256i; R]; N] {
    let mut acc = [[_mm256_setzero_si256(); R]; N];
    let whole = cols / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let row = |r: usize| codes.wrapping_add(r * cols + at);
        if at % 64 == 0 {
            (0..R).for_each(|r| ask_for(codes.wrapping_add(R * at + 64 * r)));
        }
        let mut weights = [_mm256_setzero_si256(); R];
        for r in 0..R {
            // SAFETY: columns `at .. at + LANES` are in all rows.
            weights[r] = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(row(r).cast()) });
        }
        // SAFETY: and in all tokens.
        unsafe { add(&mut acc, weights, x, at) };
    }
    if whole < cols {
        let mut weights = [_mm256_setzero_si256(); R];
        for r in 0..R {
            let mut last = [0i8; LANES];
            // SAFETY: `cols - whole` codes are left of row r, and fewer than LANES.
            unsafe { last.as_mut_ptr().copy_from_nonoverlapping(codes.add(r * cols + whole), cols - whole) };
            // SAFETY: an array of sixteen.
            weights[r] = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(last.as_ptr().cast()) });
        }
        // SAFETY: tokens have whole vectors.
        unsafe { add(&mut acc, weights, x, whole) };
    }
    acc
}

/// Adds the products of the columns `at .. at + LANES`.
///
/// # Safety
/// They are in all tokens.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add<const R: usize, const N: usize>(
    acc: &mut [[__m256i; R]; N],
    weights: [__m256i; R],
    x: Tokens,
    at: usize,
) {
    for t in 0..N {
        // SAFETY: as the caller vouches.
        let x = unsafe { _mm256_loadu_si256(x.codes.add(t * x.width + at).cast()) };
        for r in 0..R {
            acc[t][r] = _mm256_add_epi32(acc[t][r], _mm256_madd_epi16(weights[r], x));
        }
    }
}

/// The sum of the lanes of each.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce([a, b, c, d]: [__m256i; ROWS]) -> [i32; ROWS] {
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    bytemuck::cast(_mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums)))
}
