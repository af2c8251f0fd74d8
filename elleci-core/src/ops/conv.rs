//! Causal depthwise convolution with bias and SiLU, the short filter in front of the Mamba-2 recurrence.
//!
//! ```text
//! pre[t, c] = bias[c] + sum_k weight[c, k] * input[t - (K - 1) + k, c]        input before the sequence is 0
//! out[t, c] = silu(pre[t, c])
//! ```
//! Channels last: `[tokens, channels]`, `tokens = batch * seq`; `weight` is `[channels, K]` and tap 0 is the OLDEST.
//!
//! Work is cut into tiles of steps and channels; the tap gradients of the tiles are added in tile order, so that the
//! bits do not depend on the number of threads.

mod steps;

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use ndarray::{ArrayViewMut2, Axis};
use pulp::{Simd, WithSimd};

use crate::ops::lanes::{dispatch, load, silu, silu_grad, store, vectors, vectors_mut};
use crate::ops::matmul::mat_mut;
use crate::par;

pub(crate) use steps::STEPS;
pub use steps::{ConvFilter, ConvInput, conv_silu_steps, conv_taps};

/// Channels of one task, at most: a page of every row. Narrow blocks of long rows defeat the prefetchers, and a filter
/// this short is all memory: 64 channels ran at a quarter of the speed.
const BLOCK: usize = 1024;
/// Steps of one task, at most.
const SEGMENT: usize = 128;

/// Sizes of one convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Independent sequences.
    pub batch: usize,
    /// Steps of each.
    pub seq: usize,
    /// Channels, each with its own filter.
    pub channels: usize,
    /// Filter length K, at least 1.
    pub taps: usize,
}

impl ConvShape {
    fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    fn check(&self, input: &[f32], weight: &[f32], bias: &[f32]) {
        assert!(self.taps >= 1, "conv: no taps");
        assert_eq!(input.len(), self.tokens() * self.channels, "conv: input");
        assert_eq!(weight.len(), self.channels * self.taps, "conv: weight");
        assert_eq!(bias.len(), self.channels, "conv: bias");
    }
}

/// The tile of a task: some steps of one sequence, some channels.
#[derive(Clone)]
struct Tile {
    /// First token of the sequence.
    sequence: usize,
    steps: Range<usize>,
    channels: Range<usize>,
}

/// All tiles, and the part of `data` `[tokens, channels]` that belongs to each. The cut depends on the shape alone.
fn tiles<'a>(shape: ConvShape, data: &'a mut [f32]) -> Vec<(Tile, ArrayViewMut2<'a, f32>)> {
    let block = shape.channels.div_ceil(shape.channels.div_ceil(BLOCK).max(1)).next_multiple_of(16);
    let mut rest = mat_mut(data, shape.tokens(), shape.channels);
    let mut tiles = Vec::new();
    for sequence in (0..shape.tokens()).step_by(shape.seq.max(1)) {
        for first in (0..shape.seq).step_by(SEGMENT) {
            let steps = first..shape.seq.min(first + SEGMENT);
            let (mut rows, later) = rest.split_at(Axis(0), steps.len());
            rest = later;
            for first in (0..shape.channels).step_by(block) {
                let channels = first..shape.channels.min(first + block);
                let (now, next) = rows.split_at(Axis(1), channels.len());
                rows = next;
                tiles.push((Tile { sequence, steps: steps.clone(), channels }, now));
            }
        }
    }
    tiles
}

/// The filters of a tile's channels, taps outermost, rows padded with zeros to whole vectors.
struct Filters {
    row: usize,
    taps: Vec<f32>, // [K, row]
    bias: Vec<f32>, // [row]
}

impl Filters {
    fn new(tile: &Tile, taps: usize, weight: &[f32], bias: &[f32]) -> Filters {
        let row = tile.channels.len().next_multiple_of(16);
        let mut filters = Filters { row, taps: vec![0.0; taps * row], bias: vec![0.0; row] };
        for (i, c) in tile.channels.clone().enumerate() {
            for k in 0..taps {
                filters.taps[k * row + i] = weight[c * taps + k];
            }
            filters.bias[i] = bias[c];
        }
        filters
    }

    #[inline(always)]
    fn tap<S: Simd>(&self, k: usize) -> &[S::f32s] {
        vectors::<S>(&self.taps[k * self.row..(k + 1) * self.row])
    }
}

/// What a task reads.
struct Inputs<'a> {
    shape: ConvShape,
    tile: Tile,
    filters: Filters,
    input: &'a [f32],
}

impl Inputs<'_> {
    /// The tile's channels of `data` at step t of its sequence.
    #[inline(always)]
    fn row<'d>(&self, data: &'d [f32], t: usize) -> &'d [f32] {
        &data[(self.tile.sequence + t) * self.shape.channels..][self.tile.channels.clone()]
    }

    /// The first tap that step t has an input for.
    #[inline(always)]
    fn first_tap(&self, t: usize) -> usize {
        (self.shape.taps - 1).saturating_sub(t)
    }

    /// `pre[t, ..]`, in whole vectors.
    #[inline(always)]
    fn pre_activation<S: Simd>(&self, simd: S, t: usize, pre: &mut [f32]) {
        pre.copy_from_slice(&self.filters.bias);
        let pre = vectors_mut::<S>(pre);
        for k in self.first_tap(t)..self.shape.taps {
            let (tap, row) = (self.filters.tap::<S>(k), self.row(self.input, t + k + 1 - self.shape.taps));
            for (v, pre) in pre.iter_mut().enumerate() {
                *pre = simd.mul_add_e_f32s(tap[v], load(simd, row, v), *pre);
            }
        }
    }
}

/// Forward: writes `out` `[tokens, channels]`.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
pub fn conv_silu_forward(shape: ConvShape, input: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    shape.check(input, weight, bias);
    par::for_each(tiles(shape, out), |(tile, out)| {
        let filters = Filters::new(&tile, shape.taps, weight, bias);
        let mut pre = vec![0.0; filters.row];
        dispatch(Forward { inputs: Inputs { shape, tile, filters, input }, out, pre: &mut pre });
    });
}

struct Forward<'a> {
    inputs: Inputs<'a>,
    out: ArrayViewMut2<'a, f32>,
    pre: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for (i, t) in self.inputs.tile.steps.clone().enumerate() {
            self.inputs.pre_activation(simd, t, self.pre);
            let out = row_mut(&mut self.out, i);
            for (v, pre) in vectors::<S>(self.pre).iter().enumerate() {
                store(simd, out, v, silu(simd, *pre));
            }
        }
    }
}

/// Backward: writes `dinput`, ADDS to `dweight` and `dbias`. The pre-activation is computed again from `input`, which
/// costs less than keeping it.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
#[expect(clippy::too_many_arguments, reason = "the tensors of the op, each once")]
pub fn conv_silu_backward(
    shape: ConvShape,
    input: &[f32],
    weight: &[f32],
    bias: &[f32],
    dout: &[f32],
    dinput: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    shape.check(input, weight, bias);
    shape.check(dout, dweight, dbias);
    let tiles = tiles(shape, dinput);
    // Tap gradients of every tile, [K + 1, row] with the bias last, added up in tile order.
    let widths: Vec<_> =
        tiles.iter().map(|(tile, _)| (tile.channels.clone(), tile.channels.len().next_multiple_of(16))).collect();
    let mut sums = vec![0.0; widths.iter().map(|(_, row)| row * (shape.taps + 1)).sum()];
    let mut rest = &mut sums[..];
    let mut items = Vec::with_capacity(tiles.len());
    for ((tile, dinput), (_, row)) in tiles.into_iter().zip(&widths) {
        let (now, later) = core::mem::take(&mut rest).split_at_mut(row * (shape.taps + 1));
        rest = later;
        items.push((tile, dinput, now));
    }
    par::for_each(items, |(tile, dinput, sums)| {
        let filters = Filters::new(&tile, shape.taps, weight, bias);
        let mut ring = vec![0.0; shape.taps * filters.row];
        dispatch(Backward { inputs: Inputs { shape, tile, filters, input }, dout, dinput, sums, ring: &mut ring });
    });
    let mut rest = &sums[..];
    for (channels, row) in widths {
        let (now, later) = rest.split_at(row * (shape.taps + 1));
        rest = later;
        for (i, c) in channels.enumerate() {
            for k in 0..shape.taps {
                dweight[c * shape.taps + k] += now[k * row + i];
            }
            dbias[c] += now[shape.taps * row + i];
        }
    }
}

struct Backward<'a> {
    inputs: Inputs<'a>,
    dout: &'a [f32],
    dinput: ArrayViewMut2<'a, f32>,
    /// `[K + 1, row]`
    sums: &'a mut [f32],
    /// Gradients of the last K pre-activations, `[K, row]`, step t in row t mod K.
    ring: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (shape, steps) = (self.inputs.shape, self.inputs.tile.steps.clone());
        // An input reaches K - 1 steps ahead, beyond the tile too.
        let end = shape.seq.min(steps.end + shape.taps - 1);
        for t in steps.start..end {
            self.pre_activation_gradient(simd, t);
            if t < steps.end {
                self.tap_gradients(simd, t);
            }
            if t + 1 >= steps.start + shape.taps {
                self.input_gradient(simd, t + 1 - shape.taps, end);
            }
        }
        // The last steps of a sequence, which fewer than K steps read.
        for t in steps.start.max((end + 1).saturating_sub(shape.taps))..steps.end {
            self.input_gradient(simd, t, end);
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn pre_activation_gradient<S: Simd>(&mut self, simd: S, t: usize) {
        let row = self.inputs.filters.row;
        let dpre = &mut self.ring[t % self.inputs.shape.taps * row..][..row];
        self.inputs.pre_activation(simd, t, dpre);
        let dout = self.inputs.row(self.dout, t);
        for (v, dpre) in vectors_mut::<S>(dpre).iter_mut().enumerate() {
            *dpre = simd.mul_f32s(load(simd, dout, v), silu_grad(simd, *dpre));
        }
    }

    #[inline(always)]
    fn tap_gradients<S: Simd>(&mut self, simd: S, t: usize) {
        let (taps, row) = (self.inputs.shape.taps, self.inputs.filters.row);
        let dpre = vectors::<S>(&self.ring[t % taps * row..][..row]);
        let (by_tap, bias) = self.sums.split_at_mut(taps * row);
        for k in self.inputs.first_tap(t)..taps {
            let x = self.inputs.row(self.inputs.input, t + k + 1 - taps);
            let sums = vectors_mut::<S>(&mut by_tap[k * row..(k + 1) * row]);
            for (v, (sum, dpre)) in sums.iter_mut().zip(dpre).enumerate() {
                *sum = simd.mul_add_e_f32s(load(simd, x, v), *dpre, *sum);
            }
        }
        for (sum, dpre) in vectors_mut::<S>(bias).iter_mut().zip(dpre) {
            *sum = simd.add_f32s(*sum, *dpre);
        }
    }

    /// `dinput[t]` from the steps t .. t + K that exist (before `end`), all in the ring.
    #[inline(always)]
    fn input_gradient<S: Simd>(&mut self, simd: S, t: usize, end: usize) {
        let (taps, row) = (self.inputs.shape.taps, self.inputs.filters.row);
        let dinput = row_mut(&mut self.dinput, t - self.inputs.tile.steps.start);
        for v in 0..row / S::F32_LANES {
            let mut sum = simd.splat_f32s(0.0);
            for s in t..end.min(t + taps) {
                let dpre = vectors::<S>(&self.ring[s % taps * row..][..row])[v];
                sum = simd.mul_add_e_f32s(self.inputs.filters.tap::<S>(t + taps - 1 - s)[v], dpre, sum);
            }
            store(simd, dinput, v, sum);
        }
    }
}

#[inline(always)]
fn row_mut<'a>(view: &'a mut ArrayViewMut2<f32>, row: usize) -> &'a mut [f32] {
    view.row_mut(row).into_slice().expect("columns are contiguous")
}

/// The definition, in float64 and in the order of the formula.
pub mod reference {
    use super::ConvShape;
    use alloc::vec;
    use alloc::vec::Vec;

    fn pre_activation(shape: ConvShape, input: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
        let mut pre = vec![0.0; shape.tokens() * shape.channels];
        for b in 0..shape.batch {
            for t in 0..shape.seq {
                for c in 0..shape.channels {
                    let mut sum = bias[c];
                    for k in 0..shape.taps {
                        if let Some(s) = (t + k + 1).checked_sub(shape.taps) {
                            sum += weight[c * shape.taps + k] * input[(b * shape.seq + s) * shape.channels + c];
                        }
                    }
                    pre[(b * shape.seq + t) * shape.channels + c] = sum;
                }
            }
        }
        pre
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + libm::exp(-x))
    }

    /// See [`super::conv_silu_forward`].
    pub fn forward(shape: ConvShape, input: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
        pre_activation(shape, input, weight, bias).into_iter().map(|x| x * sigmoid(x)).collect()
    }

    /// Gradients of [`forward`]: of the input, the taps and the bias.
    pub fn backward(
        shape: ConvShape,
        input: &[f64],
        weight: &[f64],
        bias: &[f64],
        dout: &[f64],
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let pre = pre_activation(shape, input, weight, bias);
        let (mut dinput, mut dweight) = (vec![0.0; input.len()], vec![0.0; weight.len()]);
        let mut dbias = vec![0.0; bias.len()];
        for b in 0..shape.batch {
            for t in 0..shape.seq {
                for c in 0..shape.channels {
                    let i = (b * shape.seq + t) * shape.channels + c;
                    let s = sigmoid(pre[i]);
                    let dpre = dout[i] * s * (1.0 + pre[i] * (1.0 - s));
                    dbias[c] += dpre;
                    for k in 0..shape.taps {
                        if let Some(s) = (t + k + 1).checked_sub(shape.taps) {
                            let j = (b * shape.seq + s) * shape.channels + c;
                            dinput[j] += weight[c * shape.taps + k] * dpre;
                            dweight[c * shape.taps + k] += input[j] * dpre;
                        }
                    }
                }
            }
        }
        (dinput, dweight, dbias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        // A multiplicative hash: values in [-1, 1), asymmetric.
        (0..n as u32)
            .map(|i| ((i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 8) as f32)
            .map(|v| v / (1 << 23) as f32 - 1.0)
            .collect()
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| *x as f64).collect()
    }

    #[track_caller]
    fn close(got: &[f32], want: &[f64], bound: f64) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((*g as f64 - w).abs() <= bound, "{i}: {g} {w}, bound {bound:e}");
        }
    }

    const U: f64 = 1.0 / (1 << 24) as f64;

    /// Holds both passes against the definition.
    fn check(shape: ConvShape, seed: u32) {
        let ConvShape { channels, taps, .. } = shape;
        let n = shape.tokens() * channels;
        let (x, dy) = (noise(n, seed), noise(n, seed ^ 1));
        let (w, b) = (noise(channels * taps, seed ^ 2), noise(channels, seed ^ 3));
        let mut y = vec![f32::NAN; n];
        conv_silu_forward(shape, &x, &w, &b, &mut y);
        // All operands are below 1: |pre| <= K + 1 with an error of K + 1 roundings, 2 U (K + 1)^2; silu' <= 1.1;
        // silu itself 3 ulp of at most K + 1, i.e. 6 U (K + 1).
        let k1 = (taps + 1) as f64;
        let bound = U * (2.2 * k1 * k1 + 6.0 * k1);
        close(&y, &reference::forward(shape, &wide(&x), &wide(&w), &wide(&b)), bound);

        let (mut dx, mut dw, mut db) = (vec![f32::NAN; n], vec![1.0; w.len()], vec![1.0; b.len()]);
        conv_silu_backward(shape, &x, &w, &b, &dy, &mut dx, &mut dw, &mut db);
        let (dx64, mut dw64, mut db64) = reference::backward(shape, &wide(&x), &wide(&w), &wide(&b), &wide(&dy));
        dw64.iter_mut().chain(&mut db64).for_each(|g| *g += 1.0);
        // dpre: |silu''| <= 0.5 times the error of pre, plus 8 U for silu' and 2 U for the product. A sum of n
        // such terms with |w|, |x| <= 1 inherits n of it and rounds n values of at most 1.1 n.
        let dpre = U * (k1 * k1 + 10.0);
        let sum = |n: f64| n * dpre + 2.2 * U * n * (n + 1.0);
        close(&dx, &dx64, sum(taps as f64));
        close(&dw, &dw64, sum(shape.tokens() as f64 + 1.0));
        close(&db, &db64, sum(shape.tokens() as f64 + 1.0));
    }

    /// Several segments and blocks, the last of each shorter, and filters longer than a short sequence.
    #[test]
    fn tiles_of_uneven_size() {
        check(ConvShape { batch: 2, seq: 259, channels: 1100, taps: 4 }, 5);
        check(ConvShape { batch: 3, seq: 129, channels: 17, taps: 9 }, 6);
        check(ConvShape { batch: 2, seq: 3, channels: 17, taps: 9 }, 7);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn matches_the_definition(batch in 1usize..4, seq in 1usize..40, channels in 1usize..150, taps in 1usize..7, seed: u32) {
            check(ConvShape { batch, seq, channels, taps }, seed);
        }

        /// In calls of any length, the channels in two parts with inputs of their own.
        #[test]
        fn steps_equal_the_sequence_to_the_bit(
            seq in 1usize..40, channels in 1usize..70, taps in 1usize..6, call in 1usize..41, part in 0usize..70, seed: u32,
        ) {
            let shape = ConvShape { batch: 1, seq, channels, taps };
            let (x, w, b) = (noise(seq * channels, seed), noise(channels * taps, !seed), noise(channels, seed ^ 9));
            let mut y = vec![f32::NAN; x.len()];
            conv_silu_forward(shape, &x, &w, &b, &mut y);
            let mut state = vec![0.0; (taps - 1) * channels];
            let w = conv_taps(&w, channels);
            let (filter, part) = (ConvFilter { taps: &w, bias: &b }, part.min(channels));
            for (x, y) in x.chunks(call * channels).zip(y.chunks(call * channels)) {
                let mut out = vec![f32::NAN; x.len()];
                let rest: Vec<f32> = x.chunks(channels).flat_map(|row| [&row[part..], &[7.0, 7.0]].concat()).collect();
                let inputs = [
                    ConvInput { channels: 0..part, values: x, stride: channels },
                    ConvInput { channels: part..channels, values: &rest, stride: channels - part + 2 },
                ];
                conv_silu_steps(filter, &inputs, &mut state, &mut out);
                prop_assert_eq!(&out[..], y);
            }
        }
    }

    #[test]
    fn reference_gradients_are_finite_differences() {
        let shape = ConvShape { batch: 2, seq: 5, channels: 3, taps: 4 };
        let (x, w, b) = (wide(&noise(30, 1)), wide(&noise(12, 2)), wide(&noise(3, 3)));
        let dy = wide(&noise(30, 4));
        let loss = |p: [&[f64]; 3]| -> f64 {
            reference::forward(shape, p[0], p[1], p[2]).iter().zip(&dy).map(|(y, d)| y * d).sum()
        };
        let (dx, dw, db) = reference::backward(shape, &x, &w, &b, &dy);
        for (which, grad) in [&dx, &dw, &db].into_iter().enumerate() {
            for i in 0..grad.len() {
                let at = |h: f64| {
                    let mut p = [x.clone(), w.clone(), b.clone()];
                    p[which][i] += h;
                    loss([&p[0], &p[1], &p[2]])
                };
                // Central differences: h^2/6 times a third derivative below 10, and 2^-52 * |loss| / h of rounding.
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((numeric - grad[i]).abs() < 1e-9, "{which} {i}: {numeric} {}", grad[i]);
            }
        }
    }

    #[cfg(feature = "std")]
    #[test]
    fn same_bits_at_any_thread_count() {
        let shape = ConvShape { batch: 3, seq: 50, channels: 200, taps: 4 };
        let n = shape.tokens() * shape.channels;
        let (x, dy, w, b) = (noise(n, 1), noise(n, 2), noise(800, 3), noise(200, 4));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut y, mut dx) = (vec![0.0; n], vec![0.0; n]);
                let (mut dw, mut db) = (vec![0.0; 800], vec![0.0; 200]);
                conv_silu_forward(shape, &x, &w, &b, &mut y);
                conv_silu_backward(shape, &x, &w, &b, &dy, &mut dx, &mut dw, &mut db);
                (y, dx, dw, db)
            })
        };
        assert!(run(1) == run(3));
    }
}
