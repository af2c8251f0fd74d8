//! `elleci-convert`: models from every form to every form that can be written, and what is in a file.
//!
//! A [`source::Source`] is a checkpoint, a Hugging Face folder, a safetensors or PyTorch file or an archive: a configuration,
//! a tokenizer and tensors that are read one at a time. A `Target` takes them one at a time, under a temporary name.
//! So memory is that of the largest tensor, and what is interrupted leaves nothing.

pub mod cli;
mod compare;
mod inspect;
pub mod job;
mod packing;
mod score;
pub mod source;
mod target;
mod temporary;

use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use elleci_core::archive::DenseFormat;
use serde_json::{Value, json};

use self::cli::{Cli, Command, ConvertArgs};
use self::job::Job;
use self::source::{Form, Options, Source};
use self::target::Target;
use crate::data::tokenizer::Tokenizer;
use crate::exit::usage;
use crate::report::format::{duration, thousands};
use crate::train::device::Device;

/// Does what a command line says.
///
/// # Errors
/// Whatever stops it, with its exit code as [`crate::exit::finish`] has it.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    Job::outlive_size_limit()?;
    match &cli.command {
        Some(Command::Inspect(args)) => inspect::run(args),
        Some(Command::Compare(args)) => compare::run(args),
        None => convert(&cli.convert),
    }
}

fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let (Some(from), Some(to)) = (&args.src, &args.dst) else {
        return Err(usage("give a source and a destination; elleci-convert --help tells the forms"));
    };
    let began = Instant::now();
    let target = Target::new(to, args)?;
    let device = Device::choose("cpu", args.threads)?;
    let job = Job::start()?;
    let source = Source::open(from, &Options::from(args), &job)?;
    source.must_be_sound()?;
    let model = source.model()?;
    crate::exit::errln!("{}: {}", from.display(), source.title());
    let scores = match &args.text {
        Some(text) => Some(device.install(|| score::dense_choices(&source, &model, text, args.text_tokens, &job))?),
        None => None,
    };
    // Last: what is stopped before leaves nothing.
    let written = device.install(|| target.write(&source, &model, &job))?;
    job.finish();
    let notes = [if args.packs() { None } else { source.lossy_note() }, written.clamped_note()];
    let report = json!({
        "source": from, "source_form": source.form.name(), "destination": to, "destination_form": target.form(),
        "parameters": model.layout.len(), "tensors": model.layout.params().len(), "bytes": written.bytes,
        "packing": written.packing, "dense": written.dense, "tokenizer": source.tokenizer.is_some(),
        "weights": if source.averaged { "swa" } else { "last" }, "notes": notes.iter().flatten().chain(&source.notes).collect::<Vec<_>>(),
        "bits_per_byte": scores, "seconds": began.elapsed().as_secs_f64(),
    });
    match args.json {
        true => crate::exit::outln!("{report}"),
        false => print_report(&report, to),
    }
    Ok(())
}

fn print_report(report: &Value, to: &Path) {
    let number = |key: &str| thousands(report[key].as_u64().unwrap_or(0));
    crate::exit::outln!(
        "{}: {} parameters in {} tensors, {} bytes, {}",
        to.display(),
        number("parameters"),
        number("tensors"),
        number("bytes"),
        duration(report["seconds"].as_f64().unwrap_or(0.0))
    );
    for (kind, count) in report["packing"].as_object().into_iter().flatten() {
        crate::exit::outln!("  {count} ternary tensors as {kind}");
    }
    if let Some(dense) = report["dense"].as_str() {
        crate::exit::outln!("  embedding and head as {dense}");
    }
    if report["tokenizer"] == false {
        crate::exit::outln!("  no tokenizer: none was found beside the source, give --tokenizer");
    }
    for note in report["notes"].as_array().into_iter().flatten() {
        crate::exit::outln!("  note: {}", note.as_str().unwrap_or_default());
    }
    if report["bits_per_byte"].is_object() {
        score::print(&report["bits_per_byte"]);
    }
}

/// The tokenizer of a source that needs one.
fn tokenizer(source: &Source) -> anyhow::Result<Tokenizer> {
    let Some(json) = &source.tokenizer else {
        return Err(usage(format!(
            "{}: a text can only be scored with the model's tokenizer; give --tokenizer",
            source.path.display()
        )));
    };
    Tokenizer::from_json(json.clone(), None)
}

/// The values of `--dense`.
fn dense_format(name: &str) -> Result<DenseFormat, String> {
    let names = DenseFormat::ALL.map(DenseFormat::name);
    DenseFormat::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| format!("one of {}", names.join(", ")))
}

/// Reads the values of a tensor and refuses those that are no numbers.
fn read_finite(source: &Source, index: usize, latent: bool, values: &mut [f32]) -> anyhow::Result<()> {
    let tensors = &source.tensors;
    match latent {
        true => tensors.read_latent(index, values)?,
        false => tensors.read(index, values)?,
    }
    let faulty = values.iter().filter(|v| !v.is_finite()).count();
    ensure!(
        faulty == 0,
        "{}: `{}` holds {faulty} values that are not finite; take an earlier checkpoint",
        source.path.display(),
        tensors.list()[index].name
    );
    Ok(())
}

/// Whether what a source holds is packed already.
fn is_packed(source: &Source) -> bool {
    source.form == Form::Archive
}
