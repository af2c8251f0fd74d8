//! AVX2: as [`super::avx512`] without VNNI, at half the width: a line is two halves of 8 rows each.

use core::arch::x86_64::*;

use super::super::avx2::FOLD;
use super::super::kernel::{Line, ROWS};
use super::kernel::{self, PackedKernel};
use super::t5::{ESCAPE, LOW};
use super::{LINES, RowPacking};
use crate::simd::{Isa, prefetch_run};

/// Proof that the machine has AVX2.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// A token, where the machine has what it takes.
    pub fn detect() -> Option<Avx2> {
        (Isa::machine() >= Isa::Avx2).then_some(Avx2(()))
    }
}

impl PackedKernel for Avx2 {
    fn dot(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
        kernel::check_dot(packing, panel, q);
        // SAFETY: `self` exists only where the features were detected.
        unsafe {
            match packing {
                RowPacking::I2 => dot_i2(panel, q, sums),
                RowPacking::T5 => dot_t5(panel, q, sums),
            }
        }
    }

    fn unpack(self, packing: RowPacking, panel: &[Line], codes: &mut [Line]) {
        kernel::check_unpack(packing, panel, codes);
        // SAFETY: `self` exists only where the features were detected.
        unsafe {
            match packing {
                RowPacking::I2 => unpack_i2(panel, codes),
                RowPacking::T5 => unpack_t5(panel, codes),
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line, half: usize) -> __m256i {
    if half == 0 {
        prefetch_run((line as *const Line).cast());
    }
    // SAFETY: a line is two halves of 32 bytes, aligned to 64.
    unsafe { _mm256_load_si256((line as *const Line).cast::<__m256i>().add(half & 1)) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(line: &mut Line, half: usize, codes: __m256i) {
    // SAFETY: a line is two halves of 32 bytes, aligned to 64.
    unsafe { _mm256_store_si256((line as *mut Line).cast::<__m256i>().add(half & 1), codes) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn word(q: &[i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen(acc: __m256i, pairs: __m256i) -> __m256i {
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_to(sums: &mut [i32], more: __m256i) {
    let sums: &mut [i32; 8] = sums.try_into().expect("half a line has 8 rows");
    // SAFETY: `sums` is 8 int32.
    unsafe {
        let sum = _mm256_add_epi32(_mm256_loadu_si256(sums.as_ptr().cast()), more);
        _mm256_storeu_si256(sums.as_mut_ptr().cast(), sum);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn codes_i2(x: __m256i) -> [__m256i; LINES] {
    let mask = _mm256_set1_epi8(3);
    [
        _mm256_and_si256(x, mask),
        _mm256_and_si256(_mm256_srli_epi16::<2>(x), mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask),
        _mm256_and_si256(_mm256_srli_epi16::<6>(x), mask),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn trits(x: __m256i) -> [__m256i; 5] {
    const fn table(k: usize, from: usize) -> [u8; 16] {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            table[i] = LOW[from + i][k];
            i += 1;
        }
        table
    }
    const TABLES: [[[u8; 16]; 2]; 3] =
        [[table(0, 0), table(0, 16)], [table(1, 0), table(1, 16)], [table(2, 0), table(2, 16)]];
    let escape = _mm256_set1_epi8(ESCAPE as i8);
    let escaped = _mm256_cmpeq_epi8(_mm256_and_si256(x, escape), escape);
    let seven = _mm256_set1_epi8(7);
    let top = _mm256_and_si256(_mm256_srli_epi16::<5>(x), seven);
    let rotated = _mm256_or_si256(_mm256_andnot_si256(seven, _mm256_slli_epi16::<3>(x)), top);
    let index = _mm256_blendv_epi8(x, rotated, escaped);
    // Bit 4 moves to bit 7, where `blendv` looks.
    let upper = _mm256_slli_epi16::<3>(index);
    let index = _mm256_and_si256(index, _mm256_set1_epi8(15));
    let low = |k: usize| {
        // SAFETY: the tables are 16 bytes each.
        let [lower, higher] = TABLES[k].each_ref().map(|t| unsafe { _mm_loadu_si128(t.as_ptr().cast()) });
        let lower = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lower), index);
        _mm256_blendv_epi8(lower, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(higher), index), upper)
    };
    let high = _mm256_blendv_epi8(top, _mm256_set1_epi8(8), escaped);
    let t3 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    let t4 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    [low(0), low(1), low(2), _mm256_shuffle_epi8(t3, high), _mm256_shuffle_epi8(t4, high)]
}

#[target_feature(enable = "avx2")]
fn dot_i2(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    *sums = [0; ROWS];
    for half in 0..2 {
        let mut acc = [_mm256_setzero_si256(); LINES];
        for (panel, q) in panel.chunks(FOLD).zip(q.chunks(4 * FOLD)) {
            let mut pairs = [_mm256_setzero_si256(); LINES];
            for (line, q) in panel.iter().zip(q.as_chunks::<4>().0) {
                let (codes, q) = (codes_i2(load(line, half)), word(q));
                for j in 0..LINES {
                    pairs[j] = _mm256_add_epi16(pairs[j], _mm256_maddubs_epi16(codes[j], q));
                }
            }
            for j in 0..LINES {
                acc[j] = widen(acc[j], pairs[j]);
            }
        }
        for (j, acc) in acc.into_iter().enumerate() {
            add_to(&mut sums[16 * j + 8 * half..][..8], acc);
        }
    }
}

#[target_feature(enable = "avx2")]
fn dot_t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    /// Runs of 20 columns that an int16 lane can add up: five pairs are between -2560 and 2540, and 12 times that fits.
    const FOLD: usize = 12;
    *sums = [0; ROWS];
    for (panel, q) in panel.chunks(FOLD * LINES).zip(q.chunks(FOLD * 20)) {
        for j in 0..LINES {
            for half in 0..2 {
                let mut pairs = _mm256_setzero_si256();
                for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
                    let trits = trits(load(&lines[j], half));
                    for (trits, q) in trits.into_iter().zip(q.as_chunks::<4>().0) {
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(trits, word(q)));
                    }
                }
                add_to(&mut sums[16 * j + 8 * half..][..8], widen(_mm256_setzero_si256(), pairs));
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn unpack_i2(panel: &[Line], codes: &mut [Line]) {
    for (line, codes) in panel.iter().zip(codes.as_chunks_mut::<LINES>().0) {
        for half in 0..2 {
            for (codes, x) in codes.iter_mut().zip(codes_i2(load(line, half))) {
                store(codes, half, x);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn unpack_t5(panel: &[Line], codes: &mut [Line]) {
    let runs = codes.as_chunks_mut::<{ 5 * LINES }>().0;
    for (lines, codes) in panel.as_chunks::<LINES>().0.iter().zip(runs) {
        for (j, line) in lines.iter().enumerate() {
            for half in 0..2 {
                for (k, x) in trits(load(line, half)).into_iter().enumerate() {
                    store(&mut codes[k * LINES + j], half, x);
                }
            }
        }
    }
}
