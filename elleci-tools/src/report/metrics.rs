//! The numbers of a run: `metrics.jsonl` (everything), `metrics.csv` (a row a step), `evals.csv` (a row an evaluation and source).
//!
//! Every record is one `write` of whole lines, so a killed process leaves at most one torn line. A resumed run first calls
//! [`truncate_after`], which cuts what lies beyond the checkpoint, torn line included; the files then end up as those of a
//! run that was never interrupted, timings aside.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Everything, one JSON object a line.
pub const JSONL: &str = "metrics.jsonl";
/// Steps.
pub const STEPS_CSV: &str = "metrics.csv";
/// Evaluations.
pub const EVALS_CSV: &str = "evals.csv";

/// One optimiser step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser steps made, this one included.
    pub step: u64,
    /// Tokens seen, this step's included.
    pub tokens: u64,
    /// Mean training loss of the step, nats a token.
    #[serde(with = "finite_or_none")]
    pub loss: f64,
    /// The scheduled learning rate.
    #[serde(with = "finite_or_none")]
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    #[serde(with = "finite_or_none")]
    pub grad_norm: f64,
    /// Phase of the data mix, from 1.
    pub phase: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Steps skipped so far because their loss or norm was not finite.
    pub skipped: u64,
    /// Milliseconds of the step.
    #[serde(with = "finite_or_none")]
    pub ms: f64,
    /// Tokens a second.
    #[serde(with = "finite_or_none")]
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation: share of the measured peak, 0 to 1.
    #[serde(with = "finite_or_none")]
    pub mfu: f64,
}

/// One evaluation on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimiser steps made.
    pub step: u64,
    /// Tokens seen in training.
    pub tokens: u64,
    /// Mean loss over all sources, nats a token.
    #[serde(with = "finite_or_none")]
    pub loss: f64,
    /// Bits a byte of text over all sources.
    #[serde(with = "finite_or_none")]
    pub bpb: f64,
    /// The same by source.
    pub sources: Vec<SourceEval>,
}

/// An evaluation on one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceEval {
    /// The source's name in the data configuration.
    pub name: String,
    /// Mean loss, nats a token.
    #[serde(with = "finite_or_none")]
    pub loss: f64,
    /// Bits a byte of text.
    #[serde(with = "finite_or_none")]
    pub bpb: f64,
}

/// Text that the model wrote during training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Optimiser steps made.
    pub step: u64,
    /// What it was given.
    pub prompt: String,
    /// What it continued with.
    pub text: String,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A step.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
    /// A sample.
    Sample(Sample),
}

/// JSON has no NaN: a number that is not finite is `null` there and empty in CSV, and NaN when read.
mod finite_or_none {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { s.serialize_some(value) } else { s.serialize_none() }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
    }
}

/// A row of `evals.csv`; the source `all` is the mean.
#[derive(Serialize)]
struct EvalRow<'a> {
    step: u64,
    tokens: u64,
    source: &'a str,
    #[serde(with = "finite_or_none")]
    loss: f64,
    #[serde(with = "finite_or_none")]
    bpb: f64,
}

/// Appends records to the three files of a directory.
pub struct Metrics {
    jsonl: Output,
    steps: Output,
    evals: Output,
}

impl Metrics {
    /// Opens the files for appending, creating them with their header lines where they are new.
    ///
    /// # Errors
    /// When the directory or a file cannot be created or written.
    pub fn open(dir: &Path) -> Result<Metrics> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create the directory {}", dir.display()))?;
        Ok(Metrics {
            jsonl: Output::open(dir.join(JSONL), "")?,
            steps: Output::open(
                dir.join(STEPS_CSV),
                "step,tokens,loss,lr,grad_norm,phase,seq_len,skipped,ms,tokens_per_s,mfu\n",
            )?,
            evals: Output::open(dir.join(EVALS_CSV), "step,tokens,source,loss,bpb\n")?,
        })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.steps.rows([record])?;
        self.jsonl.json(&Record::Step(record.clone()))
    }

    /// Adds a sample (to `metrics.jsonl` alone).
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn sample(&mut self, sample: &Sample) -> Result<()> {
        self.jsonl.json(&Record::Sample(sample.clone()))
    }

    /// Adds an evaluation.
    ///
    /// # Errors
    /// When a file cannot be written, or a source's name is more than one line.
    pub fn eval(&mut self, record: &EvalRecord) -> Result<()> {
        let EvalRecord { step, tokens, loss, bpb, ref sources } = *record;
        if let Some(s) = sources.iter().find(|s| s.name.contains(['\n', '\r'])) {
            bail!("the name of the source {:?} holds a line break; give it another in the data configuration", s.name);
        }
        let all = EvalRow { step, tokens, source: "all", loss, bpb };
        let by_source = sources.iter().map(|s| EvalRow { step, tokens, source: &s.name, loss: s.loss, bpb: s.bpb });
        self.evals.rows(std::iter::once(all).chain(by_source))?;
        self.jsonl.json(&Record::Eval(record.clone()))
    }
}

/// A file that is only appended to.
struct Output {
    file: File,
    path: PathBuf,
}

impl Output {
    fn open(path: PathBuf, header: &str) -> Result<Output> {
        let context = || format!("cannot open {} for appending", path.display());
        let file = OpenOptions::new().create(true).append(true).open(&path).with_context(context)?;
        let new = file.metadata().with_context(context)?.len() == 0;
        let mut output = Output { file, path };
        if new && !header.is_empty() {
            output.write(header.as_bytes())?;
        }
        Ok(output)
    }

    fn write(&mut self, lines: &[u8]) -> Result<()> {
        self.file.write_all(lines).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn json(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record).context("cannot encode a metrics record")?;
        line.push(b'\n');
        self.write(&line)
    }

    fn rows<T: Serialize>(&mut self, rows: impl IntoIterator<Item = T>) -> Result<()> {
        let mut csv = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        for row in rows {
            csv.serialize(row).context("cannot encode a metrics row")?;
        }
        let lines = csv.into_inner().map_err(|e| e.into_error()).context("cannot encode a metrics row")?;
        self.write(&lines)
    }
}

/// Cuts every record of a later step than `step`, and a torn last line, off the files of a directory. Files that do not
/// exist stay so. Returns how many lines were cut.
///
/// # Errors
/// When a file cannot be read or cut, or a line before the cut is not a record: it was then changed by something else, and is left as
/// it is.
pub fn truncate_after(dir: &Path, step: u64) -> Result<usize> {
    let json_step = |line: &str| -> Option<u64> { serde_json::from_str::<StepOnly>(line).ok().map(|r| r.step) };
    let csv_step = |line: &str| -> Option<u64> { line.split(',').next()?.parse().ok() };
    let mut cut = truncate_file(&dir.join(JSONL), 0, step, json_step)?;
    for name in [STEPS_CSV, EVALS_CSV] {
        cut += truncate_file(&dir.join(name), 1, step, csv_step)?;
    }
    Ok(cut)
}

#[derive(Deserialize)]
struct StepOnly {
    step: u64,
}

fn truncate_file(path: &Path, headers: usize, step: u64, step_of: impl Fn(&str) -> Option<u64>) -> Result<usize> {
    let context = || format!("cannot read {}", path.display());
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other.with_context(context)?,
    };
    let mut reader = BufReader::new(&file);
    let (mut keep, mut cut) = (0u64, 0);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).with_context(context)?;
        if length == 0 {
            break;
        }
        let whole = line.ends_with(b"\n");
        if cut > 0 || !whole {
            cut += 1;
        } else if number <= headers {
            keep += length as u64;
        } else {
            match std::str::from_utf8(&line).ok().and_then(|l| step_of(l.trim_end())) {
                Some(s) if s > step => cut += 1,
                Some(_) => keep += length as u64,
                None => bail!(
                    "{}, line {number}: not a metrics record; repair the line or move the file away",
                    path.display()
                ),
            }
        }
    }
    if cut > 0 {
        file.set_len(keep).with_context(|| format!("cannot cut {}", path.display()))?;
    }
    Ok(cut)
}

/// All records of a directory's `metrics.jsonl`, in order. A torn last line is left out.
///
/// # Errors
/// When the file cannot be read, or a line is not a record.
pub fn read(dir: &Path) -> Result<Vec<Record>> {
    let path = dir.join(JSONL);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}, line {}: not a metrics record", path.display(), i + 1))
    };
    whole.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn step(step: u64) -> StepRecord {
        StepRecord {
            step,
            tokens: step * 2048,
            loss: 8.3 / step as f64,
            lr: 1.5e-3,
            grad_norm: 0.1 * step as f64,
            phase: 1,
            seq_len: 256,
            skipped: 0,
            ms: 412.5,
            tokens_per_s: 4964.8125,
            mfu: 0.38,
        }
    }

    fn eval(step: u64) -> EvalRecord {
        let source = |name: &str, bpb| SourceEval { name: name.into(), loss: 3.1, bpb };
        let sources = vec![source("wikipedia", 1.5), source("a, \"b\"", 1.75)];
        EvalRecord { step, tokens: step * 2048, loss: 3.1, bpb: 1.6, sources }
    }

    fn sample(step: u64) -> Sample {
        Sample { step, prompt: "La città".into(), text: " è\n\"qui\"".into() }
    }

    /// Steps of a range with an evaluation and a sample after every third.
    fn write(dir: &Path, steps: std::ops::RangeInclusive<u64>) {
        let mut metrics = Metrics::open(dir).unwrap();
        for s in steps {
            metrics.step(&step(s)).unwrap();
            if s.is_multiple_of(3) {
                metrics.eval(&eval(s)).unwrap();
                metrics.sample(&sample(s)).unwrap();
            }
        }
    }

    fn contents(dir: &Path) -> Vec<String> {
        [JSONL, STEPS_CSV, EVALS_CSV].iter().map(|f| fs::read_to_string(dir.join(f)).unwrap()).collect()
    }

    #[test]
    fn a_resumed_run_leaves_the_files_of_an_uninterrupted_one() {
        let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(whole.path(), 1..=10);
        // Every step at which the checkpoint may be, with the kill later and in the middle of a line of each file.
        for checkpoint in 0..=8 {
            fs::remove_dir_all(killed.path()).unwrap();
            write(killed.path(), 1..=8);
            for file in [JSONL, STEPS_CSV, EVALS_CSV] {
                let mut f = OpenOptions::new().append(true).open(killed.path().join(file)).unwrap();
                f.write_all(b"{\"kind\":\"step\",\"step\":9,\"tok").unwrap();
            }
            let cut = truncate_after(killed.path(), checkpoint).unwrap();
            assert!(cut >= 3, "at least the torn lines");
            write(killed.path(), checkpoint + 1..=10);
            assert_eq!(contents(killed.path()), contents(whole.path()), "resumed at {checkpoint}");
        }
        assert_eq!(truncate_after(whole.path(), 10).unwrap(), 0);
        assert_eq!(truncate_after(&whole.path().join("none"), 10).unwrap(), 0);
    }

    #[test]
    fn records_come_back_and_what_is_not_finite_is_nan() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1..=3);
        let mut skipped = step(4);
        (skipped.loss, skipped.grad_norm) = (f64::NAN, f64::INFINITY);
        Metrics::open(dir.path()).unwrap().step(&skipped).unwrap();
        let records = read(dir.path()).unwrap();
        let expected = [
            Record::Step(step(1)),
            Record::Step(step(2)),
            Record::Step(step(3)),
            Record::Eval(eval(3)),
            Record::Sample(sample(3)),
        ];
        assert_eq!(records[..5], expected);
        let Record::Step(back) = &records[5] else { panic!("a step was written") };
        assert!(back.loss.is_nan() && back.grad_norm.is_nan() && back.lr == 1.5e-3);
    }

    #[test]
    fn csv_has_the_columns_of_its_header() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1..=3);
        let mut steps = csv::Reader::from_path(dir.path().join(STEPS_CSV)).unwrap();
        let rows: Vec<StepRecord> = steps.deserialize().map(Result::unwrap).collect();
        assert_eq!(rows, [step(1), step(2), step(3)]);
        let mut evals = csv::Reader::from_path(dir.path().join(EVALS_CSV)).unwrap();
        assert_eq!(evals.headers().unwrap(), &["step", "tokens", "source", "loss", "bpb"][..]);
        let mut broken = eval(4);
        broken.sources[0].name = "a\nb".into();
        assert!(Metrics::open(dir.path()).unwrap().eval(&broken).unwrap_err().to_string().contains("\\n"));
        let sources: Vec<_> = evals.records().map(|r| r.unwrap()[2].to_string()).collect();
        assert_eq!(sources, ["all", "wikipedia", "a, \"b\""]);
    }

    #[test]
    fn a_damaged_line_is_named_and_nothing_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1..=3);
        let path = dir.path().join(JSONL);
        let damaged = fs::read_to_string(&path).unwrap().replacen("\"step\":2", "\"step\":\"x\"", 1);
        fs::write(&path, &damaged).unwrap();
        let error = truncate_after(dir.path(), 3).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl, line 2"), "{error}");
        assert!(read(dir.path()).unwrap_err().to_string().contains("line 2"));
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }
}
