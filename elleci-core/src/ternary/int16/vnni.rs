//! AVX-512 VNNI: `vpdpwssd` multiplies a word with 16 others and adds the pairs to 16 int32 lanes.
//!
//! The register tile is that of the float product (`ops::avx512`): 6 rows × 64 columns in 24 accumulators, four
//! registers of the panel, one broadcast word. The same number of instructions does twice the multiply-adds.

use core::arch::asm;
use core::arch::x86_64::*;

use super::kernel::{self, Ahead, Block, Kernel, Line, WIDTH, Words};
use crate::simd::Isa;

/// Registers of a line.
const H: usize = WIDTH / 16;
/// Lines of the panel to one cache line asked for ahead.
const STEP: usize = 8;

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
    fn block(self, a: Words, panel: &[Line], ahead: Ahead, block: &mut Block) {
        kernel::check(a, panel);
        // SAFETY: `self` exists only where the features were detected; `check` has just established that `a` has as
        // many rows as the function chosen reads, each of as many words as the panel has lines.
        unsafe {
            match a.rows {
                1 => sums::<1>(a, panel, ahead, block),
                2 => sums::<2>(a, panel, ahead, block),
                3 => sums::<3>(a, panel, ahead, block),
                4 => sums::<4>(a, panel, ahead, block),
                5 => sums::<5>(a, panel, ahead, block),
                _ => sums::<6>(a, panel, ahead, block),
            }
        }
    }
}

/// # Safety
/// `a` has M rows of `panel.len()` words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums<const M: usize>(a: Words, panel: &[Line], ahead: Ahead, block: &mut Block) {
    let mut acc = [[_mm512_setzero_si512(); H]; M];
    let mut at = a.data.as_ptr();
    let row_lines = ahead.depth.div_ceil(16).max(1);
    for (part, lines) in panel.chunks(STEP).enumerate() {
        let (row, line) = ((ahead.given + part) / row_lines, (ahead.given + part) % row_lines);
        fetch::<_MM_HINT_T1>(ahead.words.wrapping_add(row * ahead.pitch + line * 16).cast());
        let (output, pitch) = ahead.output;
        fetch::<_MM_HINT_T0>(output.wrapping_add(part / H % M * pitch + part % H * 16).cast());
        for line in lines {
            let mut columns = [_mm512_setzero_si512(); H];
            for h in 0..H {
                // SAFETY: a line is four aligned runs of 16 words.
                columns[h] = unsafe { _mm512_load_si512(line.0.as_ptr().add(16 * h).cast()) };
            }
            for r in 0..M {
                // SAFETY: word (r, k) of `a`; `at` has moved by one word for every line.
                let word = _mm512_set1_epi32(unsafe { *at.add(r * a.pitch) });
                for h in 0..H {
                    acc[r][h] = dpwssd(acc[r][h], word, columns[h]);
                }
            }
            at = at.wrapping_add(1);
        }
    }
    for r in 0..M {
        for (h, out) in block[r].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: `out` is 16 int32.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), acc[r][h]) };
        }
    }
}

/// `vpdpwssd`. Not the intrinsic: LLVM takes that for slow and makes two instructions of it, `vpmaddwd` and `vpaddd`, in
/// 22 of 24 places here, which halves the rate.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) fn dpwssd(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction is one of the features, and touches these registers only.
    unsafe {
        asm!("vpdpwssd {sums}, {a}, {b}", sums = inout(zmm_reg) sums, a = in(zmm_reg) a, b = in(zmm_reg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Asks for the cache line at `at`, which may be any address.
#[inline(always)]
fn fetch<const HINT: i32>(at: *const i8) {
    // SAFETY: a prefetch reads nothing and never faults; SSE is part of x86-64.
    unsafe { _mm_prefetch::<HINT>(at) };
}
