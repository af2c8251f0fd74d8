//! `elleci-convert compare`: two models on one text.

use serde_json::{Value, json};

use super::cli::CompareArgs;
use super::job::Job;
use super::score::{self, Text};
use super::source::{Options, Source};
use super::tokenizer;
use crate::train::device::Device;

/// Runs the verb.
///
/// # Errors
/// A model that is not sound or has no tokenizer, or a text that cannot be read.
pub fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let device = Device::choose("cpu", args.threads)?;
    let job = Job::start()?;
    let open = |path| Source::open(path, &Options::from(args), &job);
    let sources = [open(&args.a)?, open(&args.b)?];
    let mut tokenizers = Vec::new();
    for source in &sources {
        source.must_be_sound()?;
        tokenizers.push(tokenizer(source)?);
    }
    let texts = Text::read_for_all(&args.text, &tokenizers, args.text_tokens)?;
    let mut scores = Vec::new();
    for (source, text) in sources.iter().zip(&texts) {
        scores.push(device.install(|| score::one(source, text, &job))?);
    }
    job.finish();
    let bpb = |s: &Value| s["bits_per_byte"].as_f64().unwrap_or(f64::NAN);
    let change = bpb(&scores[1]) / bpb(&scores[0]) - 1.0;
    if args.json {
        crate::exit::outln!("{}", json!({ "models": scores, "relative_difference": change }));
        return Ok(());
    }
    crate::exit::outln!("bits/byte  tokens   model");
    for s in &scores {
        let (model, form) = (s["model"].as_str().unwrap_or_default(), s["form"].as_str().unwrap_or_default());
        crate::exit::outln!("{:9.5}  {:<7}  {model} ({form})", bpb(s), s["tokens"].as_u64().unwrap_or(0));
    }
    crate::exit::outln!("{:+.4} % from the first to the second", change * 100.0);
    Ok(())
}
