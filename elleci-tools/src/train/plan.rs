//! What every step does, as a function of its number alone: shape, mix, rates.

use elleci_core::config::ModelConfig;
use elleci_core::model::Checkpointing;
use elleci_core::ops::head::HeadPrecision;
use elleci_core::optim::StatePrecision;
use elleci_core::optim::schedule::{Cooldown, Lerac, Phases, SequenceCurriculum, StepShape, Wsd, boundary};
use elleci_core::ternary::GradPrecision;
use serde_json::Value;

use super::backend::{StepForm, cpu_pass_rows};
use super::batches::phase_weights;
use super::config::{CooldownKind, Gradients, Head, LeracMode, RunConfig, States};

/// The schedules of a run.
pub struct Plan {
    steps: u64,
    curriculum: SequenceCurriculum,
    phases: Phases,
    wsd: Wsd,
    lerac: Lerac,
    weight_decay: f64,
    n_layers: usize,
    average_from: Option<u64>,
}

/// Learning rates of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// The scheduled rate, before multipliers by layer.
    pub lr: f64,
    /// Multiplier of every layer.
    pub by_layer: Vec<f64>,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepPlan<'a> {
    /// Sequence length and micro-batches.
    pub shape: StepShape,
    /// Index of the phase.
    pub phase: usize,
    /// Shares of tokens by source.
    pub weights: &'a [f64],
    /// Learning rates.
    pub rates: Rates,
    /// Whether the weights after this step enter the running mean.
    pub averages: bool,
}

impl Plan {
    /// The plan of a validated configuration with its sources in the order of the feed.
    pub fn new(config: &RunConfig, sources: &[String]) -> Plan {
        let (t, o) = (&config.training, &config.optimizer);
        let steps = t.steps;
        let warmup_steps = boundary(o.schedule.warmup, steps);
        // Rounded shares may meet; together they never exceed the run.
        let cooldown_steps = boundary(o.schedule.cooldown, steps).min(steps - warmup_steps);
        let cooldown = match o.schedule.kind {
            CooldownKind::OneMinusSqrt => Cooldown::OneMinusSqrt,
            CooldownKind::Linear => Cooldown::Linear,
            CooldownKind::Cosine => Cooldown::Cosine,
        };
        let lerac = match o.lerac.mode {
            LeracMode::Off => Lerac::Off,
            LeracMode::Static => Lerac::Static { ratio: o.lerac.ratio },
            LeracMode::Geometric => {
                let until_step = if o.lerac.until > 0.0 { boundary(o.lerac.until, steps) } else { warmup_steps };
                Lerac::Grow { floor: o.lerac.floor, until_step }
            }
        };
        let weights = phase_weights(config, sources);
        Plan {
            steps,
            curriculum: curriculum(config),
            phases: Phases { stages: config.data.phases.iter().map(|p| p.until).zip(weights).collect() },
            wsd: Wsd { peak: o.peak_lr, warmup_steps, total_steps: steps, cooldown_steps, cooldown },
            lerac,
            weight_decay: o.weight_decay,
            n_layers: config.model.n_layers,
            average_from: (config.swa.start < 1.0).then(|| boundary(config.swa.start, steps)),
        }
    }

    /// Optimizer steps of the run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// A step, counted from 0.
    pub fn at(&self, step: u64) -> StepPlan<'_> {
        let by_layer = (0..self.n_layers).map(|l| self.lerac.multiplier(step, l, self.n_layers)).collect();
        let weight_decay = self.wsd.weight_decay(step, self.weight_decay);
        StepPlan {
            shape: self.curriculum.shape(step, self.steps),
            phase: self.phases.index(step, self.steps),
            weights: self.phases.weights(step, self.steps),
            rates: Rates { lr: self.wsd.rate(step), by_layer, weight_decay },
            averages: self.average_from.is_some_and(|from| step >= from),
        }
    }

    /// Number of the phase of a step.
    pub fn phase(&self, step: u64) -> usize {
        self.phases.index(step, self.steps)
    }

    /// The stages of the curriculum: shape and number of steps.
    pub fn stages(&self) -> Vec<(StepShape, u64)> {
        let mut stages: Vec<(StepShape, u64)> = Vec::new();
        let mut start = 0;
        for &(until, _) in &self.curriculum.stages {
            let end = boundary(until, self.steps);
            if end > start {
                stages.push((self.curriculum.shape(start, self.steps), end - start));
            }
            start = end;
        }
        stages
    }

    /// Tokens of the whole run.
    pub fn total_tokens(&self) -> u64 {
        self.stages().iter().map(|(shape, steps)| shape.tokens() as u64 * steps).sum()
    }

    /// Shares of the sources in the whole run.
    pub fn run_weights(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.phases.stages.first().map_or(0, |s| s.1.len())];
        let mut start = 0.0;
        for (until, weights) in &self.phases.stages {
            sums.iter_mut().zip(weights).for_each(|(sum, w)| *sum += (until - start) * w);
            start = *until;
        }
        sums
    }
}

/// The sequence curriculum of a configuration.
pub fn curriculum(config: &RunConfig) -> SequenceCurriculum {
    let t = &config.training;
    SequenceCurriculum {
        stages: t.sequence.iter().map(|s| (s.until, s.length)).collect(),
        batch: t.batch,
        accumulation: t.accumulation,
        tokens_per_step: (t.tokens_per_step > 0).then_some(t.tokens_per_step),
    }
}

/// Activation checkpointing of a configuration; `None` = as the device's memory allows.
pub fn checkpointing(config: &RunConfig) -> Option<Checkpointing> {
    config.checkpoint_every().map(|every| match every {
        0 => Checkpointing::None,
        1 => Checkpointing::EveryLayer,
        k => Checkpointing::EveryKth(k),
    })
}

/// Precision of the optimizer states of a configuration.
pub fn precision(config: &RunConfig) -> StatePrecision {
    match config.optimizer.states {
        States::F32 => StatePrecision::F32,
        States::EightBit => StatePrecision::Block8,
    }
}

/// Precision of the gradients of a configuration.
pub fn gradients(config: &RunConfig) -> GradPrecision {
    match config.training.gradients {
        Gradients::F32 => GradPrecision::Float32,
        Gradients::Int16 => GradPrecision::Int16,
    }
}

/// Precision of the head of a configuration.
pub fn head(config: &RunConfig) -> HeadPrecision {
    match config.training.head {
        Head::F32 => HeadPrecision::Float32,
        Head::Int16 => HeadPrecision::Int16,
    }
}

/// How a configuration has its steps computed, with these activations kept.
pub fn step_form(config: &RunConfig, checkpointing: Checkpointing) -> StepForm {
    StepForm { checkpointing, gradients: gradients(config), head: head(config) }
}

/// Rows and tokens of the largest micro-batch of a configuration.
pub fn largest_micro_batch(config: &RunConfig, plan: &Plan) -> (usize, usize) {
    let sizes = plan.stages().into_iter().map(|(shape, _)| (shape.rows(0), shape.seq_len));
    sizes.max_by_key(|&(rows, seq)| (rows * seq, seq)).unwrap_or((config.training.batch, config.model.max_seq_len))
}

/// Sequences and tokens a sequence of the largest pass that the CPU makes in a run: what memory must hold.
pub fn largest_pass(config: &RunConfig, plan: &Plan) -> (usize, usize) {
    let rows = |rows, seq| cpu_pass_rows(config.model.d_model, rows, seq);
    let passes = plan.stages().into_iter().map(|(shape, _)| (rows(shape.rows(0), shape.seq_len), shape.seq_len));
    passes.max_by_key(|&(rows, seq)| (rows * seq, seq)).unwrap_or((1, config.model.max_seq_len))
}

/// The fields in which two shapes of models differ, with the values of both.
pub fn differences(ours: &ModelConfig, theirs: &ModelConfig) -> Vec<(String, String, String)> {
    let fields = |config| serde_json::to_value(config).ok();
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (fields(ours), fields(theirs)) else { return Vec::new() };
    let other = a.into_iter().filter(|(key, value)| b.get(key) != Some(value));
    other.map(|(key, value)| (key.clone(), value.to_string(), b[&key].to_string())).collect()
}
