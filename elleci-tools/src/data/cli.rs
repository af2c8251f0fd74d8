//! The command line of `elleci-data`.

use super::fetch;
use super::prepare::{self, PrepareOptions, Progress, Summary};
use super::shards::{ShardOptions, ShardSet, Split, Verify};
use super::sources::{self, Document, ReadOptions, Rejected, Schema, TextSplit};
use super::stats;
use super::tokenizer::{self, Tokenizer, TrainOptions, train_tokenizer};
use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Corpora to token shards: fetch text, train a tokenizer, prepare shards, look at them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage. Results go to standard output, all else \
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
    Tokenizer(TokenizerArgs),
    Prepare(PrepareArgs),
    Stats(StatsArgs),
}

/// How to read corpora.
#[derive(Debug, Args)]
struct InputArgs {
    /// Files and directories: .parquet, .jsonl, .ndjson, .json, .txt, .md (all but parquet also with .gz or .zst).
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// What the columns mean; told by their names if not given.
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

/// Train the byte-level BPE tokenizer on a mix of corpora.
///
/// The specials are <|endoftext|> 0, <|padding|> 1, <|im_start|> 2, <|im_end|> 3. The commonest Italian words are single
/// tokens, with a space before them and without. The same text gives the same file, byte for byte.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  elleci-data tokenizer --out tok/tokenizer.json corpus/it corpus/en
  elleci-data tokenizer --vocab 4096 --out nano/tokenizer.json corpus/it corpus/en")]
struct TokenizerArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Where to write; tokenizer.config.json goes beside it.
    #[arg(short, long, default_value = "tokenizer.json")]
    out: PathBuf,
    /// Tokens, special ones and bytes included.
    #[arg(long, default_value_t = 32_000)]
    vocab: usize,
    /// Rows of the embedding (ids from --vocab on never occur) [default: 32128 for 32000 tokens, else as many as tokens].
    #[arg(long)]
    pad_to: Option<usize>,
    /// Words that must be single tokens, one a line [default: the first VOCAB/32 of the built-in Italian list].
    #[arg(long, value_name = "FILE")]
    words: Option<PathBuf>,
    /// Stop after this much text.
    #[arg(long, default_value_t = 2_000, value_name = "MB")]
    max_mb: u64,
}

/// Turn corpora into a shard set: tokens, document boundaries, loss masks, a held-out split.
///
/// Exact duplicates are dropped (16 to 40 bytes of memory a document). Rows that cannot be used are counted by reason. The
/// output appears when it is complete, or not at all.
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
    #[arg(long, default_value_t = 0.01, value_name = "SHARE")]
    holdout: f64,
    /// Write documents that occurred before again.
    #[arg(long)]
    keep_duplicates: bool,
    /// Stop after this many documents.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Tokens in a shard.
    #[arg(long, default_value_t = ShardOptions::DEFAULT_SHARD_TOKENS, value_name = "N")]
    shard_tokens: u64,
    /// Replace an existing shard set.
    #[arg(long)]
    overwrite: bool,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One JSON object on standard output instead of a table.
    #[arg(long)]
    json: bool,
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
/// Whatever the verb reports; the caller prints it and exits with 1.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Fetch(args) => run_fetch(&args),
        Command::Tokenizer(args) => run_tokenizer(&args),
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
    bail!("this build has no Hugging Face client (feature `hub`); use --demo, or build with the default features")
}

fn run_tokenizer(args: &TokenizerArgs) -> Result<()> {
    let padded = if args.vocab == 32_000 { 32_128 } else { args.vocab };
    let mut options = TrainOptions::new(args.vocab, args.pad_to.unwrap_or(padded));
    if let Some(path) = &args.words {
        let list = std::fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
        options.words = tokenizer::words(&list).map(str::to_string).collect();
    }
    let (inputs, ignored) = sources::find_inputs(&args.input.inputs)?;
    let bar = bar(inputs.iter().map(|i| i.size).sum());
    let read_options = args.input.read_options();
    let position = Arc::new(AtomicU64::new(0));
    let (send, receive) = std::sync::mpsc::sync_channel::<String>(256);
    let limit = args.max_mb.saturating_mul(1_000_000);
    let (trained, rejected) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rejected = Rejected::default();
            let mut bytes = 0u64;
            for input in &inputs {
                sources::read(input, &read_options, &position, &mut |row, result| {
                    bar.set_position(position.load(Ordering::Relaxed));
                    match result {
                        Err(reason) => rejected.add(&reason, || format!("{}:{row}", input.path.display())),
                        Ok(document) => {
                            bytes += document.bytes() as u64;
                            let texts = match document {
                                Document::Text(text) => vec![text],
                                Document::Dialogue(turns) => turns.into_iter().map(|t| t.content).collect(),
                            };
                            for text in texts {
                                if send.send(text).is_err() {
                                    return Ok(false);
                                }
                            }
                        }
                    }
                    Ok(bytes < limit)
                })?;
                if bytes >= limit {
                    eprintln!("stopped reading after {} MB of text (--max-mb)", args.max_mb);
                    break;
                }
            }
            drop(send);
            bar.finish_and_clear();
            eprintln!("{:.1} MB of text read; learning merges", bytes as f64 / 1e6);
            Ok::<_, anyhow::Error>(rejected)
        });
        let trained = train_tokenizer(receive.into_iter(), &options);
        match reader.join() {
            // A fault of the input explains a failed training.
            Ok(Ok(rejected)) => trained.map(|t| (t, rejected)),
            Ok(Err(e)) => Err(e),
            Err(_) => bail!("the reading thread failed"),
        }
    })?;
    report_rejected(&rejected, ignored);
    trained.save(&args.out)?;
    let config = trained.config();
    crate::exit::outln!(
        "{}: {} tokens, padded to {}; {} words are single tokens; sha256 {}",
        args.out.display(),
        config.tokens,
        config.vocab_size,
        config.single_token_words.len(),
        config.tokenizer_sha256
    );
    Ok(())
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
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build()?;
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
    report_rejected(&summary.rejected, summary.ignored_files);
    let (train, val) = (summary.index.split(Split::Train), summary.index.split(Split::Val));
    if val.documents == 0 && args.holdout > 0.0 {
        eprintln!("warning: no document was held out (there are only {}); raise --holdout", train.documents);
    }
    let seconds = start.elapsed().as_secs_f64();
    let mb = (train.bytes + val.bytes) as f64 / 1e6;
    eprintln!(
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
fn report_rejected(rejected: &Rejected, ignored_files: u64) {
    if ignored_files > 0 {
        eprintln!("{ignored_files} files of other kinds were ignored");
    }
    if rejected.total() > 0 {
        eprintln!("{} rows were not used:{}", rejected.total(), prepare::describe(rejected));
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
