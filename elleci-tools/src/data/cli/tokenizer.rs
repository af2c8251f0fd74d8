//! `elleci-data tokenizer`.

use super::{InputArgs, bar, report};
use crate::data::sources::{self, Document, Found, Input, Rejected};
use crate::data::tokenizer::{TrainOptions, config_path, train_tokenizer, words};
use crate::exit::usage;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Train the byte-level BPE tokenizer on a mix of corpora.
///
/// The specials are <|endoftext|> 0, <|padding|> 1, <|im_start|> 2, <|im_end|> 3. The commonest Italian words are single
/// tokens, with a space before them and without. The same text gives the same file, byte for byte.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  elleci-data tokenizer --out tok/tokenizer.json corpus/it corpus/en
  elleci-data tokenizer --vocab 4096 --out nano/tokenizer.json corpus/it corpus/en")]
pub struct TokenizerArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Where to write; tokenizer.config.json goes beside it.
    #[arg(short, long, default_value = "tokenizer.json")]
    out: PathBuf,
    /// Replace an existing tokenizer.
    #[arg(long)]
    overwrite: bool,
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

/// Runs `elleci-data tokenizer`.
///
/// # Errors
/// Wrong usage, told before any text is read; input that cannot be read; what training reports.
pub fn run(args: &TokenizerArgs) -> Result<()> {
    let padded = if args.vocab == 32_000 { 32_128 } else { args.vocab };
    let mut options = TrainOptions::new(args.vocab, args.pad_to.unwrap_or(padded));
    if let Some(path) = &args.words {
        let list = fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
        options.words = words(&list).map(str::to_string).collect();
    }
    options.validate()?;
    let read_options = args.input.read_options();
    check_out(args, &[])?;
    let Found { inputs, ignored, notes } = sources::find_inputs(&args.input.inputs, &read_options)?;
    check_out(args, &inputs)?;
    let bar = bar(inputs.iter().map(|i| i.size).sum());
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
                    crate::exit::errln!("stopped reading after {} MB of text (--max-mb)", args.max_mb);
                    break;
                }
            }
            drop(send);
            bar.finish_and_clear();
            crate::exit::errln!("{:.1} MB of text read; learning merges", bytes as f64 / 1e6);
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
    report(&rejected, ignored, &notes);
    // Again: training takes a while.
    check_out(args, &inputs)?;
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

/// Whether both files may be written: neither is read from, and they are not there, or are to be replaced.
fn check_out(args: &TokenizerArgs, inputs: &[Input]) -> Result<()> {
    let named = args.input.inputs.iter().chain(&args.words).map(PathBuf::as_path);
    let read: Vec<&Path> = named.chain(inputs.iter().map(|i| i.path.as_path())).collect();
    for path in [args.out.clone(), config_path(&args.out)] {
        let shown = path.display();
        // A link that leads nowhere is there, too.
        if fs::symlink_metadata(&path).is_err() {
            continue;
        }
        if path.exists() && !path.is_file() {
            return Err(usage(format!("--out: {shown} is not a regular file; name one, such as DIR/tokenizer.json")));
        }
        let real = fs::canonicalize(&path).ok();
        if let Some(input) = real.and_then(|real| read.iter().find(|p| fs::canonicalize(p).is_ok_and(|p| p == real))) {
            let input = input.display();
            return Err(usage(format!("--out: {shown} would replace {input}, which is an input; write elsewhere")));
        }
        if !args.overwrite {
            return Err(usage(format!("{shown}: is already there; pass --overwrite to replace it")));
        }
    }
    Ok(())
}
