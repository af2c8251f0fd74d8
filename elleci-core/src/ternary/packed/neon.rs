//! NEON: a packed line is four quarters of 4 rows each, and a trit is a look-up in a table of 32 bytes (`tbl`).

use core::arch::aarch64::*;

use super::super::kernel::{Line, ROWS};
use super::super::neon::{FOLD, Neon, NeonDot, QUARTERS, add_columns, load, multiply_add, sdot, store, word};
use super::kernel::{self, PackedKernel};
use super::t5::{ESCAPE, LOW};
use super::{LINES, RowPacking};

impl PackedKernel for Neon {
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
        unsafe { unpack(packing, panel, codes) }
    }
}

impl PackedKernel for NeonDot {
    fn dot(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
        kernel::check_dot(packing, panel, q);
        // SAFETY: `self` exists only where the features were detected.
        unsafe {
            match packing {
                RowPacking::I2 => sdot_i2(panel, q, sums),
                RowPacking::T5 => sdot_t5(panel, q, sums),
            }
        }
    }

    fn unpack(self, packing: RowPacking, panel: &[Line], codes: &mut [Line]) {
        kernel::check_unpack(packing, panel, codes);
        // SAFETY: `self` exists only where the features were detected.
        unsafe { unpack(packing, panel, codes) }
    }
}

/// The codes of a quarter of each code line.
#[inline]
#[target_feature(enable = "neon")]
fn codes_i2(packed: int8x16_t) -> [int8x16_t; LINES] {
    let (x, mask) = (vreinterpretq_u8_s8(packed), vdupq_n_u8(3));
    [
        vreinterpretq_s8_u8(vandq_u8(x, mask)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(x), mask)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<4>(x), mask)),
        vreinterpretq_s8_u8(vshrq_n_u8::<6>(x)),
    ]
}

/// The trits of every byte; see [`super::t5`].
#[inline]
#[target_feature(enable = "neon")]
fn trits(packed: int8x16_t) -> [int8x16_t; 5] {
    const fn table(k: usize) -> [u8; 32] {
        let mut table = [0; 32];
        let mut i = 0;
        while i < 32 {
            table[i] = LOW[i][k];
            i += 1;
        }
        table
    }
    const TABLES: [[u8; 32]; 3] = [table(0), table(1), table(2)];
    const T3: [u8; 16] = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0];
    const T4: [u8; 16] = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the tables are 32 bytes, and 16.
    let (tables, t3, t4) =
        unsafe { (TABLES.each_ref().map(|t| vld1q_u8_x2(t.as_ptr())), vld1q_u8(T3.as_ptr()), vld1q_u8(T4.as_ptr())) };
    let x = vreinterpretq_u8_s8(packed);
    let escape = vdupq_n_u8(ESCAPE);
    let escaped = vceqq_u8(vandq_u8(x, escape), escape);
    let top = vshrq_n_u8::<5>(x);
    // The byte rotated left by three: its own top bits below, the others above.
    let rotated = vsliq_n_u8::<3>(top, x);
    let index = vandq_u8(vbslq_u8(escaped, rotated, x), vdupq_n_u8(31));
    let high = vbslq_u8(escaped, vdupq_n_u8(8), top);
    [
        vreinterpretq_s8_u8(vqtbl2q_u8(tables[0], index)),
        vreinterpretq_s8_u8(vqtbl2q_u8(tables[1], index)),
        vreinterpretq_s8_u8(vqtbl2q_u8(tables[2], index)),
        vreinterpretq_s8_u8(vqtbl1q_u8(t3, high)),
        vreinterpretq_s8_u8(vqtbl1q_u8(t4, high)),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn add_to(sums: &mut [i32], more: int32x4_t) {
    // SAFETY: `store` below has the same slice, and refuses any that is not 4 int32.
    let sum = unsafe { vld1q_s32(sums[..4].as_ptr()) };
    store(sums, vaddq_s32(sum, more));
}

#[target_feature(enable = "neon")]
fn dot_i2(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    *sums = [0; ROWS];
    for (panel, q) in panel.chunks(FOLD).zip(q.chunks(4 * FOLD)) {
        for quarter in 0..QUARTERS {
            let mut pairs = [[vdupq_n_s16(0); 2]; LINES];
            for (line, q) in panel.iter().zip(q.as_chunks::<4>().0) {
                let (codes, q) = (codes_i2(load(line, quarter)), word(q));
                for j in 0..LINES {
                    pairs[j] = multiply_add(pairs[j], codes[j], q);
                }
            }
            for j in 0..LINES {
                add_to(&mut sums[16 * j + 4 * quarter..][..4], add_columns(pairs[j]));
            }
        }
    }
}

#[target_feature(enable = "neon")]
fn dot_t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    /// Runs of 20 columns that an int16 lane can add up: five products each, and [`FOLD`] products fit.
    const RUNS: usize = FOLD / 5;
    *sums = [0; ROWS];
    for (panel, q) in panel.chunks(RUNS * LINES).zip(q.chunks(RUNS * 20)) {
        for j in 0..LINES {
            for quarter in 0..QUARTERS {
                let mut pairs = [vdupq_n_s16(0); 2];
                for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
                    let trits = trits(load(&lines[j], quarter));
                    for (trits, q) in trits.into_iter().zip(q.as_chunks::<4>().0) {
                        pairs = multiply_add(pairs, trits, word(q));
                    }
                }
                add_to(&mut sums[16 * j + 4 * quarter..][..4], add_columns(pairs));
            }
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
fn sdot_i2(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    let mut acc = [[vdupq_n_s32(0); QUARTERS]; LINES];
    for (line, q) in panel.iter().zip(q.as_chunks::<4>().0) {
        let q = word(q);
        for quarter in 0..QUARTERS {
            let codes = codes_i2(load(line, quarter));
            for j in 0..LINES {
                acc[j][quarter] = sdot(acc[j][quarter], codes[j], q);
            }
        }
    }
    store_all(&acc, sums);
}

#[target_feature(enable = "neon,dotprod")]
fn sdot_t5(panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
    let mut acc = [[vdupq_n_s32(0); QUARTERS]; LINES];
    for (lines, q) in panel.as_chunks::<LINES>().0.iter().zip(q.as_chunks::<20>().0) {
        for j in 0..LINES {
            for quarter in 0..QUARTERS {
                let trits = trits(load(&lines[j], quarter));
                for (trits, q) in trits.into_iter().zip(q.as_chunks::<4>().0) {
                    acc[j][quarter] = sdot(acc[j][quarter], trits, word(q));
                }
            }
        }
    }
    store_all(&acc, sums);
}

#[inline]
#[target_feature(enable = "neon")]
fn store_all(acc: &[[int32x4_t; QUARTERS]; LINES], sums: &mut [i32; ROWS]) {
    for (sums, acc) in sums.as_chunks_mut::<4>().0.iter_mut().zip(acc.as_flattened()) {
        store(sums, *acc);
    }
}

#[target_feature(enable = "neon")]
fn unpack(packing: RowPacking, panel: &[Line], codes: &mut [Line]) {
    match packing {
        RowPacking::I2 => {
            for (line, codes) in panel.iter().zip(codes.as_chunks_mut::<LINES>().0) {
                for quarter in 0..QUARTERS {
                    for (codes, x) in codes.iter_mut().zip(codes_i2(load(line, quarter))) {
                        put(codes, quarter, x);
                    }
                }
            }
        }
        RowPacking::T5 => {
            let runs = codes.as_chunks_mut::<{ 5 * LINES }>().0;
            for (lines, codes) in panel.as_chunks::<LINES>().0.iter().zip(runs) {
                for (j, line) in lines.iter().enumerate() {
                    for quarter in 0..QUARTERS {
                        for (k, x) in trits(load(line, quarter)).into_iter().enumerate() {
                            put(&mut codes[k * LINES + j], quarter, x);
                        }
                    }
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn put(line: &mut Line, quarter: usize, codes: int8x16_t) {
    let to: &mut [u8; 16] = &mut line.0.as_chunks_mut().0[quarter];
    // SAFETY: `to` is 16 bytes.
    unsafe { vst1q_u8(to.as_mut_ptr(), vreinterpretq_u8_s8(codes)) }
}
