//! The loop's view of a device: where weights, gradients and optimizer states live, and who computes on them.

use anyhow::Context;
use elleci_core::archive::{AlignedBytes, Archive, DenseFormat, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::ops::head::HeadPrecision;
use elleci_core::optim::norm::{clip_factor, global_norm};
use elleci_core::optim::schedule::depth_of;
use elleci_core::optim::swa::Swa;
use elleci_core::optim::{AdamW, AdamWConfig, StateData, StatePrecision, StateType, StepRates};
use elleci_core::params::{Id, Params};
use elleci_core::ternary::GradPrecision;
use elleci_core::ternary::packed::Packing;
use safetensors::Dtype;

use super::plan::Rates;
use crate::checkpoint::tensors::{Bytes, Tensor, TensorFile};

/// What a checkpoint stores apart, a file each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The latent weights.
    Weights,
    /// The optimizer's moments.
    Optimizer,
    /// The running mean of the weights.
    Average,
}

impl Group {
    /// Its file in a checkpoint.
    pub fn file(self) -> &'static str {
        match self {
            Group::Weights => "model.safetensors",
            Group::Optimizer => "optimizer.safetensors",
            Group::Average => "swa.safetensors",
        }
    }
}

/// How a step is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepForm {
    /// Which activations are kept.
    pub checkpointing: Checkpointing,
    /// Precision of the gradients that enter the products of ternary projections.
    pub gradients: GradPrecision,
    /// Precision of the head's products.
    pub head: HeadPrecision,
}

/// What a checkpoint must know of a backend beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Updates that the optimizer has made.
    pub updates: u64,
    /// Weights in the running mean; 0 = there is none.
    pub averaged: u64,
}

/// What the end of a step needs beside its rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepEnd {
    /// Weight of all targets of the step: what its loss is divided by.
    pub weight: f64,
    /// Largest global norm of the gradient; 0 = any.
    pub clip: f64,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean of `w·CE` over the micro-batches.
    pub loss: f64,
    /// Global norm of the gradient, before it was clipped.
    pub grad_norm: f64,
    /// Whether there was an update: loss and norm are finite.
    pub updated: bool,
}

impl StepOutcome {
    /// Of these numbers: an update needs both to be finite.
    pub fn new(loss: f64, grad_norm: f64) -> StepOutcome {
        StepOutcome { loss, grad_norm, updated: loss.is_finite() && grad_norm.is_finite() }
    }
}

/// Weights, gradients and optimizer on some device.
///
/// One step is: [`accumulate`](Backend::accumulate) for every micro-batch, [`update`](Backend::update), [`outcome`](Backend::outcome).
/// The first two may return before their work is done, so that the host can prepare the next step meanwhile; a fault of theirs may
/// then be reported by a later call.
pub trait Backend {
    /// Adds the gradient of `scale · Σ w·CE` of a micro-batch, and `Σ w·CE` to the loss of the step.
    ///
    /// # Errors
    /// A batch that does not fit the model, or a fault of the device.
    fn accumulate(&mut self, batch: &Batch<'_>, scale: f32) -> anyhow::Result<()>;

    /// Ends the step: one optimizer update with the clipped gradients or, where loss or norm is not finite, none. The gradients
    /// are zero afterwards.
    ///
    /// # Errors
    /// A fault of the device.
    fn update(&mut self, rates: &Rates, end: StepEnd) -> anyhow::Result<()>;

    /// What the step that was ended last came to, once.
    ///
    /// # Errors
    /// A fault of the device; no step was ended since the last call.
    fn outcome(&mut self) -> anyhow::Result<StepOutcome>;

    /// Takes the weights into the running mean.
    ///
    /// # Errors
    /// A fault of the device.
    fn average(&mut self) -> anyhow::Result<()>;

    /// `Σ w·CE` of a batch.
    ///
    /// # Errors
    /// A batch that does not fit the model, or a fault of the device.
    fn evaluate(&mut self, batch: &Batch<'_>) -> anyhow::Result<f64>;

    /// Continues `prompt` (not empty): `pick` sees the logits of the next token, and ends the text with `None`.
    ///
    /// # Errors
    /// A token that is not in the vocabulary, or a fault of the device.
    fn sample(&mut self, prompt: &[u32], pick: &mut dyn FnMut(&[f32]) -> Option<u32>) -> anyhow::Result<()>;

    /// Replaces the weights by their running mean, where there is one; returns whether there is.
    ///
    /// # Errors
    /// A fault of the device.
    fn adopt_average(&mut self) -> anyhow::Result<bool>;

    /// How many updates and averages there have been.
    fn counters(&self) -> Counters;

    /// The tensors of a group, to be written.
    ///
    /// # Errors
    /// A fault of the device.
    fn export(&self, group: Group) -> anyhow::Result<Vec<Tensor<'_>>>;

    /// Replaces a group by the tensors of a file. `counters` are those that stood beside it.
    ///
    /// # Errors
    /// A tensor that is missing, superfluous, of another shape or type.
    fn import(&mut self, group: Group, file: &TensorFile, counters: Counters) -> anyhow::Result<()>;
}

/// Sequences of a micro-batch of `rows` times `seq` tokens that a device works on at once, if that shall be at most `tokens` (one
/// sequence goes through whole). Passes of a micro-batch are equal.
pub fn pass_rows(rows: usize, seq: usize, tokens: usize) -> usize {
    let most = (tokens / seq.max(1)).clamp(1, rows.max(1));
    (1..=most).rev().find(|n| rows.is_multiple_of(*n)).unwrap_or(1)
}

/// As [`pass_rows`], on a CPU, for a model of this width. Products are at their full speed with 2,048 tokens, and activations of more
/// would only take memory. A model of more than 1,024 channels takes fewer, down to 1,024 tokens: its plan has to be small (docs/LOG.md).
pub fn cpu_pass_rows(d_model: usize, rows: usize, seq: usize) -> usize {
    pass_rows(rows, seq, ((1 << 21) / d_model.max(1)).clamp(1024, 2048))
}

/// The CPU: everything in `elleci-core`.
pub struct CpuBackend {
    model: Model,
    grads: Params,
    optimizer: AdamW,
    average: Option<Swa>,
    depth: Vec<usize>,
    form: StepForm,
    workspace: Option<(Checkpointing, Workspace)>,
    /// `Σ w·CE` of the step so far
    loss: f64,
    ended: Option<StepOutcome>,
}

impl CpuBackend {
    /// Optimizer states at zero.
    pub fn new(model: Model, adamw: AdamWConfig, states: StatePrecision, form: StepForm) -> CpuBackend {
        let layout = model.layout().clone();
        let depth = (0..layout.params().len()).map(|i| depth_of(&layout, Id(i))).collect();
        CpuBackend {
            grads: Params::zeros(layout.clone()),
            optimizer: AdamW::new(layout, adamw, states),
            average: None,
            depth,
            form,
            workspace: None,
            loss: 0.0,
            ended: None,
            model,
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The workspace of a shape; another one that may be there is dropped before the new one is made.
    fn workspace(&mut self, batch: &Batch<'_>, kept: Checkpointing) {
        let shape = (batch.batch, batch.seq);
        if !self.workspace.as_ref().is_some_and(|(k, w)| *k == kept && w.shape() == shape) {
            self.workspace = None;
            let workspace = Workspace::new(self.model.config(), batch.batch, batch.seq, kept)
                .with_grad_precision(self.form.gradients)
                .with_head_precision(self.form.head);
            self.workspace = Some((kept, workspace));
        }
    }
}

/// Weights as deployment would run them, in full precision where that has a choice: samples come from these.
pub(super) fn packed(config: &ModelConfig, params: &Params) -> anyhow::Result<Archive<AlignedBytes>> {
    let options = PackOptions { packing: Packing::I2, sparse: Packing::I2, dense: DenseFormat::F32 };
    Ok(Archive::open(to_bytes(config, params, None, options)?)?)
}

/// Continues a prompt (not empty) on the CPU.
pub(super) fn continue_on_cpu(
    archive: &Archive<AlignedBytes>,
    prompt: &[u32],
    pick: &mut dyn FnMut(&[f32]) -> Option<u32>,
) -> anyhow::Result<()> {
    let mut session = Session::new(archive.model())?;
    let mut next = pick(session.extend(archive.model(), prompt)?);
    while let Some(token) = next {
        next = pick(session.extend(archive.model(), &[token])?);
    }
    Ok(())
}

/// Tensors of a set of parameters, borrowed.
pub fn param_tensors(params: &Params) -> Vec<Tensor<'_>> {
    let tensor = |p: &elleci_core::params::Param| Tensor::f32(&p.name, &p.shape, &params.data()[p.range.clone()]);
    params.layout().params().iter().map(tensor).collect()
}

/// Fills a set of parameters from a file that must hold exactly its tensors.
///
/// # Errors
/// All tensors that are missing, superfluous or of another shape, by name.
pub fn read_params(params: &mut Params, file: &TensorFile) -> anyhow::Result<()> {
    let layout = params.layout().clone();
    let expected = layout.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
    crate::hf::check_tensors(expected, &file.entries().iter().map(|(n, e)| (n.as_str(), e.shape.as_slice())).collect())
        .map_err(|e| e.context(file.path().display().to_string()))?;
    for p in layout.params() {
        file.read_floats(&p.name, &p.shape, &mut params.data_mut()[p.range.clone()])?;
    }
    Ok(())
}

impl Backend for CpuBackend {
    fn accumulate(&mut self, batch: &Batch<'_>, scale: f32) -> anyhow::Result<()> {
        for pass in batch.split(cpu_pass_rows(self.model.config().d_model, batch.batch, batch.seq))? {
            self.workspace(&pass, self.form.checkpointing);
            let (_, workspace) = self.workspace.as_mut().expect("made by the line above");
            self.loss += self.model.loss_and_grad(workspace, &pass, scale, &mut self.grads)?;
        }
        Ok(())
    }

    fn update(&mut self, rates: &Rates, end: StepEnd) -> anyhow::Result<()> {
        let loss = std::mem::take(&mut self.loss) / end.weight;
        let outcome = StepOutcome::new(loss, global_norm(&self.grads));
        if outcome.updated {
            let depth = &self.depth;
            let lr_of = |id: Id| rates.lr * rates.by_layer[depth[id.0]];
            let grad_scale = if end.clip > 0.0 { clip_factor(outcome.grad_norm, end.clip) } else { 1.0 };
            let rates = StepRates { lr_of: &lr_of, weight_decay: rates.weight_decay, grad_scale };
            self.model.update(|params| self.optimizer.step(params, &self.grads, &rates));
        }
        self.grads.clear();
        self.ended = Some(outcome);
        Ok(())
    }

    fn outcome(&mut self) -> anyhow::Result<StepOutcome> {
        self.ended.take().context("no step was ended")
    }

    fn average(&mut self) -> anyhow::Result<()> {
        let mean = self.average.get_or_insert_with(|| Swa::new(self.model.layout().clone()));
        mean.update(self.model.params());
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch<'_>) -> anyhow::Result<f64> {
        let mut loss = 0.0;
        for pass in batch.split(cpu_pass_rows(self.model.config().d_model, batch.batch, batch.seq))? {
            // Nothing is kept for a backward: the smallest workspace does.
            self.workspace(&pass, Checkpointing::EveryLayer);
            let (_, workspace) = self.workspace.as_mut().expect("made by the line above");
            loss += self.model.loss(workspace, &pass)?;
        }
        Ok(loss)
    }

    fn sample(&mut self, prompt: &[u32], pick: &mut dyn FnMut(&[f32]) -> Option<u32>) -> anyhow::Result<()> {
        if prompt.is_empty() {
            return Ok(());
        }
        continue_on_cpu(&packed(self.model.config(), self.model.params())?, prompt, pick)
    }

    fn adopt_average(&mut self) -> anyhow::Result<bool> {
        let Some(average) = &self.average else { return Ok(false) };
        self.model.update(|params| params.data_mut().copy_from_slice(average.mean().data()));
        Ok(true)
    }

    fn counters(&self) -> Counters {
        Counters { updates: self.optimizer.steps(), averaged: self.average.as_ref().map_or(0, Swa::count) }
    }

    fn export(&self, group: Group) -> anyhow::Result<Vec<Tensor<'_>>> {
        Ok(match group {
            Group::Weights => param_tensors(self.model.params()),
            Group::Average => self.average.as_ref().map(|a| param_tensors(a.mean())).unwrap_or_default(),
            Group::Optimizer => {
                let dtype = |data: &StateData<'_>| if data.dtype() == StateType::F32 { Dtype::F32 } else { Dtype::U8 };
                let states = self.optimizer.tensors().into_iter();
                states
                    .map(|t| {
                        let bytes = Bytes::Ready(t.data.bytes());
                        Tensor { name: t.name, dtype: dtype(&t.data), shape: t.shape, bytes }
                    })
                    .collect()
            }
        })
    }

    fn import(&mut self, group: Group, file: &TensorFile, counters: Counters) -> anyhow::Result<()> {
        match group {
            Group::Weights => self.model.update(|params| read_params(params, file)),
            Group::Average => {
                let mut mean = Params::zeros(self.model.layout().clone());
                read_params(&mut mean, file)?;
                self.average = Some(Swa::restore(mean, counters.averaged));
                Ok(())
            }
            Group::Optimizer => {
                let names: Vec<String> = self.optimizer.tensors().into_iter().map(|t| t.name).collect();
                for name in &names {
                    let bytes = file.bytes(name)?;
                    let entry = &file.entries()[name];
                    let dtype = match entry.dtype {
                        Dtype::F32 => StateType::F32,
                        Dtype::U8 => StateType::U8,
                        other => anyhow::bail!("{}: `{name}` has type {other}", file.path().display()),
                    };
                    self.optimizer.load(name, dtype, &entry.shape, &bytes)?;
                }
                self.optimizer.set_steps(counters.updates);
                Ok(())
            }
        }
    }
}
