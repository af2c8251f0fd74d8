//! One token and a panel of T5, with VBMI and VNNI: what decoding spends its time in.
//!
//! A line takes 13 vector instructions: a shift, four look-ups, three logic operations and five multiply-adds. Two leave a cycle at
//! best, and shifts, look-ups and multiply-adds share three of Zen 4's four units, so that 6.7 cycles are the floor. Each of them waits
//! for the one before: a line is some 30 cycles from its load to its last product, in which others have to be at work, and a core
//! finds these by itself only as far as its queues reach (8.7 cycles a line). So three lines are under way at a time: one is
//! multiplied while the trits of the next are looked up and the one after that is loaded, and what stands side by side needs nothing
//! of each other. The order within a step is the best of some thousand that were timed (7.0 cycles; at random 7.5 to 8). A compiler
//! would sort all that back into the order of one line; hence the assembler.

use core::arch::asm;
use core::arch::x86_64::*;

use super::super::kernel::{Line, ROWS};
use super::LINES;
use super::avx512::{store_sums, tables};
use crate::simd::{LATER, SOON};

/// Sums of 16 rows: of t0 to t3, and of t4 at its place in a byte.
type Sums = [__m512i; 2];

/// Where t4 stands, in bits.
const PLACE: u32 = 6;

/// Lines on their way to their sums.
struct Pipeline {
    /// Tables, and masks of the byte's two lowest bits and of t4.
    upper: __m512i,
    low: [__m512i; 3],
    lowest: __m512i,
    highest: __m512i,
    /// The line that was loaded, and what its upper bits say.
    bytes: __m512i,
    found: __m512i,
    /// The trits of the one before.
    trits: [__m512i; 5],
}

impl Pipeline {
    /// Moves all by one: multiplies the oldest line with `q` and adds that to `acc`, looks up the trits of the one after it, and loads
    /// `line`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn step(&mut self, line: &Line, q: &[i8; 20], acc: &mut Sums) {
        let [t0, t1, t2, t3, t4] = &mut self.trits;
        let [low0, low1, low2] = self.low;
        let [sum, sum4] = acc;
        // SAFETY: reads a line, which is aligned to its 64 bytes, and 20 bytes of activations; asking for more never faults.
        unsafe {
            asm!(
                "vpdpbusd {sum4}, {t4}, dword ptr [{q} + 16]{{1to16}}",
                "vpdpbusd {sum}, {t3}, dword ptr [{q} + 12]{{1to16}}",
                "vpdpbusd {sum}, {t1}, dword ptr [{q} + 4]{{1to16}}",
                "vmovdqa64 {loaded}, zmmword ptr [{line}]",
                "vpdpbusd {sum}, {t0}, dword ptr [{q}]{{1to16}}",
                "vpsrlw {above}, {loaded}, 2",
                "vpandq {t3}, {found}, {lowest}",
                // What the low trits are looked up by: two bits of the byte, the others found by its upper six.
                "vpternlogd {byte}, {found}, {lowest}, 0xe4",
                "vpandq {t4}, {found}, {highest}",
                "prefetcht0 byte ptr [{line} + {soon}]",
                "vpermb {t0}, {byte}, {low0}",
                "vpermb {above}, {above}, {upper}",
                "vpdpbusd {sum}, {t2}, dword ptr [{q} + 8]{{1to16}}",
                "prefetcht1 byte ptr [{line} + {later}]",
                "vpermb {t1}, {byte}, {low1}",
                "vpermb {t2}, {byte}, {low2}",
                sum = inout(zmm_reg) *sum,
                sum4 = inout(zmm_reg) *sum4,
                t0 = inout(zmm_reg) *t0,
                t1 = inout(zmm_reg) *t1,
                t2 = inout(zmm_reg) *t2,
                t3 = inout(zmm_reg) *t3,
                t4 = inout(zmm_reg) *t4,
                byte = inout(zmm_reg) self.bytes => _,
                found = in(zmm_reg) self.found,
                loaded = out(zmm_reg) self.bytes,
                above = out(zmm_reg) self.found,
                upper = in(zmm_reg) self.upper,
                low0 = in(zmm_reg) low0,
                low1 = in(zmm_reg) low1,
                low2 = in(zmm_reg) low2,
                lowest = in(zmm_reg) self.lowest,
                highest = in(zmm_reg) self.highest,
                line = in(reg) line,
                q = in(reg) q,
                soon = const SOON,
                later = const LATER,
                options(readonly, nostack, preserves_flags),
            );
        }
    }
}

/// `Σ (code + 1) · q` of a panel's 64 rows; lines and activations are as many as the shorter of the two has.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    let zero = _mm512_setzero_si512();
    let [upper, low0, low1, low2, _] = tables();
    let mut pipeline = Pipeline {
        upper,
        low: [low0, low1, low2],
        lowest: _mm512_set1_epi8(3),
        highest: _mm512_set1_epi8(3 << PLACE),
        // A line of zeros has trits of zero, which add nothing.
        bytes: zero,
        found: zero,
        trits: [zero; 5],
    };
    let mut acc = [[zero; 2]; LINES];
    let (runs, activations) = (panel.as_chunks::<LINES>().0, q.as_chunks::<20>().0);
    let mut before = &[0; 20];
    for (run, q) in runs.iter().zip(activations) {
        pipeline.step(&run[0], before, &mut acc[2]);
        pipeline.step(&run[1], before, &mut acc[3]);
        pipeline.step(&run[2], q, &mut acc[0]);
        pipeline.step(&run[3], q, &mut acc[1]);
        before = q;
    }
    let end = Line([0; 64]);
    pipeline.step(&end, before, &mut acc[2]);
    pipeline.step(&end, before, &mut acc[3]);
    for ([sum, sum4], sums) in acc.into_iter().zip(sums.as_chunks_mut::<16>().0) {
        store_sums(sums, _mm512_add_epi32(sum, _mm512_srai_epi32::<PLACE>(sum4)));
    }
}
