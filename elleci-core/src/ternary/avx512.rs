//! AVX-512 BW without VNNI: `maddubs` multiplies u8 × i8 and adds neighbours into int16, which are added up there and
//! folded into int32 before they can overflow.
//!
//! A pair is between -2·3·128 = -768 and 762, so that 42 of them fit an int16: -32256 to 32004.

use core::arch::x86_64::*;

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line};
use crate::simd::Isa;

/// Groups that an int16 lane can add up; see [`super::avx2`].
const FOLD: usize = super::avx2::FOLD;

/// Proof that the machine has AVX-512 F, BW and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Avx512> {
        (Isa::machine() >= Isa::Avx512).then_some(Avx512(()))
    }
}

impl Kernel for Avx512 {
    #[inline(always)]
    fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
        let tokens = kernel::check(panel, q, in_dim);
        for (q, block) in q.chunks(3 * in_dim).zip(block[..tokens].chunks_mut(3)) {
            // SAFETY: `self` exists only where the features were detected; `check` has just established that the panel
            // has all groups of `in_dim` columns, and `q` and `block` are cut into the same numbers of tokens.
            unsafe {
                match block.len() {
                    1 => sums::<1>(panel, q, in_dim, block),
                    2 => sums::<2>(panel, q, in_dim, block),
                    _ => sums::<3>(panel, q, in_dim, block),
                }
            }
        }
    }
}

/// # Safety
/// `panel` has `in_dim.div_ceil(4)` groups, `q` is `[T, in_dim]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn sums<const T: usize>(panel: &[Line], q: &[i8], in_dim: usize, block: &mut [[i32; 64]]) {
    let lines = panel.as_ptr().cast::<__m512i>();
    let groups = in_dim / DEPTH;
    let ones = _mm512_set1_epi16(1);
    let mut acc = [[_mm512_setzero_si512(); LINES]; T];
    for start in (0..groups).step_by(FOLD) {
        let mut pairs = [[_mm512_setzero_si512(); LINES]; T];
        for g in start..groups.min(start + FOLD) {
            for t in 0..T {
                // SAFETY: group g < in_dim / 4 lies whole inside row t < T of `q`.
                let word = unsafe { q.as_ptr().add(t * in_dim + g * DEPTH).cast::<i32>().read_unaligned() };
                for j in 0..LINES {
                    // SAFETY: the panel has more than g groups of LINES lines, each 64 bytes and aligned so.
                    let codes = unsafe { _mm512_load_si512(lines.add(g * LINES + j)) };
                    let products = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(word));
                    pairs[t][j] = _mm512_add_epi16(pairs[t][j], products);
                }
            }
        }
        for t in 0..T {
            for j in 0..LINES {
                acc[t][j] = _mm512_add_epi32(acc[t][j], _mm512_madd_epi16(pairs[t][j], ones));
            }
        }
    }
    for t in 0..T {
        if let Some(word) = kernel::tail_word(&q[t * in_dim..][..in_dim]) {
            for j in 0..LINES {
                // SAFETY: a tail means that the panel has one more group than `groups`.
                let codes = unsafe { _mm512_load_si512(lines.add(groups * LINES + j)) };
                let products = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(word));
                acc[t][j] = _mm512_add_epi32(acc[t][j], _mm512_madd_epi16(products, ones));
            }
        }
        for (j, out) in block[t].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: `out` is 16 int32.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), acc[t][j]) };
        }
    }
}
