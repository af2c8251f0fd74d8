//! Causal attention over MLA's pieces: queries `[q_nope; q_rope]` per head, keys `[k_nope; k_rope]` with one `k_rope`
//! shared by all heads, values `[v]` (SPEC §1.2). Rotation has already happened.
//!
//! Rows are taken in blocks: the scores of a block against all keys up to it stand in cache, never the whole
//! `[T, T]` matrix. The forward keeps the log-sum-exp of a row, from which the backward recomputes its probabilities.

use alloc::vec;
use alloc::vec::Vec;
use ndarray::{ArrayView2, ArrayView4, ArrayViewMut2, ArrayViewMut4, Axis, s};

use super::activation::exp;
use super::matmul::{Out, matmul_serial};
use super::rows;
use crate::par;
use crate::simd::vectorize;

/// Query rows whose scores stand in cache together.
const BLOCK: usize = 64;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the model configuration")]
pub struct AttentionShape {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub d_nope: usize,
    pub d_rope: usize,
    pub d_v: usize,
}

impl AttentionShape {
    fn scale(&self) -> f32 {
        1.0 / libm::sqrtf((self.d_nope + self.d_rope) as f32)
    }
}

/// Splits `[batch, seq, heads, width]` into one `[seq, width]` view a (batch, head), batch-major.
fn heads<'a>(data: &'a [f32], shape: &AttentionShape, width: usize) -> Vec<ArrayView2<'a, f32>> {
    let dim = (shape.batch, shape.seq, shape.heads, width);
    let all = ArrayView4::from_shape(dim, data).expect("a [tokens, heads * width] buffer");
    (0..shape.batch * shape.heads).map(|i| all.slice_move(s![i / shape.heads, .., i % shape.heads, ..])).collect()
}

/// [`heads`], mutable: the views are split off one by one, which is how they are known not to overlap.
fn heads_mut<'a>(data: &'a mut [f32], shape: &AttentionShape, width: usize) -> Vec<ArrayViewMut2<'a, f32>> {
    let dim = (shape.batch, shape.seq, shape.heads, width);
    let mut rest = ArrayViewMut4::from_shape(dim, data).expect("a [tokens, heads * width] buffer");
    let mut views = Vec::with_capacity(shape.batch * shape.heads);
    for _ in 0..shape.batch {
        let (row, tail) = rest.split_at(Axis(0), 1);
        rest = tail;
        let mut row = row.index_axis_move(Axis(0), 0);
        for _ in 0..shape.heads {
            let (head, tail) = row.split_at(Axis(1), 1);
            row = tail;
            views.push(head.index_axis_move(Axis(1), 0));
        }
    }
    views
}

/// One sequence's `[seq, stride]` rows of the shared rotated key, which stands after the latent in `ckr`.
fn shared_keys<'a>(ckr: &'a [f32], shape: &AttentionShape, rank: usize) -> Vec<ArrayView2<'a, f32>> {
    let width = rank + shape.d_rope;
    ckr.chunks_exact(shape.seq * width)
        .map(|seq| super::matmul::mat(seq, shape.seq, width).slice_move(s![.., rank..]))
        .collect()
}

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput<'a> {
    /// `[tokens, heads * (d_nope + d_rope)]`, rotated
    pub q: &'a [f32],
    /// `[tokens, heads * (d_nope + d_v)]`
    pub kv: &'a [f32],
    /// `[tokens, rank + d_rope]`: the latent (not read here), then the rotated shared key
    pub ckr: &'a [f32],
    /// Width of the latent in `ckr`
    pub rank: usize,
}

/// Scores of query rows `i0..i0+n` against keys `0..keys`, scaled, into `scores` `[n, keys]`.
fn block_scores(
    q: ArrayView2<f32>,
    kv: ArrayView2<f32>,
    kr: ArrayView2<f32>,
    dn: usize,
    keys: usize,
    scores: ArrayViewMut2<f32>,
) {
    let mut scores = scores;
    matmul_serial(q.slice(s![.., ..dn]), kv.slice(s![..keys, ..dn]).reversed_axes(), scores.view_mut(), Out::Store);
    matmul_serial(q.slice(s![.., dn..]), kr.slice(s![..keys, ..]).reversed_axes(), scores, Out::Add);
}

/// `o` `[tokens, heads * d_v]` and the log-sum-exp of every row, `lse` `[batch, heads, seq]`.
pub fn attention_forward(shape: &AttentionShape, input: AttentionInput, o: &mut [f32], lse: &mut [f32]) {
    let (dn, scale, t) = (shape.d_nope, shape.scale(), shape.seq);
    let q = heads(input.q, shape, dn + shape.d_rope);
    let kv = heads(input.kv, shape, dn + shape.d_v);
    let kr = shared_keys(input.ckr, shape, input.rank);
    let items: Vec<_> =
        q.into_iter().zip(kv).zip(heads_mut(o, shape, shape.d_v)).zip(lse.chunks_exact_mut(t)).enumerate().collect();
    par::for_each(items, |(bh, (((q, kv), mut o), lse))| {
        let kr = kr[bh / shape.heads];
        let mut buffer = vec![0.0f32; BLOCK.min(t) * t];
        for i0 in (0..t).step_by(BLOCK) {
            let n = BLOCK.min(t - i0);
            let keys = i0 + n;
            let p = &mut buffer[..n * keys];
            block_scores(q.slice(s![i0..keys, ..]), kv, kr, dn, keys, super::matmul::mat_mut(p, n, keys));
            vectorize(
                #[inline(always)]
                || {
                    for (i, row) in p.chunks_exact_mut(keys).enumerate() {
                        let (seen, future) = row.split_at_mut(i0 + i + 1);
                        let max = rows::max(seen);
                        for s in seen.iter_mut() {
                            *s = exp((*s - max) * scale);
                        }
                        let total = rows::sum(seen);
                        lse[i0 + i] = max * scale + libm::logf(total);
                        let inverse = 1.0 / total;
                        for s in seen.iter_mut() {
                            *s *= inverse;
                        }
                        future.fill(0.0);
                    }
                },
            );
            let p = super::matmul::mat(p, n, keys);
            matmul_serial(p, kv.slice(s![..keys, dn..]), o.slice_mut(s![i0..keys, ..]), Out::Store);
        }
    });
}

/// Gradients of an attention's inputs.
#[derive(Debug)]
pub struct AttentionGrad<'a> {
    /// `[tokens, heads * (d_nope + d_rope)]`, written
    pub dq: &'a mut [f32],
    /// `[tokens, heads * (d_nope + d_v)]`, written
    pub dkv: &'a mut [f32],
    /// `[batch, heads, seq, d_rope]`: every head's share of the shared key's gradient, written
    pub dkr_heads: &'a mut [f32],
}

/// Backward of [`attention_forward`] from its input, its output `o`, `lse`, and the output's gradient `d_o`.
pub fn attention_backward(
    shape: &AttentionShape,
    input: AttentionInput,
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    grad: AttentionGrad,
) {
    let (dn, dr, dv, scale, t) = (shape.d_nope, shape.d_rope, shape.d_v, shape.scale(), shape.seq);
    let kr = shared_keys(input.ckr, shape, input.rank);
    let reads = heads(input.q, shape, dn + dr).into_iter().zip(heads(input.kv, shape, dn + dv));
    let outputs = heads(o, shape, dv).into_iter().zip(heads(d_o, shape, dv)).zip(lse.chunks_exact(t));
    let writes = heads_mut(grad.dq, shape, dn + dr)
        .into_iter()
        .zip(heads_mut(grad.dkv, shape, dn + dv))
        .zip(grad.dkr_heads.chunks_exact_mut(t * dr));
    let items: Vec<_> = reads.zip(outputs).zip(writes).enumerate().collect();
    par::for_each(items, |(bh, (((q, kv), ((o, d_o), lse)), ((mut dq, mut dkv), dkr)))| {
        let kr = kr[bh / shape.heads];
        let mut dkr = super::matmul::mat_mut(dkr, t, dr);
        dkv.fill(0.0);
        dkr.fill(0.0);
        let mut buffer = vec![0.0f32; 2 * BLOCK.min(t) * t];
        let (p_buffer, ds_buffer) = buffer.split_at_mut(BLOCK.min(t) * t);
        let mut gap = [0.0f32; BLOCK];
        for i0 in (0..t).step_by(BLOCK) {
            let n = BLOCK.min(t - i0);
            let keys = i0 + n;
            let (p, ds) = (&mut p_buffer[..n * keys], &mut ds_buffer[..n * keys]);
            let (q, d_o) = (q.slice(s![i0..keys, ..]), d_o.slice(s![i0..keys, ..]));
            block_scores(q, kv, kr, dn, keys, super::matmul::mat_mut(p, n, keys));
            matmul_serial(
                d_o,
                kv.slice(s![..keys, dn..]).reversed_axes(),
                super::matmul::mat_mut(ds, n, keys),
                Out::Store,
            );
            for (i, gap) in gap[..n].iter_mut().enumerate() {
                // Σ_j p_ij dp_ij = dO_i · O_i
                *gap = d_o.row(i).iter().zip(o.row(i0 + i)).map(|(a, b)| a * b).sum();
            }
            vectorize(
                #[inline(always)]
                || {
                    for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                        let seen = i0 + i + 1;
                        for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                            *p = exp(*p * scale - lse[i0 + i]);
                            *ds = *p * (*ds - gap[i]) * scale;
                        }
                        p[seen..].fill(0.0);
                        ds[seen..].fill(0.0);
                    }
                },
            );
            let (p, ds) = (super::matmul::mat(p, n, keys), super::matmul::mat(ds, n, keys));
            matmul_serial(ds, kv.slice(s![..keys, ..dn]), dq.slice_mut(s![i0..keys, ..dn]), Out::Store);
            matmul_serial(ds, kr.slice(s![..keys, ..]), dq.slice_mut(s![i0..keys, dn..]), Out::Store);
            let (p, ds) = (p.reversed_axes(), ds.reversed_axes());
            matmul_serial(ds, q.slice(s![.., ..dn]), dkv.slice_mut(s![..keys, ..dn]), Out::Add);
            matmul_serial(ds, q.slice(s![.., dn..]), dkr.slice_mut(s![..keys, ..]), Out::Add);
            matmul_serial(p, d_o, dkv.slice_mut(s![..keys, dn..]), Out::Add);
        }
    });
}
