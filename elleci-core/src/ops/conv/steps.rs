//! The convolution of some tokens after others: for inference.

use alloc::vec::Vec;
use core::ops::Range;

use pulp::{Simd, WithSimd};

use crate::ops::lanes::{dispatch, load, silu, store};
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
        let Steps { filter, input, state, first, out } = self;
        let ConvInput { channels, values, stride } = input;
        let width = filter.bias.len();
        let (taps, tokens, len) = (filter.taps.len() / width, out.len() / width, channels.len());
        let at = |row: usize| row * width + channels.start..row * width + channels.end;
        let bias = &filter.bias[channels.clone()];
        for t in 0..tokens {
            let out = &mut out[at(t)];
            for v in 0..len.div_ceil(S::F32_LANES) {
                let mut pre = load(simd, bias, v);
                for k in 0..taps {
                    // Rows of the state, and then those of the input.
                    let row = match (first + t + k).checked_sub(taps - 1) {
                        Some(token) => &values[token * stride..][..len],
                        None => &state[at(first + t + k)],
                    };
                    pre = simd.mul_add_e_f32s(load(simd, &filter.taps[at(k)], v), load(simd, row, v), pre);
                }
                store(simd, out, v, silu(simd, pre));
            }
        }
    }
}
