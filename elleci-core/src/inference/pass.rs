//! One pass of rows through the model, whatever sequences they belong to.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::batch::Output;
use super::schedule::{Inputs, Segment, Turn};
use super::session::LayerState;
use super::{attention, mamba};
use crate::archive::PackedModel;
use crate::layers::ffn::activate;
use crate::ops::norm::{QuantizedRows, rmsnorm, rmsnorm_quantize};
use crate::ops::rope::RopeTable;
use crate::ops::rows::rows_per_task;
use crate::par;
use crate::params::{FfnIds, Id, MixerIds};
use crate::ternary::packed::{self, forward_all};

/// Rows whose outputs are made together: a head's weights become floats once for so many.
const OUTPUTS: usize = 32;

impl Output {
    /// The rows that are wanted of a run of a feed.
    fn rows(self, run: &Segment) -> Range<usize> {
        match self {
            Output::Each | Output::Hidden => 0..run.len,
            Output::From(first) => first.saturating_sub(run.start).min(run.len)..run.len,
            Output::Last if run.ends() => run.len - 1..run.len,
            Output::Last | Output::Nothing => 0..0,
        }
    }
}

/// Which outputs are wanted of a feed, by its index.
pub(super) type Outputs<'a> = dyn Fn(usize) -> Output + Sync + 'a;
/// Takes a feed's index, the index of a token in it, and the output there; from any thread.
pub(super) type Visit<'a> = dyn Fn(usize, usize, &[f32]) + Sync + 'a;

/// What becomes of the sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sessions {
    /// They have taken the tokens.
    Advance,
    /// They are dropped after the call: their last states are of no use.
    Discard,
}

/// Activations of a pass, `[rows, ..]` each, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Residual stream, output of a block, output of a norm: `[rows, d_model]`
    h: Vec<f32>,
    pub y: Vec<f32>,
    pub normed: Vec<f32>,
    pub norm: QuantizedRows,
    pub quantized: QuantizedRows,
    /// The widest activations of mixers and feed-forward
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub mix: Vec<mamba::MixScratch>,
    pub attention: Vec<attention::Room>,
}

/// `buffer` with at least `len` elements, as a slice of `len`.
pub(super) fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// What the small parameters of a model are turned into once.
#[derive(Debug)]
pub(super) struct Constants {
    pub fingerprint: u64,
    /// One a Mamba layer, in order
    mamba: Vec<mamba::Constants>,
}

impl Constants {
    pub fn new(model: PackedModel<'_>) -> Constants {
        let layers = model.layout().layers().iter();
        let mamba = layers.filter_map(|ids| match &ids.mixer {
            MixerIds::Mamba(ids) => Some(mamba::Constants::new(model, ids)),
            MixerIds::Mla(_) => None,
        });
        Constants { fingerprint: model.fingerprint(), mamba: mamba.collect() }
    }
}

/// What all passes of a call read.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub model: PackedModel<'a>,
    pub constants: &'a Constants,
    pub sessions: Sessions,
    /// Whether a call's only token is computed as one of several
    pub one_form: bool,
}

impl Call<'_> {
    /// Takes some rows through the model, each layer's states and the outputs in `turn`.
    pub fn pass(
        &self,
        scratch: &mut Scratch,
        inputs: &Inputs<'_>,
        segments: &[Segment],
        turn: &Turn<'_>,
        outputs: &Outputs<'_>,
        visit: &Visit<'_>,
    ) {
        let rows = segments.last().map_or(0, |s| s.row + s.len);
        let model = self.model;
        let c = model.config();
        let (d, layout) = (c.d_model, model.layout());
        let positions = segments.iter().flat_map(|s| {
            let first = inputs.positions[s.feed] + s.start;
            first..first + s.len
        });
        let rope = RopeTable::of_positions(c.d_rope, c.rope_base, positions);

        let mut h = core::mem::take(&mut scratch.h);
        let stream = grown(&mut h, rows * d);
        let mut row = Vec::new();
        for s in segments {
            for (i, token) in inputs.tokens[s.feed][s.start..][..s.len].iter().enumerate() {
                let to = &mut stream[(s.row + i) * d..][..d];
                model.stored_row(layout.tok_emb(), *token as usize, &mut row).row(0, to);
            }
        }
        let wanted = self.wanted(segments, outputs);
        // Nothing reads the last layer's output in the other rows.
        let some = (wanted.len() < rows).then_some(&wanted[..]);
        let mut stream = stream;
        let mut constants = self.constants.mamba.iter();
        for (layer, ids) in layout.layers().iter().enumerate() {
            let outs = if layer + 1 == layout.layers().len() { some } else { None };
            let pass = Pass { call: *self, inputs, segments, turn, layer, rows, outs, rope: &rope };
            let wants_floats = matches!(ids.mixer, MixerIds::Mamba(_));
            match &ids.mixer {
                MixerIds::Mamba(m) => pass.expect([m.input]),
                MixerIds::Mla(m) => pass.expect([m.q, m.kv_down]),
            }
            pass.norm(ids.mixer_norm, stream, scratch, wants_floats);
            match &ids.mixer {
                MixerIds::Mamba(m) => {
                    let constants = constants.next().expect("one a Mamba layer");
                    mamba::forward(&pass, m, constants, scratch);
                }
                MixerIds::Mla(m) => attention::forward(&pass, m, scratch),
            }
            let pass = Pass { rows: pass.outs(), outs: None, ..pass };
            if pass.rows == 0 {
                break;
            }
            if let Some(outs) = outs {
                for (i, out) in outs.iter().enumerate() {
                    stream.copy_within(out.row * d..(out.row + 1) * d, i * d);
                }
                stream = &mut stream[..outs.len() * d];
            }
            pass.expect([ids.ffn.gate, ids.ffn.up]);
            add(stream, &scratch.y[..pass.rows * d]);
            pass.norm(ids.ffn_norm, stream, scratch, false);
            pass.ffn(&ids.ffn, scratch);
            add(stream, &scratch.y[..pass.rows * d]);
        }
        self.outputs(scratch, wanted, turn, stream, visit);
        scratch.h = h;
    }

    /// The rows of which something is wanted, in order.
    fn wanted(&self, segments: &[Segment], outputs: &Outputs<'_>) -> Vec<Wanted> {
        let rows_of = |s: &Segment| {
            let (s, output) = (*s, outputs(s.feed));
            output.rows(&s).map(move |i| Wanted { feed: s.feed, index: s.start + i, row: s.row + i, output })
        };
        segments.iter().flat_map(rows_of).collect()
    }

    /// Final norm, and the head where logits are wanted: `stream` is that of the rows of which something is wanted.
    fn outputs(
        &self,
        scratch: &mut Scratch,
        mut wanted: Vec<Wanted>,
        turn: &Turn<'_>,
        stream: &[f32],
        visit: &Visit<'_>,
    ) {
        let model = self.model;
        let c = model.config();
        let (d, vocab) = (c.d_model, c.vocab_size);
        wanted.iter_mut().enumerate().for_each(|(i, w)| w.row = i);
        // Those that need the head come first; the order within a feed stays.
        wanted.sort_by_key(|w| w.output == Output::Hidden);
        let heads = wanted.partition_point(|w| w.output != Output::Hidden);
        let gain = model.floats(model.layout().final_norm());
        let head = model.dense(model.layout().lm_head());
        if heads > 0 {
            head.expect();
        }
        let (logits_of, hidden_of) = wanted.split_at(heads);
        for wanted in logits_of.chunks(OUTPUTS).chain(hidden_of.chunks(OUTPUTS)) {
            let n = wanted.len();
            let picked = grown(&mut scratch.normed, n * d);
            for (wanted, to) in wanted.iter().zip(picked.chunks_exact_mut(d)) {
                to.copy_from_slice(&stream[wanted.row * d..(wanted.row + 1) * d]);
            }
            let y = grown(&mut scratch.y, n * d);
            rmsnorm(picked, gain, c.norm_eps, y, &mut vec![0.0; n]);
            let (values, width): (&[f32], usize) = if wanted[0].output == Output::Hidden {
                (y, d)
            } else {
                let logits = grown(&mut scratch.a, n * vocab);
                head.forward(y, n, logits);
                (logits, vocab)
            };
            // A sequence's outputs come in order, and none after a panic.
            if !turn.wait_for_all() {
                return;
            }
            for (wanted, values) in wanted.iter().zip(values.chunks_exact(width)) {
                visit(wanted.feed, wanted.index, values);
            }
        }
    }
}

/// A row of a pass whose output is wanted.
#[derive(Debug)]
struct Wanted {
    feed: usize,
    /// Of its token in the feed
    index: usize,
    /// In the pass; behind the last layer, among those that are wanted
    row: usize,
    output: Output,
}

/// What every layer of a pass reads.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a, 'i> {
    pub call: Call<'a>,
    inputs: &'a Inputs<'i>,
    pub segments: &'a [Segment],
    turn: &'a Turn<'a>,
    /// That it is in
    layer: usize,
    pub rows: usize,
    /// Rows that the layer's output is wanted of, if not of all: of a sequence the newest
    outs: Option<&'a [Wanted]>,
    /// The rotation of every row
    pub rope: &'a RopeTable,
}

impl Pass<'_, '_> {
    /// Rows that the layer's output is wanted of.
    pub fn outs(&self) -> usize {
        self.outs.map_or(self.rows, <[_]>::len)
    }

    /// The row that is the `i`-th of those.
    pub fn out_row(&self, i: usize) -> usize {
        self.outs.map_or(i, |outs| outs[i].row)
    }

    /// Those of a segment: so many of its last rows.
    pub fn outs_of(&self, segment: &Segment) -> usize {
        self.outs.map_or(segment.len, |outs| outs.iter().filter(|out| out.feed == segment.feed).count())
    }

    /// Norm and quantiser of the residual stream, into `scratch.norm` and, if wanted, `scratch.normed`.
    fn norm(&self, gain: Id, h: &[f32], scratch: &mut Scratch, floats: bool) {
        let c = self.call.model.config();
        let d = c.d_model;
        scratch.norm.resize(self.rows, d);
        let normed = floats.then(|| grown(&mut scratch.normed, self.rows * d));
        rmsnorm_quantize(
            #[inline(always)]
            |t, row| row.copy_from_slice(&h[t * d..(t + 1) * d]),
            self.call.model.floats(gain),
            c.norm_eps,
            &mut scratch.norm,
            normed,
        );
    }

    /// `y` `[rows, out]`: the projection of quantised rows.
    pub fn project(&self, id: Id, rows: &QuantizedRows, y: &mut [f32]) {
        self.call.model.ternary(id).forward(&rows.codes, &rows.scales, y);
    }

    /// Projections of the same rows.
    pub fn project_all<const N: usize>(&self, ids: [Id; N], rows: &QuantizedRows, outs: [&mut [f32]; N]) {
        let parts = ids.into_iter().map(|id| self.call.model.ternary(id)).zip(outs);
        if self.rows == 1 {
            forward_all(parts.collect(), &rows.codes, rows.scales[0]);
        } else {
            parts.for_each(|(matrix, out)| matrix.forward(&rows.codes, &rows.scales, out));
        }
    }

    /// What the next projection will read, said before the serial work that leads to it.
    pub fn expect<const N: usize>(&self, ids: [Id; N]) {
        if self.rows == 1 {
            packed::expect(&ids.map(|id| self.call.model.ternary(id)));
        }
    }

    /// Runs `f` with the layer's states of the segments, as the tokens before have left them.
    pub fn with_states<R>(&self, f: impl FnOnce(Vec<(&Segment, &mut LayerState)>) -> R) -> R {
        self.turn.wait(self.layer);
        let states = self.segments.iter().map(|s| self.inputs.state(self.layer, s.feed).take());
        let mut states: Vec<_> = states.collect();
        let done = f(self.segments.iter().zip(states.iter_mut().map(|state| &mut ***state)).collect());
        drop(states);
        self.turn.done(self.layer);
        done
    }

    fn ffn(&self, ids: &FfnIds, scratch: &mut Scratch) {
        let c = self.call.model.config();
        let f = c.ffn_hidden;
        // The buffers that the mixers make nearly as large.
        let gate = grown(&mut scratch.a, self.rows * f);
        let up = grown(&mut scratch.c, self.rows * f);
        self.project_all([ids.gate, ids.up], &scratch.norm, [&mut *gate, &mut *up]);
        self.expect([ids.down]);
        scratch.quantized.resize(self.rows, f);
        let (gate, up): (&[f32], &[f32]) = (gate, up);
        rmsnorm_quantize(
            #[inline(always)]
            |t, row| activate(&gate[t * f..(t + 1) * f], &up[t * f..(t + 1) * f], row),
            self.call.model.floats(ids.sub_norm),
            c.norm_eps,
            &mut scratch.quantized,
            None,
        );
        let y = grown(&mut scratch.y, self.rows * c.d_model);
        self.project(ids.down, &scratch.quantized, y);
    }
}

/// `h += y`
fn add(h: &mut [f32], y: &[f32]) {
    let n = rows_per_task(h.len() / 64) * 64;
    let items = h.chunks_mut(n).zip(y.chunks(n)).collect();
    par::for_each(items, |(h, y): (&mut [f32], &[f32])| {
        h.iter_mut().zip(y).for_each(|(h, y)| *h += y);
    });
}
