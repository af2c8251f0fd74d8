//! Attention of a call's only token: it reads the cached latents themselves (SPEC §1.2, absorbed decode).
//!
//! `kv_up` is absorbed into the query on one side and into the output on the other. The context is cut into blocks, each a task with a
//! softmax of its own; these are put together in order. A block's latents become floats once. Its products are two small matrix products,
//! `scores = queries · latentsᵀ` and `mixed = weights · latents`, blocked so that a value that is loaded meets several others: long contexts
//! are bound by multiply-adds, `heads · (2 kv_rank + d_rope)` a cached token.

use alloc::vec::Vec;

use pulp::{Simd, WithSimd};

use super::attention::softmax_scale;
use super::pass::grown;
use super::session::{MlaCache, PAGE};
use crate::config::ModelConfig;
use crate::ops::activation::exp;
use crate::ops::lanes::{dispatch, products, vectors, vectors_mut};
use crate::ops::rows;
use crate::par;
use crate::simd::vectorize;
use crate::ternary::packed::{PackedTernary, floats};

/// Cached tokens of a block. Divides [`PAGE`].
const BLOCK: usize = 64;
/// Rows of floats are padded to two vectors of the widest kind.
const PAD: usize = 32;

/// Working memory of a token, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// `[heads, row]`, zeros behind what a row has
    queries: Vec<f32>,
    /// Of every block and head: the mix `[kv_rank]`, the largest score, the sum of the weights
    partials: Vec<f32>,
    blocks: Vec<BlockRoom>,
    heads: Vec<HeadRoom>,
}

/// That of a head.
#[derive(Debug, Default)]
struct HeadRoom {
    product: floats::Room,
    /// Latents `[kv_rank]`
    mixed: Vec<f32>,
}

/// That of a thread.
#[derive(Debug, Default)]
struct BlockRoom {
    /// `[tokens, row]`
    latents: Vec<f32>,
    /// `[heads, BLOCK]`
    scores: Vec<f32>,
}

/// Sizes of the rows, and heads that are worked on together: zeros fill the last group.
#[derive(Clone, Copy)]
struct Shape {
    rank: usize,
    d_rope: usize,
    heads: usize,
    /// Floats of a query or of a cached token, padded
    row: usize,
    /// Heads, padded
    group_heads: usize,
}

impl Shape {
    fn new(c: &ModelConfig) -> Shape {
        let row = (c.kv_rank + c.d_rope).next_multiple_of(PAD);
        Shape { rank: c.kv_rank, d_rope: c.d_rope, heads: c.n_heads, row, group_heads: c.n_heads.next_multiple_of(4) }
    }
}

/// The newest token: `q` `[heads, d_nope + d_rope]`, `o` `[heads, d_v]`.
pub(super) fn absorbed(
    c: &ModelConfig,
    kv_up: &PackedTernary,
    cache: &MlaCache,
    q: &[f32],
    room: &mut Room,
    o: &mut [f32],
) {
    let (dn, dv, scale, shape) = (c.d_nope, c.d_v, softmax_scale(c), Shape::new(c));
    let (rank, heads) = (shape.rank, shape.heads);
    let Room { queries, partials, blocks, heads: head_rooms } = room;
    // A query that meets latents and shared keys at once: [W₃ᵀ q_nope · γ | q_rope] · scale
    queries.clear();
    queries.resize(shape.group_heads * shape.row, 0.0);
    let items = queries.chunks_exact_mut(shape.row).zip(q.chunks_exact(c.d_qk())).enumerate().collect();
    par::for_each_kept(items, head_rooms, |room, (h, (query, q)): (usize, (&mut [f32], &[f32]))| {
        let (latent, rope) = query.split_at_mut(rank);
        let first = h * (dn + dv);
        kv_up.add_transposed_times(first..first + dn, &q[..dn], latent, &mut room.product);
        latent.iter_mut().for_each(|l| *l *= scale * kv_up.gamma());
        rope.iter_mut().zip(&q[dn..]).for_each(|(r, q)| *r = q * scale);
    });

    let partials = grown(partials, cache.len.div_ceil(BLOCK) * heads * (rank + 2));
    let items = partials.chunks_exact_mut(heads * (rank + 2)).enumerate().collect();
    let queries = &queries[..];
    par::for_each_kept(items, blocks, |room, (block, partial): (usize, &mut [f32])| {
        dispatch(Block { shape, cache, block, queries, room, partial });
    });

    let items = o.chunks_exact_mut(dv).enumerate().collect();
    let partials: &[f32] = partials;
    par::for_each_kept(items, head_rooms, |room, (h, o): (usize, &mut [f32])| {
        let HeadRoom { product, mixed } = room;
        let (mixed, mut total) = (grown(mixed, rank), 0.0);
        mixed.fill(0.0);
        vectorize(
            #[inline(always)]
            || {
                let of_head = || partials.chunks_exact(rank + 2).skip(h).step_by(heads);
                let max = of_head().fold(f32::NEG_INFINITY, |m, p| m.max(p[rank]));
                for partial in of_head() {
                    let weight = exp(partial[rank] - max);
                    total += weight * partial[rank + 1];
                    rows::add_scaled(mixed, weight, &partial[..rank]);
                }
            },
        );
        let first = h * (dn + dv) + dn;
        kv_up.times(first..first + dv, mixed, o, product);
        o.iter_mut().for_each(|o| *o *= kv_up.gamma() / total);
    });
}

/// Writes per head `[rank]` latents weighted by `exp(score - max)`, then the maximum, then the sum of the weights.
struct Block<'a> {
    shape: Shape,
    cache: &'a MlaCache,
    block: usize,
    queries: &'a [f32],
    room: &'a mut BlockRoom,
    partial: &'a mut [f32],
}

impl WithSimd for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block { shape, cache, block, queries, room, partial } = self;
        let Shape { rank, heads, row, .. } = shape;
        let n = (cache.len - block * BLOCK).min(BLOCK);
        let latents = grown(&mut room.latents, n * row);
        expand(shape, cache, block * BLOCK, latents);
        let scores = grown(&mut room.scores, shape.group_heads * BLOCK);
        // As many heads as the registers hold sums for, beside those of two tokens or of two vectors of the mix.
        let wide = S::F32_LANES == 16;
        let mut first = 0;
        while first < shape.group_heads {
            let (queries, scores) = (&queries[first * row..], &mut scores[first * BLOCK..]);
            first += match shape.group_heads - first {
                8.. if wide => score::<S, 8>(simd, queries, latents, row, scores),
                _ => score::<S, 4>(simd, queries, latents, row, scores),
            };
        }
        for (scores, partial) in scores.chunks_exact_mut(BLOCK).zip(partial.chunks_exact_mut(rank + 2)) {
            let scores = &mut scores[..n];
            let max = rows::max(scores);
            scores.iter_mut().for_each(|s| *s = exp(*s - max));
            partial[rank] = max;
            partial[rank + 1] = rows::sum(scores);
        }
        // Without vectors, as many floats of a row as have a cache line or two.
        let columns = if S::F32_LANES == 1 { PAD } else { 2 * S::F32_LANES };
        for at in (0..rank).step_by(columns) {
            let mut first = 0;
            while first < heads {
                let scores = &scores[first * BLOCK..];
                let partial = &mut partial[first * (rank + 2)..];
                first += match shape.group_heads - first {
                    8.. if wide => mix::<S, 8, 2>(simd, scores, latents, row, at, rank, partial),
                    _ if S::F32_LANES == 1 => mix::<S, 1, PAD>(simd, scores, latents, row, at, rank, partial),
                    _ => mix::<S, 4, 2>(simd, scores, latents, row, at, rank, partial),
                };
            }
        }
    }
}

/// The latents of cached tokens `first ..` and their shared keys as floats.
#[inline(always)]
fn expand(shape: Shape, cache: &MlaCache, first: usize, latents: &mut [f32]) {
    let Shape { rank, d_rope, row, .. } = shape;
    let (page, at) = (&cache.pages[first / PAGE], first % PAGE);
    for (t, to) in (at..).zip(latents.chunks_exact_mut(row)) {
        let (latent, rest) = to.split_at_mut(rank);
        let (key, padding) = rest.split_at_mut(d_rope);
        let scale = page.scales[t];
        latent.iter_mut().zip(&page.codes[t * rank..(t + 1) * rank]).for_each(|(l, code)| *l = scale * *code as f32);
        key.copy_from_slice(&page.keys[t * d_rope..(t + 1) * d_rope]);
        padding.fill(0.0);
    }
}

/// The scores of `H` heads, two tokens at a time; returns `H`.
#[inline(always)]
fn score<S: Simd, const H: usize>(simd: S, queries: &[f32], latents: &[f32], row: usize, scores: &mut [f32]) -> usize {
    let queries = &queries[..H * row];
    let mut put = |t: usize, sums: [f32; H]| {
        for (h, sum) in sums.into_iter().enumerate() {
            scores[h * BLOCK + t] = sum;
        }
    };
    let pairs = latents.chunks_exact(2 * row);
    let last = pairs.remainder();
    for (i, pair) in pairs.enumerate() {
        let [a, b] = products::<S, H, 2>(simd, queries, pair);
        put(2 * i, a);
        put(2 * i + 1, b);
    }
    if !last.is_empty() {
        let [sums] = products::<S, H, 1>(simd, queries, last);
        put(latents.len() / row - 1, sums);
    }
    H
}

/// `V` vectors of the mix, from column `at` on, of `H` heads or of as many as there are; returns `H`.
#[inline(always)]
fn mix<S: Simd, const H: usize, const V: usize>(
    simd: S,
    scores: &[f32],
    latents: &[f32],
    row: usize,
    at: usize,
    rank: usize,
    partial: &mut [f32],
) -> usize {
    let weights: [&[f32; BLOCK]; H] = core::array::from_fn(
        #[inline(always)]
        |h| scores[h * BLOCK..].first_chunk().expect("the last group of heads is filled up"),
    );
    let mut acc = [[simd.splat_f32s(0.0); V]; H];
    for (t, row) in (0..BLOCK).zip(latents.chunks_exact(row)) {
        let row: [S::f32s; V] = *vectors::<S>(row)[at / S::F32_LANES..].first_chunk().expect("rows are padded");
        for h in 0..H {
            let weight = simd.splat_f32s(weights[h][t]);
            for v in 0..V {
                acc[h][v] = simd.mul_add_e_f32s(row[v], weight, acc[h][v]);
            }
        }
    }
    for (acc, partial) in acc.iter().zip(partial.chunks_exact_mut(rank + 2)) {
        let mut mixed = [0.0; PAD];
        let to = vectors_mut::<S>(&mut mixed);
        to[..V].copy_from_slice(acc);
        let n = (rank - at).min(V * S::F32_LANES);
        partial[at..at + n].copy_from_slice(&mixed[..n]);
    }
    H
}
