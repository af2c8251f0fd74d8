//! Multi-head latent attention over a pass (SPEC §1.2).
//!
//! The only token of a call reads the cached latents themselves: `kv_up` is absorbed into its query on one side and into its output on the
//! other, and the context is cut into blocks whose partial softmaxes are put together in order. A run of tokens expands the
//! latents, some at a time, into keys and values that all its queries share; the softmax goes along. Either
//! way little grows with the context but the cache: one token keeps a partial softmax a head and block of 64 (of `elleci-1.5b` two thirds of what
//! a layer's cache takes).

use alloc::vec::Vec;

use super::absorbed::{self, absorbed};
use super::expanded::{self, expanded};
use super::pass::{Pass, Scratch, grown};
use super::schedule::Segment;
use super::session::{LayerState, MlaCache};
use crate::config::ModelConfig;
use crate::ops::norm::rmsnorm_quantize;
use crate::par;
use crate::params::MlaIds;

/// Working memory of a sequence, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Room {
    absorbed: absorbed::Room,
    expanded: expanded::Room,
}

/// Reads `scratch.norm`, writes `scratch.y`, of the rows whose output is wanted.
pub(super) fn forward(pass: &Pass, ids: &MlaIds, scratch: &mut Scratch) {
    let (c, n, outs) = (pass.call.model.config(), pass.rows, pass.outs());
    let (rank, q_row, o_row) = (c.kv_rank, c.n_heads * c.d_qk(), c.n_heads * c.d_v);
    let latent_row = rank + c.d_rope;
    let Scratch { a, b, c: o, norm, quantized, attention, y, .. } = scratch;
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
    par::for_each_kept(items, attention, |room: &mut Room, (segment, cache, q, o)| {
        // Whether it is a call's only token.
        let alone = segment.feed_len == 1 && !pass.call.one_form;
        if alone {
            absorbed(c, &kv_up, cache, q, &mut room.absorbed, o);
        } else {
            expanded(c, &kv_up, cache, q, &mut room.expanded, o);
        }
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
