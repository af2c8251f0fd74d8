//! NEON: `smlal` adds the products of 4 int16 to as many int32; 6 rows × 8 columns at a time in 24 accumulators.

use core::arch::aarch64::*;

use super::super::neon::store;
use super::kernel::{self, Ahead, Block, Kernel, Line, WIDTH, Words};
use crate::simd::Isa;

/// Columns of one go.
const COLUMNS: usize = 8;

/// Proof that the machine has NEON.
#[derive(Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Neon> {
        (Isa::machine() >= Isa::Neon).then_some(Neon(()))
    }
}

impl Kernel for Neon {
    #[inline(always)]
    fn block(self, a: Words, panel: &[Line], _: Ahead, block: &mut Block) {
        kernel::check(a, panel);
        // SAFETY: `self` exists only where the features were detected; `check` has just established that every row of `a` has as
        // many words as the panel has lines.
        unsafe {
            match a.rows {
                1 => sums::<1>(a, panel, block),
                2 => sums::<2>(a, panel, block),
                3 => sums::<3>(a, panel, block),
                4 => sums::<4>(a, panel, block),
                5 => sums::<5>(a, panel, block),
                _ => sums::<6>(a, panel, block),
            }
        }
    }
}

/// # Safety
/// `a` has M rows of `panel.len()` words.
#[target_feature(enable = "neon")]
unsafe fn sums<const M: usize>(a: Words, panel: &[Line], block: &mut Block) {
    for j in (0..WIDTH).step_by(COLUMNS) {
        let mut acc = [[[vdupq_n_s32(0); 2]; 2]; M];
        for (k, line) in panel.iter().enumerate() {
            // SAFETY: COLUMNS words of the line from word j on, as pairs of int16.
            let columns = unsafe {
                let at = line.0.as_ptr().add(j).cast::<i16>();
                [vld1q_s16(at), vld1q_s16(at.add(COLUMNS))]
            };
            for r in 0..M {
                // SAFETY: word (r, k).
                let word = vreinterpretq_s16_s32(vdupq_n_s32(unsafe { *a.data.get_unchecked(r * a.pitch + k) }));
                for h in 0..2 {
                    let [low, high] = &mut acc[r][h];
                    *low = vmlal_s16(*low, vget_low_s16(word), vget_low_s16(columns[h]));
                    *high = vmlal_high_s16(*high, word, columns[h]);
                }
            }
        }
        for r in 0..M {
            for h in 0..2 {
                // A lane has one half of a pair: neighbours add up to the sum of a column.
                store(&mut block[r][j + 4 * h..][..4], vpaddq_s32(acc[r][h][0], acc[r][h][1]));
            }
        }
    }
}
