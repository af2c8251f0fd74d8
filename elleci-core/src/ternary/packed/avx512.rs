//! AVX-512: three levels that share their loops. What differs is how a T5 line is read (`vpermb` with VBMI, `pshufb` without) and
//! how four products are added to a lane (`vpdpbusd` with VNNI, `maddubs` and `madd` without).
//!
//! The floor is the memory: a line of 64 bytes takes about ten cycles to arrive at 20 GB/s. I2 needs 9 vector instructions for its
//! 256 weights and T5 with VBMI 13 for its 320 ([`super::dot_vbmi`]), at two a cycle 5 and 7 cycles, so that both leave the memory as the
//! limit.

use core::arch::x86_64::*;

use super::super::kernel::{Line, ROWS};
use super::dot_vbmi;
use super::kernel::{self, Dots, GROUP, PackedKernel};
use super::t5::{ESCAPE, LOW};
use super::{LINES, RowPacking};
use crate::simd::{Isa, prefetch_run};

/// Where the kernels add up each code of an I2 byte, in bits. 3 · 16 · 128 a column leaves an int32 room for any row.
const I2_BITS: [u32; LINES] = [0, 2, 4, 4];

/// A table of 64 entries.
macro_rules! table {
    (|$i:ident| $entry:expr) => {{
        let mut table = [0; 64];
        let mut i = 0;
        while i < 64 {
            let $i = i as u8;
            table[i] = $entry;
            i += 1;
        }
        Line(table)
    }};
}

/// `t3 + 3 t4` by the upper six bits of a byte.
const fn high(upper: u8) -> u8 {
    if upper & ESCAPE >> 2 == ESCAPE >> 2 { 8 } else { upper >> 3 }
}

/// What the upper six bits of a byte say: t3 at bit 0, t4 at bit 6; and between them, above the byte's own two lowest bits, what the low
/// trits are looked up by in [`LOWER`].
pub(super) static UPPER: Line = table!(|i| {
    let index = if high(i) == 8 { 8 | i >> 3 } else { i & 7 };
    (high(i) % 3) | (index << 2) | ((high(i) / 3) << 6)
});

/// The fifth trit by the upper six bits of a byte.
static T4: Line = table!(|i| high(i) / 3);

/// The five bits that say the low trits, by the two lowest bits of a byte and, above them, four of [`UPPER`]: bits 2 to 4 of the byte, or
/// bits 5 to 7 of one with `high = 8`.
const fn low(index: u8) -> usize {
    let (lowest, middle) = (index & 3, index >> 2 & 7);
    (if index < 32 { lowest | middle << 2 } else { lowest << 3 | middle }) as usize
}

/// [`low`], and its trits: one, or trit k at bit 2 k.
pub(super) static LOW_BITS: Line = table!(|i| low(i) as u8);
static LOW_TRIT: [Line; 3] = [table!(|i| LOW[low(i)][0]), table!(|i| LOW[low(i)][1]), table!(|i| LOW[low(i)][2])];
pub(super) static LOWER: Line = table!(|i| placed_low(low(i)));

/// The low trits of five bits, trit k at bit 2 k.
const fn placed_low(low: usize) -> u8 {
    let [a, b, c] = LOW[low];
    a | b << 2 | c << 4
}

/// One low trit by the five bits themselves, and all.
static BY_BITS: [Line; 3] =
    [table!(|i| LOW[i as usize & 31][0]), table!(|i| LOW[i as usize & 31][1]), table!(|i| LOW[i as usize & 31][2])];
static PLACED_BY_BITS: Line = table!(|i| placed_low(i as usize & 31));

/// Where trits stand in their bytes, in bits, when several are looked up at once and left there, and which of [`SUMS`] takes them in. For one
/// token a look-up for each can be the dearest part of reading a line.
pub(super) const PLACES: [(u32, usize); 5] = [(0, 0), (2, 1), (4, 2), (0, 0), (6, 3)];
/// Places that trits have.
const SUMS: usize = 4;

/// What [`trits_vbmi`] looks up in.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn tables() -> [__m512i; 5] {
    let [a, b, c] = &LOW_TRIT;
    [load(&UPPER), load(a), load(b), load(c), load(&T4)]
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
pub(super) fn store(line: &mut Line, codes: __m512i) {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512((line as *mut Line).cast(), codes) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn word(q: &[i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)))
}

/// What [`UPPER`] says of every byte, the index of its low trits, and its upper six bits. A look-up takes six bits; what stands above them
/// is not looked at.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
pub(super) fn indices_vbmi(x: __m512i, upper: __m512i) -> [__m512i; 3] {
    let bits = _mm512_srli_epi16::<2>(x);
    let found = _mm512_permutexvar_epi8(bits, upper);
    // The byte's bits where the mask is set, what was found elsewhere.
    [found, _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(3), x, found), bits]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
pub(super) fn trits_vbmi(x: __m512i, [upper, t0, t1, t2, t4]: &[__m512i; 5]) -> [__m512i; 5] {
    let [found, index, bits] = indices_vbmi(x, *upper);
    [
        _mm512_permutexvar_epi8(index, *t0),
        _mm512_permutexvar_epi8(index, *t1),
        _mm512_permutexvar_epi8(index, *t2),
        _mm512_and_si512(found, _mm512_set1_epi8(3)),
        _mm512_permutexvar_epi8(bits, *t4),
    ]
}

/// What the low trits are looked up by, where the upper half of their table is meant, and `t3 + 3 t4`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn indices_shuffle(x: __m512i) -> (__m512i, __mmask64, __m512i) {
    let escape = _mm512_set1_epi8(ESCAPE as i8);
    let escaped = _mm512_cmpeq_epi8_mask(_mm512_and_si512(x, escape), escape);
    let shifted = _mm512_srli_epi16::<5>(x);
    let seven = _mm512_set1_epi8(7);
    // Bits of `shifted` where the mask is set, of the other elsewhere.
    let rotated = _mm512_ternarylogic_epi32::<0xca>(seven, shifted, _mm512_slli_epi16::<3>(x));
    let index = _mm512_mask_blend_epi8(escaped, x, rotated);
    let upper = _mm512_test_epi8_mask(index, _mm512_set1_epi8(16));
    let high = _mm512_mask_blend_epi8(escaped, _mm512_and_si512(shifted, seven), _mm512_set1_epi8(8));
    (_mm512_and_si512(index, _mm512_set1_epi8(15)), upper, high)
}

/// A table of 32 entries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn shuffle(table: __m512i, index: __m512i, upper: __mmask64) -> __m512i {
    let lower = _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0>(table, table), index);
    _mm512_mask_shuffle_epi8(lower, upper, _mm512_shuffle_i32x4::<0x55>(table, table), index)
}

/// The high trits, the last at bit `PLACE`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn high_shuffle<const PLACE: u32>(high: __m512i) -> [__m512i; 2] {
    let t3 = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    let t4 = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    let t4 = if PLACE == 0 { t4 } else { _mm512_slli_epi16::<6>(t4) };
    [_mm512_shuffle_epi8(t3, high), _mm512_shuffle_epi8(t4, high)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn trits_shuffle(x: __m512i, _: &[__m512i; 5]) -> [__m512i; 5] {
    let (index, upper, high) = indices_shuffle(x);
    let [t3, t4] = high_shuffle::<0>(high);
    let [a, b, c] = &BY_BITS;
    [shuffle(load(a), index, upper), shuffle(load(b), index, upper), shuffle(load(c), index, upper), t3, t4]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn placed_shuffle(x: __m512i) -> [__m512i; 5] {
    let (index, upper, high) = indices_shuffle(x);
    let [t0, t1, t2] = apart(shuffle(load(&PLACED_BY_BITS), index, upper));
    let [t3, t4] = high_shuffle::<6>(high);
    [t0, t1, t2, t3, t4]
}

/// Three trits at bits 0, 2 and 4, each where it stands.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn apart(low: __m512i) -> [__m512i; 3] {
    [
        _mm512_and_si512(low, _mm512_set1_epi8(3)),
        _mm512_and_si512(low, _mm512_set1_epi8(3 << 2)),
        _mm512_and_si512(low, _mm512_set1_epi8(3 << 4)),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn add_vnni(acc: __m512i, codes: __m512i, q: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(acc, codes, q)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn add_madd(acc: __m512i, codes: __m512i, q: __m512i) -> __m512i {
    // I2's codes are at most 3 << 4, T5's 2 << 6: a pair is -2 · 128 · 128 to 2 · 128 · 127, and fits an int16.
    _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, q), _mm512_set1_epi16(1)))
}

/// The activations of one of some tokens.
#[inline(always)]
pub(super) fn token(q: &[i8], t: usize, tokens: usize) -> &[i8] {
    let width = q.len() / tokens;
    &q[t * width..][..width]
}

/// [`PackedKernel::dot`] of T5 where a look-up finds 32 entries: three trits at once, that are left where they stand in a byte.
macro_rules! dot_shuffle {
    ($name:ident, $features:literal, $add:ident) => {
        #[target_feature(enable = $features)]
        fn $name(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
            let mut acc = [[_mm512_setzero_si512(); SUMS]; LINES];
            for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
                let words = q.as_chunks::<4>().0;
                for (line, acc) in lines.iter().zip(&mut acc) {
                    prefetch(line);
                    let codes = placed_shuffle(load(line));
                    for k in 0..5 {
                        let place = PLACES[k].1;
                        acc[place] = $add(acc[place], codes[k], word(&words[k]));
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums.as_chunks_mut::<16>().0) {
                let mut sum = acc[0];
                for (bits, place) in [PLACES[1], PLACES[2], PLACES[4]] {
                    let placed = _mm512_srav_epi32(acc[place], _mm512_set1_epi32(bits as i32));
                    sum = _mm512_add_epi32(sum, placed);
                }
                store_sums(sums, sum);
            }
        }
    };
}

dot_shuffle!(dot_madd, "avx512f,avx512bw,avx512vl", add_madd);
dot_shuffle!(dot_vnni, "avx512f,avx512bw,avx512vl,avx512vnni", add_vnni);

macro_rules! level {
    ($token:ident, $isa:expr, $features:literal, $direct:literal, $trits:ident, $dot:path, $add:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub struct $token(());

        impl $token {
            /// A token, where the machine has what it takes.
            pub fn detect() -> Option<$token> {
                (Isa::machine() >= $isa).then_some($token(()))
            }

            /// See [`PackedKernel::DOTS`].
            #[inline(always)]
            fn dots(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [[i32; ROWS]]) {
                /// Half of the rows at a time: sixteen sums of eight tokens stay in registers beside the codes.
                #[target_feature(enable = $features)]
                fn i2<const T: usize>(panel: &[Line], q: &[i8], sums: &mut [[i32; ROWS]]) {
                    let tokens: [_; T] = core::array::from_fn(|t| token(q, t, T).as_chunks::<4>().0);
                    for half in 0..2 {
                        let mut acc = [[_mm512_setzero_si512(); LINES / 2]; T];
                        for (i, line) in panel.iter().enumerate() {
                            prefetch(line);
                            let x = load(line);
                            let codes = if half == 0 {
                                [
                                    _mm512_and_si512(x, _mm512_set1_epi8(3)),
                                    _mm512_and_si512(x, _mm512_set1_epi8(3 << 2)),
                                ]
                            } else {
                                let down = _mm512_srli_epi16::<2>(x);
                                [
                                    _mm512_and_si512(x, _mm512_set1_epi8(3 << 4)),
                                    _mm512_and_si512(down, _mm512_set1_epi8(3 << 4)),
                                ]
                            };
                            for t in 0..T {
                                let q = word(&tokens[t][i]);
                                for j in 0..LINES / 2 {
                                    acc[t][j] = $add(acc[t][j], codes[j], q);
                                }
                            }
                        }
                        for t in 0..T {
                            for j in 0..LINES / 2 {
                                let bits = _mm512_set1_epi32(I2_BITS[2 * half + j] as i32);
                                store_sums(
                                    &mut sums[t].as_chunks_mut::<16>().0[2 * half + j],
                                    _mm512_srav_epi32(acc[t][j], bits),
                                );
                            }
                        }
                    }
                }

                #[target_feature(enable = $features)]
                fn t5<const T: usize>(panel: &[Line], q: &[i8], sums: &mut [[i32; ROWS]]) {
                    let tokens: [_; T] = core::array::from_fn(|t| token(q, t, T).as_chunks::<4>().0.as_chunks::<5>().0);
                    let tables = tables();
                    for half in 0..2 {
                        let mut acc = [[_mm512_setzero_si512(); LINES / 2]; T];
                        for (i, lines) in panel.as_chunks::<LINES>().0.iter().enumerate() {
                            let [a, b] = &lines.as_chunks::<{ LINES / 2 }>().0[half];
                            prefetch(a);
                            prefetch(b);
                            let trits = [$trits(load(a), &tables), $trits(load(b), &tables)];
                            for t in 0..T {
                                let words = &tokens[t][i];
                                for k in 0..5 {
                                    let q = word(&words[k]);
                                    for j in 0..LINES / 2 {
                                        acc[t][j] = $add(acc[t][j], trits[j][k], q);
                                    }
                                }
                            }
                        }
                        for t in 0..T {
                            for j in 0..LINES / 2 {
                                store_sums(&mut sums[t].as_chunks_mut::<16>().0[2 * half + j], acc[t][j]);
                            }
                        }
                    }
                }

                kernel::check_dots(packing, panel, q, sums.len());
                // SAFETY: `self` exists only where the features were detected.
                unsafe {
                    match (packing, sums.len()) {
                        (RowPacking::I2, 2) => i2::<2>(panel, q, sums),
                        (RowPacking::I2, 3) => i2::<3>(panel, q, sums),
                        (RowPacking::I2, 4) => i2::<4>(panel, q, sums),
                        (RowPacking::I2, 5) => i2::<5>(panel, q, sums),
                        (RowPacking::I2, 6) => i2::<6>(panel, q, sums),
                        (RowPacking::I2, 7) => i2::<7>(panel, q, sums),
                        (RowPacking::I2, _) => i2::<GROUP>(panel, q, sums),
                        (RowPacking::T5, 2) => t5::<2>(panel, q, sums),
                        (RowPacking::T5, 3) => t5::<3>(panel, q, sums),
                        (RowPacking::T5, 4) => t5::<4>(panel, q, sums),
                        (RowPacking::T5, 5) => t5::<5>(panel, q, sums),
                        (RowPacking::T5, 6) => t5::<6>(panel, q, sums),
                        (RowPacking::T5, 7) => t5::<7>(panel, q, sums),
                        (RowPacking::T5, _) => t5::<GROUP>(panel, q, sums),
                    }
                }
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

                kernel::check_dot(packing, panel, q);
                // SAFETY: `self` exists only where the features were detected.
                unsafe {
                    match packing {
                        RowPacking::I2 => i2(panel, q, sums),
                        RowPacking::T5 => $dot(panel, q, sums),
                    }
                }
            }

            const DOTS: Option<Dots<$token>> = if $direct { Some($token::dots) } else { None };

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
pub(super) fn store_sums(sums: &mut [i32; 16], sum: __m512i) {
    // SAFETY: `sums` is 16 int32.
    unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) }
}

level!(
    Avx512,
    Isa::Avx512,
    "avx512f,avx512bw,avx512vl",
    // Measured: two instructions more a product outweigh what unpacking costs.
    false,
    trits_shuffle,
    dot_madd,
    add_madd,
    "Proof that the machine has AVX-512 F, BW and VL."
);
level!(
    Vnni,
    Isa::Avx512Vnni,
    "avx512f,avx512bw,avx512vl,avx512vnni",
    true,
    trits_shuffle,
    dot_vnni,
    add_vnni,
    "Proof that the machine has VNNI as well."
);
level!(
    Vbmi,
    Isa::Avx512Vbmi,
    "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi",
    true,
    trits_vbmi,
    dot_vbmi::t5,
    add_vnni,
    "Proof that the machine has VNNI and VBMI as well."
);
