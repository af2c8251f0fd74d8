//! AVX2: as [`super::avx512`], at half the width and with half the registers.
//!
//! 6 tokens × 16 rows: twelve int16 accumulators, two half lines of codes, one activation word. The int32 sums wait in
//! the output block while a run of [`FOLD`] groups is added up.

use core::arch::x86_64::*;

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line, TOKENS};
use crate::simd::Isa;

/// Groups that an int16 lane can add up: with the code 3, which only damaged bytes of a packed matrix have, a pair is between
/// -768 and 762, and 42 of them fit.
pub(super) const FOLD: usize = 42;

/// Proof that the machine has AVX2.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Avx2> {
        (Isa::machine() >= Isa::Avx2).then_some(Avx2(()))
    }
}

impl Kernel for Avx2 {
    #[inline(always)]
    fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
        let tokens = kernel::check(panel, q, in_dim);
        let block = &mut block[..tokens];
        // SAFETY: `self` exists only where the features were detected; `check` has just established that the panel has all
        // groups of `in_dim` columns and that `q` is `[tokens, in_dim]`.
        unsafe {
            match tokens {
                1 => sums::<1>(panel, q, in_dim, block),
                2 => sums::<2>(panel, q, in_dim, block),
                3 => sums::<3>(panel, q, in_dim, block),
                4 => sums::<4>(panel, q, in_dim, block),
                5 => sums::<5>(panel, q, in_dim, block),
                _ => sums::<TOKENS>(panel, q, in_dim, block),
            }
        }
    }
}

/// # Safety
/// `panel` has `in_dim.div_ceil(4)` groups, `q` is `[T, in_dim]`.
#[target_feature(enable = "avx2")]
unsafe fn sums<const T: usize>(panel: &[Line], q: &[i8], in_dim: usize, block: &mut [[i32; 64]]) {
    let whole = in_dim / DEPTH;
    let ones = _mm256_set1_epi16(1);
    for j in 0..LINES {
        let mut acc = [[_mm256_setzero_si256(); 2]; T];
        for start in (0..whole).step_by(FOLD) {
            let mut pairs = [[_mm256_setzero_si256(); 2]; T];
            for g in start..whole.min(start + FOLD) {
                // SAFETY: the panel has more than g groups of LINES lines.
                let codes = unsafe { halves(panel.as_ptr().add(g * LINES + j)) };
                for t in 0..T {
                    // SAFETY: group g < in_dim / 4 lies whole inside row t < T of `q`.
                    let word = unsafe { q.as_ptr().add(t * in_dim + g * DEPTH).cast::<i32>().read_unaligned() };
                    for h in 0..2 {
                        let products = _mm256_maddubs_epi16(codes[h], _mm256_set1_epi32(word));
                        pairs[t][h] = _mm256_add_epi16(pairs[t][h], products);
                    }
                }
            }
            for t in 0..T {
                for h in 0..2 {
                    acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(pairs[t][h], ones));
                }
            }
        }
        for t in 0..T {
            let tail = kernel::tail_word(&q[t * in_dim..][..in_dim]);
            for h in 0..2 {
                if let Some(word) = tail {
                    // SAFETY: a tail means that the panel has one more group than `whole`.
                    let codes = unsafe { halves(panel.as_ptr().add(whole * LINES + j)) };
                    let products = _mm256_maddubs_epi16(codes[h], _mm256_set1_epi32(word));
                    acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(products, ones));
                }
                let out = &mut block[t][j * 16 + h * 8..][..8];
                // SAFETY: `out` is 8 int32.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), acc[t][h]) };
            }
        }
    }
}

/// # Safety
/// `line` points to a line.
#[target_feature(enable = "avx2")]
unsafe fn halves(line: *const Line) -> [__m256i; 2] {
    // SAFETY: a line is two aligned runs of 32 bytes.
    unsafe { [_mm256_load_si256(line.cast()), _mm256_load_si256(line.cast::<__m256i>().add(1))] }
}
