//! Attention of a run of tokens: the cached latents are expanded, some at a time, into keys and values that all queries share; the softmax
//! goes along.
//!
//! Both products are sums that every output has in an order of its own, one term after the other: `score = Σ_d q[d] · key[d]` and, a
//! part of the context at a time, `mixed = Σ_j weight[j] · value[j]`. So a row's bits depend on its own context alone, whatever rows and
//! columns share a tile of registers. Keys are transposed, so that neighbours in a vector are scores of one query with several keys.

use alloc::vec::Vec;

use pulp::{Simd, WithSimd};

use super::attention::softmax_scale;
use super::pass::grown;
use super::session::{MlaCache, PAGE};
use crate::config::ModelConfig;
use crate::ops::activation::exp;
use crate::ops::lanes::{dispatch, exp_nonpositive, vectors, vectors_mut};
use crate::ops::transpose::transpose;
use crate::par;
use crate::ternary::packed::PackedTernary;

/// Cached tokens whose latents are expanded together: bounds the memory for it. Divides [`PAGE`].
const EXPAND: usize = 128;
/// Rows are padded to whole vectors of the widest kind.
const LANES: usize = 16;

/// Working memory of a run, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Of the part of the context: keys and values `[tokens, heads, d_nope + d_v]`
    kv: Vec<f32>,
    /// A softmax of each head (see [`Softmax::new`])
    softmax: Vec<f32>,
    /// Of each thread
    parts: Vec<PartRoom>,
}

/// Working memory for a head with a part of the context.
#[derive(Debug, Default)]
struct PartRoom {
    /// Keys transposed `[qk, width]`
    keys: Vec<f32>,
    /// Scores, then weights `[len, width]`
    scores: Vec<f32>,
    /// Values whose rows are no whole vectors, padded `[width, mix]`
    values: Vec<f32>,
}

/// Sizes.
#[derive(Clone, Copy, Debug)]
struct Shape {
    dn: usize,
    d_rope: usize,
    dv: usize,
    heads: usize,
    /// Queries, and cached tokens before the first of them
    len: usize,
    past: usize,
    scale: f32,
}

impl Shape {
    fn qk(&self) -> usize {
        self.dn + self.d_rope
    }

    /// Floats of a mix, padded.
    fn mix(&self) -> usize {
        self.dv.next_multiple_of(LANES)
    }

    /// Floats of an expanded token.
    fn kv_row(&self) -> usize {
        self.heads * (self.dn + self.dv)
    }

    /// Floats of a head's softmax.
    fn softmax(&self) -> usize {
        self.len * (self.mix() + 2)
    }
}

/// The newest tokens: `q` `[len, heads, d_nope + d_rope]`, `o` `[len, heads, d_v]`. A row's bits depend on its own context alone.
pub(super) fn expanded(
    c: &ModelConfig,
    kv_up: &PackedTernary,
    cache: &MlaCache,
    q: &[f32],
    room: &mut Room,
    o: &mut [f32],
) {
    let len = q.len() / (c.n_heads * c.d_qk());
    let shape = Shape {
        dn: c.d_nope,
        d_rope: c.d_rope,
        dv: c.d_v,
        heads: c.n_heads,
        len,
        past: cache.len - len,
        scale: softmax_scale(c),
    };
    let Room { kv, softmax, parts } = room;
    let kv = grown(kv, EXPAND.min(cache.len) * shape.kv_row());
    let softmax = grown(softmax, shape.heads * shape.softmax());
    for first in (0..cache.len).step_by(EXPAND) {
        let n = EXPAND.min(cache.len - first);
        let (page, own) = (&cache.pages[first / PAGE], first % PAGE..first % PAGE + n);
        let codes = &page.codes[own.start * c.kv_rank..own.end * c.kv_rank];
        let kv = &mut kv[..n * shape.kv_row()];
        kv_up.forward(codes, &page.scales[own.clone()], kv);
        let (kv, keys) = (&*kv, &page.keys[own.start * c.d_rope..own.end * c.d_rope]);
        let items = softmax.chunks_exact_mut(shape.softmax()).enumerate().collect();
        par::for_each_kept(items, parts, |room, (h, softmax): (usize, &mut [f32])| {
            let mut softmax = Softmax::new(shape, softmax);
            if first == 0 {
                softmax.begin();
            }
            let part = Part { shape, first, n, kv: &kv[h * (shape.dn + shape.dv)..], keys };
            part.add_to(softmax, &q[h * shape.qk()..], room);
        });
    }
    for (h, softmax) in softmax.chunks_exact_mut(shape.softmax()).enumerate() {
        let softmax = Softmax::new(shape, softmax);
        let mixes = softmax.mixed.chunks_exact(shape.mix()).zip(&*softmax.total);
        for (row, (mixed, total)) in o.chunks_exact_mut(shape.heads * shape.dv).zip(mixes) {
            row[h * shape.dv..][..shape.dv].iter_mut().zip(mixed).for_each(|(o, mixed)| *o = mixed / total);
        }
    }
}

/// A softmax that goes along with the context, for the queries of one head.
struct Softmax<'a> {
    /// What the values so far have become `[len, mix]`
    mixed: &'a mut [f32],
    /// The largest score so far `[len]`
    max: &'a mut [f32],
    /// The sum of the weights so far `[len]`
    total: &'a mut [f32],
}

impl<'a> Softmax<'a> {
    fn new(shape: Shape, room: &'a mut [f32]) -> Softmax<'a> {
        let (mixed, rest) = room.split_at_mut(shape.len * shape.mix());
        let (max, total) = rest.split_at_mut(shape.len);
        Softmax { mixed, max, total }
    }

    fn begin(&mut self) {
        self.mixed.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
    }
}

/// Neighbours in the context, as a head sees them.
#[derive(Clone, Copy)]
struct Part<'a> {
    shape: Shape,
    first: usize,
    n: usize,
    /// A key without its rotated part, and a value, at the beginning of every row
    kv: &'a [f32],
    /// The rotated part of the keys `[n, d_rope]`
    keys: &'a [f32],
}

impl Part<'_> {
    /// Goes on with a softmax; the queries are at the beginning of rows of `q`.
    fn add_to(self, softmax: Softmax, q: &[f32], room: &mut PartRoom) {
        let Part { shape, n, kv, .. } = self;
        let (dn, dv, kv_row, mix) = (shape.dn, shape.dv, shape.kv_row(), shape.mix());
        let width = n.next_multiple_of(LANES);
        let keys = grown(&mut room.keys, shape.qk() * width);
        let (nope, rope) = keys.split_at_mut(dn * width);
        transpose(kv, kv_row, (n, dn), nope, width);
        transpose(self.keys, shape.d_rope, (n, shape.d_rope), rope, width);
        let (mut values, mut pitch) = (&kv[dn..], kv_row);
        if dv < mix {
            let padded = grown(&mut room.values, n * mix);
            let rows = values.chunks(kv_row).zip(padded.chunks_exact_mut(mix));
            rows.for_each(|(from, to)| to[..dv].copy_from_slice(&from[..dv]));
            (values, pitch) = (padded, mix);
        }
        let scores = grown(&mut room.scores, shape.len * width);
        dispatch(Rows { part: self, width, q, keys, scores, values, pitch, softmax });
    }
}

/// The arithmetic of [`Part::add_to`].
struct Rows<'a> {
    part: Part<'a>,
    width: usize,
    q: &'a [f32],
    keys: &'a [f32],
    scores: &'a mut [f32],
    /// Rows that begin with the padded values, `pitch` apart
    values: &'a [f32],
    pitch: usize,
    softmax: Softmax<'a>,
}

impl WithSimd for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut row = 0;
        while row < self.part.shape.len {
            row += match self.part.shape.len - row {
                1 => self.rows::<S, 1>(simd, row),
                2 => self.rows::<S, 2>(simd, row),
                3..6 => self.rows::<S, 3>(simd, row),
                _ => self.rows::<S, 6>(simd, row),
            };
        }
    }
}

impl Rows<'_> {
    /// Cached tokens of the part that row `row` sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        (self.part.shape.past + row + 1).saturating_sub(self.part.first).min(self.part.n)
    }

    /// `R` rows from `row` on; returns how many that were.
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, simd: S, row: usize) -> usize {
        // The last of them sees most.
        let seen = self.seen(row + R - 1);
        let columns = seen.div_ceil(S::F32_LANES);
        let mut v = 0;
        while v < columns {
            v += match columns - v {
                4.. if S::REGISTER_COUNT >= 32 => self.scores::<S, R, 4>(simd, row, v),
                2.. => self.scores::<S, R, 2>(simd, row, v),
                _ => self.scores::<S, R, 1>(simd, row, v),
            };
        }
        for r in row..row + R {
            self.weigh(simd, r, columns * S::F32_LANES);
        }
        let columns = self.part.shape.mix() / S::F32_LANES;
        let mut v = 0;
        while v < columns {
            v += match columns - v {
                4.. if S::REGISTER_COUNT >= 32 => self.mix::<S, R, 4>(simd, row, v, seen),
                2.. => self.mix::<S, R, 2>(simd, row, v, seen),
                _ => self.mix::<S, R, 1>(simd, row, v, seen),
            };
        }
        R
    }

    /// The scores of `R` rows with `V` vectors of keys; returns V.
    #[inline(always)]
    fn scores<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, v: usize) -> usize {
        let (qk, q_row) = (self.part.shape.qk(), self.part.shape.heads * self.part.shape.qk());
        let q: [&[f32]; R] = core::array::from_fn(|r| &self.q[(row + r) * q_row..][..qk]);
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        for (d, keys) in self.keys.chunks_exact(self.width).enumerate() {
            let keys = &vectors::<S>(keys)[v..v + V];
            for r in 0..R {
                let q = simd.splat_f32s(q[r][d]);
                for i in 0..V {
                    acc[r][i] = simd.mul_add_e_f32s(q, keys[i], acc[r][i]);
                }
            }
        }
        for r in 0..R {
            let scores = &mut vectors_mut::<S>(&mut self.scores[(row + r) * self.width..][..self.width])[v..v + V];
            scores.copy_from_slice(&acc[r]);
        }
        V
    }

    /// Turns the first `columns` scores of a row into weights, and what was mixed so far to the new maximum.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, row: usize, columns: usize) {
        let seen = self.seen(row);
        let scores = &mut self.scores[row * self.width..][..columns];
        if seen == 0 {
            return scores.fill(0.0);
        }
        // Its exponential is 0.
        scores[seen..].fill(f32::NEG_INFINITY);
        let scale = simd.splat_f32s(self.part.shape.scale);
        let mut largest = simd.splat_f32s(f32::NEG_INFINITY);
        for s in vectors_mut::<S>(scores) {
            *s = simd.mul_f32s(*s, scale);
            largest = simd.max_f32s(largest, *s);
        }
        let max = self.softmax.max[row].max(simd.reduce_max_f32s(largest));
        let (minus, mut total) = (simd.splat_f32s(max), simd.splat_f32s(0.0));
        for s in vectors_mut::<S>(scores) {
            *s = exp_nonpositive(simd, simd.sub_f32s(*s, minus));
        }
        for s in vectors::<S>(scores) {
            total = simd.add_f32s(total, *s);
        }
        // The first tokens have nothing to correct: exp(-inf - max) is 0.
        let correction = exp(self.softmax.max[row] - max);
        self.softmax.max[row] = max;
        self.softmax.total[row] = self.softmax.total[row] * correction + simd.reduce_sum_f32s(total);
        let correction = simd.splat_f32s(correction);
        let mix = self.part.shape.mix();
        vectors_mut::<S>(&mut self.softmax.mixed[row * mix..(row + 1) * mix])
            .iter_mut()
            .for_each(|m| *m = simd.mul_f32s(*m, correction));
    }

    /// Adds `seen` weighted values to `V` vectors of the mix of `R` rows; returns V.
    #[inline(always)]
    fn mix<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, v: usize, seen: usize) -> usize {
        let (mix, first) = (self.part.shape.mix(), v * S::F32_LANES);
        let weights: [&[f32]; R] = core::array::from_fn(|r| &self.scores[(row + r) * self.width..][..seen]);
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        for (j, values) in self.values.chunks(self.pitch).take(seen).enumerate() {
            let values = &vectors::<S>(&values[first..first + V * S::F32_LANES])[..V];
            for r in 0..R {
                let weight = simd.splat_f32s(weights[r][j]);
                for i in 0..V {
                    acc[r][i] = simd.mul_add_e_f32s(weight, values[i], acc[r][i]);
                }
            }
        }
        for r in 0..R {
            let mixed = &mut vectors_mut::<S>(&mut self.softmax.mixed[(row + r) * mix..][..mix])[v..v + V];
            for i in 0..V {
                mixed[i] = simd.add_f32s(mixed[i], acc[r][i]);
            }
        }
        V
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    /// The mixes `[len, dv]` of one of the heads.
    fn attend(shape: Shape, head: usize, context: usize, kv: &[f32], keys: &[f32], q: &[f32]) -> Vec<f32> {
        // What was there before must not matter.
        let mut state = vec![f32::NAN; shape.softmax()];
        let mut room = PartRoom { keys: vec![9e9; 50_000], scores: vec![9e9; 50_000], values: vec![9e9; 50_000] };
        Softmax::new(shape, &mut state).begin();
        for first in (0..context).step_by(EXPAND) {
            let n = EXPAND.min(context - first);
            let kv = &kv[first * shape.kv_row()..(first + n) * shape.kv_row()][head * (shape.dn + shape.dv)..];
            let keys = &keys[first * shape.d_rope..(first + n) * shape.d_rope];
            let part = Part { shape, first, n, kv, keys };
            part.add_to(Softmax::new(shape, &mut state), &q[head * shape.qk()..], &mut room);
        }
        let softmax = Softmax::new(shape, &mut state);
        let rows = softmax.mixed.chunks_exact(shape.mix()).zip(&*softmax.total);
        rows.flat_map(|(mixed, total)| mixed[..shape.dv].iter().map(move |m| m / total)).collect()
    }

    #[test]
    fn rows_are_the_definition_and_know_nothing_of_each_other() {
        for (dn, d_rope, dv) in [(5, 2, 7), (16, 16, 16), (33, 4, 70), (64, 32, 96), (1, 0, 1)] {
            for (past, len) in [(0, 1), (0, 2), (3, 5), (0, 20), (126, 4), (127, 7), (250, 13), (0, 150)] {
                let (heads, context) = (3, past + len);
                let scale = 1.0 / libm::sqrtf((dn + d_rope) as f32);
                let shape = Shape { dn, d_rope, dv, heads, len, past, scale };
                let (kv, keys) = (values(context * shape.kv_row(), 1), values(context * d_rope, 2));
                let q = values(len * heads * shape.qk(), 3);
                for head in 0..heads {
                    let found = attend(shape, head, context, &kv, &keys, &q);
                    for (i, row) in found.chunks_exact(dv).enumerate() {
                        let q = &q[(i * heads + head) * shape.qk()..][..shape.qk()];
                        let token = |j: usize| &kv[j * shape.kv_row() + head * (dn + dv)..][..dn + dv];
                        let key = |j: usize| token(j)[..dn].iter().chain(&keys[j * d_rope..(j + 1) * d_rope]);
                        let score =
                            |j| q.iter().zip(key(j)).map(|(q, k)| f64::from(q * k)).sum::<f64>() * f64::from(scale);
                        let weights: Vec<f64> = (0..=past + i).map(|j| score(j).exp()).collect();
                        let total: f64 = weights.iter().sum();
                        for (d, found) in row.iter().enumerate() {
                            let want =
                                (0..).zip(&weights).map(|(j, w)| w * f64::from(token(j)[dn + d])).sum::<f64>() / total;
                            // Scores of a few units are off by as many roundings as they have terms, and values are 1 at most.
                            assert!((f64::from(*found) - want).abs() < 2e-5, "{shape:?} row {i}: {found} {want}");
                        }
                    }
                    // The last row alone, as if nothing had been asked with it.
                    let alone = Shape { len: 1, past: context - 1, ..shape };
                    let last = attend(alone, head, context, &kv, &keys, &q[(len - 1) * heads * shape.qk()..]);
                    assert_eq!(last, found[(len - 1) * dv..], "{shape:?}");
                    // The rows before it whatever it is.
                    let mut other = kv.clone();
                    other[(context - 1) * shape.kv_row()..].fill(f32::MAX);
                    let before = attend(shape, head, context, &other, &keys, &q);
                    assert_eq!(before[..(len - 1) * dv], found[..(len - 1) * dv], "{shape:?}");
                }
            }
        }
    }
}
