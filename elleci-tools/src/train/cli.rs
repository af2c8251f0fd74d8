//! The command line of `elleci-train`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use toml::Value;

use super::layers::Layer;
use crate::exit::usage;

/// Trains an Elleci model: a ternary Mamba-2 + MLA language model.
#[derive(Debug, Parser)]
#[command(
    name = "elleci-train",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Without arguments: trains `nano` on the bundled Italian and English texts, into runs/nano. A run that was stopped \
goes on where it was when the same command is given again.

Examples:
  elleci-train
  elleci-train --preset mini --data data/shards --out runs/mini
  elleci-train --config run.toml --set optimizer.peak_lr=1e-3 --steps 2000
  elleci-train --preset elleci-1.5b --dry-run          memory, arithmetic and time of the reference run
  elleci-train --preset mini --data data/shards --device cuda     on the first NVIDIA card
  elleci-train --preset elleci-1.5b --dry-run --device cuda --cuda-memory 24GiB     what it takes of such a card
  elleci-train --resume runs/mini --steps 20000        longer than planned
  elleci-train step --init model/ --batch io.safetensors --out grads/

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 stopped by Ctrl-C (after saving)."
)]
pub struct Cli {
    /// Something else than training.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Training.
    #[command(flatten)]
    pub train: TrainArgs,
}

/// Verbs beside plain training.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One loss, its logits and all gradients of a batch: to check this implementation against another
    Step(StepArgs),
}

/// Plain training.
#[derive(Clone, Debug, Default, Args)]
pub struct TrainArgs {
    /// Built-in run to start from: nano, mini, small-160m, elleci-1.5b [default: nano]
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// TOML file with keys that replace the preset's
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Replaces one key, e.g. training.batch=4; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Folder of prepared data, one folder a source (data.dir)
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Optimizer steps of the run (training.steps); with --dry-run: steps to time [there: 20]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Prints memory, arithmetic and time of the run, then times some real steps; writes nothing
    #[arg(long)]
    pub dry_run: bool,
    /// With --dry-run --device cuda: plans for a card with this much free memory (12GiB, 80GB), which need not be there
    #[arg(long, value_name = "BYTES", requires = "dry_run", value_parser = parse_bytes)]
    pub cuda_memory: Option<u64>,
    /// auto: go on if --out holds an unfinished run; never: refuse if it holds one; DIR: a run or a checkpoint
    #[arg(long, value_name = "auto|never|DIR", default_value = "auto")]
    pub resume: String,
    /// Folder of the run [default: runs/PRESET]
    #[arg(short, long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Weights to start from: a Hugging Face folder, a checkpoint, or a run (its newest)
    #[arg(long, value_name = "HF_DIR|CKPT")]
    pub init: Option<PathBuf>,
    /// cpu, cuda or cuda:N (training.device); the table `cuda` of the configuration says how a card is used
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Worker threads (training.threads) [default: all]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub threads: Option<u64>,
    /// Seed of weights, data order and samples (training.seed)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Writes the micro-batches of every step here, as safetensors
    #[arg(long, value_name = "DIR", hide = true)]
    pub record_batches: Option<PathBuf>,
}

/// `elleci-train step`.
#[derive(Debug, Args)]
#[command(
    after_help = "The batch holds `tokens` and `targets`, int64 [B, T]; target -100 is ignored. The loss is the mean over the others.
OUT gets io.safetensors (tokens, targets, logits [B, T, vocab], loss) and grads.safetensors (by parameter name);
standard output gets one JSON object with the loss."
)]
pub struct StepArgs {
    /// Model: a Hugging Face folder or a checkpoint
    #[arg(long, value_name = "HF_DIR|CKPT")]
    pub init: PathBuf,
    /// The batch, a safetensors file
    #[arg(long, value_name = "FILE")]
    pub batch: PathBuf,
    /// Folder to write to
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// cpu (only training runs on a card)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Worker threads [default: all]
    #[arg(short, long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
}

/// A number of bytes: with a unit, of 1000 or 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 7] = [
        ("TiB", (1u64 << 40) as f64),
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("TB", 1e12),
        ("GB", 1e9),
        ("MB", 1e6),
        ("", 1.0),
    ];
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim();
    let unit = text[text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len()..].trim();
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| factor);
    match (number.parse::<f64>(), factor) {
        (Ok(n), Some(factor)) if n.is_finite() && n > 0.0 => Ok((n * factor) as u64),
        _ => Err("write a number with GiB, MiB, GB or MB, e.g. 12GiB".into()),
    }
}

impl TrainArgs {
    /// The layers of configuration above the preset, in order.
    ///
    /// # Errors
    /// A configuration file that cannot be read; a `--set` without `=`.
    pub fn layers(&self) -> anyhow::Result<Vec<Layer>> {
        let mut layers = Vec::new();
        if let Some(file) = &self.config {
            layers.push(Layer::file(file)?);
        }
        for text in &self.set {
            layers.push(Layer::assignment(text)?);
        }
        let mut flag = |name: &str, key: &str, value: Option<Value>| {
            if let Some(value) = value {
                layers.push(Layer::key(format!("--{name}"), key, value));
            }
        };
        let text = |s: &str| Value::String(s.to_string());
        let number = |n: u64| Value::Integer(i64::try_from(n).unwrap_or(i64::MAX));
        // Kept as it is from everywhere: the run may be resumed from another folder.
        let data = self.data.as_ref().map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.clone()));
        if let Some(dir) = data.as_ref().filter(|dir| dir.to_str().is_none()) {
            return Err(usage(format!(
                "--data {}: the path is not UTF-8, and a configuration cannot hold it",
                dir.display()
            )));
        }
        flag("data", "data.dir", data.as_ref().map(|dir| text(&dir.to_string_lossy())));
        flag("steps", "training.steps", self.steps.filter(|_| !self.dry_run).map(number));
        flag("device", "training.device", self.device.as_deref().map(text));
        flag("threads", "training.threads", self.threads.map(number));
        flag("seed", "training.seed", self.seed.map(number));
        Ok(layers)
    }
}
