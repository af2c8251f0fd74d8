//! The head and its loss with all three products in int16: logits, the gradient of the input, and that of the head.
//!
//! With tokens t, vocabulary v, the head `W` `[V, d]` and the normed input `x` `[T, d]`:
//!
//! ```text
//! l[v, t]  = W[v] · x[t]                      e = exp(l − max_v l),   Z[t] = Σ_v e[v, t],   g[t] = weight[t] · scale / Z[t]
//! dx[t]    = g[t] · Σ_v e[v, t] · W[v]  −  weight[t] · scale · W[target[t]]
//! dW[v]    = Σ_t (e[v, t] · g[t]) · x[t]  −  Σ_{t: target[t] = v} weight[t] · scale · x[t]
//! ```
//!
//! The three sums of products are integer products (`ternary::int16`), the terms of the targets are added in float32.
//!
//! **Codes.** A row of an operand, along the depth of a product, is rounded to `rne(v / s)` with a scale of its own,
//! `s = max(max|v| / 32767, ‖v‖ / 46300)` (less a little, see `norm_limit`). The norms of two rows of codes are then
//! below `√(2³¹)`, and by Cauchy and Schwarz so is every partial sum of their product: int32 cannot overflow, whatever the
//! depth, and no bits are held back for a worst case that does not occur. A Gaussian row of 512 keeps codes of 2,046 in the
//! root mean square: it is rounded by 1.4e-4 of that where bfloat16 rounds by 1.7e-3.
//!
//! **The tail of the softmax.** A target's p may be near 1 while most of a vocabulary stands at 1e-6: one scale for both
//! would round the tail to zero. So for `dx` only `min(e, θ)` is rounded, with `θ[t] = 64 · Z[t] / V`, 64 times the row's mean.
//! What is above, `(e − θ) · W[v]`, is added in float32: at most V / 64 entries of a token, as they sum to Z. The scale belongs
//! to a token and `BLOCK` rows of the vocabulary. For `dW` it belongs to a row v and a chunk of tokens: what it
//! rounds by is small beside the largest contribution to that same row.
//!
//! **Error.** Each code is off by at most half a unit, hence with `s_W`, `s_x`, .. the scales of the rows that meet:
//!
//! ```text
//! |δl[v, t]|  <= ½ (s_W · Σ|x[t]| + s_x · Σ|W[v]|) + ¼ d · s_W · s_x
//! |δdx[t, i]| <= |g[t]| · Σ_blocks ½ (s_e · Σ_v|W[v, i]| + s_Wt · Σ_v min(e, θ)) + ¼ B · s_e · s_Wt
//! |δdW[v, i]| <= ½ (s_p · Σ_t|x[t, i]| + s_xt · Σ_t|e · g|) + ¼ n · s_p · s_xt
//! ```
//!
//! `s_e` is at most `√(θ · Z) / 46284 = √V / 8 · θ / 46284`: for V = 32,128 that is 0.031 of a mean entry, so nothing within a
//! factor of 64 of the mean is lost in the least favourable block; it is 0.002 of a mean entry where the mass is spread.
//! To this come float32 roundings, of the logits' error among others, which moves e by the factor exp(δl).
//!
//! **Order.** The logits are stored by vocabulary, `[V, tokens of a chunk]`: the head's rows are read as they lie, the softmax's
//! sums run over whole vectors of tokens, and the codes of e come out in the order of both gradients' operands
//! without a transposition. Only the head itself is needed transposed, once a call.
//!
//! All instruction sets give the same bits, at any thread count.

mod codes;
mod softmax;

use alloc::vec::Vec;

use self::codes::{HeadCodes, InputCodes, row_scale};
use self::softmax::{Block, Excess, Parts, Totals};
use super::loss::HeadInput;
use super::rows;
use crate::par;
use crate::simd::{self, Isa};
use crate::ternary::int16::kernel::{self, Ahead, Kernel, Line, ROWS, WIDTH, WithKernel, Words};

/// Rows of the vocabulary that are multiplied together in the gradients.
const BLOCK: usize = 1024;
/// Logits that stand in memory at a time: 32 MiB of float32.
const CHUNK_ELEMS: usize = 8 << 20;
/// Tokens of a chunk at most.
const CHUNK_TOKENS: usize = 1024;
/// Rows of the logits that one task computes.
const LOGIT_ROWS: usize = 32 * ROWS;
/// Rows of the head's gradient, and of the input's (channels), that one task computes.
const GRAD_ROWS: (usize, usize) = (8 * ROWS, 4 * ROWS);
/// Tokens whose gradient one task finishes.
const FINISH_TOKENS: usize = 16;

/// The form in which a training step computes the head: logits, loss and both gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadPrecision {
    /// float32
    #[default]
    Float32,
    /// Operands rounded to int16, exact integer products: see the module. On machines without AVX2 or better, where it
    /// would be no faster, float32.
    Int16,
}

impl HeadPrecision {
    /// What runs on this machine.
    pub fn here(self) -> HeadPrecision {
        if Isa::detect() >= Isa::Avx2 { self } else { HeadPrecision::Float32 }
    }
}

/// Tokens whose logits stand in memory together, whole panels.
pub fn chunk_tokens(tokens: usize, vocab: usize) -> usize {
    let fitting = CHUNK_ELEMS / vocab / WIDTH * WIDTH;
    fitting.clamp(WIDTH, CHUNK_TOKENS).min(tokens.next_multiple_of(WIDTH))
}

/// Buffers of the head in int16, grown on use.
#[derive(Debug, Default)]
pub struct Int16Head {
    head: HeadCodes,
    input: InputCodes,
    parts: Parts,
    totals: Totals,
    /// Codes of `e · g` of a block `[rows, words along the tokens]`
    words: Vec<i32>,
    word_scales: Vec<f32>,
    /// Codes of `min(e, θ)` of a block: panels of tokens, words along the rows
    lines: Vec<Line>,
    excess: Vec<Excess>,
    /// `Σ_v min(e, θ) · W[v]` `[d, tokens of a chunk]`
    dx: Vec<f32>,
}

impl Int16Head {
    /// Bytes after a call, logits included, but for the entries above θ.
    pub fn planned_bytes(tokens: usize, vocab: usize, d: usize) -> usize {
        let n = chunk_tokens(tokens, vocab);
        let rows = vocab.min(BLOCK);
        let block = 4 * rows * n / 2 + 4 * rows + size_of::<Line>() * n / WIDTH * rows.div_ceil(2);
        HeadCodes::planned_bytes(vocab, d)
            + InputCodes::planned_bytes(n, d)
            + Parts::planned_bytes(vocab, n)
            + Totals::planned_bytes(n)
            + block
            + 4 * d * n
    }

    /// Floats of the logits that a call needs.
    pub fn logits_len(tokens: usize, vocab: usize) -> usize {
        chunk_tokens(tokens, vocab) * vocab
    }

    /// `Σ_t w_t · CE_t`, with the gradients of `scale` times that: `dnormed` written, `dhead` added. `None`, and nothing
    /// written, when the head or the input is not finite or too large to be squared.
    ///
    /// # Panics
    /// When a slice does not have its size; `logits` has [`Int16Head::logits_len`] elements at least.
    pub fn loss_grad(
        &mut self,
        isa: Isa,
        input: HeadInput,
        scale: f32,
        logits: &mut [f32],
        dnormed: &mut [f32],
        dhead: &mut [f32],
    ) -> Option<f64> {
        let tokens = input.targets.len();
        let d = input.normed.len() / tokens;
        let vocab = input.head.len() / d;
        assert!(input.weights.len() == tokens && input.normed.len() == tokens * d, "head: {tokens} tokens of {d}");
        assert!(
            dnormed.len() == tokens * d && dhead.len() == vocab * d,
            "head: gradients of {tokens} and {vocab} x {d}"
        );
        let sound = |(x, w): (&[f32], &f32)| {
            *w == 0.0
                || simd::vectorize(
                    #[inline(always)]
                    || row_scale(x, 1.0).is_finite(),
                )
        };
        if !input.normed.chunks_exact(d).zip(input.weights).all(sound) || !self.head.fill(input.head, vocab, d) {
            return None;
        }
        let n = chunk_tokens(tokens, vocab);
        let mut loss = 0.0;
        let shape = Shape { vocab, d, n };
        let call = Call {
            scratch: self,
            shape,
            input,
            scale,
            logits: &mut logits[..n * vocab],
            dnormed,
            dhead,
            loss: &mut loss,
        };
        kernel::dispatch(isa, call);
        Some(loss)
    }
}

#[derive(Clone, Copy)]
struct Shape {
    vocab: usize,
    d: usize,
    /// Tokens of a chunk, whole panels.
    n: usize,
}

struct Call<'a> {
    scratch: &'a mut Int16Head,
    shape: Shape,
    input: HeadInput<'a>,
    scale: f32,
    logits: &'a mut [f32],
    dnormed: &'a mut [f32],
    dhead: &'a mut [f32],
    loss: &'a mut f64,
}

impl WithKernel for Call<'_> {
    fn run<K: Kernel>(self, kernel: K) {
        let Shape { d, n, .. } = self.shape;
        let HeadInput { normed, head, targets, weights } = self.input;
        let parts =
            normed.chunks(n * d).zip(targets.chunks(n)).zip(weights.chunks(n)).zip(self.dnormed.chunks_mut(n * d));
        for (((normed, targets), weights), dnormed) in parts {
            let input = HeadInput { normed, head, targets, weights };
            *self.loss += self.scratch.chunk(kernel, self.shape, input, self.scale, self.logits, dnormed, self.dhead);
        }
    }
}

impl Int16Head {
    /// One chunk of tokens; returns its part of the loss.
    #[expect(clippy::too_many_arguments, reason = "the call's own, with the kernel and the shape found by it")]
    fn chunk<K: Kernel>(
        &mut self,
        kernel: K,
        shape: Shape,
        input: HeadInput,
        scale: f32,
        logits: &mut [f32],
        dnormed: &mut [f32],
        dhead: &mut [f32],
    ) -> f64 {
        let Shape { vocab, d, n } = shape;
        let Int16Head { head, input: x, parts, totals, words, word_scales, lines, excess, dx } = self;
        x.fill(input.normed, input.weights, n, d);
        parts.resize(vocab, n);
        let pitch = d.div_ceil(2);
        let items = logits.chunks_mut(LOGIT_ROWS * n).zip(parts.maxima.chunks_mut(n)).enumerate().collect();
        par::for_each(items, |(task, (logits, max)): (usize, (&mut [f32], &mut [f32]))| {
            max.fill(f32::NEG_INFINITY);
            let first = task * LOGIT_ROWS;
            let a = Words { data: &head.rows[first * pitch..], pitch, rows: logits.len() / n };
            let (scales, columns) = (&head.row_scales[first..], &x.token_scales[..]);
            sweep(
                kernel,
                a,
                (&x.tokens, pitch),
                (logits, n),
                #[inline(always)]
                |logits, sums, row, col| {
                    let values = logits.iter_mut().zip(sums).zip(&columns[col..]).zip(&mut max[col..]);
                    for (((logit, sum), column), max) in values {
                        *logit = *sum as f32 * scales[row] * column;
                        *max = max.max(*logit);
                    }
                },
            );
        });
        totals.find_max(parts, n);
        totals.at_targets(input, logits, n);
        softmax::exponentials(logits, n, &totals.max, parts);
        let loss = totals.finish(parts, input, scale, vocab, n);
        if !loss.is_finite() {
            dnormed.fill(f32::NAN);
            return loss;
        }
        dx.clear();
        dx.resize(d * n, 0.0);
        excess.clear();
        words.resize(vocab.min(BLOCK) * n / 2, 0);
        word_scales.resize(vocab.min(BLOCK), 0.0);
        lines.resize(n / WIDTH * vocab.min(BLOCK).div_ceil(2), Line::ZERO);
        let blocks = logits.chunks(BLOCK * n).zip(dhead.chunks_mut(BLOCK * d)).enumerate();
        for (b, (e, dhead)) in blocks {
            let rows = e.len() / n;
            let depth = rows.div_ceil(2);
            let (words, lines) = (&mut words[..rows * n / 2], &mut lines[..n / WIDTH * depth]);
            let line_scales = &parts.line_scales[b * n..][..n];
            let block = Block { first: b * BLOCK, e, n, words, word_scales: &mut word_scales[..rows], lines };
            block.round(totals, line_scales, excess);
            let words = Words { data: words, pitch: n / 2, rows };
            accumulate(kernel, words, word_scales, (&x.channels, &x.channel_scales), (dhead, d), GRAD_ROWS.0);
            let columns = Words { data: &head.columns[b * d * BLOCK / 2..], pitch: depth, rows: d };
            let scales = &head.column_scales[b * d..][..d];
            accumulate(kernel, columns, scales, (lines, line_scales), (dx, n), GRAD_ROWS.1);
        }
        finish_input(dx, n, totals, excess, input, dnormed);
        for ((x, target), factor) in input.normed.chunks_exact(d).zip(input.targets).zip(&totals.target) {
            if *factor != 0.0 {
                rows::add_scaled(&mut dhead[*target as usize * d..][..d], -factor, x);
            }
        }
        loss
    }
}

/// `C += (A · B) ⊙ (row scales, column scales)`, spread over the current thread pool by `task_rows`.
fn accumulate<K: Kernel>(
    kernel: K,
    a: Words,
    scales: &[f32],
    (panels, column_scales): (&[Line], &[f32]),
    (c, columns): (&mut [f32], usize),
    task_rows: usize,
) {
    let depth = panels.len() / columns.div_ceil(WIDTH);
    par::for_each(c.chunks_mut(task_rows * columns).enumerate().collect(), |(task, c): (usize, &mut [f32])| {
        let first = task * task_rows;
        let a = Words { data: &a.data[first * a.pitch..], pitch: a.pitch, rows: c.len() / columns };
        sweep(
            kernel,
            a,
            (panels, depth),
            (c, columns),
            #[inline(always)]
            |c, sums, row, col| {
                let scale = scales[first + row];
                for ((c, sum), column) in c.iter_mut().zip(sums).zip(&column_scales[col..]) {
                    *c += *sum as f32 * scale * column;
                }
            },
        );
    });
}

/// Gives `finish` the sums of every row of A with every panel, and where they belong: `(part of C's row, sums, row, first
/// column)`.
#[inline(always)]
fn sweep<K: Kernel>(
    kernel: K,
    a: Words,
    (panels, depth): (&[Line], usize),
    (c, columns): (&mut [f32], usize),
    mut finish: impl FnMut(&mut [f32], &[i32; WIDTH], usize, usize),
) {
    let mut block: kernel::Block = [[0; WIDTH]; ROWS];
    for first in (0..a.rows).step_by(ROWS) {
        let data = &a.data[first * a.pitch..];
        let group = Words { data, pitch: a.pitch, rows: (a.rows - first).min(ROWS) };
        for (p, panel) in panels.chunks(depth).enumerate() {
            let output = c[first * columns + p * WIDTH..].as_ptr();
            let next = data.as_ptr().wrapping_add(ROWS * a.pitch);
            let given = p * depth.div_ceil(8);
            let ahead = Ahead { words: next, pitch: a.pitch, depth, given, output: (output, columns) };
            kernel.block(group, panel, ahead, &mut block);
            simd::vectorize(
                #[inline(always)]
                || {
                    for (r, sums) in block[..group.rows].iter().enumerate() {
                        let row = &mut c[(first + r) * columns..][..columns][p * WIDTH..];
                        match row.first_chunk_mut::<WIDTH>() {
                            Some(row) => finish(row, sums, first + r, p * WIDTH),
                            None => finish(row, sums, first + r, p * WIDTH),
                        }
                    }
                },
            );
        }
    }
}

/// `dnormed` from `dx` `[d, n]`, the entries above θ, and the targets.
fn finish_input(dx: &[f32], n: usize, totals: &Totals, excess: &mut [Excess], input: HeadInput, dnormed: &mut [f32]) {
    let d = dx.len() / n;
    // Stable: a token's entries stay in the order of the vocabulary.
    excess.sort_by_key(|e| e.token);
    let excess = &*excess;
    par::for_each(
        dnormed.chunks_mut(FINISH_TOKENS * d).enumerate().collect(),
        |(task, dnormed): (usize, &mut [f32])| {
            let first = task * FINISH_TOKENS;
            simd::vectorize(
                #[inline(always)]
                || {
                    for (i, dx) in dx.chunks_exact(n).enumerate() {
                        for (row, v) in dnormed.chunks_exact_mut(d).zip(&dx[first..]) {
                            row[i] = *v;
                        }
                    }
                    for (t, row) in (first..).zip(dnormed.chunks_exact_mut(d)) {
                        let from = excess.partition_point(|e| (e.token as usize) < t);
                        for e in excess[from..].iter().take_while(|e| e.token as usize == t) {
                            rows::add_scaled(row, e.value, &input.head[e.row as usize * d..][..d]);
                        }
                        row.iter_mut().for_each(|v| *v *= totals.factor[t]);
                        if totals.target[t] != 0.0 {
                            let head = &input.head[input.targets[t] as usize * d..][..d];
                            rows::add_scaled(row, -totals.target[t], head);
                        }
                    }
                },
            );
        },
    );
}

#[cfg(test)]
mod tests;
