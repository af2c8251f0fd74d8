//! Mamba-2 over a pass (SPEC §1.3): the projections for all rows, convolution and scan a sequence at a time.

use alloc::sync::Arc;

use alloc::vec::Vec;

use super::batch::{Pass, Scratch, Segment, grown};
use super::session::{LayerState, MambaState};
use crate::layers::mamba::{decay_rates, gate, ssd_shape};
use crate::ops::activation::softplus;
use crate::ops::conv::{ConvShape, conv_silu_forward, conv_silu_step};
use crate::ops::norm::rmsnorm_quantize;
use crate::ops::ssd::{CHUNK, SsdScratch, ssd_prefill, ssd_step, ssd_step_expect};
use crate::par;
use crate::params::MambaIds;

/// Reads `scratch.norm` and `scratch.normed`, writes `scratch.y`.
pub(super) fn forward(pass: &Pass, ids: &MambaIds, states: Vec<&mut LayerState>, scratch: &mut Scratch) {
    let (c, rows) = (pass.model.config(), pass.rows);
    let (di, heads, bc) = (c.d_inner, c.mamba_heads(), 2 * c.d_state);
    let Scratch { a, b, c: scan, d, norm, normed, quantized, ssd, y, .. } = scratch;
    let zx = grown(a, rows * 2 * di);
    pass.project(ids.input, norm, zx);
    let bcdt = grown(b, rows * (bc + heads));
    pass.model.dense(ids.bcdt).forward(&normed[..rows * c.d_model], rows, bcdt);

    let states = pass.states(states, |state| match state {
        LayerState::Mamba(state) => Arc::make_mut(state),
        LayerState::Mla(_) => unreachable!("the session was made from this layout"),
    });
    let layer = Layer::new(pass, ids);
    if ssd.len() < states.len() {
        ssd.resize_with(states.len(), SsdScratch::new);
    }
    let (mut y_rest, mut input_rest) = (grown(scan, rows * di), &mut grown(d, layer.input_len(pass))[..]);
    let mut items = Vec::with_capacity(states.len());
    for ((segment, state), ssd) in states.into_iter().zip(ssd) {
        let (own_y, rest) = y_rest.split_at_mut(segment.len * di);
        let (input, input_later) = input_rest.split_at_mut(layer.segment_len(segment));
        (y_rest, input_rest) = (rest, input_later);
        items.push((segment, state, ssd, own_y, input));
    }
    let (zx, bcdt): (&[f32], &[f32]) = (zx, bcdt);
    par::for_each(items, |(segment, state, ssd, y, input)| {
        let zx = &zx[segment.row * 2 * di..(segment.row + segment.len) * 2 * di];
        let bcdt = &bcdt[segment.row * (bc + heads)..(segment.row + segment.len) * (bc + heads)];
        // The chunks that the scan would cut the segment into: the same bits with less memory.
        let runs = zx.chunks(CHUNK * 2 * di).zip(bcdt.chunks(CHUNK * (bc + heads)));
        for ((zx, bcdt), y) in runs.zip(y.chunks_mut(CHUNK * di)) {
            let len = y.len() / di;
            let input = &mut input[..layer.segment_len(Segment { len, ..segment })];
            layer.mix(len, zx, bcdt, state, ssd, input, y);
        }
    });

    pass.expect(&[ids.out]);
    quantized.resize(rows, di);
    let scan: &[f32] = &scan[..rows * di];
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| gate(&scan[t * di..(t + 1) * di], &zx[t * 2 * di..][..di], row),
        pass.model.floats(ids.gate_norm),
        c.norm_eps,
        quantized,
        None,
    );
    pass.project(ids.out, quantized, grown(y, rows * c.d_model));
}

/// The layer's small parameters and shapes.
struct Layer<'a> {
    pass: &'a Pass<'a>,
    channels: usize,
    conv_weight: &'a [f32],
    conv_bias: &'a [f32],
    dt_bias: &'a [f32],
    a: Vec<f32>,
    d: &'a [f32],
}

impl<'a> Layer<'a> {
    fn new(pass: &'a Pass<'a>, ids: &MambaIds) -> Layer<'a> {
        let floats = |id| pass.model.floats(id);
        Layer {
            pass,
            channels: pass.model.config().conv_channels(),
            conv_weight: floats(ids.conv_weight),
            conv_bias: floats(ids.conv_bias),
            dt_bias: floats(ids.dt_bias),
            a: decay_rates(floats(ids.a_log)),
            d: floats(ids.d),
        }
    }

    /// Elements that a segment needs for a run of at most [`CHUNK`] tokens: the convolution's inputs with what came before them,
    /// its outputs, and dt.
    fn segment_len(&self, s: Segment) -> usize {
        let (c, len) = (self.pass.model.config(), s.len.min(CHUNK));
        let before = c.d_conv - 1;
        2 * (len + before) * self.channels + len * c.mamba_heads()
    }

    fn input_len(&self, pass: &Pass) -> usize {
        pass.segments.iter().map(|s| self.segment_len(*s)).sum()
    }

    /// Convolution and scan of a run of one sequence: `y` `[len, d_inner]`.
    #[expect(clippy::too_many_arguments, reason = "the tensors of the operation, each once")]
    fn mix(
        &self,
        len: usize,
        zx: &[f32],
        bcdt: &[f32],
        state: &mut MambaState,
        ssd: &mut SsdScratch,
        scratch: &mut [f32],
        y: &mut [f32],
    ) {
        let c = self.pass.model.config();
        let (di, heads, bc, channels, before) =
            (c.d_inner, c.mamba_heads(), 2 * c.d_state, self.channels, c.d_conv - 1);
        let (input, rest) = scratch.split_at_mut((len + before) * channels);
        let (xbc, dt) = rest.split_at_mut((len + before) * channels);
        let rows = zx.chunks_exact(2 * di).zip(bcdt.chunks_exact(bc + heads));
        let outputs = input[before * channels..].chunks_exact_mut(channels).zip(dt.chunks_exact_mut(heads));
        for ((zx, bcdt), (input, dt)) in rows.zip(outputs) {
            input[..di].copy_from_slice(&zx[di..]);
            input[di..].copy_from_slice(&bcdt[..bc]);
            for h in 0..heads {
                dt[h] = softplus(bcdt[bc + h] + self.dt_bias[h]);
            }
        }
        let shape = ssd_shape(c, 1, len);
        let MambaState { scan, conv } = state;
        if len == 1 {
            ssd_step_expect(shape, scan);
            let (input, xbc) = (&input[before * channels..], &mut xbc[..channels]);
            conv_silu_step(conv, input, self.conv_weight, self.conv_bias, xbc);
            return ssd_step(shape, xbc, dt, &self.a, self.d, scan, y);
        }
        input[..before * channels].copy_from_slice(conv);
        let conv_shape = ConvShape { batch: 1, seq: len + before, channels, taps: c.d_conv };
        conv_silu_forward(conv_shape, input, self.conv_weight, self.conv_bias, xbc);
        conv.copy_from_slice(&input[len * channels..]);
        ssd_prefill(shape, &xbc[before * channels..], dt, &self.a, self.d, y, scan, ssd);
    }
}
