//! The kernel in plain Rust: the definition, and what runs where no other does.

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line};

/// Available everywhere.
#[derive(Clone, Copy)]
pub struct Portable;

impl Kernel for Portable {
    fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block) {
        kernel::check(panel, q, in_dim);
        for (q, sums) in q.chunks(in_dim).zip(block) {
            *sums = [0; _];
            for (group, q) in panel.chunks(LINES).zip(q.chunks(DEPTH)) {
                let mut word = [0; DEPTH];
                word[..q.len()].copy_from_slice(q);
                for (line, sums) in group.iter().zip(sums.chunks_mut(16)) {
                    for (codes, sum) in line.0.chunks(DEPTH).zip(sums) {
                        for c in 0..DEPTH {
                            *sum += codes[c] as i32 * word[c] as i32;
                        }
                    }
                }
            }
        }
    }
}
