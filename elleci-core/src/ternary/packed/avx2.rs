//! AVX2: as [`super::avx512`] without VNNI, at half the width: a line is two halves of 8 rows each.

use core::arch::x86_64::*;

use super::super::avx2::FOLD;
use super::super::kernel::{Line, ROWS};
use super::kernel::{self, PackedKernel};
use super::t5::{ESCAPE, LOW};
use super::{LINES, RowPacking};
use crate::simd::{Isa, prefetch_later, prefetch_line, prefetch_run};

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
    read(line, half)
}

#[inline]
#[target_feature(enable = "avx2")]
fn read(line: &Line, half: usize) -> __m256i {
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

/// The fields of 32 bytes: `low` in two bits a trit (t0, t1, t2 from bit 0 on), and `high` as an index of tables of 16, with 8 for the
/// bytes that have no place for it.
#[inline]
#[target_feature(enable = "avx2")]
fn fields(x: __m256i) -> [__m256i; 2] {
    const fn table(from: usize) -> [u8; 16] {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            let [t0, t1, t2] = LOW[from + i];
            table[i] = t0 | t1 << 2 | t2 << 4;
            i += 1;
        }
        table
    }
    const TABLES: [[u8; 16]; 2] = [table(0), table(16)];
    // SAFETY: the tables are 16 bytes each.
    let [first, second] =
        TABLES.each_ref().map(|t| _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(t.as_ptr().cast()) }));
    let top = _mm256_and_si256(_mm256_srli_epi16::<5>(x), _mm256_set1_epi8(7));
    let low = _mm256_and_si256(x, _mm256_set1_epi8(31));
    let escaped = _mm256_cmpgt_epi8(low, _mm256_set1_epi8(ESCAPE as i8 - 1));
    let rotated = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16::<3>(x), _mm256_set1_epi8(24)), top);
    let index = _mm256_blendv_epi8(low, rotated, escaped);
    // `pshufb` gives 0 where bit 7 of the index is set: from 16 on in the first table, below 16 in the second.
    let in_first = _mm256_shuffle_epi8(first, _mm256_add_epi8(index, _mm256_set1_epi8(0x70)));
    let in_second = _mm256_shuffle_epi8(second, _mm256_sub_epi8(index, _mm256_set1_epi8(16)));
    [_mm256_or_si256(in_first, in_second), _mm256_blendv_epi8(top, _mm256_set1_epi8(8), escaped)]
}

/// The last two trits of the index that [`fields`] gives.
#[inline]
#[target_feature(enable = "avx2")]
fn last(high: __m256i) -> [__m256i; 2] {
    let t3 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0));
    let t4 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
    [_mm256_shuffle_epi8(t3, high), _mm256_shuffle_epi8(t4, high)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn trits(x: __m256i) -> [__m256i; 5] {
    let [low, high] = fields(x);
    let [t0, t1, t2, _] = codes_i2(low);
    let [t3, t4] = last(high);
    [t0, t1, t2, t3, t4]
}

#[target_feature(enable = "avx2")]
fn dot_i2(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    *sums = [0; ROWS];
    for (panel, q) in panel.chunks(FOLD).zip(q.chunks(4 * FOLD)) {
        let mut pairs = [[_mm256_setzero_si256(); LINES]; 2];
        for (line, q) in panel.iter().zip(q.as_chunks::<4>().0) {
            let q = word(q);
            for half in 0..2 {
                let codes = codes_i2(load(line, half));
                for j in 0..LINES {
                    pairs[half][j] = _mm256_add_epi16(pairs[half][j], _mm256_maddubs_epi16(codes[j], q));
                }
            }
        }
        for half in 0..2 {
            for j in 0..LINES {
                add_to(&mut sums[16 * j + 8 * half..][..8], widen(_mm256_setzero_si256(), pairs[half][j]));
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn dot_t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    /// Runs of 20 columns that int16 lanes can add up: four pairs are between -2048 and 2032, one pair of four times a trit as much.
    const FOLD: usize = 12;
    let mask = |x, bits| _mm256_and_si256(x, _mm256_set1_epi8(bits));
    *sums = [0; ROWS];
    for (panel, q) in panel.chunks(FOLD * LINES).zip(q.chunks(FOLD * 20)) {
        // The four lines of a run are far apart in time, so that what comes next is asked for in the order of the memory.
        let mut ahead = panel.as_ptr().cast::<u8>();
        for j in 0..LINES {
            let mut pairs = [_mm256_setzero_si256(); 2];
            // Four times the pairs of the second trit, which are left where they stand in `low`.
            let mut fourfold = [_mm256_setzero_si256(); 2];
            for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
                let q = q.as_chunks::<4>().0;
                prefetch_line(ahead.wrapping_add(FOLD * LINES * 64));
                prefetch_later(ahead.wrapping_add(4 * FOLD * LINES * 64));
                ahead = ahead.wrapping_add(64);
                for half in 0..2 {
                    let [low, high] = fields(read(&lines[j], half));
                    let [t3, t4] = last(high);
                    let add = |sum: &mut __m256i, trits, k: usize| {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(trits, word(&q[k])));
                    };
                    add(&mut pairs[half], mask(low, 3), 0);
                    add(&mut fourfold[half], mask(low, 12), 1);
                    add(&mut pairs[half], mask(_mm256_srli_epi16::<4>(low), 3), 2);
                    add(&mut pairs[half], t3, 3);
                    add(&mut pairs[half], t4, 4);
                }
            }
            for half in 0..2 {
                let all = _mm256_add_epi16(pairs[half], _mm256_srai_epi16::<2>(fourfold[half]));
                add_to(&mut sums[16 * j + 8 * half..][..8], widen(_mm256_setzero_si256(), all));
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
