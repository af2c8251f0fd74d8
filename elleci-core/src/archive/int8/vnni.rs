//! AVX-512 VNNI: `vpdpwssd` with the widened codes of four rows. Up to six tokens meet them together, and share the widening: 24 chains
//! of additions in the 32 registers.

use core::arch::x86_64::*;

use super::{Activations, Outputs, ROWS, Tokens, ask_for};
use crate::ternary::int16::vnni::{Vnni, dpwssd};

/// Values of a vector.
const LANES: usize = 32;
/// Tokens that meet rows together at most.
const GROUP: usize = 6;

/// All rows of `codes` with all tokens.
pub(super) fn rows(_: Vnni, codes: &[i8], cols: usize, x: &Activations, mut out: Outputs) {
    let tokens = x.check(cols);
    // All rows pass a group before the next: its activations, which have more bytes than the weights that they meet, stay near.
    let groups = tokens.div_ceil(GROUP);
    for group in 0..groups {
        let (from, to) = (group * tokens / groups, (group + 1) * tokens / groups);
        // SAFETY: the token is proof of the features; the size of `x` was checked.
        unsafe {
            match to - from {
                1 => blocks::<1>(codes, cols, x, from, &mut out),
                2 => blocks::<2>(codes, cols, x, from, &mut out),
                3 => blocks::<3>(codes, cols, x, from, &mut out),
                4 => blocks::<4>(codes, cols, x, from, &mut out),
                5 => blocks::<5>(codes, cols, x, from, &mut out),
                _ => blocks::<GROUP>(codes, cols, x, from, &mut out),
            }
        }
    }
}

/// All rows with the `N` tokens from `first` on.
///
/// # Safety
/// The features are there, and `x` has as many tokens of whole vectors and at least `cols`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn blocks<const N: usize>(codes: &[i8], cols: usize, x: &Activations, first: usize, out: &mut Outputs) {
    let x = x.tokens(first);
    let mut row = 0;
    let mut blocks = codes.chunks_exact(ROWS * cols);
    for codes in blocks.by_ref() {
        // SAFETY: ROWS rows, and as the caller vouches.
        let acc = unsafe { sums::<ROWS, N>(codes.as_ptr(), cols, x) };
        // All of them before a call, which would send vectors to the stack.
        let mut sums = [[0; ROWS]; N];
        for t in 0..N {
            sums[t] = reduce(acc[t]);
        }
        for (t, sums) in sums.into_iter().enumerate() {
            out.put(row, first + t, sums);
        }
        row += ROWS;
    }
    for codes in blocks.remainder().chunks_exact(cols) {
        // SAFETY: one row, and as the caller vouches.
        let acc = unsafe { sums::<1, N>(codes.as_ptr(), cols, x) };
        for (t, [sum]) in acc.into_iter().enumerate() {
            out.put(row, first + t, [_mm512_reduce_add_epi32(sum)]);
        }
        row += 1;
    }
}

/// The products of `R` rows with `N` tokens, `[N][R]`, before their lanes are added up.
///
/// # Safety
/// The features are there, `codes` points to `[R, cols]`, and `x` is `N` tokens of whole vectors and at least `cols`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums<const R: usize, const N: usize>(codes: *const i8, cols: usize, x: Tokens) -> [[__m512i; R]; N] {
    let mut acc = [[_mm512_setzero_si512(); R]; N];
    let whole = cols / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        if at % 64 == 0 {
            (0..R).for_each(|r| ask_for(codes.wrapping_add(R * at + 64 * r)));
        }
        // SAFETY: columns `at .. at + LANES` are in all rows and tokens.
        unsafe { add(&mut acc, codes, cols, x, at, u32::MAX) };
    }
    if whole < cols {
        // SAFETY: the mask has the columns that are left, and tokens have whole vectors.
        unsafe { add(&mut acc, codes, cols, x, whole, u32::MAX >> (whole + LANES - cols)) };
    }
    acc
}

/// Adds the products of those of the columns `at .. at + LANES` that have bits in `mask`.
///
/// # Safety
/// As [`sums`], and the columns of the mask are in all rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add<const R: usize, const N: usize>(
    acc: &mut [[__m512i; R]; N],
    codes: *const i8,
    cols: usize,
    x: Tokens,
    at: usize,
    mask: u32,
) {
    let mut weights = [_mm512_setzero_si512(); R];
    for r in 0..R {
        // SAFETY: as the caller vouches.
        weights[r] = _mm512_cvtepi8_epi16(unsafe { _mm256_maskz_loadu_epi8(mask, codes.add(r * cols + at)) });
    }
    for t in 0..N {
        // SAFETY: as the caller vouches.
        let x = unsafe { _mm512_loadu_si512(x.codes.add(t * x.width + at).cast()) };
        for r in 0..R {
            acc[t][r] = dpwssd(acc[t][r], weights[r], x);
        }
    }
}

/// The sum of the lanes of each.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce([a, b, c, d]: [__m512i; ROWS]) -> [i32; ROWS] {
    // The halves of two vectors stand side by side, then the quarters of all four.
    let halves = |a, b| {
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b))
    };
    let (ab, cd) = (halves(a, b), halves(c, d));
    let quarters =
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd));
    let pairs = _mm512_add_epi32(quarters, _mm512_shuffle_epi32::<0b11_10_11_10>(quarters));
    let sums = _mm512_add_epi32(pairs, _mm512_shuffle_epi32::<0b01_01_01_01>(pairs));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    bytemuck::cast(_mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, sums)))
}
