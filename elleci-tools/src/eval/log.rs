//! The per-item log: `samples_TASK.jsonl`, a line an item, in the layout of lm-evaluation-harness's `--log_samples`.

use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::cache::Answers;
use super::item::Item;
use super::metrics::{Answer, ItemValue};
use super::task::{Aggregate, Kind, Metric, Task};
use super::template::Row;
use crate::data::files::write_atomically;

/// Writes the log of a task.
///
/// # Errors
/// The file system refuses.
pub fn write(
    dir: &Path,
    task: &Task,
    rows: &[Row],
    items: &[&Item],
    answers: &Answers,
    values: &[Vec<(Metric, ItemValue)>],
) -> anyhow::Result<()> {
    let mut out = Vec::new();
    for (item, values) in items.iter().zip(values) {
        let line = sample(task, rows.get(item.row), item, &answers.known[&item.doc].answer, values);
        serde_json::to_writer(&mut out, &line)?;
        out.push(b'\n');
    }
    write_atomically(&dir.join(format!("samples_{}.jsonl", task.name)), &out).context("--log")
}

fn sample(
    task: &Task,
    row: Option<&Row>,
    item: &Item,
    answer: &Answer,
    values: &[(Metric, ItemValue)],
) -> Map<String, Value> {
    let requests: Vec<Vec<&str>> = match task.kind {
        Kind::Rolling | Kind::Generate => vec![vec![&item.context]],
        _ => item.continuations.iter().map(|c| vec![item.context.as_str(), c]).collect(),
    };
    let argument = |(i, args): (usize, &Vec<&str>)| {
        let named = args.iter().enumerate().map(|(j, a)| (format!("arg_{j}"), json!(a)));
        (format!("gen_args_{i}"), Value::Object(named.collect()))
    };
    let arguments: Map<String, Value> = requests.iter().enumerate().map(argument).collect();
    let responses: Vec<Value> = match answer {
        Answer::Scores(scores) => scores.iter().map(|(logprob, greedy)| json!([logprob, greedy])).collect(),
        Answer::Rolling(logprob) => vec![json!(logprob)],
        Answer::Text { text, .. } => vec![json!(text)],
    };
    let target = match (task.kind, item.gold.as_slice()) {
        (Kind::MultipleChoice, [one]) => json!(one),
        (Kind::MultipleChoice, several) => json!(several),
        (Kind::Rolling, _) => json!(item.context),
        _ => json!(item.references),
    };
    let hash = |value: &Value| blake3::hash(value.to_string().as_bytes()).to_hex().to_string();
    let mut line = Map::new();
    line.insert("doc_id".into(), json!(item.doc));
    line.insert("doc".into(), json!(row));
    line.insert("doc_hash".into(), json!(hash(&json!(row))));
    line.insert("prompt_hash".into(), json!(hash(&json!(requests))));
    line.insert("target_hash".into(), json!(hash(&target)));
    line.insert("target".into(), target);
    line.insert("arguments".into(), Value::Object(arguments));
    line.insert("resps".into(), responses.iter().map(|r| json!([r])).collect());
    line.insert("filtered_resps".into(), Value::Array(responses));
    line.insert("filter".into(), json!("none"));
    line.insert("metrics".into(), values.iter().map(|(m, _)| json!(m.name())).collect());
    for (metric, value) in values {
        let pair = !matches!(metric.aggregate(), Aggregate::Mean | Aggregate::ExpMean);
        line.insert(metric.name().into(), if pair { json!(value) } else { json!(value[0]) });
    }
    line
}
