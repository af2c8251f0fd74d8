//! Schedules: functions of the optimiser step alone, so that a resumed run follows the same curve.
//!
//! Steps count from 0, and every function takes the number of the step about to be made. A fraction of a run becomes a
//! step by rounding `fraction * total_steps` to the nearest.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::params::{Id, ParamLayout};

/// Why a schedule is refused. The text names the field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleError(pub String);

impl fmt::Display for ScheduleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for ScheduleError {}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), ScheduleError> {
    if holds { Ok(()) } else { Err(ScheduleError(message())) }
}

/// The step at which a fraction of the run is over.
pub fn boundary(until: f64, total_steps: u64) -> u64 {
    libm::round(until * total_steps as f64) as u64
}

/// The shape of the cooldown, from the peak at its first step towards 0 at `total_steps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Cooldown {
    /// `1 − √x` (Hägele et al. 2024).
    #[default]
    #[cfg_attr(feature = "serde", serde(rename = "1-sqrt"))]
    OneMinusSqrt,
    /// `1 − x`.
    #[cfg_attr(feature = "serde", serde(rename = "linear"))]
    Linear,
    /// `(1 + cos πx) / 2`.
    #[cfg_attr(feature = "serde", serde(rename = "cosine"))]
    Cosine,
}

impl Cooldown {
    /// The factor at `x` in [0, 1] of the cooldown.
    pub fn factor(self, x: f64) -> f64 {
        match self {
            Cooldown::OneMinusSqrt => 1.0 - libm::sqrt(x),
            Cooldown::Linear => 1.0 - x,
            Cooldown::Cosine => 0.5 * (1.0 + libm::cos(core::f64::consts::PI * x)),
        }
    }
}

/// Warm-up, stable, decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wsd {
    /// The rate of the constant part.
    pub peak: f64,
    /// Steps of the linear warm-up.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Steps of the cooldown, the last of the run.
    pub cooldown_steps: u64,
    /// Its shape.
    pub cooldown: Cooldown,
}

impl Wsd {
    /// Checks that the parts fit into the run.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn validate(&self) -> Result<(), ScheduleError> {
        ensure(self.peak.is_finite() && self.peak > 0.0, || {
            alloc::format!("the peak learning rate is {}; it must be a positive number", self.peak)
        })?;
        let parts = self.warmup_steps.saturating_add(self.cooldown_steps);
        ensure(parts <= self.total_steps, || {
            let Wsd { warmup_steps, cooldown_steps, total_steps, .. } = self;
            alloc::format!(
                "warm-up ({warmup_steps}) and cooldown ({cooldown_steps}) exceed the {total_steps} steps of the run"
            )
        })
    }

    /// Whether `step` is part of the cooldown.
    pub fn in_cooldown(&self, step: u64) -> bool {
        step >= self.total_steps.saturating_sub(self.cooldown_steps)
    }

    /// The learning rate of a step.
    ///
    /// The warm-up is `peak · (step + 1) / warmup_steps`: the first update is already one (a rate of 0 would waste it and
    /// still move AdamW's moments), and its last step is the first at the peak. The cooldown starts from the peak at
    /// `x = 0`, so the last step of a run still has a positive rate; 0 is reached at `total_steps`, where none is made.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        if step >= self.total_steps {
            return 0.0;
        }
        if !self.in_cooldown(step) {
            return self.peak;
        }
        let done = step - (self.total_steps - self.cooldown_steps);
        self.peak * self.cooldown.factor(done as f64 / self.cooldown_steps as f64)
    }

    /// The weight decay of a step: `value`, and 0 in the cooldown (BitNet b1.58).
    pub fn weight_decay(&self, step: u64, value: f64) -> f64 {
        if self.in_cooldown(step) { 0.0 } else { value }
    }
}

/// Learning rate curriculum: rates by depth, multiplied onto the schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Lerac {
    /// One rate for all layers.
    #[default]
    Off,
    /// LeRaC (Croitoru et al. 2022): `ρ_l^(1 − step/until_step)`, with ρ falling geometrically from 1 at the first layer to
    /// `floor` at the last; from `until_step` on, 1 everywhere.
    Grow {
        /// ρ of the last layer, in (0, 1].
        floor: f64,
        /// The step at which all rates meet.
        until_step: u64,
    },
    /// Constant multipliers, linear from `ratio` at the first layer to 1 at the last.
    Static {
        /// Multiplier of the first layer.
        ratio: f64,
    },
}

impl Lerac {
    /// Checks the ranges of its numbers.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn validate(&self) -> Result<(), ScheduleError> {
        match *self {
            Lerac::Grow { floor, .. } => ensure(floor > 0.0 && floor <= 1.0, || {
                alloc::format!("the LeRaC floor is {floor}; it must be in (0, 1]")
            }),
            Lerac::Static { ratio } => ensure(ratio.is_finite() && ratio > 0.0, || {
                alloc::format!("the LeRaC ratio is {ratio}; it must be a positive number")
            }),
            Lerac::Off => Ok(()),
        }
    }

    /// What multiplies the scheduled rate of `layer` (0 to `n_layers − 1`) at a step. A model of one layer: 1.
    pub fn multiplier(&self, step: u64, layer: usize, n_layers: usize) -> f64 {
        if n_layers <= 1 {
            return 1.0;
        }
        let last = (n_layers - 1) as f64;
        match *self {
            Lerac::Grow { floor, until_step } if step < until_step => {
                let left = 1.0 - step as f64 / until_step as f64;
                libm::pow(floor, layer as f64 / last * left)
            }
            Lerac::Static { ratio } => 1.0 + (last - layer as f64) * (ratio - 1.0) / last,
            _ => 1.0,
        }
    }
}

/// The layer by which LeRaC rates a parameter: its own; the first for the embedding, the last for final norm and head.
pub fn depth_of(layout: &ParamLayout, id: Id) -> usize {
    let last = layout.layers().len().saturating_sub(1);
    layout.param(id).layer.unwrap_or(if id == layout.tok_emb() { 0 } else { last })
}

/// What one optimiser step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Sequences of the step.
    pub sequences: usize,
    /// Forward-backward passes into which they are cut.
    pub micro_batches: usize,
}

impl StepShape {
    /// Sequences of the `i`-th micro-batch; they differ by at most one.
    pub fn rows(&self, i: usize) -> usize {
        self.sequences / self.micro_batches + usize::from(i < self.sequences % self.micro_batches)
    }

    /// Tokens of the step.
    pub fn tokens(&self) -> usize {
        self.sequences * self.seq_len
    }
}

/// Sequence lengths over a run: short ones first.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceCurriculum {
    /// (until this fraction of the steps, sequence length), the last until 1.
    pub stages: Vec<(f64, usize)>,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Holds the tokens of a step at this number instead of the sequences at `batch * accumulation`. A micro-batch then takes
    /// as many short sequences as have the tokens of `batch` of the longest, so its memory stays the same.
    pub tokens_per_step: Option<usize>,
}

impl SequenceCurriculum {
    /// Checks the stages and that every length divides a constant number of tokens.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn validate(&self) -> Result<(), ScheduleError> {
        check_fractions("sequence curriculum", self.stages.iter().map(|s| s.0))?;
        ensure(self.batch > 0 && self.accumulation > 0, || "batch and accumulation must be at least 1".into())?;
        for &(_, seq_len) in &self.stages {
            ensure(seq_len > 0, || "sequence curriculum: a length is 0".into())?;
            if let Some(tokens) = self.tokens_per_step {
                ensure(tokens > 0 && tokens.is_multiple_of(seq_len), || {
                    alloc::format!(
                        "tokens_per_step is {tokens}; it must be a multiple of every sequence length ({seq_len})"
                    )
                })?;
            }
        }
        Ok(())
    }

    /// The longest sequence.
    pub fn longest(&self) -> usize {
        self.stages.iter().map(|s| s.1).max().unwrap_or(0)
    }

    /// What a step of a validated curriculum reads.
    pub fn shape(&self, step: u64, total_steps: u64) -> StepShape {
        let seq_len = self.stages[stage(self.stages.iter().map(|s| s.0), step, total_steps)].1;
        match self.tokens_per_step {
            None => StepShape { seq_len, sequences: self.batch * self.accumulation, micro_batches: self.accumulation },
            Some(tokens) => {
                let sequences = tokens / seq_len;
                let most = self.batch * self.longest() / seq_len;
                StepShape { seq_len, sequences, micro_batches: sequences.div_ceil(most) }
            }
        }
    }
}

/// The mixes of the sources over a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Phases {
    /// (until this fraction of the steps, share of tokens of every source), the last until 1.
    pub stages: Vec<(f64, Vec<f64>)>,
}

impl Phases {
    /// Checks the stages, and that each has a share for every source and not only zeros.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn validate(&self, sources: usize) -> Result<(), ScheduleError> {
        check_fractions("phases", self.stages.iter().map(|s| s.0))?;
        for (i, (_, weights)) in self.stages.iter().enumerate() {
            ensure(weights.len() == sources, || {
                alloc::format!("phase {}: {} weights for {sources} sources", i + 1, weights.len())
            })?;
            let sound = weights.iter().all(|w| w.is_finite() && *w >= 0.0) && weights.iter().sum::<f64>() > 0.0;
            ensure(sound, || alloc::format!("phase {}: weights must not be negative, nor all 0", i + 1))?;
        }
        Ok(())
    }

    /// The phase (from 0) of a step.
    pub fn index(&self, step: u64, total_steps: u64) -> usize {
        stage(self.stages.iter().map(|s| s.0), step, total_steps)
    }

    /// The shares at a step.
    pub fn weights(&self, step: u64, total_steps: u64) -> &[f64] {
        &self.stages[self.index(step, total_steps)].1
    }
}

/// The first stage whose boundary lies beyond `step`; past all of them, the last.
fn stage(until: impl ExactSizeIterator<Item = f64>, step: u64, total_steps: u64) -> usize {
    let last = until.len() - 1;
    let mut until = until;
    until.position(|fraction| step < boundary(fraction, total_steps)).unwrap_or(last)
}

fn check_fractions(what: &str, until: impl Iterator<Item = f64>) -> Result<(), ScheduleError> {
    let mut before = 0.0;
    for fraction in until {
        ensure(fraction > before && fraction <= 1.0, || {
            alloc::format!("{what}: `until` fractions must ascend within (0, 1]; {fraction} follows {before}")
        })?;
        before = fraction;
    }
    ensure(before == 1.0, || alloc::format!("{what}: the last `until` must be 1, not {before}"))
}

#[cfg(test)]
mod tests;
