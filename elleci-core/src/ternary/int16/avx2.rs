//! AVX2: `vpmaddwd` and an addition, 6 rows × 16 columns at a time in twelve accumulators.

use core::arch::x86_64::*;

use super::kernel::{self, Ahead, Block, Kernel, Line, ROWS, WIDTH, Words};
use crate::simd::Isa;

/// Columns of one go.
const COLUMNS: usize = 16;

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
    fn block(self, a: Words, panel: &[Line], _: Ahead, block: &mut Block) {
        kernel::check(a, panel);
        let (words, pitch, block) = (a.data, a.pitch, &mut block[..a.rows]);
        // SAFETY: `self` exists only where the features were detected; `check` has just established that every row of `a` has
        // as many words as the panel has lines.
        unsafe {
            match a.rows {
                1 => sums::<1>(words, pitch, panel, block),
                2 => sums::<2>(words, pitch, panel, block),
                3 => sums::<3>(words, pitch, panel, block),
                4 => sums::<4>(words, pitch, panel, block),
                5 => sums::<5>(words, pitch, panel, block),
                _ => sums::<ROWS>(words, pitch, panel, block),
            }
        }
    }
}

/// # Safety
/// `words` has M rows of `panel.len()` words, `pitch` apart; `block` has M rows.
#[target_feature(enable = "avx2")]
unsafe fn sums<const M: usize>(words: &[i32], pitch: usize, panel: &[Line], block: &mut [[i32; WIDTH]]) {
    for j in (0..WIDTH).step_by(COLUMNS) {
        let mut acc = [[_mm256_setzero_si256(); 2]; M];
        for (k, line) in panel.iter().enumerate() {
            // SAFETY: COLUMNS words of the line, which is aligned to 64 bytes.
            let columns = unsafe {
                let at = line.0.as_ptr().add(j).cast::<__m256i>();
                [_mm256_load_si256(at), _mm256_load_si256(at.add(1))]
            };
            for r in 0..M {
                // SAFETY: word (r, k).
                let word = _mm256_set1_epi32(unsafe { *words.get_unchecked(r * pitch + k) });
                for h in 0..2 {
                    acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(word, columns[h]));
                }
            }
        }
        for r in 0..M {
            for h in 0..2 {
                let out = &mut block[r][j + 8 * h..][..8];
                // SAFETY: `out` is 8 int32.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), acc[r][h]) };
            }
        }
    }
}
