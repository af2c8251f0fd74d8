//! A model that trains on a device: what a training loop calls.

mod transfer;

use std::collections::HashMap;
use std::fmt;

use elleci_core::config::ModelConfig;
use elleci_core::model::{Batch, Checkpointing};
use elleci_core::ops::rope::RopeTable;
use elleci_core::optim::AdamWConfig;
use elleci_core::params::{Id, Params};

use crate::arena::{Buf, Use};
use crate::device::{Ability, Device, DeviceError, Recording};
use crate::ops::Products;
use crate::ops::loss::Occurrences;
use crate::ops::optim::{self, Adam, OUTCOME, Outcome, Table, TensorRates};
use crate::ops::product::Gemm;
use crate::ops::ternary::Quantizer;
use crate::plan::{Options, Plan};
use crate::step::Step;

pub use transfer::StateBuf;

/// Why a [`Trainer`] could not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The device.
    Device(DeviceError),
    /// The batch does not hold together.
    Batch(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Device(e) => e.fmt(f),
            Error::Batch(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<DeviceError> for Error {
    fn from(e: DeviceError) -> Error {
        Error::Device(e)
    }
}

/// The rates of an update.
pub struct Rates<'a> {
    /// Learning rate of a parameter.
    pub lr_of: &'a dyn Fn(Id) -> f64,
    /// Decoupled weight decay, before it is multiplied by the rate.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 = any.
    pub clip: f64,
    /// Weight of all targets of the step: what its loss is divided by.
    pub weight: f64,
}

/// Sequences and tokens of a batch, and layers whose activations stand in memory together.
type Key = (usize, usize, usize);

/// A batch shape that has been seen: its plan, and its step once it is recorded.
struct Shape {
    plan: Plan,
    recording: Option<Recording>,
    /// Whether its step may be recorded: a library loads its kernels with their first products, which a recording has no room for.
    ready: bool,
}

impl Shape {
    fn new(plan: Plan) -> Shape {
        let ready = plan.options.gemm == Gemm::Own;
        Shape { plan, recording: None, ready }
    }
}

/// Weights, gradients, optimizer and activations on a device.
pub struct Trainer {
    device: Box<dyn Device>,
    shapes: HashMap<Key, Shape>,
    /// The shape whose activations the device's memory is laid out for
    current: Key,
    reserved: u64,
    options: Options,
    config: ModelConfig,
    optimizer: AdamWConfig,
    quantizer: Quantizer,
    table: Table,
    updates: u64,
    averaged: u64,
    seed: u32,
    /// Whether steps are recorded and replayed
    record: bool,
    /// The recorded end of a step; it is the same for all shapes
    ending: Option<Recording>,
    /// Whether a step has been ended whose outcome was not read yet
    pending: bool,
    /// Whether gradients have been added since the last step
    begun: bool,
}

impl Trainer {
    /// A model on a device, for micro-batches of up to `options.batch` sequences of `options.seq` tokens; larger ones move
    /// everything once. `seed` is that of the stochastic rounding.
    ///
    /// # Errors
    /// A config that the kernels do not cover, a plan that does not fit, or a fault of the device.
    pub fn new(
        mut device: Box<dyn Device>,
        weights: &Params,
        config: &ModelConfig,
        optimizer: AdamWConfig,
        options: Options,
        seed: u32,
    ) -> Result<Trainer, Error> {
        let plan = Plan::new(config, options)?;
        if weights.data().len() != plan.layout.len() {
            let (got, want) = (weights.data().len(), plan.layout.len());
            return Err(Error::Batch(format!("the config has {want} parameters, the weights hold {got}")));
        }
        if options.products == Products::Fp8 {
            device.offers(Ability::Fp8)?;
        }
        if options.gemm == Gemm::Library {
            device.offers(Ability::Library)?;
        }
        device.reserve(&plan.arena)?;
        let (quantizer, table) = write_tables(device.as_mut(), &plan)?;
        let current = (options.batch, options.seq, plan.segment());
        let mut trainer = Trainer {
            device,
            reserved: plan.arena.bytes(),
            shapes: HashMap::from([(current, Shape::new(plan))]),
            current,
            options,
            config: config.clone(),
            optimizer,
            quantizer,
            table,
            updates: 0,
            averaged: 0,
            seed,
            record: true,
            ending: None,
            pending: false,
            begun: false,
        };
        trainer.enter()?;
        for (purpose, buf) in trainer.persistent() {
            // The moments' codes of 0 are not 0.
            if purpose != Use::Weights {
                trainer.device.zero(buf)?;
            }
        }
        for p in &trainer.plan().params.clone() {
            if p.optim.absmax.is_some() {
                let zero = elleci_core::optim::blockwise8::DynamicMap::signed().zero_code();
                trainer.device.write(p.optim.moments.0, &vec![zero; p.optim.moments.0.len])?;
            }
        }
        trainer.set_weights(weights)?;
        Ok(trainer)
    }

    /// The plan in use.
    pub fn plan(&self) -> &Plan {
        &self.shapes[&self.current].plan
    }

    /// What the device is.
    pub fn describe(&self) -> String {
        self.device.describe()
    }

    /// The device.
    pub fn device(&mut self) -> &mut dyn Device {
        self.device.as_mut()
    }

    /// Bytes asked of the device: the largest plan so far.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Updates made so far (the last step's as soon as its [outcome](Trainer::outcome) is read), and weights in the running mean.
    pub fn counters(&self) -> (u64, u64) {
        (self.updates, self.averaged)
    }

    /// Sets both, when states have been restored.
    pub fn set_counters(&mut self, updates: u64, averaged: u64) {
        (self.updates, self.averaged) = (updates, averaged);
    }

    /// From here on, every step is launched anew instead of recorded once and replayed.
    pub fn without_recording(&mut self) {
        self.record = false;
        self.ending = None;
        self.shapes.values_mut().for_each(|s| s.recording = None);
    }

    /// Buffers that outlive a step; they lie at the same place in the plans of all shapes.
    fn persistent(&self) -> Vec<(Use, Buf)> {
        let regions = self.plan().arena.regions().iter();
        let lasting = regions.filter(|r| !matches!(r.purpose, Use::Activations | Use::Scratch));
        lasting.map(|r| (r.purpose, r.buf)).collect()
    }

    /// Makes the device's memory that of a batch shape.
    fn shape(&mut self, key: Key) -> Result<(), Error> {
        if key == self.current {
            return Ok(());
        }
        if !self.shapes.contains_key(&key) {
            let (batch, seq, segment) = key;
            let checkpointing = Checkpointing::EveryKth(segment);
            let plan = Plan::new(&self.config, Options { batch, seq, checkpointing, ..self.options })?;
            if plan.arena.bytes() > self.reserved {
                self.grow(&plan)?;
            }
            self.shapes.insert(key, Shape::new(plan));
        }
        self.current = key;
        self.enter()
    }

    /// Moves everything that lasts to a larger allocation.
    fn grow(&mut self, plan: &Plan) -> Result<(), Error> {
        let mut kept = Vec::new();
        for (_, buf) in self.persistent() {
            let mut bytes = vec![0; buf.bytes() as usize];
            self.device.read(buf, &mut bytes)?;
            kept.push((buf, bytes));
        }
        self.device.reserve(&plan.arena)?;
        self.reserved = plan.arena.bytes();
        // The memory is another one: what was recorded points into the old.
        self.shapes.values_mut().for_each(|s| s.recording = None);
        self.ending = None;
        for (buf, bytes) in kept {
            self.device.write(buf, &bytes)?;
        }
        (self.quantizer, self.table) = write_tables(self.device.as_mut(), plan)?;
        Ok(())
    }

    /// Writes what a shape's kernels take for granted: the rotations.
    fn enter(&mut self) -> Result<(), Error> {
        let plan = &self.shapes[&self.current].plan;
        self.device.relabel(&plan.arena)?;
        let (c, seq) = (&plan.config, self.current.1);
        let table = RopeTable::new(c.d_rope, c.rope_base, seq);
        // The table rotates (1, 0) to (cos, sin).
        let mut values = vec![0.0f32; seq * c.d_rope];
        let (cos, sin) = values.split_at_mut(seq * c.d_rope / 2);
        let half = c.d_rope / 2;
        let mut row = vec![0.0f32; c.d_rope];
        for pos in 0..seq {
            row[..half].fill(1.0);
            row[half..].fill(0.0);
            table.rotate(&mut row, pos);
            cos[pos * half..(pos + 1) * half].copy_from_slice(&row[..half]);
            sin[pos * half..(pos + 1) * half].copy_from_slice(&row[half..]);
        }
        let rope = plan.rope;
        Ok(self.device.write(rope, &floats(&values))?)
    }

    fn upload(&mut self, batch: &Batch, scale: f32, kept: Checkpointing) -> Result<(), Error> {
        let n = batch.batch * batch.seq;
        if n == 0 || batch.tokens.len() != n || batch.targets.len() != n || batch.weights.len() != n {
            return Err(Error::Batch("tokens, targets and weights must each hold batch * seq > 0 elements".into()));
        }
        let vocab = self.config.vocab_size;
        let scored = batch.targets.iter().zip(batch.weights).filter(|(_, w)| **w != 0.0).map(|(t, _)| t);
        if let Some(token) = batch.tokens.iter().chain(scored).find(|t| **t as usize >= vocab) {
            return Err(Error::Batch(format!("token {token} is not in the vocabulary (`vocab_size` {vocab})")));
        }
        self.shape((batch.batch, batch.seq, kept.segment(self.config.n_layers)))?;
        let inputs = self.plan().inputs;
        let (positions, starts, count) = Occurrences::of(batch.tokens);
        let dev = self.device.as_mut();
        dev.write(inputs.tokens, &words(batch.tokens))?;
        dev.write(inputs.targets, &words(batch.targets))?;
        dev.write(inputs.weights, &floats(batch.weights))?;
        dev.write(inputs.scale, &floats(&[scale]))?;
        dev.write(inputs.occurrences.positions, &words(&positions))?;
        dev.write(inputs.occurrences.starts, &words(&starts))?;
        Ok(dev.write(inputs.occurrences.count, &words(&count))?)
    }

    /// `Σ w·CE` of the last batch: waits for the device.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn last_loss(&mut self) -> Result<f64, Error> {
        let buf = self.plan().losses.1;
        Ok(self.read_f64(buf)?)
    }

    fn read_f64(&mut self, buf: Buf) -> Result<f64, DeviceError> {
        let mut bytes = [0; 8];
        self.device.read(buf, &mut bytes)?;
        Ok(f64::from_le_bytes(bytes))
    }

    /// Adds the gradient of `scale · Σ w·CE` of a micro-batch, and `Σ w·CE` to the loss of the step. Nothing is waited for.
    ///
    /// # Errors
    /// A batch that does not fit the model, a second one where the options promise that one is the whole step, or a fault of the
    /// device, which may be that of an earlier launch.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<(), Error> {
        if self.begun && self.options.whole_step {
            return Err(Error::Batch("a second micro-batch, in a step that was planned to have one".into()));
        }
        self.upload(batch, scale, self.options.checkpointing)?;
        self.begun = true;
        let shape = self.shapes.get_mut(&self.current).expect("made by the line above");
        let dev = self.device.as_mut();
        match shape.recording {
            Some(recording) => dev.replay(recording)?,
            None if self.record && shape.ready => {
                dev.record()?;
                let result = Step { plan: &shape.plan, dev }.loss_and_grad();
                let recording = self.device.recorded()?;
                result?;
                shape.recording = Some(recording);
                self.device.replay(recording)?;
            }
            None => {
                Step { plan: &shape.plan, dev }.loss_and_grad()?;
                shape.ready = true;
            }
        }
        Ok(())
    }

    /// `Σ w·CE` of a batch.
    ///
    /// # Errors
    /// A batch that does not fit the model, one in the middle of a step that was planned whole, or a fault of the device.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64, Error> {
        if self.begun && self.options.whole_step {
            return Err(Error::Batch(
                "an evaluation before the step has ended: its gradients lie where activations go".into(),
            ));
        }
        // Nothing is kept for a backward: the smallest plan does.
        self.upload(batch, 0.0, Checkpointing::EveryLayer)?;
        let plan = &self.shapes[&self.current].plan;
        Step { plan, dev: self.device.as_mut() }.loss()?;
        self.last_loss()
    }

    /// Global norm of the gradients: waits for the device. A step needs no call of this.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn grad_norm(&mut self) -> Result<f64, Error> {
        let tables = self.plan().tables;
        self.table.squares(self.device.as_mut(), tables.squares, tables.norm)?;
        Ok(self.read_f64(tables.norm)?.sqrt())
    }

    /// Ends a step: one AdamW update with the clipped gradients, which are then zero; the ternary forms are derived anew. Where the
    /// loss or the norm is not finite, only the gradients are dropped. Nothing is waited for; [`outcome`](Trainer::outcome) tells.
    ///
    /// # Errors
    /// A fault of the device, which may be that of an earlier launch.
    pub fn update(&mut self, rates: &Rates) -> Result<(), Error> {
        self.outcome()?; // where it was not asked for: the corrections count the updates that were made
        self.updates += 1;
        let (cfg, t) = (self.optimizer, self.updates as f64);
        let (correction1, correction2) = (1.0 - cfg.beta1.powf(t), 1.0 - cfg.beta2.powf(t));
        let plan = &self.shapes[&self.current].plan;
        let decays = plan.layout.params().iter().map(|p| if p.kind.decays() { rates.weight_decay } else { 0.0 });
        let each = decays.enumerate().map(|(i, decay)| {
            let lr = (rates.lr_of)(Id(i));
            TensorRates { keep: (1.0 - lr * decay) as f32, step: (lr / correction1) as f32 }
        });
        let adam = Adam {
            rise1: (1.0 - cfg.beta1) as f32,
            beta2: cfg.beta2 as f32,
            rise2: (1.0 - cfg.beta2) as f32,
            correction2: correction2.sqrt() as f32,
            eps: cfg.eps as f32,
            seed: self.seed ^ (self.updates as u32).wrapping_mul(0x9e37_79b9),
            clip: rates.clip,
            weight: rates.weight,
        };
        let scalars = plan.tables.scalars;
        let buf = self.table.buf();
        self.device.write(buf, self.table.with_rates(each))?;
        self.device.write(scalars.adam, &adam.bytes())?;
        (self.pending, self.begun) = (true, false);
        match self.ending {
            Some(recording) => self.device.replay(recording)?,
            None if self.record => {
                self.device.record()?;
                let result = self.end_step();
                let recording = self.device.recorded()?;
                result?;
                self.ending = Some(recording);
                self.device.replay(recording)?;
            }
            None => self.end_step()?,
        }
        Ok(())
    }

    /// The launches that end a step; all that differs from step to step is in the device's memory.
    fn end_step(&mut self) -> Result<(), DeviceError> {
        let tables = self.plan().tables;
        let dev = self.device.as_mut();
        self.table.squares(dev, tables.squares, tables.norm)?;
        self.table.settle(dev, tables.norm, tables.scalars)?;
        self.table.update(dev, tables.scalars)?;
        self.quantizer.run(dev)
    }

    /// What the step that was ended last came to, once: waits for the device.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn outcome(&mut self) -> Result<Option<Outcome>, Error> {
        if !std::mem::take(&mut self.pending) {
            return Ok(None);
        }
        let buf = self.plan().tables.scalars.outcome;
        let mut bytes = [0; 8 * OUTCOME];
        self.device.read(buf, &mut bytes)?;
        let outcome = Outcome::read(&bytes);
        if !outcome.updated {
            self.updates -= 1;
        }
        Ok(Some(outcome))
    }

    /// Sets the gradients and the loss of the step to zero.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn discard(&mut self) -> Result<(), Error> {
        self.begun = false;
        for (purpose, buf) in self.persistent() {
            if purpose == Use::Gradients {
                self.device.zero(buf)?;
            }
        }
        let total = self.plan().tables.scalars.total;
        Ok(self.device.zero(total)?)
    }

    /// Takes the weights into the running mean; nothing where the options keep none.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn average(&mut self) -> Result<(), Error> {
        if self.options.average {
            self.table.average(self.device.as_mut(), (1.0 / (self.averaged + 1) as f64) as f32)?;
            self.averaged += 1;
        }
        Ok(())
    }
}

/// Writes the tables that do not change with the batch's shape.
fn write_tables(dev: &mut dyn Device, plan: &Plan) -> Result<(Quantizer, Table), DeviceError> {
    let tables = plan.tables;
    let forms: Vec<_> = plan.params.iter().filter_map(|p| Some((p.optim.weights, p.ternary?))).collect();
    let (quantizer, bytes) = Quantizer::new(&forms, tables.quantizer, tables.ternary_partials, dev.base());
    dev.write(tables.quantizer, &bytes)?;
    dev.write(tables.scalars.maps, &floats(&optim::maps()))?;
    let tensors: Vec<_> = plan.params.iter().map(|p| p.optim).collect();
    let mut table = Table::new(&tensors, tables.optim, dev.base());
    dev.write(tables.optim, table.with_rates(std::iter::empty()))?;
    Ok((quantizer, table))
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
