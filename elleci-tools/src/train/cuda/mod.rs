//! The card: `elleci_cuda`'s trainer as a [`Backend`]. Checkpoints are those of the CPU, tensor by tensor, so that a run can move.

use std::cell::RefCell;

use anyhow::Context;
use elleci_core::archive::{AlignedBytes, Archive};
use elleci_core::model::Batch;
use elleci_core::optim::schedule::depth_of;
use elleci_core::optim::state::check;
use elleci_core::optim::swa::Swa;
use elleci_core::optim::{AdamWConfig, StateType};
use elleci_core::params::{Id, Params};
use elleci_cuda::arena::{Buf, Dtype as Element};
use elleci_cuda::device::Device;
use elleci_cuda::trainer::{Rates as DeviceRates, StateBuf, Trainer};
use safetensors::Dtype;

use super::backend::{
    Backend, Counters, Group, StepEnd, StepOutcome, continue_on_cpu, packed, param_tensors, pass_rows, read_params,
};
use super::config::RunConfig;
use super::plan::Rates;
use crate::checkpoint::tensors::{Bytes, Tensor, TensorFile};

pub mod choice;

use choice::{Choice, Mean};

/// A model on a device of `elleci_cuda`: a card, or the emulated one.
pub struct CudaBackend {
    /// Behind a cell, because tensors are copied from the card while a file is written.
    trainer: RefCell<Trainer>,
    /// Tokens that go through the card at once, unless one sequence is longer
    pass_tokens: usize,
    depth: Vec<usize>,
    /// The running mean, where the host keeps it
    mean: Option<Swa>,
    place: Mean,
    /// The weights as samples see them, until they change
    packed: Option<Archive<AlignedBytes>>,
}

impl CudaBackend {
    /// The model of a configuration with these weights on a device; optimizer states at zero. What was chosen fits the device.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn new(
        device: Box<dyn Device>,
        config: &RunConfig,
        weights: &Params,
        choice: &Choice,
    ) -> anyhow::Result<CudaBackend> {
        let o = &config.optimizer;
        let adamw = AdamWConfig { beta1: o.betas[0], beta2: o.betas[1], eps: o.eps };
        let seed = config.training.seed as u32; // of the stochastic rounding, which mixes it with the number of the step
        let trainer = Trainer::new(device, weights, &config.model, adamw, choice.options, seed)?;
        let layout = weights.layout();
        Ok(CudaBackend {
            trainer: RefCell::new(trainer),
            pass_tokens: choice.options.batch * choice.options.seq,
            depth: (0..layout.params().len()).map(|i| depth_of(layout, Id(i))).collect(),
            mean: None,
            place: choice.mean,
            packed: None,
        })
    }

    /// Bytes asked of the device.
    pub fn reserved(&self) -> u64 {
        self.trainer.borrow().reserved()
    }

    /// The batch in pieces that go through the card at once.
    fn passes<'b>(&self, batch: &Batch<'b>) -> anyhow::Result<impl Iterator<Item = Batch<'b>> + use<'b>> {
        Ok(batch.split(pass_rows(batch.batch, batch.seq, self.pass_tokens))?)
    }

    /// The tensors of a group that lies on the device, each copied when its turn comes.
    fn param_tensors(&self, of: impl Fn(&elleci_cuda::ops::optim::Tensor) -> Option<Buf>) -> Vec<Tensor<'_>> {
        let trainer = self.trainer.borrow();
        let plan = trainer.plan();
        let tensor = |(i, p): (usize, &elleci_core::params::Param)| {
            let buf = of(&plan.params[i].optim)?;
            let read = move || Ok(float_bytes(&self.trainer.borrow_mut().read_floats(buf)?));
            let (name, shape) = (p.name.clone(), p.shape.clone());
            Some(Tensor { name, dtype: Dtype::F32, shape, bytes: Bytes::Later(Box::new(read)) })
        };
        plan.layout.params().iter().enumerate().filter_map(tensor).collect()
    }

    fn state_tensors(&self) -> Vec<Tensor<'_>> {
        let tensor = |s: StateBuf| {
            let read = move || Ok(self.trainer.borrow_mut().read_bytes(s.buf)?);
            let dtype = if s.buf.dtype == Element::U8 { Dtype::U8 } else { Dtype::F32 };
            Tensor { name: s.name, dtype, shape: s.shape, bytes: Bytes::Later(Box::new(read)) }
        };
        let states = self.trainer.borrow().states();
        states.into_iter().map(tensor).collect()
    }

    fn import_states(&mut self, file: &TensorFile) -> anyhow::Result<()> {
        let trainer = self.trainer.get_mut();
        for state in trainer.states() {
            let bytes = file.bytes(&state.name)?;
            let entry = &file.entries()[&state.name];
            let dtype = match entry.dtype {
                Dtype::F32 => StateType::F32,
                Dtype::U8 => StateType::U8,
                other => anyhow::bail!("{}: `{}` has type {other}", file.path().display(), state.name),
            };
            let expected = if state.buf.dtype == Element::U8 { StateType::U8 } else { StateType::F32 };
            check(&state.name, (expected, &state.shape), (dtype, &entry.shape, &bytes))?;
            trainer.write_bytes(state.buf, &bytes)?;
        }
        Ok(())
    }
}

fn float_bytes(values: &[f32]) -> Vec<u8> {
    crate::checkpoint::tensors::f32_bytes(values).into_owned()
}

impl Backend for CudaBackend {
    fn accumulate(&mut self, batch: &Batch<'_>, scale: f32) -> anyhow::Result<()> {
        for pass in self.passes(batch)? {
            self.trainer.get_mut().accumulate(&pass, scale)?;
        }
        Ok(())
    }

    fn update(&mut self, rates: &Rates, end: StepEnd) -> anyhow::Result<()> {
        self.packed = None;
        let lr_of = |id: Id| rates.lr * rates.by_layer[self.depth[id.0]];
        let StepEnd { weight, clip } = end;
        let rates = DeviceRates { lr_of: &lr_of, weight_decay: rates.weight_decay, clip, weight };
        Ok(self.trainer.get_mut().update(&rates)?)
    }

    fn outcome(&mut self) -> anyhow::Result<StepOutcome> {
        let outcome = self.trainer.get_mut().outcome()?.context("no step was ended")?;
        Ok(StepOutcome { loss: outcome.loss, grad_norm: outcome.norm, updated: outcome.updated })
    }

    fn average(&mut self) -> anyhow::Result<()> {
        let trainer = self.trainer.get_mut();
        match self.place {
            Mean::Device => trainer.average()?,
            Mean::Host => {
                let weights = trainer.weights()?;
                self.mean.get_or_insert_with(|| Swa::new(weights.layout().clone())).update(&weights);
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch<'_>) -> anyhow::Result<f64> {
        let mut loss = 0.0;
        for pass in self.passes(batch)? {
            loss += self.trainer.get_mut().evaluate(&pass)?;
        }
        Ok(loss)
    }

    fn sample(&mut self, prompt: &[u32], pick: &mut dyn FnMut(&[f32]) -> Option<u32>) -> anyhow::Result<()> {
        if prompt.is_empty() {
            return Ok(());
        }
        let trainer = self.trainer.get_mut();
        let archive = match &mut self.packed {
            Some(archive) => archive,
            none => {
                let weights = trainer.weights()?;
                none.insert(packed(&trainer.plan().config, &weights)?)
            }
        };
        continue_on_cpu(archive, prompt, pick)
    }

    fn adopt_average(&mut self) -> anyhow::Result<bool> {
        let trainer = self.trainer.get_mut();
        let on_device = trainer.mean()?;
        let Some(mean) = on_device.as_ref().or(self.mean.as_ref().map(Swa::mean)) else { return Ok(false) };
        self.packed = None;
        trainer.set_weights(mean)?;
        Ok(true)
    }

    fn counters(&self) -> Counters {
        let (updates, averaged) = self.trainer.borrow().counters();
        Counters { updates, averaged: self.mean.as_ref().map_or(averaged, Swa::count) }
    }

    fn export(&self, group: Group) -> anyhow::Result<Vec<Tensor<'_>>> {
        Ok(match (group, &self.mean) {
            (Group::Weights, _) => self.param_tensors(|t| Some(t.weights)),
            (Group::Optimizer, _) => self.state_tensors(),
            (Group::Average, Some(mean)) => param_tensors(mean.mean()),
            (Group::Average, None) if self.counters().averaged == 0 => Vec::new(),
            (Group::Average, None) => self.param_tensors(|t| t.mean),
        })
    }

    fn import(&mut self, group: Group, file: &TensorFile, counters: Counters) -> anyhow::Result<()> {
        self.packed = None;
        if group == Group::Optimizer {
            self.import_states(file)?;
            let averaged = self.trainer.get_mut().counters().1;
            self.trainer.get_mut().set_counters(counters.updates, averaged);
            return Ok(());
        }
        let trainer = self.trainer.get_mut();
        let mut params = Params::zeros(trainer.plan().layout.clone());
        read_params(&mut params, file)?;
        match (group, self.place) {
            (Group::Average, Mean::Host) => self.mean = Some(Swa::restore(params, counters.averaged)),
            (Group::Average, Mean::Device) => {
                trainer.set_mean(&params)?;
                let updates = trainer.counters().0;
                trainer.set_counters(updates, counters.averaged);
            }
            _ => trainer.set_weights(&params)?,
        }
        Ok(())
    }
}
