//! The command line of `elleci-eval`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::run::cli::DeviceArgs;

/// Evaluates a model: on a bundled suite, on public Italian tasks, on any text.
#[derive(Debug, Parser)]
#[command(
    name = "elleci-eval",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  elleci-eval -m model.elleci                                  the bundled suite; what needs data is named
  elleci-eval -m model.elleci --data eval --json results.json  the whole Italian suite (`elleci-data fetch --eval --out eval`)
  elleci-eval -m model.elleci --tasks arc_it,xcopa_it --data eval --limit 100
  elleci-eval -m model.elleci --text romanzo.txt               bits per byte of a text
  elleci-eval compare run-a run-b                              two --log directories, paired bootstrap

Scores are computed as lm-evaluation-harness computes them. Answers are kept as they come: a run that was stopped goes on where
it was when it is started again. The table goes to standard output, everything else to standard error.
Exit codes: 0 done, 1 failed (or a task that --tasks names could not run), 2 wrong usage, 130 stopped by Ctrl-C."
)]
pub struct Cli {
    /// Other things to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// An evaluation.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What else there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists the tasks: metrics, examples, chance, source and licence
    List(ListArgs),
    /// Compares two runs item by item
    Compare(CompareArgs),
}

/// Sets of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// All tasks; those without data are named and passed over.
    It,
    /// The tasks that need no data.
    Bundled,
}

/// An evaluation.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Model: an .elleci archive; a Hugging Face folder, a checkpoint, a run or a .pth file is packed in memory [default: the
    /// small model that is part of this program]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Which set of tasks [default: it, unless --tasks or --text is given]
    #[arg(long, value_enum)]
    pub suite: Option<Suite>,
    /// These tasks: names, groups of them, or .toml files; comma-separated
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Bits per byte of a text file (repeatable)
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,
    /// Tokens from the start of a window to that of the next, for --text: the fewer, the more each token sees before it, and
    /// the longer it takes. The window's length: windows that share nothing, as tasks have them [default: half a window]
    #[arg(long, value_name = "N", requires = "text", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub stride: Option<u64>,
    /// Where the data of tasks lie; `elleci-data fetch --eval` fills it
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Only the first N items of every task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Examples before each question, in place of every task's own number
    #[arg(long, visible_alias = "num-fewshot", value_name = "N", value_parser = clap::value_parser!(u64).range(..=64))]
    pub shots: Option<u64>,
    /// Tokens of a window; longer contexts lose their beginning, and are counted [default: what the model was trained on]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=1 << 20))]
    pub max_length: Option<u64>,
    /// Writes the results as lm-evaluation-harness lays them out; - is standard output, in place of the table
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Writes results.json and every item's answers (samples_TASK.jsonl) into a directory
    #[arg(long, value_name = "DIR")]
    pub log: Option<PathBuf>,
    /// Where answers are kept [default: elleci/eval in the user's cache]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Keeps no answers, and uses none
    #[arg(long, conflicts_with = "cache")]
    pub no_cache: bool,
    /// Seed of what is drawn: generated texts, bootstrapped errors
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// On what to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// `elleci-eval list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// One JSON object, with the whole definitions
    #[arg(long)]
    pub json: bool,
}

/// `elleci-eval compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The --log directory of a run
    pub a: PathBuf,
    /// The --log directory of another
    pub b: PathBuf,
    /// Draws of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    pub resamples: u64,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// One JSON object in place of the table
    #[arg(long)]
    pub json: bool,
}
