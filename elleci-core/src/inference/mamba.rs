//! Mamba-2 over a pass (SPEC §1.3): the projections for all rows, convolution and scan a sequence at a time.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::pass::{Pass, Scratch, Sessions, grown};
use super::session::{LayerState, MambaRecent, MambaState};
use crate::archive::PackedModel;
use crate::config::ModelConfig;
use crate::layers::mamba::{decay_rates, gate, ssd_shape};
use crate::ops::activation::softplus;
use crate::ops::conv::{ConvFilter, ConvInput, STEPS as CONV_STEPS, conv_silu_steps, conv_taps};
use crate::ops::norm::rmsnorm_quantize;
use crate::ops::ssd::{ScanState, ssd_steps, ssd_steps_expect};
use crate::par;
use crate::params::MambaIds;

/// Tokens of a sequence that go through convolution and scan at once: what the two hand on stays in the caches.
const RUN: usize = 16;
/// The same where the state stays as it is: that between runs is a copy.
const LAST_RUN: usize = 64;

/// What a layer's small parameters are turned into once, for all passes.
#[derive(Debug)]
pub(super) struct Constants {
    /// `[d_conv, channels]`
    taps: Vec<f32>,
    /// `[heads]`
    a: Vec<f32>,
}

impl Constants {
    pub fn new(model: PackedModel<'_>, ids: &MambaIds) -> Constants {
        let channels = model.config().conv_channels();
        let taps = conv_taps(model.floats(ids.conv_weight), channels);
        Constants { taps, a: decay_rates(model.floats(ids.a_log)) }
    }
}

/// Working memory of a thread.
#[derive(Debug, Default)]
pub(super) struct MixScratch {
    parts: PartScratch,
    /// For a sequence whose state stays as it is: that between parts
    passing: MambaPassing,
}

#[derive(Debug, Default)]
struct PartScratch {
    /// Outputs of the convolution, and dt
    buffer: Vec<f32>,
    /// Of the scan
    scan: Vec<Vec<f32>>,
}

#[derive(Debug, Default)]
struct MambaPassing {
    scan: Vec<f32>,
    recent: MambaRecent,
}

/// Reads `scratch.norm` and `scratch.normed`, writes `scratch.y`, of the rows whose output is wanted.
pub(super) fn forward(pass: &Pass, ids: &MambaIds, constants: &Constants, scratch: &mut Scratch) {
    let (c, rows) = (pass.call.model.config(), pass.rows);
    let (di, heads, bc) = (c.d_inner, c.mamba_heads(), 2 * c.d_state);
    let Scratch { a, b, c: scan, norm, normed, quantized, mix, y, .. } = scratch;
    let zx = grown(a, rows * 2 * di);
    pass.project(ids.input, norm, zx);
    let bcdt = grown(b, rows * (bc + heads));
    pass.call.model.dense(ids.bcdt).forward(&normed[..rows * c.d_model], rows, bcdt);

    let layer = Layer::new(pass.call.model, ids, constants);
    let (zx, bcdt): (&[f32], &[f32]) = (zx, bcdt);
    let mut y_rest = grown(scan, rows * di);
    pass.with_states(|states| {
        let mut items = Vec::with_capacity(states.len());
        for (segment, state) in states {
            let LayerState::Mamba(state) = state else { unreachable!("the session was made from this layout") };
            let (own_y, rest) = core::mem::take(&mut y_rest).split_at_mut(segment.len * di);
            y_rest = rest;
            items.push((segment, state, own_y));
        }
        par::for_each_kept(items, mix, |scratch, (segment, state, y)| {
            let zx = &zx[segment.row * 2 * di..(segment.row + segment.len) * 2 * di];
            let bcdt = &bcdt[segment.row * (bc + heads)..(segment.row + segment.len) * (bc + heads)];
            // Nothing will ever follow these tokens: the state after them need not be kept.
            let last = segment.ends() && pass.call.sessions == Sessions::Discard;
            layer.mix(zx, bcdt, state, last, scratch, y);
        });
    });

    let outs = pass.outs();
    if outs == 0 {
        return;
    }
    pass.expect([ids.out]);
    quantized.resize(outs, di);
    let scan: &[f32] = &scan[..rows * di];
    rmsnorm_quantize(
        #[inline(always)]
        |i, row| {
            let t = pass.out_row(i);
            gate(&scan[t * di..(t + 1) * di], &zx[t * 2 * di..][..di], row);
        },
        pass.call.model.floats(ids.gate_norm),
        c.norm_eps,
        quantized,
        None,
    );
    pass.project(ids.out, quantized, grown(y, outs * c.d_model));
}

/// The layer's small parameters and shapes.
struct Layer<'a> {
    config: &'a ModelConfig,
    conv_bias: &'a [f32],
    dt_bias: &'a [f32],
    d: &'a [f32],
    constants: &'a Constants,
}

impl<'a> Layer<'a> {
    fn new(model: PackedModel<'a>, ids: &MambaIds, constants: &'a Constants) -> Layer<'a> {
        let floats = |id| model.floats(id);
        Layer {
            config: model.config(),
            conv_bias: floats(ids.conv_bias),
            dt_bias: floats(ids.dt_bias),
            d: floats(ids.d),
            constants,
        }
    }

    /// Convolution and scan of a run of tokens of one sequence, whose state stays as it is if they are its `last`: `y` `[len, d_inner]`.
    fn mix(
        &self,
        zx: &[f32],
        bcdt: &[f32],
        state: &mut MambaState,
        last: bool,
        scratch: &mut MixScratch,
        y: &mut [f32],
    ) {
        let c = self.config;
        let (di, width) = (c.d_inner, 2 * c.d_state + c.mamba_heads());
        let run = if last { LAST_RUN } else { RUN };
        let parts = (y.len() / di).div_ceil(run);
        let MixScratch { parts: part_scratch, passing } = scratch;
        if last {
            passing.recent.clone_from(&state.recent);
            if parts > 1 {
                passing.scan.clone_from(&state.scan);
            }
        }
        let rows = zx.chunks(run * 2 * di).zip(bcdt.chunks(run * width));
        for (part, ((zx, bcdt), y)) in rows.zip(y.chunks_mut(run * di)).enumerate() {
            let (scan, recent) = if last {
                let scan = match (parts, part + 1 == parts) {
                    (1, _) => ScanState::Passed(&state.scan),
                    (_, true) => ScanState::Passed(&passing.scan),
                    _ => ScanState::Kept(&mut passing.scan),
                };
                (scan, &mut passing.recent)
            } else {
                let recent = Arc::make_mut(&mut state.recent);
                // A fork shares the state until it is written.
                let scan = match recent.steps.is_over_within(y.len() / di) {
                    true => ScanState::Kept(Arc::<Vec<f32>>::make_mut(&mut state.scan)),
                    false => ScanState::Passed(&state.scan),
                };
                (scan, recent)
            };
            self.mix_part(zx, bcdt, scan, recent, part_scratch, y);
        }
    }

    /// [`Layer::mix`] of a part.
    fn mix_part(
        &self,
        zx: &[f32],
        bcdt: &[f32],
        scan: ScanState<'_>,
        recent: &mut MambaRecent,
        scratch: &mut PartScratch,
        y: &mut [f32],
    ) {
        let c = self.config;
        let (di, heads, bc, channels) = (c.d_inner, c.mamba_heads(), 2 * c.d_state, c.conv_channels());
        let len = y.len() / di;
        let shape = ssd_shape(c, 1, len);
        let (xbc, dt) = grown(&mut scratch.buffer, len * (channels + heads)).split_at_mut(len * channels);
        for (bcdt, dt) in bcdt.chunks_exact(bc + heads).zip(dt.chunks_exact_mut(heads)) {
            for h in 0..heads {
                dt[h] = softplus(bcdt[bc + h] + self.dt_bias[h]);
            }
        }
        let Constants { taps, a } = self.constants;
        let filter = ConvFilter { taps, bias: self.conv_bias };
        let inputs = [
            ConvInput { channels: 0..di, values: &zx[di..], stride: 2 * di },
            ConvInput { channels: di..channels, values: bcdt, stride: bc + heads },
        ];
        // The convolution of so few is no loop for several threads: the next is the scan.
        if len <= CONV_STEPS {
            ssd_steps_expect(shape, scan.values());
        }
        conv_silu_steps(filter, &inputs, &mut recent.conv, xbc);
        ssd_steps(shape, xbc, dt, a, self.d, scan, &mut recent.steps, y, &mut scratch.scan);
    }
}
