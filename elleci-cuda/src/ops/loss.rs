//! The embedding, and the cross-entropy of a chunk of tokens.

use super::{ROOM, THREADS, exact, floats, int, room};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

fn rows(n: usize, shared: u32) -> Launch {
    Launch { grid: [n as u32, 1, 1], threads: THREADS, shared }
}

/// `h` `[tokens, d]` (float32 or bf16) = rows of the embedding `[vocab, d]`.
///
/// # Errors
/// A fault of the device.
pub fn embed(dev: &mut dyn Device, tokens: Buf, embedding: Buf, d: usize, h: Buf) -> Result<()> {
    let n = tokens.len;
    let args = [exact(tokens, Dtype::U32, n), floats(embedding, embedding.len), int(d), floats(h, n * d)];
    dev.launch("embed", rows(n, 0), &args)
}

/// Positions of a batch sorted by token, so that a row of the embedding's gradient has one owner.
#[derive(Clone, Copy, Debug)]
pub struct Occurrences {
    /// `[tokens]`
    pub positions: Buf,
    /// `[tokens + 1]`: where each distinct token's positions begin
    pub starts: Buf,
    /// `[1]`: distinct tokens
    pub count: Buf,
}

impl Occurrences {
    /// The three buffers' contents for a batch.
    pub fn of(tokens: &[u32]) -> (Vec<u32>, Vec<u32>, [u32; 1]) {
        let mut positions: Vec<u32> = (0..tokens.len() as u32).collect();
        positions.sort_by_key(|p| tokens[*p as usize]); // stable: the positions of a token stay in order
        let begins = |i: &usize| *i == 0 || tokens[positions[*i] as usize] != tokens[positions[*i - 1] as usize];
        let mut starts: Vec<u32> = (0..tokens.len()).filter(begins).map(|i| i as u32).collect();
        let count = [starts.len() as u32];
        starts.resize(tokens.len() + 1, tokens.len() as u32);
        (positions, starts, count)
    }
}

/// Adds `dh` `[tokens, d]` to the rows of the embedding's gradient.
///
/// # Errors
/// A fault of the device.
pub fn embed_backward(dev: &mut dyn Device, tokens: Buf, at: Occurrences, dh: Buf, d: usize, grad: Buf) -> Result<()> {
    let n = tokens.len;
    let args = [
        exact(tokens, Dtype::U32, n),
        exact(at.positions, Dtype::U32, n),
        exact(at.starts, Dtype::U32, n + 1),
        exact(at.count, Dtype::U32, 1),
        room(dh, n * d),
        int(d),
        floats(grad, grad.len),
    ];
    dev.launch("embed_backward", rows(n, 0), &args)
}

/// What the loss is measured against: `[rows]` each, and what the gradient is multiplied by, `[1]`.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// Token that follows
    pub targets: Buf,
    /// Weight in the loss
    pub weights: Buf,
    /// Factor of the gradient
    pub scale: Buf,
}

/// `losses` `[rows]` (float64) `= w · CE`; with `grad`, logits `[rows, vocab]` become their gradients.
///
/// # Errors
/// A fault of the device.
pub fn cross_entropy(
    dev: &mut dyn Device,
    logits: Buf,
    vocab: usize,
    t: Targets,
    grad: bool,
    losses: Buf,
) -> Result<()> {
    let n = t.targets.len;
    let args = [
        room(logits, n * vocab),
        exact(t.targets, Dtype::U32, n),
        exact(t.weights, Dtype::F32, n),
        exact(t.scale, Dtype::F32, 1),
        int(vocab),
        int(grad as usize),
        exact(losses, Dtype::F64, n),
    ];
    dev.launch("cross_entropy", rows(n, ROOM), &args)
}

/// `out` `[1]` = the sum of float64 `values`, which is added to `total` `[1]` too, where given.
///
/// # Errors
/// A fault of the device.
pub fn sum(dev: &mut dyn Device, values: Buf, out: Buf, total: Option<Buf>) -> Result<()> {
    let total = total.map_or(Arg::Null, |t| exact(t, Dtype::F64, 1));
    let args = [exact(values, Dtype::F64, values.len), int(values.len), exact(out, Dtype::F64, 1), total];
    dev.launch("sum_doubles", rows(1, ROOM), &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_grouped_by_token() {
        let (positions, starts, count) = Occurrences::of(&[7, 3, 7, 9, 3, 7]);
        assert_eq!(positions, [1, 4, 0, 2, 5, 3]);
        assert_eq!(count, [3]);
        assert_eq!(starts[..4], [0, 2, 5, 6]);
        assert_eq!(starts.len(), 7);
    }
}
