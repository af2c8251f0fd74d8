//! Causal depthwise convolution with bias and SiLU, the short filter in front of the Mamba-2 recurrence.
//!
//! ```text
//! pre[t, c] = bias[c] + sum_k weight[c, k] * input[t - (K - 1) + k, c]        input before the sequence is 0
//! out[t, c] = silu(pre[t, c])
//! ```
//! Channels last: `[tokens, channels]`, `tokens = batch * seq`; `weight` is `[channels, K]` and tap 0 is the OLDEST.
//!
//! Work is cut into blocks of channels, each walking every sequence in order. So the tap gradients need no partial
//! sums across threads, and the bits do not depend on how many there are.

use alloc::vec;
use alloc::vec::Vec;
use ndarray::{ArrayViewMut2, Axis};

use crate::ops::activation::{silu, silu_grad};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::vectorize;

/// Channels of one task: four AVX-512 registers, so that a row's accumulators never leave the registers' reach.
const BLOCK: usize = 64;

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

/// The filters of up to [`BLOCK`] channels, taps outermost.
struct Filters<'a> {
    first: usize,
    taps: Vec<f32>, // [K, n]
    bias: &'a [f32],
}

impl<'a> Filters<'a> {
    fn new(shape: ConvShape, block: usize, weight: &[f32], bias: &'a [f32]) -> Filters<'a> {
        let first = block * BLOCK;
        let bias = &bias[first..shape.channels.min(first + BLOCK)];
        let mut taps = Vec::with_capacity(shape.taps * bias.len());
        for k in 0..shape.taps {
            taps.extend((0..bias.len()).map(|c| weight[(first + c) * shape.taps + k]));
        }
        Filters { first, taps, bias }
    }

    fn len(&self) -> usize {
        self.bias.len()
    }

    #[inline(always)]
    fn tap(&self, k: usize) -> &[f32] {
        &self.taps[k * self.len()..][..self.len()]
    }

    /// The inputs of this block at one token.
    #[inline(always)]
    fn row<'i>(&self, input: &'i [f32], channels: usize, token: usize) -> &'i [f32] {
        &input[token * channels + self.first..][..self.len()]
    }

    /// `pre[t, ..]` of the sequence that starts at token `start`.
    #[inline(always)]
    fn pre_activation(&self, shape: ConvShape, input: &[f32], start: usize, t: usize, pre: &mut [f32]) {
        pre.copy_from_slice(self.bias);
        for k in (shape.taps - 1).saturating_sub(t)..shape.taps {
            let row = self.row(input, shape.channels, start + t + k + 1 - shape.taps);
            for ((pre, w), x) in pre.iter_mut().zip(self.tap(k)).zip(row) {
                *pre += w * x;
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
    let mut out = mat_mut(out, shape.tokens(), shape.channels);
    let items: Vec<_> = out.axis_chunks_iter_mut(Axis(1), BLOCK).enumerate().collect();
    par::for_each(items, |(block, mut out)| {
        let filters = Filters::new(shape, block, weight, bias);
        vectorize(
            #[inline(always)]
            || {
                for start in (0..shape.tokens()).step_by(shape.seq.max(1)) {
                    for t in 0..shape.seq {
                        let mut buffer = [0.0; BLOCK];
                        let pre = &mut buffer[..filters.len()];
                        filters.pre_activation(shape, input, start, t, pre);
                        for (out, pre) in row_mut(&mut out, start + t).iter_mut().zip(pre) {
                            *out = silu(*pre);
                        }
                    }
                }
            },
        );
    });
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
    let mut dinput = mat_mut(dinput, shape.tokens(), shape.channels);
    let parts = dweight.chunks_mut(BLOCK * shape.taps).zip(dbias.chunks_mut(BLOCK));
    let items: Vec<_> = dinput.axis_chunks_iter_mut(Axis(1), BLOCK).zip(parts).enumerate().collect();
    par::for_each(items, |(block, (mut dinput, (dweight, dbias)))| {
        let filters = Filters::new(shape, block, weight, bias);
        let n = filters.len();
        // Sums of one sequence, [K + 1, n] with the bias last; a second level of summation keeps long batches exact.
        let mut sums = vec![0.0; (shape.taps + 1) * n];
        for start in (0..shape.tokens()).step_by(shape.seq.max(1)) {
            sums.fill(0.0);
            vectorize(
                #[inline(always)]
                || backward_sequence(shape, &filters, input, dout, &mut dinput, &mut sums, start),
            );
            for c in 0..n {
                for k in 0..shape.taps {
                    dweight[c * shape.taps + k] += sums[k * n + c];
                }
                dbias[c] += sums[shape.taps * n + c];
            }
        }
    });
}

#[inline(always)]
fn backward_sequence(
    shape: ConvShape,
    filters: &Filters,
    input: &[f32],
    dout: &[f32],
    dinput: &mut ArrayViewMut2<f32>,
    sums: &mut [f32],
    start: usize,
) {
    let n = filters.len();
    let last = shape.taps - 1;
    for t in 0..shape.seq {
        let mut buffer = [0.0; BLOCK];
        let dpre = &mut buffer[..n];
        filters.pre_activation(shape, input, start, t, dpre);
        for (d, dout) in dpre.iter_mut().zip(filters.row(dout, shape.channels, start + t)) {
            *d = dout * silu_grad(*d);
        }
        // Step t is the first to touch dinput[t]: the newest tap stores, the older ones add.
        for ((dx, w), d) in row_mut(dinput, start + t).iter_mut().zip(filters.tap(last)).zip(&*dpre) {
            *dx = w * d;
        }
        for k in last.saturating_sub(t)..last {
            let dx = row_mut(dinput, start + t + k - last);
            for ((dx, w), d) in dx.iter_mut().zip(filters.tap(k)).zip(&*dpre) {
                *dx += w * d;
            }
        }
        for k in last.saturating_sub(t)..shape.taps {
            let row = filters.row(input, shape.channels, start + t + k - last);
            for ((sum, x), d) in sums[k * n..][..n].iter_mut().zip(row).zip(&*dpre) {
                *sum += x * d;
            }
        }
        for (sum, d) in sums[shape.taps * n..].iter_mut().zip(&*dpre) {
            *sum += d;
        }
    }
}

#[inline(always)]
fn row_mut<'a>(view: &'a mut ArrayViewMut2<f32>, row: usize) -> &'a mut [f32] {
    view.row_mut(row).into_slice().expect("columns are contiguous")
}

/// One token of one sequence: `input` `[channels]` joins `state` `[K - 1, channels]` (the last inputs, oldest first,
/// zeros at the start of a sequence), `out` `[channels]` is written. The same bits as [`conv_silu_forward`].
///
/// # Panics
/// When a slice does not have the size that `weight` and `bias` give it.
pub fn conv_silu_step(state: &mut [f32], input: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let channels = bias.len();
    let taps = weight.len() / channels.max(1);
    assert!(taps >= 1, "conv step: no taps");
    let sizes = (weight.len(), state.len(), input.len(), out.len());
    assert_eq!(sizes, (channels * taps, channels * (taps - 1), channels, channels), "conv step");
    for c in 0..channels {
        let w = &weight[c * taps..][..taps];
        let mut pre = bias[c];
        for k in 0..taps - 1 {
            pre += w[k] * state[k * channels + c];
        }
        out[c] = silu(pre + w[taps - 1] * input[c]);
    }
    if taps > 1 {
        state.copy_within(channels.., 0);
        state[(taps - 2) * channels..].copy_from_slice(input);
    }
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn matches_the_definition(batch in 1usize..4, seq in 1usize..40, channels in 1usize..150, taps in 1usize..7, seed: u32) {
            let shape = ConvShape { batch, seq, channels, taps };
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

        #[test]
        fn steps_equal_the_sequence_to_the_bit(seq in 1usize..12, channels in 1usize..70, taps in 1usize..6, seed: u32) {
            let shape = ConvShape { batch: 1, seq, channels, taps };
            let (x, w, b) = (noise(seq * channels, seed), noise(channels * taps, !seed), noise(channels, seed ^ 9));
            let mut y = vec![f32::NAN; x.len()];
            conv_silu_forward(shape, &x, &w, &b, &mut y);
            let mut state = vec![0.0; (taps - 1) * channels];
            for (x, y) in x.chunks(channels).zip(y.chunks(channels)) {
                let mut out = vec![f32::NAN; channels];
                conv_silu_step(&mut state, x, &w, &b, &mut out);
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
