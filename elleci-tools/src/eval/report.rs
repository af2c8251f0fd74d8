//! Results: the table, and the harness's JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::item::Item;
use super::metrics::{ItemValue, aggregate, guessed, standard_error};
use super::task::{Aggregate, Metric, Task};

/// A metric of a task or of a part of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Which.
    pub metric: Metric,
    /// Its value.
    pub value: f64,
    /// Its standard error, where there is one.
    pub stderr: Option<f64>,
    /// What guessing gets, where that is known.
    pub chance: Option<f64>,
}

/// The results of a task.
#[derive(Clone, Debug)]
pub struct TaskResult {
    /// The task.
    pub task: Task,
    /// Examples before each question.
    pub shots: usize,
    /// Items that there are.
    pub original: usize,
    /// Items that were asked.
    pub effective: usize,
    /// Items whose context lost its beginning.
    pub truncated: usize,
    /// Tokens from the start of a window to that of the next, of texts that are scored whole.
    pub stride: Option<usize>,
    /// What the answers depend on.
    pub key: String,
    /// Where the data were found.
    pub place: String,
    /// The metrics.
    pub measured: Vec<Measured>,
    /// The first metric by part: name, items, value.
    pub parts: Vec<(String, usize, Measured)>,
}

/// A task that could not run, and why.
#[derive(Clone, Debug)]
pub struct Absent {
    /// Its name.
    pub name: String,
    /// The reason in words.
    pub reason: String,
    /// Its kind.
    pub why: Why,
}

/// Kinds of reasons that a task could not run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The rows that are evaluated are not there.
    NoData,
    /// They are, but not those that examples are taken from.
    NoExamples,
    /// Everything else.
    Failed,
}

/// The metrics of a task from what its items contribute; `values` has a row an item.
pub fn measure(task: &Task, items: &[&Item], values: &[Vec<(Metric, ItemValue)>], seed: u64) -> Vec<Measured> {
    let chances: Option<Vec<f64>> = items.iter().map(|i| i.chance()).collect();
    let by_items = chances.map(|c| c.iter().sum::<f64>() / c.len() as f64);
    // The same number for all items, or nothing.
    let choices = items.first().map(|i| i.choices.len());
    let choices = choices.filter(|n| *n > 0 && items.iter().all(|i| i.choices.len() == *n));
    let of = |(at, metric): (usize, &Metric)| {
        let values: Vec<ItemValue> = values.iter().map(|v| v[at].1).collect();
        let how = metric.aggregate();
        let guess = match (how, choices) {
            (Aggregate::Mean, _) => task.chance.or(by_items),
            (_, Some(n)) => guessed(how, &values, n),
            _ => None,
        };
        Measured {
            metric: *metric,
            value: aggregate(how, &values),
            stderr: standard_error(how, &values, seed),
            chance: guess,
        }
    };
    task.metrics.iter().enumerate().map(of).collect()
}

/// The mean of the variants of each group, weighted by their items, with the harness's pooled standard error.
pub fn groups(results: &[TaskResult]) -> Vec<(String, usize, Vec<Measured>)> {
    let mut by_name: BTreeMap<&String, Vec<&TaskResult>> = BTreeMap::new();
    for result in results {
        if let Some(group) = &result.task.group {
            by_name.entry(group).or_default().push(result);
        }
    }
    let group = |(name, members): (&String, Vec<&TaskResult>)| {
        let sizes: Vec<f64> = members.iter().map(|m| m.effective as f64).collect();
        let total: f64 = sizes.iter().sum();
        let mean =
            |of: &dyn Fn(&TaskResult) -> f64| members.iter().zip(&sizes).map(|(m, n)| of(m) * n).sum::<f64>() / total;
        let measured = (0..members[0].measured.len()).map(|i| {
            let first = &members[0].measured[i];
            let errors: Option<Vec<f64>> = members.iter().map(|m| m.measured[i].stderr).collect();
            let pooled = errors.filter(|_| total > sizes.len() as f64).map(|errors| {
                let squares: f64 = errors.iter().zip(&sizes).map(|(e, n)| (n - 1.0) * e * e * n).sum();
                (squares / (total - sizes.len() as f64) / total).sqrt()
            });
            Measured {
                metric: first.metric,
                value: mean(&|m| m.measured[i].value),
                stderr: pooled,
                chance: first.chance.map(|_| mean(&|m| m.measured[i].chance.unwrap_or(f64::NAN))),
            }
        });
        (name.clone(), members.iter().map(|m| m.effective).sum(), measured.collect())
    };
    by_name.into_iter().map(group).collect()
}

/// Facts of the run that results carry.
pub struct Facts {
    /// What the model is called.
    pub model: String,
    /// Where it was opened from.
    pub path: String,
    /// Its parameters.
    pub parameters: usize,
    /// The hash of model and tokenizer.
    pub model_hash: String,
    /// Tokens of a window.
    pub max_length: usize,
    /// `--limit`.
    pub limit: Option<u64>,
    /// `--seed`.
    pub seed: u64,
    /// The device, in words.
    pub device: String,
    /// When it began, seconds since 1970.
    pub date: f64,
    /// How long it took.
    pub seconds: f64,
}

fn number(value: f64) -> Value {
    // Not-a-number has no JSON.
    if value.is_finite() { json!(value) } else { Value::Null }
}

fn entry(alias: &str, n: usize, measured: &[Measured]) -> Value {
    let mut entry = Map::new();
    entry.insert("alias".into(), json!(alias));
    entry.insert("sample_len".into(), json!(n));
    for m in measured {
        let name = m.metric.name();
        entry.insert(format!("{name},none"), number(m.value));
        entry.insert(format!("{name}_stderr,none"), m.stderr.map_or(json!("N/A"), number));
    }
    Value::Object(entry)
}

/// The results as lm-evaluation-harness lays them out. What it has no place for stands under `elleci`.
pub fn to_json(results: &[TaskResult], absent: &[Absent], facts: &Facts) -> Value {
    let mut tables: [Map<String, Value>; 8] = Default::default();
    let [entries, subtasks, configs, versions, shots, better, samples, own] = &mut tables;
    for r in results {
        let name = r.task.name.clone();
        entries.insert(name.clone(), entry(&name, r.effective, &r.measured));
        subtasks.insert(name.clone(), json!([]));
        configs.insert(name.clone(), json!(r.task));
        versions.insert(name.clone(), json!(r.task.version));
        shots.insert(name.clone(), json!(r.shots));
        let higher: Map<String, Value> =
            r.task.metrics.iter().map(|m| (m.name().to_string(), json!(m.higher_is_better()))).collect();
        better.insert(name.clone(), Value::Object(higher));
        samples.insert(name.clone(), json!({ "original": r.original, "effective": r.effective }));
        let chance: Map<String, Value> =
            r.measured.iter().filter_map(|m| Some((m.metric.name().to_string(), number(m.chance?)))).collect();
        let part = |(part, n, m): &(String, usize, Measured)| {
            (part.clone(), json!({ "n": n, m.metric.name(): number(m.value), "stderr": m.stderr }))
        };
        let parts: Map<String, Value> = r.parts.iter().map(part).collect();
        let mut about =
            json!({ "chance": chance, "truncated": r.truncated, "parts": parts, "data": r.place, "key": r.key });
        if let Some(stride) = r.stride {
            about["stride"] = json!(stride);
        }
        own.insert(name, about);
    }
    let mut group_entries = Map::new();
    for (name, n, measured) in groups(results) {
        let members: Vec<&String> =
            results.iter().filter(|r| r.task.group.as_ref() == Some(&name)).map(|r| &r.task.name).collect();
        subtasks.insert(name.clone(), json!(members));
        let value = entry(&name, n, &measured);
        entries.insert(name.clone(), value.clone());
        group_entries.insert(name, value);
    }
    let missing: Map<String, Value> = absent.iter().map(|a| (a.name.clone(), json!(a.reason))).collect();
    let hashes: Map<String, Value> = results.iter().map(|r| (r.task.name.clone(), json!(r.key))).collect();
    let sanitised: String =
        facts.model.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
    let [entries, subtasks, configs, versions, shots, better, samples, own] = tables;
    json!({
        "results": entries,
        "groups": group_entries,
        "group_subtasks": subtasks,
        "configs": configs,
        "versions": versions,
        "n-shot": shots,
        "higher_is_better": better,
        "n-samples": samples,
        "config": {
            "model": "elleci",
            "model_args": { "path": facts.path, "max_length": facts.max_length },
            "model_num_parameters": facts.parameters,
            "model_sha": facts.model_hash,
            "device": facts.device,
            "limit": facts.limit,
            "random_seed": facts.seed,
        },
        "date": facts.date,
        "task_hashes": hashes,
        "max_length": facts.max_length,
        "eot_token_id": crate::data::tokenizer::END_OF_TEXT_ID,
        "model_source": "elleci",
        "model_name": facts.model,
        "model_name_sanitized": sanitised,
        "total_evaluation_time_seconds": facts.seconds.to_string(),
        "elleci": { "version": env!("CARGO_PKG_VERSION"), "tasks": own, "not_run": missing },
    })
}

/// The table for people, in Markdown.
pub fn table(results: &[TaskResult]) -> String {
    let mut rows = vec![["task", "shots", "n", "metric", "", "value", "stderr", "chance"].map(String::from).to_vec()];
    let mut add = |name: &str, shots: &str, n: usize, m: &Measured, first: bool| {
        let show = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.4}"));
        let arrow = if m.metric.higher_is_better() { "↑" } else { "↓" };
        let only_first = |text: String| if first { text } else { String::new() };
        rows.push(vec![
            only_first(name.to_string()),
            only_first(shots.to_string()),
            only_first(n.to_string()),
            m.metric.name().to_string(),
            arrow.to_string(),
            show(Some(m.value)),
            show(m.stderr),
            show(m.chance),
        ]);
    };
    for r in results {
        for (i, m) in r.measured.iter().enumerate() {
            add(&r.task.name, &r.shots.to_string(), r.effective, m, i == 0);
        }
        for (part, n, m) in &r.parts {
            add(&format!("- {part}"), "", *n, m, true);
        }
    }
    for (name, n, measured) in groups(results) {
        for (i, m) in measured.iter().enumerate() {
            add(&format!("{name} (mean)"), "", n, m, i == 0);
        }
    }
    layout(&rows)
}

/// Rows as a Markdown table: the first column to the left, numbers to the right.
pub fn layout(rows: &[Vec<String>]) -> String {
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0).max(1);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let is_text = |c: usize| c == 0 || rows[0][c] == "metric" || rows[0][c].is_empty();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        for (c, cell) in row.iter().enumerate() {
            let w = widths[c];
            let _ = if is_text(c) { write!(out, "| {cell:<w$} ") } else { write!(out, "| {cell:>w$} ") };
        }
        out.push_str("|\n");
        if i == 0 {
            for (c, w) in widths.iter().enumerate() {
                let dashes = "-".repeat(w + 1);
                let _ = if is_text(c) { write!(out, "|{dashes}-") } else { write!(out, "|{dashes}:") };
            }
            out.push_str("|\n");
        }
    }
    out
}
