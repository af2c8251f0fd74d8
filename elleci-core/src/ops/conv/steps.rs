//! The convolution of some tokens after others: for inference.

use alloc::vec::Vec;
use core::ops::Range;

use pulp::{Simd, WithSimd};

use crate::ops::lanes::{dispatch, load, silu, store, vectors, vectors_mut};
use crate::par;

/// Tokens of one task, at most.
pub(crate) const STEPS: usize = 16;

/// The taps `[K, channels]` of `weight` `[channels, K]`, as [`ConvFilter`] has them.
pub fn conv_taps(weight: &[f32], channels: usize) -> Vec<f32> {
    let taps = weight.len() / channels.max(1);
    (0..taps).flat_map(|k| weight.iter().skip(k).step_by(taps).copied()).collect()
}

/// A filter as [`conv_silu_steps`] reads it.
#[derive(Clone, Copy, Debug)]
pub struct ConvFilter<'a> {
    /// `[K, channels]`: [`conv_taps`].
    pub taps: &'a [f32],
    /// `[channels]`
    pub bias: &'a [f32],
}

/// Where the inputs of some channels lie.
#[derive(Clone, Debug)]
pub struct ConvInput<'a> {
    /// The channels.
    pub channels: Range<usize>,
    /// Rows of `stride` values, one a token, that begin with these channels; the last may end with them.
    pub values: &'a [f32],
    /// Length of a row.
    pub stride: usize,
}

/// Some tokens of one sequence: `inputs`, which have every channel once (what none has is not written), join `state` `[K - 1, channels]` (the last inputs, oldest first,
/// zeros at the start of a sequence), and `out` `[tokens, channels]` is written. The same bits as
/// [`conv_silu_forward`](super::conv_silu_forward), however tokens are
/// dealt to calls.
///
/// # Panics
/// When a slice does not have the size that the filter gives it.
pub fn conv_silu_steps(filter: ConvFilter<'_>, inputs: &[ConvInput<'_>], state: &mut [f32], out: &mut [f32]) {
    let width = filter.bias.len();
    if out.is_empty() {
        return;
    }
    let (taps, tokens) = (filter.taps.len() / width, out.len() / width);
    assert!(taps >= 1, "conv steps: no taps");
    let sizes = (filter.taps.len(), state.len(), out.len());
    assert_eq!(sizes, (taps * width, (taps - 1) * width, tokens * width), "conv steps");
    for ConvInput { channels, values, stride } in inputs {
        assert!(channels.end <= width && channels.len() <= *stride, "conv steps: channels");
        assert!((tokens - 1) * stride + channels.len() <= values.len(), "conv steps: input");
    }
    let before: &[f32] = state;
    let items: Vec<_> = out.chunks_mut(STEPS * width).enumerate().collect();
    par::for_each(items, |(i, out)| {
        for input in inputs {
            dispatch(Steps { filter, input, state: before, first: i * STEPS, out: &mut *out });
        }
    });
    for ConvInput { channels, values, stride } in inputs {
        let row = |k: usize| k * width + channels.start..k * width + channels.end;
        for k in 0..taps - 1 {
            match (tokens + k).checked_sub(taps - 1) {
                Some(token) => state[row(k)].copy_from_slice(&values[token * stride..][..channels.len()]),
                None => state.copy_within(row(tokens + k), row(k).start),
            }
        }
    }
}

/// Tokens `first ..` of some channels, as many as `out` has rows.
struct Steps<'a> {
    filter: ConvFilter<'a>,
    input: &'a ConvInput<'a>,
    state: &'a [f32],
    first: usize,
    out: &'a mut [f32],
}

impl WithSimd for Steps<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.filter.taps.len() / self.filter.bias.len() {
            1 => self.tokens::<S, 1>(simd),
            2 => self.tokens::<S, 2>(simd),
            3 => self.tokens::<S, 3>(simd),
            4 => self.tokens::<S, 4>(simd),
            _ => self.of_many_taps(simd),
        }
    }
}

impl<'a> Steps<'a> {
    /// Values of these channels in a row that has all.
    #[inline(always)]
    fn own(&self, row: usize) -> Range<usize> {
        let width = self.filter.bias.len();
        row * width + self.input.channels.start..row * width + self.input.channels.end
    }

    /// Inputs by rows: those of the state, and then the tokens'.
    #[inline(always)]
    fn row(&self, row: usize, taps: usize) -> &'a [f32] {
        match row.checked_sub(taps - 1) {
            Some(token) => &self.input.values[token * self.input.stride..][..self.input.channels.len()],
            None => &self.state[self.own(row)],
        }
    }

    /// `K` taps.
    #[inline(always)]
    fn tokens<S: Simd, const K: usize>(self, simd: S) {
        let taps: [&[f32]; K] = core::array::from_fn(|k| &self.filter.taps[self.own(k)]);
        let bias = &self.filter.bias[self.input.channels.clone()];
        let whole = bias.len() / S::F32_LANES;
        let vectors = |row: &'a [f32]| &vectors::<S>(row)[..whole];
        let (taps_v, bias_v) = (core::array::from_fn::<_, K, _>(|k| vectors(taps[k])), vectors(bias));
        for t in 0..self.out.len() / self.filter.bias.len() {
            let rows: [&[f32]; K] = core::array::from_fn(|k| self.row(self.first + t + k, K));
            let rows_v: [&[S::f32s]; K] = core::array::from_fn(|k| vectors(rows[k]));
            let own = self.own(t);
            let out = &mut self.out[own];
            let out_v = &mut vectors_mut::<S>(out)[..whole];
            for v in 0..whole {
                let mut pre = bias_v[v];
                for k in 0..K {
                    pre = simd.mul_add_e_f32s(taps_v[k][v], rows_v[k][v], pre);
                }
                out_v[v] = silu(simd, pre);
            }
            if whole * S::F32_LANES < bias.len() {
                let mut pre = load(simd, bias, whole);
                for k in 0..K {
                    pre = simd.mul_add_e_f32s(load(simd, taps[k], whole), load(simd, rows[k], whole), pre);
                }
                store(simd, out, whole, silu(simd, pre));
            }
        }
    }

    /// Any number of taps.
    #[inline(always)]
    fn of_many_taps<S: Simd>(self, simd: S) {
        let width = self.filter.bias.len();
        let taps = self.filter.taps.len() / width;
        let bias = &self.filter.bias[self.input.channels.clone()];
        for t in 0..self.out.len() / width {
            for v in 0..bias.len().div_ceil(S::F32_LANES) {
                let mut pre = load(simd, bias, v);
                for k in 0..taps {
                    let row = self.row(self.first + t + k, taps);
                    pre = simd.mul_add_e_f32s(load(simd, &self.filter.taps[self.own(k)], v), load(simd, row, v), pre);
                }
                let own = self.own(t);
                store(simd, &mut self.out[own], v, silu(simd, pre));
            }
        }
    }
}
