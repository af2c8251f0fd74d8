//! `elleci-convert compare`: two models on one text.

use serde_json::{Value, json};

use super::cli::CompareArgs;
use super::job::Job;
use super::score;
use super::source::{Options, Source};
use crate::train::device::Device;

/// Runs the verb.
///
/// # Errors
/// A model that is not sound or has no tokenizer, or a text that cannot be read.
pub fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let device = Device::choose("cpu", args.threads)?;
    let job = Job::start()?;
    let mut scores = Vec::new();
    for path in [&args.a, &args.b] {
        let source = Source::open(path, &Options::from(args), &job)?;
        scores.push(device.install(|| score::one(&source, &args.text, args.text_tokens, &job))?);
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
