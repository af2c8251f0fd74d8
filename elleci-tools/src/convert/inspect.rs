//! `elleci-convert inspect`: what is in a file, tensor by tensor, and whether it is sound.

use std::collections::BTreeMap;

use anyhow::bail;
use elleci_core::params::{ParamKind, ParamLayout};
use elleci_core::ternary::TernaryMatrix;
use serde_json::{Map, Value, json};

use super::cli::InspectArgs;
use super::job::Job;
use super::source::{Options, Source, TensorInfo, plain, printable};
use crate::report::format::thousands;

/// Runs the verb. Every value of every tensor is read.
///
/// # Errors
/// A file that cannot be opened, or that is not sound.
pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let job = Job::start()?;
    let mut source = match Source::open(&args.file, &Options::from(args), &job) {
        Ok(source) => source,
        Err(e) => {
            job.finish();
            if args.json && e.downcast_ref::<crate::exit::Usage>().is_none() {
                crate::exit::outln!("{}", json!({ "path": args.file, "sound": false, "problems": [format!("{e:#}")] }));
            }
            return Err(e);
        }
    };
    let kinds = kinds(&source);
    let total = source.tensors.list().iter().map(|t| t.elements() as u64 * 4).sum();
    job.begin("reading", total);
    let mut rows = Vec::new();
    for index in 0..source.tensors.list().len() {
        let info = source.tensors.list()[index].clone();
        let kind = kinds.as_ref().map(|k| k.get(info.name.as_str()).copied());
        let (row, problem) = inspect(&source, index, &info, kind);
        rows.push(row);
        source.problems.extend(problem);
        job.advance(info.elements() as u64 * 4)?;
    }
    job.finish();
    let report = report(&source, &rows);
    match args.json {
        true => crate::exit::outln!("{report}"),
        false => print(&report),
    }
    if !source.problems.is_empty() {
        bail!("{}: not sound: {}", args.file.display(), printable(&source.problems.join("; ")));
    }
    Ok(())
}

/// The kind of every parameter that the configuration has; `None` without one.
fn kinds(source: &Source) -> Option<BTreeMap<String, ParamKind>> {
    let layout = ParamLayout::new(source.config.as_ref()?);
    Some(layout.params().iter().map(|p| (p.name.clone(), p.kind)).collect())
}

/// One line about a tensor, and what is wrong with it. `kind` is what the configuration says of it: nothing known, not of this model,
/// or a kind.
fn inspect(
    source: &Source,
    index: usize,
    info: &TensorInfo,
    kind: Option<Option<ParamKind>>,
) -> (Map<String, Value>, Option<String>) {
    let mut row = Map::new();
    row.insert("name".into(), json!(info.name));
    row.insert("shape".into(), json!(info.shape));
    row.insert("format".into(), json!(info.format));
    row.insert("bytes".into(), json!(info.bytes));
    if let Some(stored_as) = &info.stored_as {
        row.insert("stored_as".into(), json!(stored_as));
    }
    if kind == Some(None) {
        row.insert("extra".into(), json!(true));
    }
    let mut values = vec![0.0; info.elements()];
    if let Err(e) = source.tensors.read(index, &mut values) {
        return (row, Some(format!("{e:#}")));
    }
    let stats = Stats::new(&values);
    row.insert("min".into(), json!(stats.min));
    row.insert("max".into(), json!(stats.max));
    row.insert("rms".into(), json!(stats.rms));
    if let Some(gamma) = info.gamma {
        row.insert("gamma".into(), json!(gamma));
        row.insert("zero".into(), json!(stats.zeros as f64 / values.len() as f64));
    } else if kind == Some(Some(ParamKind::Ternary)) && stats.faulty == 0 && info.shape.len() == 2 {
        let matrix = TernaryMatrix::from_weights(&values, info.shape[0], info.shape[1]);
        // rne(w/γ) is 0 up to and including half of γ.
        let zeros = values.iter().filter(|v| (**v / matrix.gamma()).abs() <= 0.5).count();
        row.insert("gamma".into(), json!(matrix.gamma()));
        row.insert("zero".into(), json!(zeros as f64 / values.len() as f64));
    }
    let problem =
        (stats.faulty > 0).then(|| format!("`{}` holds {} values that are not finite", info.name, stats.faulty));
    (row, problem)
}

/// Figures of finite values.
struct Stats {
    min: Option<f32>,
    max: Option<f32>,
    rms: Option<f64>,
    zeros: usize,
    faulty: usize,
}

impl Stats {
    fn new(values: &[f32]) -> Stats {
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let count = finite().count();
        let squares: f64 = finite().map(|v| f64::from(v) * f64::from(v)).sum();
        Stats {
            min: finite().reduce(f32::min),
            max: finite().reduce(f32::max),
            rms: (count > 0).then(|| (squares / count as f64).sqrt()),
            zeros: finite().filter(|v| *v == 0.0).count(),
            faulty: values.len() - count,
        }
    }
}

fn report(source: &Source, rows: &[Map<String, Value>]) -> Value {
    let elements: usize = source.tensors.list().iter().map(TensorInfo::elements).sum();
    let bytes: u64 = source.tensors.list().iter().map(|t| t.bytes).sum();
    let facts: Map<String, Value> = source.facts.iter().map(|(k, v)| (k.replace(' ', "_"), v.clone())).collect();
    json!({
        "path": source.path, "form": source.form.name(), "facts": facts, "averaged": source.averaged,
        "config": source.config, "tokenizer_bytes": source.tokenizer.as_ref().map(Vec::len), "tensors": rows,
        "elements": elements, "tensor_bytes": bytes, "notes": source.notes, "sound": source.problems.is_empty(),
        "problems": source.problems,
    })
}

fn print(report: &Value) {
    let text = |v: &Value, key: &str| plain(&v[key]);
    let shown = |v: &Value, key: &str| printable(&text(v, key));
    let figure = |v: &Value| v.as_f64().map_or_else(String::new, |v| format!("{v:.4}"));
    crate::exit::outln!("{}: {}", text(report, "path"), text(report, "form"));
    for (name, value) in report["facts"].as_object().into_iter().flatten() {
        crate::exit::outln!("  {name}: {}", plain(value));
    }
    if let Some(config) = report["config"].as_object() {
        let sizes: Vec<String> = config.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
        crate::exit::outln!("  {}", sizes.join(", "));
    }
    match report["tokenizer_bytes"].as_u64() {
        Some(bytes) => crate::exit::outln!("  tokenizer: {} bytes", thousands(bytes)),
        None => crate::exit::outln!("  tokenizer: none"),
    }
    let rows = report["tensors"].as_array().map(Vec::as_slice).unwrap_or_default();
    let width = rows.iter().map(|r| shown(r, "name").chars().count()).max().unwrap_or(0);
    crate::exit::outln!(
        "\n{:width$}  {:14} {:5} {:>12} {:>9} {:>9} {:>8} {:>8}  zero",
        "tensor",
        "shape",
        "type",
        "bytes",
        "min",
        "max",
        "rms",
        "gamma"
    );
    for row in rows {
        let zero = row.get("zero").and_then(Value::as_f64).map_or_else(String::new, |z| format!("{:.1} %", z * 100.0));
        let mark = if row.get("extra").is_some() { "  not of this model" } else { "" };
        let stored = row.get("stored_as").map_or_else(String::new, |s| format!("  as {}", printable(&plain(s))));
        crate::exit::outln!(
            "{:width$}  {:14} {:5} {:>12} {:>9} {:>9} {:>8} {:>8}  {zero}{mark}{stored}",
            shown(row, "name"),
            row["shape"].to_string(),
            text(row, "format"),
            thousands(row["bytes"].as_u64().unwrap_or(0)),
            figure(&row["min"]),
            figure(&row["max"]),
            figure(&row["rms"]),
            row.get("gamma").map_or_else(String::new, figure),
        );
    }
    crate::exit::outln!(
        "\n{} tensors, {} elements, {} bytes",
        rows.len(),
        thousands(report["elements"].as_u64().unwrap_or(0)),
        thousands(report["tensor_bytes"].as_u64().unwrap_or(0))
    );
    for note in report["notes"].as_array().into_iter().flatten() {
        crate::exit::outln!("note: {}", plain(note));
    }
    crate::exit::outln!("{}", if report["sound"] == true { "sound" } else { "NOT sound" });
}
