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
                word.iter_mut().zip(q).for_each(|(word, q)| *word = *q as i32);
                for (line, sums) in group.iter().zip(sums.as_chunks_mut::<16>().0) {
                    for (codes, sum) in line.0.as_chunks::<DEPTH>().0.iter().zip(sums) {
                        *sum += (0..DEPTH).map(|c| codes[c] as i32 * word[c]).sum::<i32>();
                    }
                }
            }
        }
    }
}
