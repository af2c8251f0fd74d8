//! The kernel in plain Rust: the definition, and what runs where no other does.

use super::super::kernel::{Line, ROWS};
use super::kernel::{self, PackedKernel};
use super::t5::DECODED;
use super::{LINES, RowPacking};

/// Available everywhere.
#[derive(Clone, Copy)]
pub struct Portable;

impl PackedKernel for Portable {
    fn dot(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]) {
        kernel::check_dot(packing, panel, q);
        *sums = [0; ROWS];
        match packing {
            RowPacking::I2 => {
                for (line, q) in panel.iter().zip(q.as_chunks::<4>().0) {
                    for (b, byte) in line.0.iter().enumerate() {
                        for j in 0..LINES {
                            sums[16 * j + b / 4] += (byte >> (2 * j) & 3) as i32 * q[b % 4] as i32;
                        }
                    }
                }
            }
            RowPacking::T5 => {
                for (lines, q) in panel.chunks_exact(LINES).zip(q.as_chunks::<20>().0) {
                    for (line, sums) in lines.iter().zip(sums.as_chunks_mut::<16>().0) {
                        for (b, byte) in line.0.iter().enumerate() {
                            let trits = DECODED[*byte as usize];
                            let dot: i32 = (0..5).map(|k| trits[k] as i32 * q[4 * k + b % 4] as i32).sum();
                            sums[b / 4] += dot;
                        }
                    }
                }
            }
        }
    }

    fn unpack(self, packing: RowPacking, panel: &[Line], codes: &mut [Line]) {
        kernel::check_unpack(packing, panel, codes);
        match packing {
            RowPacking::I2 => {
                for (line, codes) in panel.iter().zip(codes.as_chunks_mut::<LINES>().0) {
                    for (j, codes) in codes.iter_mut().enumerate() {
                        codes.0 = line.0.map(|byte| byte >> (2 * j) & 3);
                    }
                }
            }
            RowPacking::T5 => {
                for (lines, codes) in panel.chunks_exact(LINES).zip(codes.chunks_exact_mut(5 * LINES)) {
                    for (j, line) in lines.iter().enumerate() {
                        for k in 0..5 {
                            codes[k * LINES + j].0 = line.0.map(|byte| DECODED[byte as usize][k]);
                        }
                    }
                }
            }
        }
    }
}
