//! What a run leaves to read: metrics, TensorBoard events, samples, one page; and progress on standard error.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::config::RunConfig;
use super::eval::Evaluation;
use crate::checkpoint::write_atomic;
use crate::report::events::wall_time;
use crate::report::format::{duration, thousands};
use crate::report::metrics::{read, truncate_after};
use crate::report::progress::Goal;
use crate::report::{EvalRecord, EventWriter, Metrics, Page, Plot, Progress, Record, Sample, SourceEval, StepRecord};

/// Without a terminal, every so many steps are a line.
const LOG_EVERY: u64 = 10;
const SAMPLES: &str = "samples.jsonl";

/// The log files of a run directory, and standard error.
pub struct Log {
    files: Option<Files>,
    progress: Option<Progress>,
}

struct Files {
    dir: PathBuf,
    metrics: Metrics,
    events: EventWriter,
    samples: File,
}

impl Log {
    /// Standard error only; nothing at all without a goal.
    pub fn to_stderr(goal: Option<Goal>) -> Log {
        Log { files: None, progress: goal.map(|goal| Progress::new(goal, 0, 1)) }
    }

    /// Opens the logs of a run. What they say about steps after `made` is dropped: those steps will be made again.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn open(dir: &Path, goal: Option<Goal>, made: u64) -> anyhow::Result<Log> {
        truncate_after(dir, made)?;
        let path = dir.join(SAMPLES);
        keep_until(&path, made)?;
        let samples = File::options().create(true).append(true).open(&path);
        let files = Files {
            metrics: Metrics::open(dir)?,
            events: EventWriter::create(dir, (made > 0).then_some(made + 1))?,
            samples: samples.with_context(|| format!("opening {}", path.display()))?,
            dir: dir.to_path_buf(),
        };
        Ok(Log { files: Some(files), progress: goal.map(|goal| Progress::new(goal, made, LOG_EVERY)) })
    }

    /// A line to read, on standard error.
    pub fn note(&self, text: &str) {
        if let Some(progress) = &self.progress {
            progress.note(text);
        }
    }

    /// Leaves the progress bar as it is.
    pub fn finish(&self) {
        if let Some(progress) = &self.progress {
            progress.finish();
        }
    }

    /// Logs a step.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn step(&mut self, r: &StepRecord) -> anyhow::Result<()> {
        if let Some(Files { metrics, events, .. }) = &mut self.files {
            metrics.step(r)?;
            let now = wall_time();
            let values = [
                ("train/loss", r.loss),
                ("train/lr", r.lr),
                ("train/grad_norm", r.grad_norm),
                ("train/tok_per_sec", r.tokens_per_s),
                ("train/mfu", r.mfu),
                ("train/dt", r.ms / 1e3),
                ("train/seq_len", r.seq_len as f64),
                ("train/skipped", r.skipped as f64),
            ];
            for (tag, value) in values {
                events.scalar(tag, r.step, value, now)?;
            }
        }
        if !(r.loss.is_finite() && r.grad_norm.is_finite()) {
            self.note(&format!("step {} skipped: loss {}, gradient norm {}", r.step, r.loss, r.grad_norm));
        }
        if let Some(progress) = &mut self.progress {
            progress.step(r);
        }
        Ok(())
    }

    /// Logs an evaluation. `prefix` is `val`, or `swa` for that of the averaged weights, which is no part of the curve.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn evaluation(&mut self, (step, tokens): (u64, u64), prefix: &str, e: &Evaluation) -> anyhow::Result<()> {
        let source = |s: &super::eval::Score| SourceEval { name: s.source.clone(), loss: s.loss(), bpb: s.bpb() };
        let sources: Vec<SourceEval> = e.scores.iter().map(source).collect();
        let parts: Vec<String> = sources.iter().map(|s| format!("{} {:.4}", s.name, s.bpb)).collect();
        self.note(&format!("{prefix}: {:.4} bits per byte ({}), loss {:.4}", e.bpb, parts.join(", "), e.loss));
        let Some(Files { metrics, events, .. }) = &mut self.files else { return Ok(()) };
        let now = wall_time();
        events.scalar(&format!("{prefix}/loss"), step, e.loss, now)?;
        events.scalar(&format!("{prefix}/bpb"), step, e.bpb, now)?;
        for s in &sources {
            events.scalar(&format!("{prefix}/bpb_{}", s.name), step, s.bpb, now)?;
        }
        if prefix == "val" {
            metrics.eval(&EvalRecord { step, tokens, loss: e.loss, bpb: e.bpb, sources })?;
        }
        Ok(())
    }

    /// Logs a sample.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn sample(&mut self, step: u64, prompt: &str, text: &str) -> anyhow::Result<()> {
        self.note(&format!("sample: {}", text.replace('\n', " ")));
        let Some(Files { samples, events, .. }) = &mut self.files else { return Ok(()) };
        let line = json!({ "step": step, "prompt": prompt, "text": text });
        samples.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("writing {SAMPLES}"))?;
        events.text("samples", step, &format!("**{prompt}**\n\n{text}"), wall_time())
    }

    /// Writes `report.html` and `loss.svg` from the logs. `machine`: (what, value).
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn page(&self, config: &RunConfig, machine: &[(String, String)], finished: bool) -> anyhow::Result<()> {
        let Some(Files { dir, .. }) = &self.files else { return Ok(()) };
        let records = read(dir)?;
        let title = dir.file_name().and_then(|n| n.to_str()).unwrap_or("run").to_string();
        let plot = Plot::loss(&title, &records).svg();
        write_text(&dir.join("loss.svg"), &plot)?;
        let evals: Vec<EvalRecord> = records.iter().filter_map(as_eval).collect();
        let steps: Vec<&StepRecord> = records.iter().filter_map(as_step).collect();
        let seconds: f64 = steps.iter().map(|s| s.ms / 1e3).sum();
        let mut figures = Vec::new();
        let mut figure = |what: &str, value: String| figures.push((what.to_string(), value));
        if let Some(last) = steps.last() {
            figure("Steps", format!("{} of {}", thousands(last.step), thousands(config.training.steps)));
            figure("Tokens", thousands(last.tokens));
            figure("Loss", format!("{:.3}", last.loss));
            figure("Time in steps", duration(seconds));
        }
        if let Some(eval) = evals.last() {
            figure("Bits per byte", format!("{:.4}", eval.bpb));
        }
        let plots = [plot, Plot::bits_per_byte("Held-out text", &records).svg(), Plot::health("Health", &records).svg()];
        let html = Page {
            title: &title,
            subtitle: if finished { "finished" } else { "in training" },
            figures: &figures,
            plots: &plots,
            evals: &evals,
            samples: &read_samples(&dir.join(SAMPLES))?,
            machine,
            config: &toml::to_string(config)?,
        }
        .html();
        write_text(&dir.join("report.html"), &html)
    }
}

fn as_step(record: &Record) -> Option<&StepRecord> {
    match record {
        Record::Step(step) => Some(step),
        Record::Eval(_) => None,
    }
}

fn as_eval(record: &Record) -> Option<EvalRecord> {
    match record {
        Record::Eval(eval) => Some(eval.clone()),
        Record::Step(_) => None,
    }
}

/// Loss of the first step, and mean loss of the last ten, as the metrics of a run directory have them.
pub fn first_and_last_loss(dir: &Path) -> Option<(f64, f64)> {
    let records = read(dir).ok()?;
    let losses: Vec<f64> = records.iter().filter_map(as_step).map(|s| s.loss).filter(|l| l.is_finite()).collect();
    let tail = &losses[losses.len().saturating_sub(10)..];
    Some((*losses.first()?, tail.iter().sum::<f64>() / tail.len() as f64))
}

fn read_samples(path: &Path) -> anyhow::Result<Vec<Sample>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let parse = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        let prompt = value["prompt"].as_str()?;
        let text = value["text"].as_str()?;
        let continued = text.strip_prefix(prompt).unwrap_or(text);
        Some(Sample { step: value["step"].as_u64()?, prompt: prompt.into(), text: continued.into() })
    };
    Ok(text.lines().filter_map(parse).collect())
}

/// Drops the samples after a step, and a half-written last line.
fn keep_until(path: &Path, step: u64) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let of = |line: &str| serde_json::from_str::<Value>(line).ok().and_then(|v| v["step"].as_u64());
    let kept: String =
        text.lines().filter(|l| of(l).is_some_and(|s| s <= step)).map(|l| format!("{l}\n")).collect();
    if kept == text { Ok(()) } else { write_text(path, &kept) }
}

/// Writes a small text file of the run directory, whole or not at all.
///
/// # Errors
/// Whatever the file system reports.
pub fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, |temporary| Ok(fs::write(temporary, text)?))
}
