//! AVX-512 VNNI: `vpdpbusd` adds four u8 × i8 products to each of 16 int32 lanes, without intermediate saturation.
//!
//! 6 tokens × 64 rows fill 24 accumulators; four panel lines and one broadcast activation word make 29 of the 32
//! registers, and each line loaded is used six times.

use core::arch::x86_64::*;

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line};
use crate::simd::Isa;

/// Proof that the machine has AVX-512 F, BW, VL and VNNI.
#[derive(Clone, Copy)]
pub struct Vnni(());

impl Vnni {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Vnni> {
        (Isa::machine() >= Isa::Avx512Vnni).then_some(Vnni(()))
    }
}

impl Kernel for Vnni {
    #[inline(always)]
    fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
        let tokens = kernel::check(panel, q, in_dim);
        // SAFETY: `self` exists only where the features were detected; `check` has just established that the panel has
        // all groups of `in_dim` columns and `q` exactly as many rows as the function chosen reads.
        unsafe {
            match tokens {
                1 => sums::<1>(panel, q, in_dim, block),
                2 => sums::<2>(panel, q, in_dim, block),
                3 => sums::<3>(panel, q, in_dim, block),
                4 => sums::<4>(panel, q, in_dim, block),
                5 => sums::<5>(panel, q, in_dim, block),
                _ => sums::<6>(panel, q, in_dim, block),
            }
        }
    }
}

/// # Safety
/// `panel` has `in_dim.div_ceil(4)` groups, `q` is `[T, in_dim]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums<const T: usize>(panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
    let mut acc = [[_mm512_setzero_si512(); LINES]; T];
    let lines = panel.as_ptr().cast::<__m512i>();
    let groups = in_dim / DEPTH;
    for g in 0..groups {
        for t in 0..T {
            // SAFETY: group g < in_dim / 4 lies whole inside row t < T of `q`.
            let word = unsafe { q.as_ptr().add(t * in_dim + g * DEPTH).cast::<i32>().read_unaligned() };
            for j in 0..LINES {
                // SAFETY: the panel has more than g groups of LINES lines, each 64 bytes and aligned so.
                let codes = unsafe { _mm512_load_si512(lines.add(g * LINES + j)) };
                acc[t][j] = _mm512_dpbusd_epi32(acc[t][j], codes, _mm512_set1_epi32(word));
            }
        }
    }
    for t in 0..T {
        if let Some(word) = kernel::tail_word(&q[t * in_dim..][..in_dim]) {
            for j in 0..LINES {
                // SAFETY: a tail means that the panel has one more group than `groups`.
                let codes = unsafe { _mm512_load_si512(lines.add(groups * LINES + j)) };
                acc[t][j] = _mm512_dpbusd_epi32(acc[t][j], codes, _mm512_set1_epi32(word));
            }
        }
        for (j, out) in block[t].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: `out` is 16 int32.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), acc[t][j]) };
        }
    }
}
