//! The configuration of a run: typed, complete (every key has a value), and validated as a whole.
//!
//! Values come in layers, see [`super::layers`]. What is saved in the run directory is the effective configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use elleci_core::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::exit::usage;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The built-in run that this one started from.
    pub preset: String,
    /// The shape of the model.
    pub model: ModelConfig,
    /// Length, batches, intervals.
    pub training: TrainingConfig,
    /// AdamW and its schedules.
    pub optimizer: OptimizerConfig,
    /// Sources and mixes.
    pub data: DataConfig,
    /// Stochastic weight averaging.
    pub swa: SwaConfig,
    /// What only a run on a card reads. (Runs older than this section had none.)
    #[serde(default)]
    pub cuda: CudaConfig,
}

/// Length, batches, intervals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Tokens in a step; 0 = `batch * accumulation` sequences whatever their length.
    pub tokens_per_step: usize,
    /// Sequence lengths, each until a share of the steps; the last until 1.
    pub sequence: Vec<SequenceStage>,
    /// `none`, `layer`, a number k: keep the activations of every k-th layer only; or `auto`: the fastest that fits the memory that
    /// the device has free. All give the same bits.
    pub checkpointing: String,
    /// Precision of the gradients that enter the products of ternary projections. (Runs older than this key had float32.)
    #[serde(default)]
    pub gradients: Gradients,
    /// Precision of the head's products in a step: logits and both gradients. (Runs older than this key had float32.)
    #[serde(default)]
    pub head: Head,
    /// Largest global norm of the gradient; 0 = off.
    pub clip: f64,
    /// Seeds initialisation, data order and samples.
    pub seed: u64,
    /// Worker threads; 0 = all that the machine has.
    pub threads: usize,
    /// `cpu`, or `cuda` and `cuda:N` where built in.
    pub device: String,
    /// Steps between evaluations; 0 = at the end only.
    pub eval_interval: u64,
    /// Held-out tokens a source that an evaluation reads at most; 0 = all.
    pub eval_tokens: usize,
    /// Steps between samples; 0 = at the end only.
    pub sample_interval: u64,
    /// Steps between checkpoints; 0 = at the end only.
    pub save_interval: u64,
    /// Checkpoints kept; 0 = all.
    pub keep_last: usize,
    /// What samples continue.
    pub prompts: Vec<String>,
}

/// Precision of the gradients that enter the products of ternary projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gradients {
    /// float32
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// int16 with a scale a token or channel: exact integer products, faster with AVX-512 VNNI and with AVX2 (docs/LOG.md).
    #[serde(rename = "int16")]
    Int16,
}

/// Precision of the head's products in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Head {
    /// float32
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// int16 with a scale a row, and float32 for what is above 64 times a softmax's mean. float32 on machines without AVX2,
    /// and in evaluations.
    #[serde(rename = "int16")]
    Int16,
}

/// One stage of the sequence curriculum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceStage {
    /// Ends at this share of the steps.
    pub until: f64,
    /// Tokens in a sequence.
    pub length: usize,
}

/// AdamW and its schedules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Learning rate on the plateau.
    pub peak_lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
    /// Precision of the moments.
    pub states: States,
    /// Warm-up, plateau, cooldown.
    pub schedule: ScheduleConfig,
    /// Rates by layer.
    pub lerac: LeracConfig,
}

/// Precision of the optimizer's moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum States {
    /// float32
    #[serde(rename = "f32")]
    F32,
    /// Block-wise dynamic 8-bit, float32 where a tensor is small or sensitive.
    #[serde(rename = "8bit")]
    EightBit,
}

/// The warm-up–stable–decay schedule, in shares of the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Linear warm-up.
    pub warmup: f64,
    /// Cooldown at the end.
    pub cooldown: f64,
    /// Shape of the cooldown.
    pub kind: CooldownKind,
}

/// Shape of the cooldown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CooldownKind {
    /// `1 - sqrt(progress)`
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
    /// `1 - progress`
    #[serde(rename = "linear")]
    Linear,
    /// Half a cosine.
    #[serde(rename = "cosine")]
    Cosine,
}

/// Rates by layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeracConfig {
    /// Which form.
    pub mode: LeracMode,
    /// `geometric`: start rate of the last layer as a share of the first's.
    pub floor: f64,
    /// `geometric`: share of the steps after which all layers have one rate; 0 = the warm-up.
    pub until: f64,
    /// `static`: rate of the first layer over that of the last.
    pub ratio: f64,
}

/// Forms of the rates by layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeracMode {
    /// One rate for all layers.
    Off,
    /// Start rates that all grow to the scheduled rate.
    Geometric,
    /// Constant multipliers.
    Static,
}

/// Sources and mixes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Holds one prepared folder a source.
    pub dir: PathBuf,
    /// `tokenizer.json`; empty = the one in `dir`.
    pub tokenizer: PathBuf,
    /// Prepared folder of every source; empty = `dir`/NAME.
    pub sources: BTreeMap<String, PathBuf>,
    /// Mixes in order.
    pub phases: Vec<PhaseConfig>,
}

/// One mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseConfig {
    /// Ends at this share of the steps.
    pub until: f64,
    /// Share of the tokens, by source.
    pub weights: BTreeMap<String, f64>,
}

/// Stochastic weight averaging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwaConfig {
    /// Running mean from this share of the steps on; 1 = off.
    pub start: f64,
}

/// What only a run on a card reads. None of it changes what a checkpoint holds: a run may go on with other values, or on a CPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CudaConfig {
    /// Operands of the products that are not exact anyway.
    #[serde(default)]
    pub products: CudaProducts,
    /// What is kept of ternary weights.
    #[serde(default)]
    pub ternary: CudaTernary,
    /// Who multiplies the large products on tensor cores.
    #[serde(default)]
    pub gemm: CudaGemm,
    /// The residual stream.
    #[serde(default)]
    pub stream: CudaFloat,
    /// Matrices while they are trained; bf16 ones are updated with stochastic rounding.
    #[serde(default)]
    pub masters: CudaFloat,
    /// Gradients of matrices.
    #[serde(default)]
    pub gradients: CudaFloat,
    /// Sequences that the card works on at once; 0 = as many of a micro-batch as are fastest with the memory that it has free.
    #[serde(default)]
    pub rows: usize,
}

/// Arithmetic of a card's products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CudaProducts {
    /// float32
    Float32,
    /// bf16 operands, float32 sums
    #[default]
    Bf16,
    /// As bf16, with the gradients of ternary projections' inputs in e4m3
    Fp8,
}

/// What a card keeps of ternary weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CudaTernary {
    /// The operands of the products too where the memory allows
    #[default]
    Auto,
    /// Two bits a weight, laid out anew for every product
    Packed,
    /// The operands of the products too
    Unpacked,
}

/// Who multiplies on a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CudaGemm {
    /// cuBLASLt where it is installed, else our own kernels
    #[default]
    Auto,
    /// cuBLASLt, or nothing
    Cublaslt,
    /// Our own kernels
    Own,
}

/// A type of floats on a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CudaFloat {
    /// float32
    #[default]
    Float32,
    /// bf16
    Bf16,
}

/// Optimizer steps at most.
const MAX_STEPS: u64 = 1 << 25;
/// Tokens of a micro-batch at most.
const MAX_TOKENS: usize = 1 << 22;
/// Micro-batches of a step at most.
const MAX_ACCUMULATION: usize = 1 << 16;

/// One refused value.
struct Misfit {
    key: String,
    value: String,
    remedy: String,
}

fn misfit(key: impl Into<String>, value: impl ToString, remedy: impl Into<String>) -> Result<(), Misfit> {
    Err(Misfit { key: key.into(), value: value.to_string(), remedy: remedy.into() })
}

/// Errs unless `ok`.
fn expect(ok: bool, key: &str, value: impl ToString, remedy: &str) -> Result<(), Misfit> {
    if ok { Ok(()) } else { misfit(key, value, remedy) }
}

impl RunConfig {
    /// Checks everything that can be checked without reading data. `origin` says in which layer a key was set.
    ///
    /// # Errors
    /// [`crate::exit::Usage`]: layer, key, value, remedy of the first value that does not fit.
    pub fn validate(&self, origin: impl Fn(&str) -> String) -> anyhow::Result<()> {
        if let Err(e) = self.model.validate() {
            return Err(usage(format!("{}: [model] {e}", origin("model"))));
        }
        self.training_fits()
            .and_then(|()| self.optimizer_fits())
            .and_then(|()| self.data_fits())
            .map_err(|m| usage(format!("{}: `{}` is {}; {}", origin(&m.key), m.key, m.value, m.remedy)))
    }

    fn training_fits(&self) -> Result<(), Misfit> {
        let t = &self.training;
        expect(t.steps > 0, "training.steps", t.steps, "it must be at least 1")?;
        expect(t.batch > 0, "training.batch", t.batch, "it must be at least 1")?;
        expect(t.accumulation > 0, "training.accumulation", t.accumulation, "it must be at least 1")?;
        expect(
            t.clip >= 0.0 && t.clip.is_finite(),
            "training.clip",
            t.clip,
            "it must be 0 (off) or a positive number",
        )?;
        expect(t.threads <= 4096, "training.threads", t.threads, "at most 4096 are supported")?;
        self.checkpointing()?;
        shares("training.sequence", t.sequence.iter().map(|s| s.until))?;
        for (i, stage) in t.sequence.iter().enumerate() {
            let key = format!("training.sequence[{i}].length");
            if stage.length == 0 || stage.length > self.model.max_seq_len {
                let max = self.model.max_seq_len;
                return misfit(key, stage.length, format!("it must be 1..={max}, the value of `model.max_seq_len`"));
            }
            if !t.tokens_per_step.is_multiple_of(stage.length) {
                let remedy = format!("it must be a multiple of {key} ({})", stage.length);
                return misfit("training.tokens_per_step", t.tokens_per_step, remedy);
            }
        }
        self.sizes_fit()
    }

    /// Bounds far past every use, so that no product of sizes overflows later.
    fn sizes_fit(&self) -> Result<(), Misfit> {
        let t = &self.training;
        let longest = t.sequence.iter().map(|s| s.length).max().unwrap_or(self.model.max_seq_len);
        expect(t.steps <= MAX_STEPS, "training.steps", t.steps, &format!("at most {MAX_STEPS} are supported"))?;
        expect(
            t.batch.saturating_mul(longest) <= MAX_TOKENS,
            "training.batch",
            t.batch,
            &format!(
                "with sequences of {longest} it may be {} at most; `training.accumulation` adds up several",
                MAX_TOKENS / longest
            ),
        )?;
        let most = MAX_ACCUMULATION;
        expect(
            t.accumulation <= most,
            "training.accumulation",
            t.accumulation,
            &format!("at most {most} are supported"),
        )?;
        let most = MAX_TOKENS.saturating_mul(MAX_ACCUMULATION);
        expect(
            t.tokens_per_step <= most,
            "training.tokens_per_step",
            t.tokens_per_step,
            &format!("at most {most} are supported"),
        )
    }

    fn optimizer_fits(&self) -> Result<(), Misfit> {
        let o = &self.optimizer;
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let share = |v: f64| (0.0..=1.0).contains(&v);
        expect(positive(o.peak_lr), "optimizer.peak_lr", o.peak_lr, "it must be a positive number")?;
        for beta in o.betas {
            expect((0.0..1.0).contains(&beta), "optimizer.betas", beta, "both must be at least 0 and below 1")?;
        }
        expect(positive(o.eps), "optimizer.eps", o.eps, "it must be a positive number")?;
        let decay = o.weight_decay;
        expect(
            decay >= 0.0 && decay.is_finite(),
            "optimizer.weight_decay",
            decay,
            "it must be 0 or a positive number",
        )?;
        let most = 1.0 / o.peak_lr;
        expect(
            decay <= most,
            "optimizer.weight_decay",
            decay,
            "a step must not take off more than there is: at most 1/peak_lr",
        )?;
        let s = &o.schedule;
        expect(share(s.warmup), "optimizer.schedule.warmup", s.warmup, "it is a share of the steps: 0 to 1")?;
        expect(share(s.cooldown), "optimizer.schedule.cooldown", s.cooldown, "it is a share of the steps: 0 to 1")?;
        let both = s.warmup + s.cooldown;
        expect(both <= 1.0, "optimizer.schedule", both, "warm-up and cooldown together must not be above 1")?;
        let l = &o.lerac;
        expect(positive(l.floor) && l.floor <= 1.0, "optimizer.lerac.floor", l.floor, "it must be above 0, at most 1")?;
        expect(share(l.until), "optimizer.lerac.until", l.until, "it is a share of the steps: 0 to 1")?;
        expect(positive(l.ratio), "optimizer.lerac.ratio", l.ratio, "it must be a positive number")?;
        expect(share(self.swa.start), "swa.start", self.swa.start, "it is a share of the steps: 0 to 1")
    }

    fn data_fits(&self) -> Result<(), Misfit> {
        let d = &self.data;
        expect(!d.sources.is_empty(), "data.sources", "empty", "name at least one source")?;
        shares("data.phases", d.phases.iter().map(|p| p.until))?;
        for (i, phase) in d.phases.iter().enumerate() {
            let key = format!("data.phases[{i}].weights");
            for (name, &weight) in &phase.weights {
                if !d.sources.contains_key(name) {
                    let known: Vec<_> = d.sources.keys().map(String::as_str).collect();
                    let remedy = format!("`data.sources` has {}", known.join(", "));
                    return misfit(format!("{key}.{name}"), "of no source", remedy);
                }
                if !(weight.is_finite() && weight >= 0.0) {
                    return misfit(format!("{key}.{name}"), weight, "it must be 0 or a positive number");
                }
            }
            let sum: f64 = phase.weights.values().sum();
            // Written shares such as 0.55 + 0.35 + 0.10 miss 1 by a few 2^-53; a typing error misses it by 0.01.
            if (sum - 1.0).abs() > 1e-6 {
                return misfit(key, format!("{sum} in sum"), "shares of tokens must add up to 1");
            }
        }
        Ok(())
    }

    /// The parsed `training.checkpointing`: 0 = none, k = every k-th layer; `None` = auto.
    fn checkpointing(&self) -> Result<Option<usize>, Misfit> {
        let value = self.training.checkpointing.as_str();
        match (value, value.parse()) {
            ("auto", _) => Ok(None),
            ("none", _) => Ok(Some(0)),
            ("layer", _) => Ok(Some(1)),
            (_, Ok(k)) if k > 0 => Ok(Some(k)),
            _ => misfit(
                "training.checkpointing",
                format!("`{value}`"),
                "write \"auto\", \"none\", \"layer\" or a number of layers",
            )
            .map(|()| None),
        }
    }

    /// Keep the activations of every k-th layer only; 0 = of all, `None` = as the device's memory allows. Of a validated configuration.
    pub fn checkpoint_every(&self) -> Option<usize> {
        self.checkpointing().unwrap_or(Some(0))
    }
}

fn shares(key: &str, untils: impl Iterator<Item = f64>) -> Result<(), Misfit> {
    let mut last = 0.0;
    for (i, until) in untils.enumerate() {
        if !(until > last && until <= 1.0) {
            let remedy = "shares of the steps must grow, and the last must be 1.0";
            return misfit(format!("{key}[{i}].until"), until, remedy);
        }
        last = until;
    }
    expect(
        last == 1.0,
        key,
        if last == 0.0 { "empty".into() } else { last.to_string() },
        "the last `until` must be 1.0",
    )
}
