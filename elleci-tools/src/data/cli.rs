//! The command line of `elleci-data`.

mod tokenizer;

use super::fetch;
use super::prepare::{self, PrepareOptions, Progress, Summary};
use super::shards::{ShardOptions, ShardSet, Split, Verify};
use super::sources::{ReadOptions, Rejected, Schema, TextSplit};
use super::stats;
use super::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Corpora to token shards: fetch text, train a tokenizer, prepare shards, look at them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. Results go to standard output, all else \
                                 to standard error."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Fetch(FetchArgs),
    Tokenizer(tokenizer::TokenizerArgs),
    Prepare(PrepareArgs),
    Stats(StatsArgs),
}

/// How to read corpora.
#[derive(Debug, Args)]
struct InputArgs {
    /// Files and directories: .parquet, .jsonl, .ndjson, .json, .txt, .md (all but parquet also with .gz or .zst). JSON is one
    /// object a line (JSON lines), or one array of objects.
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// What the columns mean; told by their names if not given. Not for plain text, which has none.
    #[arg(long, value_enum)]
    schema: Option<Schema>,
    /// How plain text is cut into documents.
    #[arg(long, value_enum, default_value_t)]
    text_split: TextSplit,
    /// Only OpenAssistant's dialogues in this language (repeatable).
    #[arg(long = "lang", value_name = "CODE")]
    languages: Vec<String>,
}

impl InputArgs {
    fn read_options(&self) -> ReadOptions {
        ReadOptions { schema: self.schema, text_split: self.text_split, languages: self.languages.clone() }
    }
}

/// Get corpora.
///
/// Without --demo: the corpora of the reference run, from the Hugging Face hub, as OUT/CORPUS/*.parquet. Files lie in the
/// hub's cache (HF_HOME says where; HF_ENDPOINT names a mirror). Run again to go on with what broke off.
///
/// With --demo: some 15 MB of real Italian and English text from Debian packages (manuals, help pages, aphorisms), by
/// `apt-get download` and pinned checksums, as OUT/it/*.jsonl and OUT/en/*.jsonl. Its licences are copyleft for the most part:
/// train on it, do not pass it on as yours.
///
/// With --eval: the test sets that `elleci-eval --data OUT` reads, some 150 MB, as OUT/OWNER/NAME/CONFIG/SPLIT/*. Never train on them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  elleci-data fetch --demo --out corpus
  elleci-data fetch --only wikipedia --only oasst --out corpus
  elleci-data fetch --eval --out eval
  elleci-data fetch --eval --tasks arc_it,xcopa_it --out eval
  HF_ENDPOINT=https://mirror.example elleci-data fetch --only cosmopedia --limit-files 4 --out corpus")]
struct FetchArgs {
    /// The Debian packages.
    #[arg(long)]
    demo: bool,
    /// Take packages whose checksum is not the pinned one (Debian has moved on); results then differ.
    #[arg(long, requires = "demo")]
    any_version: bool,
    /// The test sets of elleci-eval.
    #[cfg(feature = "hub")]
    #[arg(long, conflicts_with_all = ["demo", "only", "limit_files"])]
    eval: bool,
    /// Only the data of these tasks [default: all].
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', requires = "eval")]
    tasks: Vec<String>,
    /// Only this corpus (repeatable) [default: all].
    #[cfg(feature = "hub")]
    #[arg(long, value_enum, conflicts_with = "demo")]
    only: Vec<fetch::hub::Corpus>,
    /// At most this many files of each corpus.
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "N", conflicts_with = "demo", value_parser = clap::value_parser!(u32).range(1..))]
    limit_files: Option<u32>,
    /// Where to put the text.
    #[arg(short, long, default_value = "corpus")]
    out: PathBuf,
}

/// Turn corpora into a shard set: tokens, document boundaries, loss masks, a held-out split.
///
/// Exact duplicates are dropped (16 to 40 bytes of memory a document). Rows that cannot be used are counted by reason. The
/// output appears when it is complete, or not at all: Ctrl-C leaves nothing of it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  elleci-data prepare --tokenizer tok --out shards/it corpus/it
  elleci-data prepare --tokenizer tok --out shards/cosmopedia --schema cosmopedia cosmopedia-v2/
  elleci-data prepare --tokenizer tok --out shards/oasst-it --lang it oasst1/train.parquet")]
struct PrepareArgs {
    #[command(flatten)]
    input: InputArgs,
    /// tokenizer.json, or the directory that holds it.
    #[arg(short, long)]
    tokenizer: PathBuf,
    /// The directory of the shard set.
    #[arg(short, long)]
    out: PathBuf,
    /// The share of documents to hold out, chosen by a hash of their content.
    #[arg(long, default_value_t = 0.01, value_name = "SHARE", value_parser = holdout, allow_negative_numbers = true)]
    holdout: f64,
    /// Write documents that occurred before again.
    #[arg(long)]
    keep_duplicates: bool,
    /// Stop after this many documents.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Tokens in a shard.
    #[arg(long, default_value_t = ShardOptions::DEFAULT_SHARD_TOKENS, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    shard_tokens: u64,
    /// Replace an existing shard set; a directory that holds anything else stays.
    #[arg(long)]
    overwrite: bool,
    /// Threads, 0 for one a core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=MAX_THREADS))]
    threads: u32,
    /// One JSON object on standard output instead of a table.
    #[arg(long)]
    json: bool,
}

/// As the other tools have it: more make no machine faster and may be more than it can start.
const MAX_THREADS: i64 = 1024;

/// `--holdout`.
fn holdout(text: &str) -> std::result::Result<f64, String> {
    let share = text.parse::<f64>().map_err(|e| e.to_string())?;
    if (0.0..1.0).contains(&share) { Ok(share) } else { Err("it must be at least 0 and below 1".to_string()) }
}

/// Show what is in a shard set, after checking it in full.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  elleci-data stats shards/it
  elleci-data stats shards/it --tokenizer tok --json")]
struct StatsArgs {
    /// The directory of the shard set.
    dir: PathBuf,
    /// The tokenizer that made it, to decode an example [default: one beside the set or in it, if there is one].
    #[arg(short, long)]
    tokenizer: Option<PathBuf>,
    /// Do not read the shards through (sizes are checked, checksums are not).
    #[arg(long)]
    no_verify: bool,
    /// One JSON object on standard output instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs a parsed command line.
///
/// # Errors
/// Whatever the verb reports, for [`crate::exit::finish`].
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Fetch(args) => run_fetch(&args),
        Command::Tokenizer(args) => tokenizer::run(&args),
        Command::Prepare(args) => run_prepare(&args),
        Command::Stats(args) => run_stats(&args),
    }
}

fn run_fetch(args: &FetchArgs) -> Result<()> {
    if args.demo {
        let report = fetch::demo::fetch(&args.out, args.any_version)?;
        crate::exit::out!("{}", report.table());
        return Ok(());
    }
    #[cfg(feature = "hub")]
    if args.eval {
        let found = crate::eval::task::built_in()?;
        let tasks = if args.tasks.is_empty() { found } else { crate::eval::task::select(&found, &args.tasks)? };
        let sources: Vec<_> = tasks.into_iter().filter_map(|t| t.source).collect();
        return fetch::eval::fetch(&args.out, &sources, &mut |path| crate::exit::outln!("{}", path.display()));
    }
    #[cfg(feature = "hub")]
    {
        let corpora = if args.only.is_empty() { &fetch::hub::Corpus::ALL[..] } else { &args.only };
        for path in fetch::hub::fetch(&args.out, corpora, args.limit_files.map(|n| n as usize))? {
            crate::exit::outln!("{}", path.display());
        }
        Ok(())
    }
    #[cfg(not(feature = "hub"))]
    anyhow::bail!(
        "this build has no Hugging Face client (feature `hub`); use --demo, or build with the default features"
    )
}

fn run_prepare(args: &PrepareArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let options = PrepareOptions {
        read: args.input.read_options(),
        holdout: args.holdout,
        keep_duplicates: args.keep_duplicates,
        limit: args.limit,
        shard_tokens: args.shard_tokens,
        overwrite: args.overwrite,
        ..PrepareOptions::new(args.input.inputs.clone(), args.out.clone())
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads as usize).build()?;
    let progress = Arc::new(Progress::default());
    let on_signal = progress.clone();
    ctrlc::set_handler(move || {
        if on_signal.stop.swap(true, Ordering::Relaxed) {
            // Asked twice: the leftovers are removed by the next run.
            std::process::exit(130);
        }
    })
    .context("cannot watch for Ctrl-C")?;
    let start = Instant::now();
    let summary = with_bar(&progress, || pool.install(|| prepare::prepare(&tokenizer, &options, &progress)))?;
    report(&summary.rejected, summary.ignored_files, &summary.notes);
    let (train, val) = (summary.index.split(Split::Train), summary.index.split(Split::Val));
    if val.documents == 0 && args.holdout > 0.0 {
        crate::exit::errln!("warning: no document was held out (there are only {}); raise --holdout", train.documents);
    }
    let seconds = start.elapsed().as_secs_f64();
    let mb = (train.bytes + val.bytes) as f64 / 1e6;
    crate::exit::errln!(
        "{:.1} MB of text in {seconds:.1} s: {:.1} MB/s with {} threads",
        mb,
        mb / seconds,
        pool.current_num_threads()
    );
    print_summary(args, &summary)
}

fn print_summary(args: &PrepareArgs, summary: &Summary) -> Result<()> {
    if args.json {
        crate::exit::outln!("{}", serde_json::to_string(summary)?);
        return Ok(());
    }
    crate::exit::outln!("{}: {} files, {} duplicates dropped", args.out.display(), summary.files, summary.duplicates);
    let set = ShardSet::open_with(&args.out, Verify::Sizes)?;
    crate::exit::out!("{}", stats::table(&stats::stats(&set, None)?));
    Ok(())
}

fn run_stats(args: &StatsArgs) -> Result<()> {
    let verify = if args.no_verify { Verify::Sizes } else { Verify::Full };
    let set = ShardSet::open_with(&args.dir, verify)?;
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(Tokenizer::load(path)?),
        None => {
            let nearby = [args.dir.join("tokenizer.json"), args.dir.join("..").join("tokenizer.json")];
            // A tokenizer that merely lies nearby may be another one: then there is no example.
            let found = nearby.iter().find(|p| p.is_file()).map(|p| Tokenizer::load(p)).transpose()?;
            found.filter(|t| t.sha256() == set.index().tokenizer_sha256)
        }
    };
    let stats = stats::stats(&set, tokenizer.as_ref())?;
    if args.json {
        crate::exit::outln!("{}", serde_json::to_string(&stats)?);
    } else {
        crate::exit::out!("{}", stats::table(&stats));
    }
    Ok(())
}

/// Tells what was passed over.
fn report(rejected: &Rejected, ignored_files: u64, notes: &[String]) {
    for note in notes {
        crate::exit::errln!("note: {note}");
    }
    if ignored_files > 0 {
        crate::exit::errln!("{ignored_files} files of other kinds were ignored");
    }
    if rejected.total() > 0 {
        crate::exit::errln!("{} rows were not used:{}", rejected.total(), prepare::describe(rejected));
    }
}

/// A progress bar over bytes; invisible unless standard error is a terminal.
pub(crate) fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{bar:30} {percent:>3}%  {bytes}/{total_bytes}  {bytes_per_sec}  ETA {eta}  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Shows `progress` while `work` runs.
fn with_bar<T>(progress: &Progress, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let bar = bar(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                bar.set_length(progress.total.load(Ordering::Relaxed));
                bar.set_position(progress.position.load(Ordering::Relaxed));
                bar.set_message(format!("{} tokens", progress.tokens.load(Ordering::Relaxed)));
                std::thread::sleep(Duration::from_millis(100));
            }
            bar.finish_and_clear();
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    })
}
