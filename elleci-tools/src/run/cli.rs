//! The command line of `elleci-run`.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use elleci_core::sampler::SamplerOptions;

use crate::exit::usage;
#[cfg(feature = "serve")]
use crate::serve::settings::ServeArgs;

/// Runs an Elleci model: text, dialogue, measurements.
#[derive(Debug, Parser)]
#[command(
    name = "elleci-run",
    version,
    after_help = "Examples:
  elleci-run chat                                            with the small model that is part of this program
  elleci-run generate -m model.elleci -p \"C'era una volta\" -n 100
  elleci-run chat -m model.elleci
  elleci-run serve -m model.elleci --port 8080
  elleci-run bench -m model.elleci -p 512 -n 128 -t 1,2

Text and results go to standard output, everything else to standard error.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continues a text
    Generate(GenerateArgs),
    /// Talks, turn by turn
    Chat(ChatArgs),
    /// Answers over HTTP, as OpenAI's servers do, and with a page to talk to
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    /// Measures the speed of prompts and of generation
    Bench(BenchArgs),
    /// Writes the logits of every position of a batch: to check this implementation against another
    Logits(LogitsArgs),
}

/// Which model, on what.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model: an .elleci archive; a Hugging Face folder, a checkpoint, a run or a .pth file is packed in memory [default: the
    /// small model that is part of this program]
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Where to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// On what to compute.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Worker threads [default: all]
    #[arg(short, long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
    /// cpu, the only one so far
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
}

/// How the likeliest tokens are weighed. The filters work in this order: penalty, top-k, top-p, min-p, temperature.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct FilterArgs {
    /// Below 1 the likely becomes likelier; 0 always takes the likeliest
    #[arg(long, visible_alias = "temp", value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Draws from the likeliest K tokens; 0 = no limit
    #[arg(long, value_name = "K", default_value_t = 40, value_parser = parse_top_k, allow_negative_numbers = true)]
    pub top_k: u32,
    /// Draws from the likeliest tokens that together have probability P; 1 = off
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Draws from tokens with at least this share of the likeliest one's probability; 0 = off
    #[arg(long, value_name = "P", default_value_t = 0.05, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Makes tokens that occurred lately less likely; 1 = off
    #[arg(
        long,
        visible_alias = "repetition-penalty",
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repeat_penalty: f32,
    /// How many of the last tokens --repeat-penalty looks at
    #[arg(long, visible_alias = "repetition-window", value_name = "N", default_value_t = 64)]
    pub repeat_last_n: u32,
}

impl FilterArgs {
    /// As the sampler takes them, with a seed.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a value that has no meaning.
    pub fn options(&self, seed: u64) -> anyhow::Result<SamplerOptions> {
        let options = SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            seed,
        };
        options.validate().map_err(|e| usage(e.to_string()))?;
        Ok(options)
    }
}

/// How tokens are chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// What may be chosen.
    #[command(flatten)]
    pub filters: FilterArgs,
    /// Seed of the draws: the same one gives the same text; `random` (or -1) takes another each time
    #[arg(short, long, value_name = "N|random", default_value = "0", value_parser = parse_seed, allow_hyphen_values = true)]
    pub seed: u64,
}

impl SamplingArgs {
    /// As the sampler takes them.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a value that has no meaning.
    pub fn options(&self) -> anyhow::Result<SamplerOptions> {
        self.filters.options(self.seed)
    }
}

/// A limit of tokens; others write -1 for none.
fn parse_top_k(text: &str) -> Result<u32, String> {
    if text == "-1" {
        return Ok(0);
    }
    text.parse().map_err(|_| "a number from 0 on".to_string())
}

/// A seed; `random` and -1 are drawn from the clock.
pub fn parse_seed(text: &str) -> Result<u64, String> {
    if text == "random" || text == "-1" {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        // 32 bits are easy to type again.
        return Ok(u64::from(since.subsec_nanos() ^ since.as_secs() as u32));
    }
    text.parse().map_err(|_| "a number from 0 on, or `random`".to_string())
}

/// Limits of a text.
#[derive(Clone, Debug, Args)]
pub struct LengthArgs {
    /// Tokens at most; -1 = until the text ends by itself
    #[arg(short = 'n', long, visible_alias = "predict", value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(i64).range(-1..), allow_negative_numbers = true)]
    pub max_tokens: i64,
    /// Tokens that prompt and text together may have. A longer prompt is refused, never cut
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value_t = 131_072,
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub context: u64,
}

impl LengthArgs {
    /// `max_tokens` as a limit.
    pub fn max_tokens(&self) -> usize {
        usize::try_from(self.max_tokens).unwrap_or(usize::MAX)
    }
}

/// `elleci-run generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "Standard output gets the continuation, as it comes. The same model, prompt and --seed give the same text.

Examples:
  elleci-run generate -p \"C'era una volta\"
  elleci-run generate -m model.elleci -f prompt.txt -n 500 --temp 0.7 --stop $'\\n\\n'
  echo \"La capitale d'Italia è\" | elleci-run generate -m model.elleci --temp 0 --json
  elleci-run generate -m model.elleci --chat -p 'Chi sei?'
  elleci-run generate -m model.elleci --tokens -p '17 204 9'"
)]
pub struct GenerateArgs {
    /// Which model, on what.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The prompt [default: standard input]
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// Reads the prompt from a file; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Limits.
    #[command(flatten)]
    pub length: LengthArgs,
    /// Ends the text before this string; may be repeated
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Goes on after the end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
    /// The prompt is a user's turn (ChatML); the assistant's answer is written
    #[arg(long)]
    pub chat: bool,
    /// With --chat: the system turn before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// Token ids in and out, in place of text; needs no tokenizer
    #[arg(long, conflicts_with_all = ["chat", "stop"])]
    pub tokens: bool,
    /// Writes the prompt before its continuation
    #[arg(long, conflicts_with_all = ["json", "chat"])]
    pub echo: bool,
    /// One JSON object at the end in place of running text
    #[arg(long)]
    pub json: bool,
    /// Only errors on standard error
    #[arg(short, long)]
    pub quiet: bool,
    /// How to choose.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `elleci-run chat`.
#[derive(Debug, Args)]
#[command(
    after_help = "Type a message and Enter; a line that ends with \\ goes on in the next one. /help lists the commands.
Ctrl-C stops an answer, Ctrl-D leaves. From a pipe every line is a message, and only answers are written.

Examples:
  elleci-run chat
  elleci-run chat -m model.elleci --system 'Rispondi in una frase.' --temp 0.6
  printf 'Ciao!\\nCome stai?\\n' | elleci-run chat -m model.elleci --temp 0"
)]
pub struct ChatArgs {
    /// Which model, on what.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The system turn that begins the dialogue
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A dialogue that /save wrote: goes on with it
    #[arg(long, value_name = "FILE", conflicts_with = "system")]
    pub load: Option<PathBuf>,
    /// Limits; of tokens: an answer's.
    #[command(flatten)]
    pub length: LengthArgs,
    /// How to choose.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Forms of the table of `elleci-run bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchOutput {
    /// A Markdown table
    Md,
    /// An array of objects
    Json,
    /// Comma-separated values with a head
    Csv,
}

/// A number of tokens, as in [`LengthArgs::context`].
fn tokens() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(0..=1 << 24)
}

/// `elleci-run bench`.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("measured").args(["model", "preset"]).required(true),
    after_help = "Tests are named as llama-bench names them: pp512 = a prompt of 512 tokens at once, tg128 = 128 tokens one by one,
tg128 x8 = the same in each of 8 sequences that are advanced together (--parallel 8),
@ d1024 = after 1024 others. Tokens a second are the mean of the repetitions ± their standard deviation; making
the model, tokenising and sampling do not count. One repetition before them warms up.

Examples:
  elleci-run bench -m model.elleci
  elleci-run bench -m model.elleci -p 256,512 -n 64 -t 1,2 -d 0,1024
  elleci-run bench --preset elleci-1.5b -o json          random weights, no file needed"
)]
pub struct BenchArgs {
    /// Model: an .elleci archive; a Hugging Face folder, a checkpoint, a run or a .pth file is packed in memory
    #[arg(short, long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Random weights of a built-in shape in place of a model: nano, mini, small-160m, elleci-1.5b
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Writes the random model to this archive, which must not be there yet, and measures it from there, as a real one would be
    #[arg(long, value_name = "FILE", requires = "preset")]
    pub save: Option<PathBuf>,
    /// Lengths of prompts; 0 = none
    #[arg(short = 'p', long, value_name = "N,…", value_delimiter = ',', default_value = "512", value_parser = tokens())]
    pub n_prompt: Vec<usize>,
    /// Numbers of tokens to generate; 0 = none
    #[arg(short = 'n', long, value_name = "N,…", value_delimiter = ',', default_value = "128", value_parser = tokens())]
    pub n_gen: Vec<usize>,
    /// Sequences that generate together, -n tokens each; their tokens a second are added
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub parallel: Vec<usize>,
    /// Tokens in the session before each test
    #[arg(short = 'd', long, value_name = "N,…", value_delimiter = ',', default_value = "0", value_parser = tokens())]
    pub depth: Vec<usize>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// Numbers of threads [default: all]
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "0", hide_default_value = true)]
    pub threads: Vec<usize>,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = BenchOutput::Md)]
    pub output: BenchOutput,
    /// cpu, the only one so far
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
}

/// `elleci-run logits`.
#[derive(Debug, Args)]
#[command(
    after_help = "The batch holds `tokens`, int64 [B, T]. The output holds `tokens` and `logits`, float32 [B, T, vocab_size]:
those of deployment, of whole sequences as prompts are read, or with --decode token by token.

Example:
  elleci-run logits -m model.elleci --batch io.safetensors --out logits.safetensors"
)]
pub struct LogitsArgs {
    /// Which model, on what.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The batch, a safetensors file
    #[arg(long, value_name = "FILE")]
    pub batch: PathBuf,
    /// Token by token through the caches, as text is generated, in place of whole sequences as prompts are read
    #[arg(long)]
    pub decode: bool,
    /// File to write, safetensors
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn flags_that_users_know_are_taken() {
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        for line in [
            "elleci-run generate -m m -p x -n 128 -t 2 -c 2048 --temp 0.8 --top-k 40 --top-p 0.95 --min-p 0.05 -s 42",
            "elleci-run generate --model m --prompt x --predict -1 --threads 2 --ctx-size 512 --temperature 0 -s -1",
            "elleci-run generate -m m --repeat-penalty 1.1 --repeat-last-n 64 --seed random",
            "elleci-run bench -m m -p 512,256 -n 128 -r 3 -t 1,2 -d 0,100 -o json",
            "elleci-run bench --preset nano",
            "elleci-run generate -m m --top-k -1",
            "elleci-run chat -m m --system x",
            #[cfg(feature = "serve")]
            "elleci-run serve -m m -t 2 -c 2048 --host 0.0.0.0 --port 0 --api-key k --cors * --temp 0.5",
            "elleci-run chat",
            "elleci-run generate -p x",
            "elleci-run logits -m m --batch b --out o",
        ] {
            parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
        for line in [
            "elleci-run logits -m m --out o",
            "elleci-run generate -m m -n -2",
            "elleci-run generate -m m -s ten",
            "elleci-run generate -m m -p x -f y",
            "elleci-run generate -m m --tokens --stop x",
            "elleci-run bench",
            "elleci-run bench -m m --preset nano",
            "elleci-run bench -m m -r 0",
            "elleci-run bench -m m -p 16777217",
            "elleci-run bench -m m --parallel 0",
            "elleci-run generate -m m --stop= -p x",
            "elleci-run generate -m m --top-k -2 -p x",
            "elleci-run chat --load x --system y",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn defaults_are_the_sampler_s() {
        let Ok(Cli { command: Command::Chat(args) }) = Cli::try_parse_from(["elleci-run", "chat", "-m", "m"]) else {
            panic!("chat is a verb")
        };
        assert_eq!(args.sampling.options().unwrap(), SamplerOptions::default());
        let mut wrong = args.sampling;
        wrong.filters.top_p = 2.0;
        assert!(wrong.options().unwrap_err().to_string().contains("`top_p` is 2"));
    }
}
