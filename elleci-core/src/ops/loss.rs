//! The head and the weighted cross-entropy (SPEC §1.4), fused in chunks of tokens: the `[tokens, vocab]` logits never
//! exist whole.

use alloc::vec;
use alloc::vec::Vec;

use super::activation::exp;
use super::matmul::{Out, mat, mat_mut, matmul};
use super::rows::{self, rows_per_task};
use crate::par;
use crate::simd::vectorize;

/// Logits that stand in memory at a time: 32 MiB of float32.
const CHUNK_ELEMS: usize = 8 << 20;

/// Tokens whose logits stand in memory together.
pub fn chunk_tokens(tokens: usize, vocab: usize) -> usize {
    (CHUNK_ELEMS / vocab).max(32).min(tokens)
}

/// Turns rows of logits into rows of `weight · scale · (softmax − onehot(target))`; returns `Σ weight · CE`, in order.
/// Without `GRAD` the rows are left as they are.
fn cross_entropy<const GRAD: bool>(logits: &mut [f32], targets: &[u32], weights: &[f32], scale: f32) -> f64 {
    let vocab = logits.len() / targets.len();
    let n = rows_per_task(targets.len());
    let mut losses = vec![0.0f64; targets.len()];
    let items =
        logits.chunks_mut(n * vocab).zip(targets.chunks(n)).zip(weights.chunks(n)).zip(losses.chunks_mut(n)).collect();
    type Item<'a> = (((&'a mut [f32], &'a [u32]), &'a [f32]), &'a mut [f64]);
    par::for_each(items, |(((logits, targets), weights), losses): Item| {
        vectorize(
            #[inline(always)]
            || {
                for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
                    if weights[i] == 0.0 {
                        if GRAD {
                            row.fill(0.0);
                        }
                        continue;
                    }
                    let target = targets[i] as usize;
                    let max = rows::max(row);
                    let at_target = row[target] - max;
                    let total = if GRAD {
                        for l in row.iter_mut() {
                            *l = exp(*l - max);
                        }
                        rows::sum(row)
                    } else {
                        sum_exp(row, max)
                    };
                    losses[i] = weights[i] as f64 * (libm::log(total as f64) - at_target as f64);
                    if GRAD {
                        let factor = weights[i] * scale / total;
                        for l in row.iter_mut() {
                            *l *= factor;
                        }
                        row[target] -= weights[i] * scale;
                    }
                }
            },
        );
    });
    losses.iter().sum()
}

/// `Σ exp(x − max)` with the partial sums of [`rows::sum`], so that both forms of the loss give the same bits.
#[inline(always)]
fn sum_exp(row: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; rows::LANES];
    for block in row.chunks(rows::LANES) {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += exp(x - max);
        }
    }
    rows::sum(&lanes)
}

/// What the head reads.
#[derive(Clone, Copy, Debug)]
pub struct HeadInput<'a> {
    /// Output of the final norm `[tokens, d]`
    pub normed: &'a [f32],
    /// `lm_head` `[vocab, d]`
    pub head: &'a [f32],
    /// `[tokens]`, each below `vocab` where its weight is not 0
    pub targets: &'a [u32],
    /// `[tokens]`; 0 = ignored
    pub weights: &'a [f32],
}

/// `Σ_t w_t · CE_t`. `logits` is scratch of `chunk_tokens · vocab`.
pub fn head_loss(input: HeadInput, logits: &mut [f32]) -> f64 {
    chunks(input, logits, |chunk, logits| cross_entropy::<false>(logits, chunk.targets, chunk.weights, 0.0))
}

/// [`head_loss`] with the gradients of `scale · Σ_t w_t · CE_t`: `dnormed` written, `dhead` added.
pub fn head_loss_grad(input: HeadInput, scale: f32, logits: &mut [f32], dnormed: &mut [f32], dhead: &mut [f32]) -> f64 {
    let d = input.normed.len() / input.targets.len();
    let vocab = input.head.len() / d;
    let mut start = 0;
    chunks(input, logits, |chunk, logits| {
        let n = chunk.targets.len();
        let loss = cross_entropy::<true>(logits, chunk.targets, chunk.weights, scale);
        let dlogits = mat(logits, n, vocab);
        let dn = &mut dnormed[start * d..(start + n) * d];
        matmul(dlogits, mat(input.head, vocab, d), mat_mut(dn, n, d), Out::Store);
        matmul(dlogits.reversed_axes(), mat(chunk.normed, n, d), mat_mut(dhead, vocab, d), Out::Add);
        start += n;
        loss
    })
}

/// Runs `f` on the logits of every chunk of tokens and adds what it returns, in order.
fn chunks(input: HeadInput, logits: &mut [f32], mut f: impl FnMut(HeadInput, &mut [f32]) -> f64) -> f64 {
    let tokens = input.targets.len();
    let d = input.normed.len() / tokens;
    let vocab = input.head.len() / d;
    let n = chunk_tokens(tokens, vocab);
    let parts: Vec<_> = input.normed.chunks(n * d).zip(input.targets.chunks(n)).zip(input.weights.chunks(n)).collect();
    let mut total = 0.0;
    for ((normed, targets), weights) in parts {
        let logits = &mut logits[..targets.len() * vocab];
        let head = mat(input.head, vocab, d);
        matmul(mat(normed, targets.len(), d), head.reversed_axes(), mat_mut(logits, targets.len(), vocab), Out::Store);
        total += f(HeadInput { normed, head: input.head, targets, weights }, logits);
    }
    total
}
