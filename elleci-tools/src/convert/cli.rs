//! The command line of `elleci-convert`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use elleci_core::archive::DenseFormat;

use super::dense_format;
use super::source::extension;

/// Converts models between training checkpoints, Hugging Face folders, PyTorch files and deployment archives.
#[derive(Debug, Parser)]
#[command(
    name = "elleci-convert",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "SRC is one of: a training checkpoint (step-*/), a run (its newest checkpoint), a Hugging Face folder, a \
.safetensors file, a PyTorch .pth or .pt file, an .elleci archive. DST is an archive if its name ends in .elleci, otherwise a Hugging \
Face folder.

Examples:
  elleci-convert runs/nano nano.elleci
  elleci-convert runs/nano/final nano.elleci --pack t5 --dense int8 --text held-out.txt
  elleci-convert --config nano weights.pth model/
  elleci-convert nano.elleci model/                    gives γ·W₃: what was quantised stays quantised
  elleci-convert inspect nano.elleci
  elleci-convert compare runs/nano nano.elleci --text held-out.txt

DST is written under a hidden name beside it, .DST.PROCESS-NUMBER.tmp, and renamed when it is whole. A process that is killed, also by
a second Ctrl-C, leaves that name; it may be removed.

Exit codes: 0 done, 1 failed or not sound, 2 wrong usage, 130 stopped by Ctrl-C."
)]
pub struct Cli {
    /// Something else than converting.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Converting.
    #[command(flatten)]
    pub convert: ConvertArgs,
}

/// Verbs beside converting.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// What is in a file, tensor by tensor, and whether it is sound
    Inspect(InspectArgs),
    /// Bits per byte of two models on a text
    Compare(CompareArgs),
}

/// How ternary projections are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PackChoice {
    /// Whichever this machine multiplies faster, a shape at a time
    #[default]
    Auto,
    /// 2 bits a weight
    I2,
    /// 1.6 bits a weight
    T5,
    /// 1.6 bits a weight; in ffn.down, columns whose activation is zero are not read
    C5,
}

/// Which weights of a source that has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// Those of the last step
    #[default]
    Last,
    /// Their running mean
    Swa,
}

/// Converting.
#[derive(Clone, Debug, Default, Args)]
pub struct ConvertArgs {
    /// What to convert
    pub src: Option<PathBuf>,
    /// What to write
    pub dst: Option<PathBuf>,
    /// How ternary projections are packed in an archive [default: auto]
    #[arg(long, value_enum)]
    pub pack: Option<PackChoice>,
    /// How embedding and head are stored in an archive: f32, f16, bf16, int8 [default: int8]
    #[arg(long, value_parser = dense_format, value_name = "FORMAT")]
    pub dense: Option<DenseFormat>,
    /// Sizes of the model where SRC does not say them: a preset, a config.json, or the config.toml of a run
    #[arg(long, value_name = "FILE|PRESET")]
    pub config: Option<String>,
    /// tokenizer.json that goes with the model [default: the one beside SRC]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Which weights of a checkpoint that averages them
    #[arg(long, value_enum, default_value_t)]
    pub weights: Weights,
    /// Replaces DST
    #[arg(long)]
    pub force: bool,
    /// Reports bits per byte of this text for every choice of --dense, read in windows of max_seq_len tokens (4,096 at most)
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of the text at most; 0 = all
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub text_tokens: usize,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

impl ConvertArgs {
    /// Whether the destination is an archive.
    pub fn packs(&self) -> bool {
        self.dst.as_ref().is_some_and(|dst| extension(dst) == "elleci")
    }
}

/// Looking.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "Examples:
  elleci-convert inspect nano.elleci
  elleci-convert inspect runs/nano --weights swa
  elleci-convert inspect weights.pth --config nano --json

Exit codes: 0 sound, 1 not sound, 2 wrong usage, 130 stopped by Ctrl-C.")]
pub struct InspectArgs {
    /// What to look at
    pub file: PathBuf,
    /// Sizes that its tensors are held against: a preset, a config.json, or the config.toml of a run
    #[arg(long, value_name = "FILE|PRESET")]
    pub config: Option<String>,
    /// Which weights of a checkpoint that averages them
    #[arg(long, value_enum, default_value_t)]
    pub weights: Weights,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// Comparing.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  elleci-convert compare runs/nano nano.elleci --text held-out.txt
  elleci-convert compare nano.elleci mini.elleci --text held-out.txt --text-tokens 0 --json

Exit codes: 0 done, 1 failed or not sound, 2 wrong usage, 130 stopped by Ctrl-C.")]
pub struct CompareArgs {
    /// A model of any form
    pub a: PathBuf,
    /// Another
    pub b: PathBuf,
    /// UTF-8 text, the same bytes for both; read in windows of max_seq_len tokens (4,096 at most)
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens of the text at most, in the tokenizer that makes more of them; 0 = all
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub text_tokens: usize,
    /// Sizes of a model that does not say them
    #[arg(long, value_name = "FILE|PRESET")]
    pub config: Option<String>,
    /// tokenizer.json of both
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Which weights of checkpoints that average them
    #[arg(long, value_enum, default_value_t)]
    pub weights: Weights,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Threads; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}
