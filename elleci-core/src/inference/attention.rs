//! Multi-head latent attention over a pass (SPEC §1.2).
//!
//! The only token of a call reads the cached latents themselves: `kv_up` is absorbed into its query on one side and into its output on the
//! other, and the context is cut into blocks whose partial softmaxes are put together in order. A run of tokens expands the
//! latents, some at a time, into keys and values that all its queries share; the softmax goes along. Either
//! way little grows with the context but the cache: one token keeps a partial softmax a block, two thirds of a layer's cache at most.

use alloc::vec;
use alloc::vec::Vec;

use ndarray::s;
use pulp::{Simd, WithSimd};

use super::pass::{Pass, Scratch, grown};
use super::schedule::Segment;
use super::session::{LayerState, MlaCache, PAGE};
use crate::config::ModelConfig;
use crate::ops::activation::exp;
use crate::ops::lanes::{dispatch, dots};
use crate::ops::matmul::{Out, mat, mat_mut, matmul_serial};
use crate::ops::norm::rmsnorm_quantize;
use crate::ops::rows;
use crate::par;
use crate::params::MlaIds;
use crate::simd::vectorize;
use crate::ternary::packed::PackedTernary;

/// Cached tokens of a block of the absorbed attention: a task of its own. Divides [`PAGE`].
const BLOCK: usize = 64;

/// Cached tokens whose latents are expanded together: bounds the memory for it. Divides [`PAGE`].
const EXPAND: usize = 128;
/// Scores that `gemm` computes in another order of additions: products of up to so many, or of a single row. They are filled up, because
/// the bits of a row are not to depend on how many others there are. (It also has a form of its own for sums of one or two terms, and
/// cuts sums of more than 512, wherever it likes; heads are narrower.)
const SMALL: usize = 256;

/// Reads `scratch.norm`, writes `scratch.y`.
pub(super) fn forward(pass: &Pass, ids: &MlaIds, scratch: &mut Scratch) {
    let (c, n) = (pass.model.config(), pass.rows);
    let (rank, q_row, o_row) = (c.kv_rank, c.n_heads * c.d_qk(), c.n_heads * c.d_v);
    let latent_row = rank + c.d_rope;
    let Scratch { a, b, c: o, norm, quantized, y, .. } = scratch;
    let (q, ckr) = (grown(a, n * q_row), grown(b, n * latent_row));
    pass.project_all([ids.q, ids.kv_down], norm, [&mut *q, &mut *ckr]);
    for (row, (q, ckr)) in q.chunks_exact_mut(q_row).zip(ckr.chunks_exact_mut(latent_row)).enumerate() {
        q.chunks_exact_mut(c.d_qk()).for_each(|head| pass.rope.rotate(&mut head[c.d_nope..], row));
        pass.rope.rotate(&mut ckr[rank..], row);
    }
    let (q, ckr): (&[f32], &[f32]) = (q, ckr);
    quantized.resize(n, rank);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&ckr[t * latent_row..][..rank]),
        pass.model.floats(ids.kv_norm),
        c.norm_eps,
        quantized,
        None,
    );
    let kv_up = pass.model.ternary(ids.kv_up);
    let mut rest = grown(o, n * o_row);
    pass.with_states(|states| {
        let mut items: Vec<(&Segment, &mut MlaCache, &mut [f32])> = Vec::with_capacity(states.len());
        for (segment, cache) in states {
            let LayerState::Mla(cache) = cache else { unreachable!("the session was made from this layout") };
            for row in segment.row..segment.row + segment.len {
                let codes = &quantized.codes[row * rank..(row + 1) * rank];
                cache.push(c, codes, quantized.scales[row], &ckr[row * latent_row + rank..(row + 1) * latent_row]);
            }
            let (own, later) = core::mem::take(&mut rest).split_at_mut(segment.len * o_row);
            rest = later;
            items.push((segment, cache, own));
        }
        par::for_each(items, |(segment, cache, o)| {
            let q = &q[segment.row * q_row..(segment.row + segment.len) * q_row];
            // Whether it is a call's only token.
            let absorb = segment.feed_len == 1 && !pass.call.one_form;
            if absorb { absorbed(c, &kv_up, cache, q, o) } else { expanded(c, &kv_up, cache, q, o) }
        });
    });
    let o: &[f32] = &o[..n * o_row];
    pass.expect(&[ids.out]);
    quantized.resize(n, o_row);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&o[t * o_row..(t + 1) * o_row]),
        pass.model.floats(ids.out_norm),
        c.norm_eps,
        quantized,
        None,
    );
    pass.project(ids.out, quantized, grown(y, n * c.d_model));
}

fn softmax_scale(c: &ModelConfig) -> f32 {
    1.0 / libm::sqrtf(c.d_qk() as f32)
}

/// The newest token: `q` `[heads, d_nope + d_rope]`, `o` `[heads, d_v]`.
fn absorbed(c: &ModelConfig, kv_up: &PackedTernary, cache: &MlaCache, q: &[f32], o: &mut [f32]) {
    let (rank, heads, dn, dv) = (c.kv_rank, c.n_heads, c.d_nope, c.d_v);
    // A query that meets latents and shared keys at once: [W₃ᵀ q_nope · γ | q_rope] · scale
    let width = rank + c.d_rope;
    let scale = softmax_scale(c);
    let mut queries = vec![0.0f32; heads * width];
    let items = queries.chunks_exact_mut(width).zip(q.chunks_exact(c.d_qk())).enumerate().collect();
    par::for_each(items, |(h, (query, q)): (usize, (&mut [f32], &[f32]))| {
        let (latent, rope) = query.split_at_mut(rank);
        let first = h * (dn + dv);
        kv_up.add_transposed_times(first..first + dn, &q[..dn], latent);
        latent.iter_mut().for_each(|l| *l *= scale * kv_up.gamma());
        rope.iter_mut().zip(&q[dn..]).for_each(|(r, q)| *r = q * scale);
    });

    let blocks = cache.len.div_ceil(BLOCK);
    let mut partials = vec![0.0f32; blocks * heads * (rank + 2)];
    let items = partials.chunks_exact_mut(heads * (rank + 2)).enumerate().collect();
    let queries = &queries;
    par::for_each(items, |(block, partial): (usize, &mut [f32])| {
        dispatch(AttendBlock { c, cache, block, queries, partial });
    });

    let items = o.chunks_exact_mut(dv).enumerate().collect();
    let partials = &partials;
    par::for_each(items, |(h, o): (usize, &mut [f32])| {
        let (mut mixed, mut total) = (vec![0.0f32; rank], 0.0);
        vectorize(
            #[inline(always)]
            || {
                let of_head = || partials.chunks_exact(rank + 2).skip(h).step_by(heads);
                let max = of_head().fold(f32::NEG_INFINITY, |m, p| m.max(p[rank]));
                for partial in of_head() {
                    let weight = exp(partial[rank] - max);
                    total += weight * partial[rank + 1];
                    rows::add_scaled(&mut mixed, weight, &partial[..rank]);
                }
            },
        );
        let first = h * (dn + dv) + dn;
        kv_up.times(first..first + dv, &mixed, o);
        o.iter_mut().for_each(|o| *o *= kv_up.gamma() / total);
    });
}

/// Heads whose scores are made together.
const HEADS: usize = 8;
/// Channels of the latent that are mixed at once, in registers.
const MIX: usize = 64;

/// Writes per head `[rank]` latents weighted by `exp(score - max)`, then the maximum, then the sum of the weights.
struct AttendBlock<'a> {
    c: &'a ModelConfig,
    cache: &'a MlaCache,
    block: usize,
    queries: &'a [f32],
    partial: &'a mut [f32],
}

impl WithSimd for AttendBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        attend_block(simd, self.c, self.cache, self.block, self.queries, self.partial);
    }
}

#[inline(always)]
fn attend_block<S: Simd>(
    simd: S,
    c: &ModelConfig,
    cache: &MlaCache,
    block: usize,
    queries: &[f32],
    partial: &mut [f32],
) {
    let (rank, d_rope, heads) = (c.kv_rank, c.d_rope, c.n_heads);
    let width = rank + d_rope;
    let first = block * BLOCK;
    let n = (cache.len - first).min(BLOCK);
    let (page, at) = (&cache.pages[first / PAGE], first % PAGE);
    let padded = width.next_multiple_of(MIX);
    let mut latents = vec![0.0f32; n * padded];
    for (t, row) in latents.chunks_exact_mut(padded).enumerate() {
        let (t, scale) = (at + t, page.scales[at + t]);
        let codes = &page.codes[t * rank..(t + 1) * rank];
        row.iter_mut().zip(codes).for_each(|(r, code)| *r = scale * *code as f32);
        row[rank..width].copy_from_slice(&page.keys[t * d_rope..(t + 1) * d_rope]);
    }
    let mut scores = vec![0.0f32; heads * BLOCK];
    let mut group = vec![0.0f32; HEADS * padded];
    for (g, queries) in queries.chunks(HEADS * width).enumerate() {
        for (to, query) in group.chunks_exact_mut(padded).zip(queries.chunks_exact(width)) {
            to[..width].copy_from_slice(query);
        }
        let heads = queries.len() / width;
        for (t, row) in latents.chunks_exact(padded).enumerate() {
            let mut sums = [0.0; HEADS];
            if heads <= HEADS / 2 {
                sums[..HEADS / 2].copy_from_slice(&dots::<S, { HEADS / 2 }>(simd, &group[..HEADS / 2 * padded], row));
            } else {
                sums = dots(simd, &group, row);
            }
            for i in 0..heads {
                scores[(g * HEADS + i) * BLOCK + t] = sums[i];
            }
        }
    }
    for (scores, partial) in scores.chunks_exact_mut(BLOCK).zip(partial.chunks_exact_mut(rank + 2)) {
        let scores = &mut scores[..n];
        let max = rows::max(scores);
        scores.iter_mut().for_each(|s| *s = exp(*s - max));
        partial[rank] = max;
        partial[rank + 1] = rows::sum(scores);
        for (chunk, mixed) in partial[..rank].chunks_mut(MIX).enumerate() {
            let mut acc = [0.0f32; MIX];
            for (row, p) in latents.chunks_exact(padded).zip(scores.iter()) {
                let row: &[f32; MIX] = row[chunk * MIX..][..MIX].try_into().expect("rows are whole chunks");
                for l in 0..MIX {
                    acc[l] += p * row[l];
                }
            }
            mixed.copy_from_slice(&acc[..mixed.len()]);
        }
    }
}

/// The newest tokens: `q` `[len, heads, d_nope + d_rope]`, `o` `[len, heads, d_v]`. A row's bits depend on its own context alone.
fn expanded(c: &ModelConfig, kv_up: &PackedTernary, cache: &MlaCache, q: &[f32], o: &mut [f32]) {
    let (rank, heads, qk, dn, dv) = (c.kv_rank, c.n_heads, c.d_qk(), c.d_nope, c.d_v);
    let (len, q_row, kv_row) = (q.len() / (heads * qk), heads * qk, heads * (dn + dv));
    let (past, rows) = (cache.len - len, len.max(2));
    let (mut filled_q, mut filled_keys) = (Vec::new(), Vec::new());
    let q = mat(filled(q, rows * q_row, &mut filled_q), rows, q_row);
    let least = (SMALL / rows + 1).max(3);
    let mut kv = vec![0.0f32; EXPAND.min(cache.len).max(least) * kv_row];
    let mut states: Vec<HeadState> = (0..heads).map(|_| HeadState::new(rows, dv)).collect();
    for first in (0..cache.len).step_by(EXPAND) {
        let seen_by_any = EXPAND.min(cache.len - first);
        let n = seen_by_any.max(least);
        let (page, at) = (&cache.pages[first / PAGE], first % PAGE);
        let own = at..at + seen_by_any;
        let codes = &page.codes[own.start * rank..own.end * rank];
        kv_up.forward(codes, &page.scales[own.clone()], &mut kv[..seen_by_any * kv_row]);
        let keys = &page.keys[own.start * c.d_rope..own.end * c.d_rope];
        let keys = mat(filled(keys, n * c.d_rope, &mut filled_keys), n, c.d_rope);
        let kv = mat(&kv[..n * kv_row], n, kv_row);
        par::for_each(states.iter_mut().enumerate().collect(), |(h, state)| {
            let mut scores = vec![0.0f32; rows * n];
            let q = q.slice(s![.., h * qk..(h + 1) * qk]);
            let kv = kv.slice(s![.., h * (dn + dv)..(h + 1) * (dn + dv)]);
            let mut view = mat_mut(&mut scores, rows, n);
            let nope = kv.slice(s![.., ..dn]).reversed_axes();
            matmul_serial(q.slice(s![.., ..dn]), nope, view.view_mut(), Out::Store);
            matmul_serial(q.slice(s![.., dn..]), keys.reversed_axes(), view, Out::Add);
            vectorize(
                #[inline(always)]
                || {
                    for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
                        // The tokens of these that row i may see.
                        let seen = (past + i + 1).saturating_sub(first).min(seen_by_any);
                        state.weigh(i, softmax_scale(c), scores, seen);
                    }
                },
            );
            let mixed = mat_mut(&mut state.mixed, rows, dv);
            matmul_serial(mat(&scores, rows, n), kv.slice(s![.., dn..]), mixed, Out::Add);
        });
    }
    for (h, state) in states.iter().enumerate() {
        for (i, row) in o.chunks_exact_mut(heads * dv).enumerate() {
            let total = state.total[i];
            for (o, mixed) in row[h * dv..(h + 1) * dv].iter_mut().zip(&state.mixed[i * dv..]) {
                *o = mixed / total;
            }
        }
    }
}

/// `values` with zeros up to `len`: itself where it has them, else in `buffer`.
fn filled<'a>(values: &'a [f32], len: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
    if values.len() == len {
        return values;
    }
    buffer.clear();
    buffer.extend_from_slice(values);
    buffer.resize(len, 0.0);
    buffer
}

/// A softmax that goes along with the context, for the rows of one head.
struct HeadState {
    max: Vec<f32>,
    total: Vec<f32>,
    /// `[len, d_v]`
    mixed: Vec<f32>,
    dv: usize,
}

impl HeadState {
    fn new(len: usize, dv: usize) -> HeadState {
        HeadState { max: vec![f32::NEG_INFINITY; len], total: vec![0.0; len], mixed: vec![0.0; len * dv], dv }
    }

    /// Turns the scores of row `i` into weights, and what was mixed so far to the new maximum.
    #[inline(always)]
    fn weigh(&mut self, i: usize, scale: f32, scores: &mut [f32], seen: usize) {
        let (scores, hidden) = scores.split_at_mut(seen);
        hidden.fill(0.0);
        if scores.is_empty() {
            return;
        }
        scores.iter_mut().for_each(|s| *s *= scale);
        let max = self.max[i].max(rows::max(scores));
        // The first tokens have nothing to correct: exp(-inf - max) is 0.
        let correction = exp(self.max[i] - max);
        scores.iter_mut().for_each(|s| *s = exp(*s - max));
        self.max[i] = max;
        self.total[i] = self.total[i] * correction + rows::sum(scores);
        self.mixed[i * self.dv..(i + 1) * self.dv].iter_mut().for_each(|m| *m *= correction);
    }
}
