//! The whole model: logits, loss, and the gradient of every parameter.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use crate::config::{ConfigError, LayerKind, ModelConfig};
use crate::layers::ffn::{self, FfnSaved};
use crate::layers::mamba::{self, MambaSaved};
use crate::layers::mla::{self, MlaSaved};
use crate::layers::{Context, Scratch, add};
use crate::ops::head::{HeadPrecision, Int16Head};
use crate::ops::loss::{HeadInput, chunk_tokens, head_loss, head_loss_grad};
use crate::ops::matmul::{Out, mat, mat_mut, matmul};
use crate::ops::norm::{QuantizedRows, rmsnorm, rmsnorm_backward, rmsnorm_quantize};
use crate::ops::rope::RopeTable;
use crate::par;
use crate::params::{Id, LayerIds, MixerIds, ParamKind, ParamLayout, Params};
use crate::simd::Isa;
use crate::ternary::{GradPrecision, GradScratch, TernaryMatrix};

/// Tokens and what is to be predicted from them. All `[batch, seq]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Sequences.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Input tokens.
    pub tokens: &'a [u32],
    /// `targets[t]` is to follow `tokens[t]`.
    pub targets: &'a [u32],
    /// Weight of every position in the loss; 0 = ignored.
    pub weights: &'a [f32],
}

impl<'a> Batch<'a> {
    /// Whether it is a batch at all.
    ///
    /// # Errors
    /// [`ModelError::BatchShape`] for one that is empty or whose parts differ in length from `batch · seq`.
    pub fn validate(&self) -> Result<(), ModelError> {
        let n = self.batch * self.seq;
        let whole = n > 0 && self.tokens.len() == n && self.targets.len() == n && self.weights.len() == n;
        whole.then_some(()).ok_or(ModelError::BatchShape)
    }

    /// Its sequences as batches of `rows` (> 0), the last of what is left.
    ///
    /// # Errors
    /// As [`Batch::validate`].
    pub fn split(&self, rows: usize) -> Result<impl Iterator<Item = Batch<'a>> + use<'a>, ModelError> {
        self.validate()?;
        let (seq, n) = (self.seq, rows * self.seq);
        let parts = self.tokens.chunks(n).zip(self.targets.chunks(n)).zip(self.weights.chunks(n));
        Ok(parts.map(move |((tokens, targets), weights)| Batch {
            batch: tokens.len() / seq,
            seq,
            tokens,
            targets,
            weights,
        }))
    }
}

/// Why a [`Batch`] or a set of weights does not fit a model.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelError {
    /// The config itself does not hold together.
    Config(ConfigError),
    /// The weights were laid out for another config.
    Layout {
        /// Elements that the config asks for.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A buffer of the batch is not `batch * seq` long, or the batch is empty.
    BatchShape,
    /// The batch has other sizes than the workspace.
    Workspace {
        /// `(batch, seq)` of the workspace.
        expected: (usize, usize),
        /// `(batch, seq)` of the batch.
        got: (usize, usize),
    },
    /// A token or target is not in the vocabulary.
    Token {
        /// The token.
        token: u32,
        /// `vocab_size`.
        vocab_size: usize,
    },
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelError::Config(e) => e.fmt(f),
            ModelError::Layout { expected, got } => {
                write!(f, "the config has {expected} parameters, the weights hold {got}")
            }
            ModelError::BatchShape => write!(f, "tokens, targets and weights must each hold batch * seq > 0 elements"),
            ModelError::Workspace { expected, got } => {
                write!(f, "the workspace was made for batch x seq {expected:?}, the batch is {got:?}")
            }
            ModelError::Token { token, vocab_size } => {
                write!(f, "token {token} is not in the vocabulary (`vocab_size` {vocab_size})")
            }
        }
    }
}

impl core::error::Error for ModelError {}

impl From<ConfigError> for ModelError {
    fn from(e: ConfigError) -> ModelError {
        ModelError::Config(e)
    }
}

/// Which activations the forward keeps for the backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpointing {
    /// All: nothing is computed twice.
    None,
    /// The input of every layer; a layer's inside is computed again in the backward.
    EveryLayer,
    /// The input of every k-th layer; k layers are computed again together.
    EveryKth(usize),
}

impl Checkpointing {
    /// Layers whose activations stand in memory together.
    pub fn segment(self, n_layers: usize) -> usize {
        match self {
            Checkpointing::None => n_layers,
            Checkpointing::EveryLayer => 1,
            Checkpointing::EveryKth(k) => k.clamp(1, n_layers),
        }
    }
}

/// What one layer's backward needs of its forward. A slot serves every k-th layer under checkpointing, so it has room
/// for each kind of mixer that comes by.
#[derive(Debug)]
struct LayerSaved {
    mixer_norm: QuantizedRows,
    mamba: Option<MambaSaved>,
    mla: Option<MlaSaved>,
    ffn_norm: QuantizedRows,
    ffn: FfnSaved,
}

/// All activation memory of a forward and backward, reused over steps.
#[derive(Debug)]
pub struct Workspace {
    batch: usize,
    seq: usize,
    segment: usize,
    /// Residual stream at the start of every segment `[tokens, d_model]`
    starts: Vec<Vec<f32>>,
    /// Residual stream after every mixer and feed-forward of a segment: `2 * segment` buffers
    residuals: Vec<Vec<f32>>,
    saved: Vec<LayerSaved>,
    scratch: Scratch,
    rope: RopeTable,
    final_rstd: Vec<f32>,
    /// Gradient of the residual stream `[tokens, d_model]`
    dh: Vec<f32>,
    head: HeadPrecision,
    int16_head: Int16Head,
    logits: Vec<f32>,
}

impl Workspace {
    /// Memory for batches of exactly `batch` sequences of `seq` tokens. Gradients are computed in float32.
    pub fn new(c: &ModelConfig, batch: usize, seq: usize, checkpointing: Checkpointing) -> Workspace {
        let tokens = batch * seq;
        let segment = checkpointing.segment(c.n_layers);
        let stream = || vec![0.0f32; tokens * c.d_model];
        let saved = (0..segment).map(|slot| LayerSaved {
            mixer_norm: QuantizedRows::new(tokens, c.d_model),
            mamba: slot_has(c, segment, slot, LayerKind::Mamba).then(|| MambaSaved::new(c, batch, seq)),
            mla: slot_has(c, segment, slot, LayerKind::Mla).then(|| MlaSaved::new(c, tokens)),
            ffn_norm: QuantizedRows::new(tokens, c.d_model),
            ffn: FfnSaved::new(c, tokens),
        });
        Workspace {
            batch,
            seq,
            segment,
            starts: (0..c.n_layers.div_ceil(segment)).map(|_| stream()).collect(),
            residuals: (0..2 * segment).map(|_| stream()).collect(),
            saved: saved.collect(),
            scratch: Scratch::new(c, batch, seq, GradPrecision::Float32),
            rope: RopeTable::new(c.d_rope, c.rope_base, seq),
            final_rstd: vec![0.0; tokens],
            dh: stream(),
            head: HeadPrecision::Float32,
            int16_head: Int16Head::default(),
            logits: vec![0.0; chunk_tokens(tokens, c.vocab_size) * c.vocab_size],
        }
    }

    /// The same, for backwards whose projections read their incoming gradient in this precision.
    #[must_use]
    pub fn with_grad_precision(mut self, precision: GradPrecision) -> Workspace {
        self.scratch.grad = GradScratch::new(precision);
        self
    }

    /// The same, for training steps that compute the head in this precision. ([`Model::loss`] and [`Model::logits`] stay
    /// in float32.)
    #[must_use]
    pub fn with_head_precision(mut self, precision: HeadPrecision) -> Workspace {
        self.head = precision.here();
        self
    }

    /// Bytes that a backward's [`Workspace`] comes to: `(kept for the backward, scratch)`.
    pub fn planned_bytes(
        c: &ModelConfig,
        batch: usize,
        seq: usize,
        checkpointing: Checkpointing,
        precision: GradPrecision,
        head: HeadPrecision,
    ) -> (usize, usize) {
        let tokens = batch * seq;
        let segment = checkpointing.segment(c.n_layers);
        let stream = 4 * tokens * c.d_model;
        let mut kept = stream * (c.n_layers.div_ceil(segment) + 2 * segment);
        for slot in 0..segment {
            kept += 2 * QuantizedRows::planned_bytes(tokens, c.d_model) + FfnSaved::planned_bytes(c, tokens);
            if slot_has(c, segment, slot, LayerKind::Mamba) {
                kept += MambaSaved::planned_bytes(c, batch, seq);
            }
            if slot_has(c, segment, slot, LayerKind::Mla) {
                kept += MlaSaved::planned_bytes(c, tokens);
            }
        }
        let mut logits = chunk_tokens(tokens, c.vocab_size) * c.vocab_size;
        let mut scratch = Scratch::planned_bytes(c, batch, seq, precision) + stream + 4 * tokens + 4 * seq * c.d_rope;
        if head.here() == HeadPrecision::Int16 {
            logits = logits.max(Int16Head::logits_len(tokens, c.vocab_size));
            scratch += Int16Head::planned_bytes(tokens, c.vocab_size, c.d_model);
        }
        (kept, scratch + 4 * logits)
    }

    /// `(batch, seq)` that it was made for.
    pub fn shape(&self) -> (usize, usize) {
        (self.batch, self.seq)
    }

    /// The int8 rows of the last forward's quantisers, each with the gain of the norm before it. Only without
    /// checkpointing do all layers keep theirs; with it, this is the first segment, as a backward leaves it.
    pub fn quantized_rows<'a>(&'a self, layout: &ParamLayout) -> Vec<(Id, &'a QuantizedRows)> {
        let mut rows = Vec::new();
        for (ids, saved) in layout.layers().iter().zip(&self.saved) {
            rows.push((ids.mixer_norm, &saved.mixer_norm));
            match (&ids.mixer, &saved.mamba, &saved.mla) {
                (MixerIds::Mamba(ids), Some(mamba), _) => rows.push((ids.gate_norm, &mamba.gated)),
                (MixerIds::Mla(ids), _, Some(mla)) => {
                    rows.extend([(ids.kv_norm, &mla.latent), (ids.out_norm, &mla.out)]);
                }
                _ => {}
            }
            rows.push((ids.ffn_norm, &saved.ffn_norm));
            rows.push((ids.ffn.sub_norm, &saved.ffn.hidden));
        }
        rows
    }
}

/// Whether a layer of this kind passes through a slot.
fn slot_has(c: &ModelConfig, segment: usize, slot: usize, kind: LayerKind) -> bool {
    c.layer_kinds().into_iter().skip(slot).step_by(segment).any(|k| k == kind)
}

/// A config, its weights, and their ternary forms.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    params: Params,
    ternary: Vec<Option<TernaryMatrix>>,
}

impl Model {
    /// Takes weights and derives their ternary forms.
    ///
    /// # Errors
    /// A config that does not validate, or weights of another layout.
    pub fn new(config: ModelConfig, params: Params) -> Result<Model, ModelError> {
        config.validate()?;
        let expected = ParamLayout::new(&config).len();
        if params.data().len() != expected {
            return Err(ModelError::Layout { expected, got: params.data().len() });
        }
        let ternary = params.layout().params().iter().map(|p| {
            (p.kind == ParamKind::Ternary)
                .then(|| TernaryMatrix::from_weights(&params.data()[p.range.clone()], p.shape[0], p.shape[1]))
        });
        let ternary = ternary.collect();
        Ok(Model { config, params, ternary })
    }

    /// The shapes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The latent (float) weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Where every parameter is.
    pub fn layout(&self) -> &Arc<ParamLayout> {
        self.params.layout()
    }

    /// The ternary form of a projection; `None` for full-precision parameters.
    pub fn ternary(&self, id: Id) -> Option<&TernaryMatrix> {
        self.ternary[id.0].as_ref()
    }

    /// Changes the weights and derives their ternary forms again.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut Params) -> R) -> R {
        par::together(|| {
            let result = change(&mut self.params);
            let layout = self.params.layout().clone();
            for (matrix, p) in self.ternary.iter_mut().zip(layout.params()) {
                if let Some(matrix) = matrix {
                    matrix.update(&self.params.data()[p.range.clone()]);
                }
            }
            result
        })
    }

    /// The weights, when the model is no longer needed.
    pub fn into_params(self) -> Params {
        self.params
    }

    fn check(&self, ws: &Workspace, batch: &Batch) -> Result<(), ModelError> {
        batch.validate()?;
        if ws.shape() != (batch.batch, batch.seq) {
            return Err(ModelError::Workspace { expected: ws.shape(), got: (batch.batch, batch.seq) });
        }
        let vocab_size = self.config.vocab_size;
        let scored = batch.targets.iter().zip(batch.weights).filter(|(_, w)| **w != 0.0).map(|(t, _)| t);
        match batch.tokens.iter().chain(scored).find(|t| **t as usize >= vocab_size) {
            Some(&token) => Err(ModelError::Token { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// `Σ_t w_t · CE_t`.
    ///
    /// # Errors
    /// A batch that does not fit the workspace or the vocabulary.
    pub fn loss(&self, ws: &mut Workspace, batch: &Batch) -> Result<f64, ModelError> {
        self.check(ws, batch)?;
        self.forward(ws, batch.tokens);
        Ok(head_loss(self.head_input(&ws.scratch.normed, batch), &mut ws.logits))
    }

    /// The logits `[tokens, vocab_size]`, written to `logits`.
    ///
    /// # Errors
    /// A batch that does not fit the workspace or the vocabulary, or `logits` of another length.
    pub fn logits(&self, ws: &mut Workspace, batch: &Batch, logits: &mut [f32]) -> Result<(), ModelError> {
        self.check(ws, batch)?;
        let (tokens, d, vocab) = (batch.tokens.len(), self.config.d_model, self.config.vocab_size);
        if logits.len() != tokens * vocab {
            return Err(ModelError::BatchShape);
        }
        self.forward(ws, batch.tokens);
        let head = mat(&self.params[self.layout().lm_head()], vocab, d);
        matmul(mat(&ws.scratch.normed, tokens, d), head.reversed_axes(), mat_mut(logits, tokens, vocab), Out::Store);
        Ok(())
    }

    /// Adds the gradient of `scale · Σ_t w_t · CE_t` to `grads`; returns `Σ_t w_t · CE_t`.
    ///
    /// # Errors
    /// A batch that does not fit the workspace or the vocabulary; `grads` of another layout.
    pub fn loss_and_grad(
        &self,
        ws: &mut Workspace,
        batch: &Batch,
        scale: f32,
        grads: &mut Params,
    ) -> Result<f64, ModelError> {
        self.check(ws, batch)?;
        if grads.data().len() != self.layout().len() {
            return Err(ModelError::Layout { expected: self.layout().len(), got: grads.data().len() });
        }
        Ok(par::together(|| self.step(ws, batch, scale, grads)))
    }

    /// [`Model::loss_and_grad`] of a batch that fits.
    fn step(&self, ws: &mut Workspace, batch: &Batch, scale: f32, grads: &mut Params) -> f64 {
        let layout = self.layout().clone();
        self.forward(ws, batch.tokens);
        // scratch.a takes the gradient of the final norm's output; the layers have no use for it yet
        let tokens = batch.tokens.len();
        let d = self.config.d_model;
        let last_residual = 2 * self.layers_in_last_segment(ws) - 1;
        let dnormed = &mut ws.scratch.a[..tokens * d];
        let input = self.head_input(&ws.scratch.normed, batch);
        let dhead = &mut grads[layout.lm_head()];
        let rounded = match ws.head {
            HeadPrecision::Float32 => None,
            HeadPrecision::Int16 => {
                let needed = Int16Head::logits_len(tokens, self.config.vocab_size);
                ws.logits.resize(needed.max(ws.logits.len()), 0.0);
                ws.int16_head.loss_grad(Isa::detect(), input, scale, &mut ws.logits, dnormed, dhead)
            }
        };
        // What is not finite is float32's to carry on.
        let loss = rounded.unwrap_or_else(|| head_loss_grad(input, scale, &mut ws.logits, dnormed, dhead));
        let last = &ws.residuals[last_residual];
        let (gain, dgain) = (&self.params[layout.final_norm()], &mut grads[layout.final_norm()]);
        rmsnorm_backward(last, gain, &ws.final_rstd, dnormed, &mut ws.dh, dgain, Out::Store);
        let segments = ws.starts.len();
        for s in (0..segments).rev() {
            if s + 1 < segments {
                self.segment_forward(ws, s);
            }
            self.segment_backward(ws, s, grads);
        }
        let demb = &mut grads[layout.tok_emb()];
        for (dh, &token) in ws.dh.chunks_exact(d).zip(batch.tokens) {
            crate::ops::rows::add_scaled(&mut demb[token as usize * d..(token as usize + 1) * d], 1.0, dh);
        }
        loss
    }

    fn head_input<'a>(&'a self, normed: &'a [f32], batch: &Batch<'a>) -> HeadInput<'a> {
        let head = &self.params[self.layout().lm_head()];
        HeadInput { normed, head, targets: batch.targets, weights: batch.weights }
    }

    fn context<'a>(&'a self, rope: &'a RopeTable, batch: usize, seq: usize) -> Context<'a> {
        Context { config: &self.config, params: &self.params, ternary: &self.ternary, rope, batch, seq }
    }

    fn layers_in_last_segment(&self, ws: &Workspace) -> usize {
        self.config.n_layers - (ws.starts.len() - 1) * ws.segment
    }

    /// Embedding, all layers, final norm: its output is left in `ws.scratch.normed`.
    fn forward(&self, ws: &mut Workspace, tokens: &[u32]) {
        let d = self.config.d_model;
        let emb = &self.params[self.layout().tok_emb()];
        for (h, &token) in ws.starts[0].chunks_exact_mut(d).zip(tokens) {
            h.copy_from_slice(&emb[token as usize * d..(token as usize + 1) * d]);
        }
        for s in 0..ws.starts.len() {
            self.segment_forward(ws, s);
            if let Some(next) = ws.starts.get_mut(s + 1) {
                next.copy_from_slice(&ws.residuals[2 * ws.segment - 1]);
            }
        }
        let last = &ws.residuals[2 * self.layers_in_last_segment(ws) - 1];
        let gain = &self.params[self.layout().final_norm()];
        rmsnorm(last, gain, self.config.norm_eps, &mut ws.scratch.normed, &mut ws.final_rstd);
    }

    fn segment_forward(&self, ws: &mut Workspace, segment: usize) {
        let first = segment * ws.segment;
        let layers = &self.layout().layers()[first..(first + ws.segment).min(self.config.n_layers)];
        let Workspace { batch, seq, starts, residuals, saved, scratch, rope, .. } = ws;
        let ctx = self.context(rope, *batch, *seq);
        for (slot, ids) in layers.iter().enumerate() {
            let (before, after) = residuals.split_at_mut(2 * slot);
            let input = before.last().unwrap_or(&starts[segment]);
            let (mid, out) = after.split_at_mut(1);
            layer_forward(&ctx, ids, input, &mut mid[0], &mut out[0], &mut saved[slot], scratch);
        }
    }

    fn segment_backward(&self, ws: &mut Workspace, segment: usize, grads: &mut Params) {
        let first = segment * ws.segment;
        let layers = &self.layout().layers()[first..(first + ws.segment).min(self.config.n_layers)];
        let Workspace { batch, seq, starts, residuals, saved, scratch, rope, dh, .. } = ws;
        let ctx = self.context(rope, *batch, *seq);
        for (slot, ids) in layers.iter().enumerate().rev() {
            let input = if slot == 0 { &starts[segment] } else { &residuals[2 * slot - 1] };
            layer_backward(&ctx, ids, (input, &residuals[2 * slot]), dh, &saved[slot], scratch, grads);
        }
    }
}

/// `mid = input + mixer(norm(input))`, `out = mid + ffn(norm(mid))`.
fn layer_forward(
    ctx: &Context,
    ids: &LayerIds,
    input: &[f32],
    mid: &mut [f32],
    out: &mut [f32],
    saved: &mut LayerSaved,
    scratch: &mut Scratch,
) {
    let (d, eps) = (ctx.config.d_model, ctx.config.norm_eps);
    let len = ctx.tokens() * d;
    // The mixer's output goes to scratch, as its own operations use the other buffers.
    match (&ids.mixer, &mut saved.mamba, &mut saved.mla) {
        (MixerIds::Mamba(m), Some(mamba), _) => {
            let Scratch { normed, a, b, c, ssd, .. } = scratch;
            let gain = &ctx.params[ids.mixer_norm];
            rmsnorm_quantize(
                #[inline(always)]
                |t, row| row.copy_from_slice(&input[t * d..(t + 1) * d]),
                gain,
                eps,
                &mut saved.mixer_norm,
                Some(normed),
            );
            let y = &mut c[..len];
            mamba::forward(ctx, m, &saved.mixer_norm, normed, mamba, (a, b, ssd), y);
            add(input, y, mid);
        }
        (MixerIds::Mla(m), _, Some(mla)) => {
            let gain = &ctx.params[ids.mixer_norm];
            rmsnorm_quantize(
                #[inline(always)]
                |t, row| row.copy_from_slice(&input[t * d..(t + 1) * d]),
                gain,
                eps,
                &mut saved.mixer_norm,
                None,
            );
            let y = &mut scratch.a[..len];
            mla::forward(ctx, m, &saved.mixer_norm, mla, y);
            add(input, y, mid);
        }
        _ => unreachable!("a slot has room for every kind of layer that passes through it"),
    }
    let mid: &[f32] = mid;
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&mid[t * d..(t + 1) * d]),
        &ctx.params[ids.ffn_norm],
        eps,
        &mut saved.ffn_norm,
        None,
    );
    let y = &mut scratch.a[..len];
    ffn::forward(ctx, &ids.ffn, &saved.ffn_norm, &mut saved.ffn, y);
    add(mid, y, out);
}

/// From `dh`, the gradient of the layer's output, to that of its input (in place), adding the parameters' gradients.
fn layer_backward(
    ctx: &Context,
    ids: &LayerIds,
    (input, mid): (&[f32], &[f32]),
    dh: &mut [f32],
    saved: &LayerSaved,
    scratch: &mut Scratch,
    grads: &mut Params,
) {
    ffn::backward(ctx, &ids.ffn, &saved.ffn_norm, &saved.ffn, dh, scratch, grads);
    let gain = &ctx.params[ids.ffn_norm];
    rmsnorm_backward(mid, gain, &saved.ffn_norm.rstd, &scratch.normed, dh, &mut grads[ids.ffn_norm], Out::Add);
    let gain = &ctx.params[ids.mixer_norm];
    match (&ids.mixer, &saved.mamba, &saved.mla) {
        (MixerIds::Mamba(m), Some(mamba), _) => {
            mamba::backward(ctx, m, &saved.mixer_norm, (input, gain), mamba, dh, scratch, grads);
        }
        (MixerIds::Mla(m), _, Some(mla)) => mla::backward(ctx, m, &saved.mixer_norm, mla, dh, scratch, grads),
        _ => unreachable!("a slot has room for every kind of layer that passes through it"),
    }
    rmsnorm_backward(input, gain, &saved.mixer_norm.rstd, &scratch.normed, dh, &mut grads[ids.mixer_norm], Out::Add);
}
