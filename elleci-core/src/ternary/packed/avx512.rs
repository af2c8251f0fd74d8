//! AVX-512: three levels that share their loops. What differs is how a T5 line is read (`vpermb` with VBMI, `pshufb` without) and
//! how four products are added to a lane (`vpdpbusd` with VNNI, `maddubs` and `madd` without).
//!
//! The floor is the memory: a line of 64 bytes takes about ten cycles to arrive at 20 GB/s. I2 needs 9 vector instructions for its
//! 256 weights and T5 with VBMI 14 for its 320, at two a cycle 5 and 7 cycles, so that both leave the memory as the limit.

use core::arch::x86_64::*;

use super::super::kernel::{Line, ROWS};
use super::kernel::{self, PackedKernel};
use super::t5::{ESCAPE, LOW};
use super::{LINES, RowPacking};
use crate::simd::{Isa, prefetch_run};

/// Where the kernels add up each code of an I2 byte, in bits. 3 · 16 · 128 a column leaves an int32 room for any row.
const I2_BITS: [u32; LINES] = [0, 2, 4, 4];

/// The 64-entry table of trit `k`, by the low six bits of a byte (bit 5 does not matter to the low trits), and for the high trits
/// by its bits 2 to 7.
const fn table(k: usize) -> Line {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        let high = if i as u8 & ESCAPE >> 2 == ESCAPE >> 2 { 8 } else { (i >> 3) as u8 };
        table[i] = match k {
            0..3 => LOW[i & 31][k],
            3 => high % 3,
            _ => high / 3,
        };
        i += 1;
    }
    Line(table)
}

static TABLES: [Line; 5] = [table(0), table(1), table(2), table(3), table(4)];

/// The tables as VBMI reads them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn tables() -> [__m512i; 5] {
    [0, 1, 2, 3, 4].map(|k| load(&TABLES[k]))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512((line as *const Line).cast()) }
}

/// Asks for the lines that follow; what lies behind the end of a matrix is fetched, but not read. The machine's own prefetcher
/// stops at every page of 4 KiB, and leaves a third of the bandwidth unused (docs/LOG.md).
#[inline(always)]
fn prefetch(line: &Line) {
    prefetch_run((line as *const Line).cast());
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn store(line: &mut Line, codes: __m512i) {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512((line as *mut Line).cast(), codes) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn word(q: &[i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni")]
pub(super) fn trits_vbmi(x: __m512i, tables: &[__m512i; 5]) -> [__m512i; 5] {
    /// The bit matrix that rotates every byte left by three: byte 7 - i selects the bit that goes to bit i.
    const ROTATE: i64 = 0x2040_8001_0204_0810;
    let escape = _mm512_set1_epi8(ESCAPE as i8);
    let escaped = _mm512_cmpeq_epi8_mask(_mm512_and_si512(x, escape), escape);
    let low = _mm512_mask_gf2p8affine_epi64_epi8::<0>(x, escaped, x, _mm512_set1_epi64(ROTATE));
    let high = _mm512_srli_epi16::<2>(x);
    let [t0, t1, t2, t3, t4] = *tables;
    [
        _mm512_permutexvar_epi8(low, t0),
        _mm512_permutexvar_epi8(low, t1),
        _mm512_permutexvar_epi8(low, t2),
        _mm512_permutexvar_epi8(high, t3),
        _mm512_permutexvar_epi8(high, t4),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn trits_shuffle(x: __m512i, tables: &[__m512i; 5]) -> [__m512i; 5] {
    let escape = _mm512_set1_epi8(ESCAPE as i8);
    let escaped = _mm512_cmpeq_epi8_mask(_mm512_and_si512(x, escape), escape);
    let shifted = _mm512_srli_epi16::<5>(x);
    let seven = _mm512_set1_epi8(7);
    // Bits of `shifted` where the mask is set, of the other elsewhere.
    let rotated = _mm512_ternarylogic_epi32::<0xca>(seven, shifted, _mm512_slli_epi16::<3>(x));
    let index = _mm512_mask_blend_epi8(escaped, x, rotated);
    let upper = _mm512_test_epi8_mask(index, _mm512_set1_epi8(16));
    let index = _mm512_and_si512(index, _mm512_set1_epi8(15));
    let low = |k: usize| {
        let lower = _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0>(tables[k], tables[k]), index);
        _mm512_mask_shuffle_epi8(lower, upper, _mm512_shuffle_i32x4::<0x55>(tables[k], tables[k]), index)
    };
    let high = _mm512_mask_blend_epi8(escaped, _mm512_and_si512(shifted, seven), _mm512_set1_epi8(8));
    let (t3, t4) = (
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0)),
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0)),
    );
    [low(0), low(1), low(2), _mm512_shuffle_epi8(t3, high), _mm512_shuffle_epi8(t4, high)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_vnni(acc: __m512i, codes: __m512i, q: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(acc, codes, q)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn add_madd(acc: __m512i, codes: __m512i, q: __m512i) -> __m512i {
    // Codes are at most 3 << 4: a pair is at most 2 · 48 · 128 in magnitude, and fits an int16.
    _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, q), _mm512_set1_epi16(1)))
}

macro_rules! level {
    ($token:ident, $isa:expr, $features:literal, $trits:ident, $add:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub struct $token(());

        impl $token {
            /// A token, where the machine has what it takes.
            pub fn detect() -> Option<$token> {
                (Isa::machine() >= $isa).then_some($token(()))
            }
        }

        impl PackedKernel for $token {
            #[inline(always)]
            fn dot(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
                #[target_feature(enable = $features)]
                fn i2(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
                    // Two sets of accumulators, as a chain of additions to one would wait for its own latency.
                    let mut acc = [[_mm512_setzero_si512(); LINES]; 2];
                    let (pairs, last) = panel.as_chunks::<2>();
                    let (words, last_word) = q.as_chunks::<8>();
                    for (lines, q) in pairs.iter().zip(words) {
                        for (i, q) in q.as_chunks::<4>().0.iter().enumerate() {
                            prefetch(&lines[i]);
                            i2_line(&mut acc[i], load(&lines[i]), word(q));
                        }
                    }
                    if let ([line], [q]) = (last, last_word.as_chunks::<4>().0) {
                        i2_line(&mut acc[0], load(line), word(q));
                    }
                    for (j, sums) in sums.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                        let sum = _mm512_add_epi32(acc[0][j], acc[1][j]);
                        store_sums(sums, _mm512_srav_epi32(sum, _mm512_set1_epi32(I2_BITS[j] as i32)));
                    }
                }

                /// The codes stay where they are in the byte, and their sums with them; only the topmost come down by two, as
                /// a pair of products with 3 · 64 would not fit the int16 of `maddubs`.
                #[inline]
                #[target_feature(enable = $features)]
                fn i2_line(acc: &mut [__m512i; LINES], x: __m512i, q: __m512i) {
                    for (j, acc) in acc.iter_mut().enumerate() {
                        let x = if j == 3 { _mm512_srli_epi16::<2>(x) } else { x };
                        *acc = $add(*acc, _mm512_and_si512(x, _mm512_set1_epi8(3 << I2_BITS[j])), q);
                    }
                }

                #[target_feature(enable = $features)]
                fn t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
                    let tables = tables();
                    let mut acc = [[_mm512_setzero_si512(); 2]; LINES];
                    for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
                        let words = q.as_chunks::<4>().0;
                        for (line, acc) in lines.iter().zip(&mut acc) {
                            prefetch(line);
                            let trits = $trits(load(line), &tables);
                            for k in 0..5 {
                                acc[k % 2] = $add(acc[k % 2], trits[k], word(&words[k]));
                            }
                        }
                    }
                    for (acc, sums) in acc.iter().zip(sums.as_chunks_mut::<16>().0) {
                        store_sums(sums, _mm512_add_epi32(acc[0], acc[1]));
                    }
                }

                kernel::check_dot(packing, panel, q);
                // SAFETY: `self` exists only where the features were detected.
                unsafe {
                    match packing {
                        RowPacking::I2 => i2(panel, q, sums),
                        RowPacking::T5 => t5(panel, q, sums),
                    }
                }
            }

            #[inline(always)]
            fn unpack(self, packing: RowPacking, panel: &[Line], codes: &mut [Line]) {
                #[target_feature(enable = $features)]
                fn i2(panel: &[Line], codes: &mut [Line]) {
                    let mask = _mm512_set1_epi8(3);
                    for (line, codes) in panel.iter().zip(codes.as_chunks_mut::<LINES>().0) {
                        let x = load(line);
                        store(&mut codes[0], _mm512_and_si512(x, mask));
                        store(&mut codes[1], _mm512_and_si512(_mm512_srli_epi16::<2>(x), mask));
                        store(&mut codes[2], _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask));
                        store(&mut codes[3], _mm512_and_si512(_mm512_srli_epi16::<6>(x), mask));
                    }
                }

                #[target_feature(enable = $features)]
                fn t5(panel: &[Line], codes: &mut [Line]) {
                    let tables = tables();
                    let runs = codes.as_chunks_mut::<{ 5 * LINES }>().0;
                    for (lines, codes) in panel.as_chunks::<LINES>().0.iter().zip(runs) {
                        for (j, line) in lines.iter().enumerate() {
                            let trits = $trits(load(line), &tables);
                            for k in 0..5 {
                                store(&mut codes[k * LINES + j], trits[k]);
                            }
                        }
                    }
                }

                kernel::check_unpack(packing, panel, codes);
                // SAFETY: `self` exists only where the features were detected.
                unsafe {
                    match packing {
                        RowPacking::I2 => i2(panel, codes),
                        RowPacking::T5 => t5(panel, codes),
                    }
                }
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn store_sums(sums: &mut [i32; 16], sum: __m512i) {
    // SAFETY: `sums` is 16 int32.
    unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) }
}

level!(
    Avx512,
    Isa::Avx512,
    "avx512f,avx512bw,avx512vl",
    trits_shuffle,
    add_madd,
    "Proof that the machine has AVX-512 F, BW and VL."
);
level!(
    Vnni,
    Isa::Avx512Vnni,
    "avx512f,avx512bw,avx512vl,avx512vnni",
    trits_shuffle,
    add_vnni,
    "Proof that the machine has VNNI as well."
);
level!(
    Vbmi,
    Isa::Avx512Vbmi,
    "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni",
    trits_vbmi,
    add_vnni,
    "Proof that the machine has VNNI, VBMI and GFNI as well."
);
