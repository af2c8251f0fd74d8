//! Rows of a task: from local parquet, JSON lines, JSON or CSV, in the data set's own columns; or from the bundled suite.
//!
//! In the directory of `--data`, a split is looked for, in this order, as
//!
//! | where | what it suits |
//! |---|---|
//! | `TASK.jsonl` (or another form) | a file made by hand; it is the evaluated split |
//! | `TASK/SPLIT*` | the same with several splits |
//! | `OWNER/NAME/CONFIG/SPLIT/*` | what `elleci-data fetch --eval` writes |
//! | `OWNER/NAME/CONFIG/SPLIT*`, `OWNER/NAME/SPLIT*`, `OWNER/NAME/data/SPLIT*` | a clone of the hub's repository |

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use serde_json::Value;

use super::suite;
use super::task::{Source, Task};
use super::template::Row;
use crate::data::sources::parquet_value;

/// Forms of a file of rows, uncompressed; all but parquet may also end in `.gz` or `.zst`.
const FORMS: [&str; 5] = ["parquet", "jsonl", "ndjson", "json", "csv"];
/// A longer line is no row of a test set, and must not fill the memory.
const MAX_LINE: u64 = 1 << 26;
/// Rows of a split at most; the largest known has 108,000.
const MAX_ROWS: usize = 4_000_000;

/// The rows of a task.
#[derive(Debug, Default)]
pub struct Rows {
    /// Of the split that is evaluated.
    pub rows: Vec<Row>,
    /// Of the split that examples are taken from; empty if none are wanted.
    pub shots: Vec<Row>,
    /// Whether both are the same split: then a row is no example of itself.
    pub same_split: bool,
    /// Where they were found.
    pub place: String,
}

/// Why a task cannot run: its data are not there.
#[derive(Debug)]
pub enum Missing {
    /// Not those that are evaluated.
    Split(String),
    /// Those that are evaluated are, but not those that examples are taken from.
    Examples(String),
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Missing::Split(text) | Missing::Examples(text)) = self;
        f.write_str(text)
    }
}

impl std::error::Error for Missing {}

/// Reads the rows of a task, with examples if `shots` is not 0.
///
/// # Errors
/// [`Missing`] where there are no data; files that are damaged or have other columns.
pub fn load(task: &Task, data: Option<&Path>, shots: usize) -> anyhow::Result<Rows> {
    let Some(source) = &task.source else {
        if let Some(bundled) = suite::rows(&task.name) {
            let suite::Bundled { rows, shots, .. } = bundled;
            return Ok(Rows { rows, shots, same_split: false, place: "bundled".into() });
        }
        let files = data.map_or_else(Vec::new, |dir| split_files(dir, task, None, ""));
        ensure!(
            !files.is_empty(),
            Missing::Split(format!("no file {}.jsonl (or .parquet, .csv) under --data", task.name))
        );
        return Ok(Rows { rows: read_all(&files, task)?, place: place(&files), ..Rows::default() });
    };
    let name = task.group.as_ref().unwrap_or(&task.name);
    let fetch = format!("`elleci-data fetch --eval --tasks {name} --out DIR`");
    let of = |split: &str| format!("({} {} {split})", source.repo, source.config);
    let find = |split: &str| data.map_or_else(Vec::new, |dir| split_files(dir, task, Some(source), split));
    let files = find(&source.split);
    ensure!(!files.is_empty(), {
        let at = data.map_or("no --data directory was given".into(), |d| format!("none under {}", d.display()));
        Missing::Split(format!("no data {}: {at}; {fetch}, then `--data DIR`", of(&source.split)))
    });
    let rows = read_all(&files, task)?;
    let mut out = Rows { rows, place: place(&files), ..Rows::default() };
    if shots > 0 {
        let split = source.shots_split.as_ref().unwrap_or(&source.split);
        out.same_split = split == &source.split;
        let files = find(split);
        ensure!(
            out.same_split || !files.is_empty(),
            Missing::Examples(format!(
                "its examples are taken from the split `{split}` {}, which is missing: {fetch} gets it, a file \
                 {name}/{split}.jsonl is as good, and `--shots 0` needs none",
                of(split)
            ))
        );
        out.shots = if out.same_split { out.rows.clone() } else { read_all(&files, task)? };
    }
    Ok(out)
}

fn place(files: &[PathBuf]) -> String {
    files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The files of a split, the first place that has any.
fn split_files(dir: &Path, task: &Task, source: Option<&Source>, split: &str) -> Vec<PathBuf> {
    let names: Vec<&String> = [Some(&task.name), task.group.as_ref()].into_iter().flatten().collect();
    if source.is_none_or(|s| split == s.split) {
        for name in &names {
            let found = matching(dir, |stem| stem == name.as_str());
            if !found.is_empty() {
                return found;
            }
        }
    }
    let Some(source) = source else { return Vec::new() };
    let in_split =
        |stem: &str| stem.strip_prefix(split).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_', '.']));
    let repo = dir.join(&source.repo);
    if !source.files.is_empty() {
        let named: Vec<PathBuf> = source.files.iter().map(|f| repo.join(f)).collect();
        return if named.iter().all(|f| f.is_file()) { named } else { Vec::new() };
    }
    let by_task = names.iter().map(|name| dir.join(name));
    let config = repo.join(&source.config);
    let in_own_directory = matching(&config.join(split), |_| true);
    let mut places = by_task.map(|d| matching(&d, in_split)).collect::<Vec<_>>();
    places.push(in_own_directory);
    places.extend([config, repo.clone(), repo.join("data")].map(|d| matching(&d, in_split)));
    places.into_iter().find(|files| !files.is_empty()).unwrap_or_default()
}

/// Files of known forms in a directory whose stems `wanted` likes, by name.
fn matching(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let fits = |path: &PathBuf| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = stem(name);
        stem.is_some_and(|(stem, _)| wanted(stem)) && path.is_file()
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(fits).collect();
    files.sort();
    files
}

/// The name without its extensions, and the form.
fn stem(name: &str) -> Option<(&str, &str)> {
    let packed = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
    let (stem, form) = packed.unwrap_or(name).rsplit_once('.')?;
    (FORMS.contains(&form) && !(form == "parquet" && packed.is_some())).then_some((stem, form))
}

fn read_all(files: &[PathBuf], task: &Task) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files {
        let before = rows.len();
        read(file, &mut rows).with_context(|| file.display().to_string())?;
        if let Some(row) = rows.get(before) {
            for column in &task.columns {
                let found = || row.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                ensure!(row.contains_key(column), "{}: no column `{column}`; it has {}", file.display(), found());
            }
        }
    }
    ensure!(!rows.is_empty(), "{}: no rows", place(files));
    Ok(rows)
}

fn read(path: &Path, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let (_, form) = stem(name).context("a file of an unknown form")?;
    let file = File::open(path).context("cannot open")?;
    let mut push = |row| {
        ensure!(rows.len() < MAX_ROWS, "more than {MAX_ROWS} rows");
        rows.push(row);
        Ok(())
    };
    if form == "parquet" {
        let reader = SerializedFileReader::new(file).context("not a valid parquet file (truncated or damaged?)")?;
        for (number, row) in (1..).zip(RowIter::from_file_into(Box::new(reader)).with_batch_size(64)) {
            let row = row.with_context(|| format!("row {number} cannot be read (damaged?)"))?;
            push(row.into_columns().into_iter().map(|(name, field)| (name, parquet_value(field))).collect())?;
        }
        return Ok(());
    }
    let mut input: Box<dyn BufRead> = match name.rsplit_once('.').map_or("", |n| n.1) {
        "gz" => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))),
        "zst" => Box::new(BufReader::new(zstd::stream::read::Decoder::new(file).context("cannot decompress")?)),
        _ => Box::new(BufReader::new(file)),
    };
    match form {
        "csv" => read_csv(input, &mut push),
        "json" if input.fill_buf().context("cannot read")?.trim_ascii_start().starts_with(b"[") => {
            let all: Vec<Row> =
                serde_json::from_reader(input.take(16 * MAX_LINE)).context("not an array of objects")?;
            all.into_iter().try_for_each(push)
        }
        _ => read_lines(input, &mut push),
    }
}

fn read_csv(input: impl Read, push: &mut dyn FnMut(Row) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut reader = csv::Reader::from_reader(input);
    let names = reader.headers().context("no head of column names")?.clone();
    for record in reader.records() {
        let record = record.context("not valid CSV")?;
        push(names.iter().map(str::to_string).zip(record.iter().map(Value::from)).collect())?;
    }
    Ok(())
}

fn read_lines(mut input: impl BufRead, push: &mut dyn FnMut(Row) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if (&mut input).take(MAX_LINE).read_until(b'\n', &mut line).context("cannot read (damaged?)")? == 0 {
            break;
        }
        if line.len() as u64 == MAX_LINE {
            bail!("line {number} is longer than {MAX_LINE} bytes; is this JSON lines (one object a line)?");
        }
        let text = line.trim_ascii();
        if !text.is_empty() {
            push(serde_json::from_slice(text).with_context(|| format!("line {number} is not a JSON object"))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
