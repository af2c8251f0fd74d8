//! Multi-head latent attention over a pass (SPEC §1.2).
//!
//! The only token of a call reads the cached latents themselves: `kv_up` is absorbed into its query on one side and into its output on the
//! other, and the context is cut into blocks whose partial softmaxes are put together in order. A run of tokens expands the
//! latents, some at a time, into keys and values that all its queries share; the softmax goes along. Either
//! way little grows with the context but the cache: one token keeps a partial softmax a head and block of 64 (of `elleci-1.5b` two thirds of what
//! a layer's cache takes).

use alloc::vec;
use alloc::vec::Vec;

use ndarray::s;

use super::absorbed::absorbed;
use super::pass::{Pass, Scratch, grown};
use super::schedule::Segment;
use super::session::{LayerState, MlaCache, PAGE};
use crate::config::ModelConfig;
use crate::ops::activation::exp;
use crate::ops::matmul::{Out, mat, mat_mut, matmul_serial};
use crate::ops::norm::rmsnorm_quantize;
use crate::ops::rows;
use crate::par;
use crate::params::MlaIds;
use crate::simd::vectorize;
use crate::ternary::packed::PackedTernary;

/// Cached tokens whose latents are expanded together: bounds the memory for it. Divides [`PAGE`].
const EXPAND: usize = 128;
/// Scores that `gemm` computes in another order of additions: products of up to so many, or of a single row. They are filled up, because
/// the bits of a row are not to depend on how many others there are. (It also has a form of its own for sums of one or two terms, and
/// cuts sums of more than 512, wherever it likes; heads are narrower.)
const SMALL: usize = 256;

/// Reads `scratch.norm`, writes `scratch.y`, of the rows whose output is wanted.
pub(super) fn forward(pass: &Pass, ids: &MlaIds, scratch: &mut Scratch) {
    let (c, n, outs) = (pass.call.model.config(), pass.rows, pass.outs());
    let (rank, q_row, o_row) = (c.kv_rank, c.n_heads * c.d_qk(), c.n_heads * c.d_v);
    let latent_row = rank + c.d_rope;
    let Scratch { a, b, c: o, norm, quantized, absorb, y, .. } = scratch;
    let (q, ckr) = (grown(a, outs * q_row), grown(b, n * latent_row));
    if outs == n {
        pass.project_all([ids.q, ids.kv_down], norm, [&mut *q, &mut *ckr]);
    } else {
        pass.project(ids.kv_down, norm, ckr);
        norm.keep((0..outs).map(|i| pass.out_row(i)));
        pass.project(ids.q, norm, q);
    }
    for (i, q) in q.chunks_exact_mut(q_row).enumerate() {
        let row = pass.out_row(i);
        q.chunks_exact_mut(c.d_qk()).for_each(|head| pass.rope.rotate(&mut head[c.d_nope..], row));
    }
    for (row, ckr) in ckr.chunks_exact_mut(latent_row).enumerate() {
        pass.rope.rotate(&mut ckr[rank..], row);
    }
    let (q, ckr): (&[f32], &[f32]) = (q, ckr);
    quantized.resize(n, rank);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&ckr[t * latent_row..][..rank]),
        pass.call.model.floats(ids.kv_norm),
        c.norm_eps,
        quantized,
        None,
    );
    // With the pages as they are now, shared: whoever goes on with the sequence need not wait for this pass to have read them.
    let caches: Vec<MlaCache> = pass.with_states(|states| {
        let pushed = states.into_iter().map(|(segment, cache)| {
            let LayerState::Mla(cache) = cache else { unreachable!("the session was made from this layout") };
            for row in segment.row..segment.row + segment.len {
                let codes = &quantized.codes[row * rank..(row + 1) * rank];
                cache.push(c, codes, quantized.scales[row], &ckr[row * latent_row + rank..(row + 1) * latent_row]);
            }
            cache.clone()
        });
        pushed.collect()
    });
    if outs == 0 {
        return;
    }
    let kv_up = pass.call.model.ternary(ids.kv_up);
    let (mut q_rest, mut o_rest) = (q, grown(o, outs * o_row));
    let mut items: Vec<(&Segment, &MlaCache, &[f32], &mut [f32])> = Vec::with_capacity(caches.len());
    for (segment, cache) in pass.segments.iter().zip(&caches) {
        let len = pass.outs_of(segment);
        let (own_o, later) = core::mem::take(&mut o_rest).split_at_mut(len * o_row);
        let own_q;
        ((own_q, q_rest), o_rest) = (q_rest.split_at(len * q_row), later);
        if len > 0 {
            items.push((segment, cache, own_q, own_o));
        }
    }
    par::for_each_kept(items, absorb, |room, (segment, cache, q, o)| {
        // Whether it is a call's only token.
        let alone = segment.feed_len == 1 && !pass.call.one_form;
        if alone { absorbed(c, &kv_up, cache, q, room, o) } else { expanded(c, &kv_up, cache, q, o) }
    });
    let o: &[f32] = &o[..outs * o_row];
    pass.expect([ids.out]);
    quantized.resize(outs, o_row);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&o[t * o_row..(t + 1) * o_row]),
        pass.call.model.floats(ids.out_norm),
        c.norm_eps,
        quantized,
        None,
    );
    pass.project(ids.out, quantized, grown(y, outs * c.d_model));
}

pub(super) fn softmax_scale(c: &ModelConfig) -> f32 {
    1.0 / libm::sqrtf(c.d_qk() as f32)
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
