//! The state-space dual (SSD) recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), with one B/C group.
//!
//! A head h with a scalar `a < 0` carries a state `S` `[head_dim, d_state]`:
//! ```text
//! S_t = exp(dt_t a) S_{t-1} + dt_t x_t (x) B_t          y_t = S_t C_t + d x_t
//! ```
//! [`mod@reference`] is that definition, step by step. Training computes the same in chunks of [`CHUNK`] steps, nearly all
//! of it as matrix products (`chunked.rs`); inference takes one step after the other ([`ssd_steps`]).
//!
//! Buffers: `xbc` `[tokens, d_inner + 2 d_state]` holds x, B and C side by side, as the convolution leaves them;
//! `dt` `[tokens, heads]` is positive (after softplus); `a` and `d` are `[heads]`; `y` is `[tokens, d_inner]`.
//! The states of a group of heads are kept together as `[d_state, channels]`: then every product with B or C is one large product over
//! the heads of a group, and a step reads and writes memory in one run.

mod backward;
mod chunked;
mod forward;
mod kernels;
mod product;
pub mod reference;
mod step;
#[cfg(test)]
mod tests;
mod transpose;

use alloc::vec::Vec;

pub use backward::ssd_backward;
pub use forward::ssd_forward;
pub use step::{Recent, ScanState, ssd_steps, ssd_steps_expect};

/// Steps of a chunk. The matrices inside a chunk are `[CHUNK, CHUNK]` a head.
pub const CHUNK: usize = 64;
/// Channels that are worked on together: the state of 512 channels and 128 rows is 256 KiB, half a small L2 cache.
const GROUP_CHANNELS: usize = 512;
/// Tasks wanted at least; with a smaller batch the heads of a sequence are dealt to several tasks.
const MIN_TASKS: usize = 16;

/// Sizes of one SSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SsdShape {
    /// Independent sequences.
    pub batch: usize,
    /// Steps of each.
    pub seq: usize,
    /// Heads, each with its own decay.
    pub heads: usize,
    /// Channels a head.
    pub head_dim: usize,
    /// Rows of the state: the width of B and of C.
    pub d_state: usize,
}

impl SsdShape {
    /// `batch * seq`.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// `heads * head_dim`: the width of x and y.
    pub fn d_inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The width of `xbc`.
    pub fn width(&self) -> usize {
        self.d_inner() + 2 * self.d_state
    }

    /// Chunks of a sequence.
    pub fn chunks(&self) -> usize {
        self.seq.div_ceil(CHUNK)
    }

    /// Elements that [`ssd_forward`] saves for [`ssd_backward`]: the state entering every chunk but the first, whose
    /// is zero. Their order is private to this module.
    pub fn states_len(&self) -> usize {
        self.batch * self.chunks().saturating_sub(1) * self.state_len()
    }

    /// Elements of the state of one sequence. Their order is private to this module: groups of heads (512 channels, the last what is
    /// left), and [`ssd_steps`] keeps tiles of channels in each.
    pub fn state_len(&self) -> usize {
        self.d_state * self.d_inner()
    }

    /// Elements of scratch that [`ssd_forward`] uses.
    pub fn forward_scratch_len(&self) -> usize {
        chunked::scratch_len(self, chunked::Pass::Forward)
    }

    /// Elements of scratch that [`ssd_backward`] uses.
    pub fn backward_scratch_len(&self) -> usize {
        chunked::scratch_len(self, chunked::Pass::Backward)
    }

    /// Heads that are worked on together.
    fn group_heads(&self) -> usize {
        (GROUP_CHANNELS / self.head_dim.max(1)).clamp(1, self.heads.max(1))
    }

    /// Heads of one task, a whole number of groups. Depends on the shape alone, so that the bits do.
    fn task_heads(&self) -> usize {
        let groups = self.heads.div_ceil(self.group_heads());
        let tasks = MIN_TASKS.div_ceil(self.batch.max(1)).clamp(1, groups.max(1));
        groups.div_ceil(tasks) * self.group_heads()
    }

    fn check(&self, xbc: &[f32], dt: &[f32], a: &[f32], d: &[f32], y: &[f32]) {
        assert_eq!(xbc.len(), self.tokens() * self.width(), "ssd: xbc");
        assert_eq!(dt.len(), self.tokens() * self.heads, "ssd: dt");
        assert_eq!((a.len(), d.len()), (self.heads, self.heads), "ssd: a, d");
        assert_eq!(y.len(), self.tokens() * self.d_inner(), "ssd: y");
    }
}

/// Working memory, grown to what a call needs and kept for the next.
#[derive(Debug, Default)]
pub struct SsdScratch {
    buffer: Vec<f32>,
}

impl SsdScratch {
    /// Empty.
    pub fn new() -> SsdScratch {
        SsdScratch::default()
    }

    fn get(&mut self, len: usize) -> &mut [f32] {
        if self.buffer.len() < len {
            self.buffer.resize(len, 0.0);
        }
        &mut self.buffer[..len]
    }
}
