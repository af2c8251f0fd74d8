//! NEON: with `sdot` where the machine has it, else with `smlal` into int16.
//!
//! `sdot` adds four i8 × i8 products to each of 4 int32 lanes, exactly, as `vpdpbusd` does on x86: a quarter of a line is
//! 4 rows × 4 columns. 6 tokens × 16 rows fill 24 accumulators; four quarters and an activation word make 29 of the 32
//! registers. Without it, a product takes two int16 accumulators, the low and the high half of the register.

use core::arch::aarch64::*;
use core::arch::asm;

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line};
use crate::simd::Isa;

/// Products that an int16 lane can add up: the codes of unread bytes may be 3, and 85 times 3 · -128 fits.
pub(super) const FOLD: usize = 85;
/// Registers of a line, 4 rows each.
pub(super) const QUARTERS: usize = 4;

/// Proof that the machine has NEON.
#[derive(Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Neon> {
        (Isa::machine() >= Isa::Neon).then_some(Neon(()))
    }
}

/// Proof that the machine has NEON with the dot product instructions.
#[derive(Clone, Copy)]
pub struct NeonDot(());

impl NeonDot {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<NeonDot> {
        (Isa::machine() >= Isa::NeonDot).then_some(NeonDot(()))
    }
}

/// A [`Kernel`] from a function that takes the number of tokens as a constant.
macro_rules! kernel {
    ($token:ident, $sums:ident) => {
        impl Kernel for $token {
            #[inline(always)]
            fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
                let tokens = kernel::check(panel, q, in_dim);
                // SAFETY: `self` exists only where the features were detected; `check` has just established that the panel has
                // all groups of `in_dim` columns and `q` exactly as many rows as the function chosen reads.
                unsafe {
                    match tokens {
                        1 => $sums::<1>(panel, q, in_dim, block),
                        2 => $sums::<2>(panel, q, in_dim, block),
                        3 => $sums::<3>(panel, q, in_dim, block),
                        4 => $sums::<4>(panel, q, in_dim, block),
                        5 => $sums::<5>(panel, q, in_dim, block),
                        _ => $sums::<6>(panel, q, in_dim, block),
                    }
                }
            }
        }
    };
}

kernel!(Neon, sums);
kernel!(NeonDot, sums_dot);

/// # Safety
/// `panel` has `in_dim.div_ceil(4)` groups, `q` is `[T, in_dim]`.
#[target_feature(enable = "neon")]
unsafe fn sums<const T: usize>(panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
    let groups = in_dim.div_ceil(DEPTH);
    for j in 0..LINES {
        for quarter in 0..QUARTERS {
            let mut acc = [vdupq_n_s32(0); T];
            for start in (0..groups).step_by(FOLD) {
                let mut pairs = [[vdupq_n_s16(0); 2]; T];
                for g in start..groups.min(start + FOLD) {
                    let codes = load(&panel[g * LINES + j], quarter);
                    for t in 0..T {
                        // SAFETY: group g and row t < T are within `q`, `[T, in_dim]`.
                        let word = unsafe { group_word(q, t, in_dim, g) };
                        pairs[t] = multiply_add(pairs[t], codes, word);
                    }
                }
                for t in 0..T {
                    acc[t] = vaddq_s32(acc[t], add_columns(pairs[t]));
                }
            }
            for t in 0..T {
                store(&mut block[t][16 * j + 4 * quarter..][..4], acc[t]);
            }
        }
    }
}

/// # Safety
/// `panel` has `in_dim.div_ceil(4)` groups, `q` is `[T, in_dim]`.
#[target_feature(enable = "neon,dotprod")]
unsafe fn sums_dot<const T: usize>(panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
    for j in 0..LINES {
        let mut acc = [[vdupq_n_s32(0); QUARTERS]; T];
        for g in 0..in_dim.div_ceil(DEPTH) {
            let line = &panel[g * LINES + j];
            let codes: [int8x16_t; QUARTERS] = [load(line, 0), load(line, 1), load(line, 2), load(line, 3)];
            for t in 0..T {
                // SAFETY: group g and row t < T are within `q`, `[T, in_dim]`.
                let word = unsafe { group_word(q, t, in_dim, g) };
                for quarter in 0..QUARTERS {
                    acc[t][quarter] = sdot(acc[t][quarter], codes[quarter], word);
                }
            }
        }
        for t in 0..T {
            for quarter in 0..QUARTERS {
                store(&mut block[t][16 * j + 4 * quarter..][..4], acc[t][quarter]);
            }
        }
    }
}

/// Activations `4 g ..` of row `t`, four times over; those past the row are 0.
///
/// # Safety
/// `q` has more than `t` rows of `in_dim`, each with columns past `4 g`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn group_word(q: &[i8], t: usize, in_dim: usize, g: usize) -> int8x16_t {
    let left = in_dim - g * DEPTH;
    // SAFETY: `left` activations of the row follow.
    let at = unsafe { q.as_ptr().add(t * in_dim + g * DEPTH) };
    if left >= DEPTH {
        // SAFETY: four of them are there, and loads need no alignment.
        return vreinterpretq_s8_s32(unsafe { vld1q_dup_s32(at.cast()) });
    }
    // SAFETY: as above, fewer than four.
    word(&core::array::from_fn(|c| if c < left { unsafe { *at.add(c) } } else { 0 }))
}

/// A quarter of a line, 4 rows × 4 columns.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load(line: &Line, quarter: usize) -> int8x16_t {
    // SAFETY: a line is four quarters of 16 bytes.
    vreinterpretq_s8_u8(unsafe { vld1q_u8(line.0.as_ptr().add(16 * (quarter % QUARTERS))) })
}

/// Four activations, four times over.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn word(q: &[i8; 4]) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(q.map(|q| q as u8))))
}

/// Writes four sums.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store(sums: &mut [i32], values: int32x4_t) {
    let sums: &mut [i32; 4] = sums.try_into().expect("a quarter of a line has 4 rows");
    // SAFETY: `sums` is 4 int32.
    unsafe { vst1q_s32(sums.as_mut_ptr(), values) }
}

/// Adds the 16 products of codes and activations to as many int16 lanes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn multiply_add(pairs: [int16x8_t; 2], codes: int8x16_t, word: int8x16_t) -> [int16x8_t; 2] {
    [vmlal_s8(pairs[0], vget_low_s8(codes), vget_low_s8(word)), vmlal_high_s8(pairs[1], codes, word)]
}

/// The sums over the four columns of each of the 4 rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn add_columns(pairs: [int16x8_t; 2]) -> int32x4_t {
    vpaddq_s32(vpaddlq_s16(pairs[0]), vpaddlq_s16(pairs[1]))
}

/// `acc[r] + Σ codes[r][c] · q[r][c]`: the intrinsic of this instruction is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sdot(mut acc: int32x4_t, codes: int8x16_t, q: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers, by an instruction that the function's features include.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {codes:v}.16b, {q:v}.16b",
            acc = inout(vreg) acc, codes = in(vreg) codes, q = in(vreg) q,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
