//! What a run leaves to read: `metrics.jsonl`, `samples.jsonl`, and a line on standard error.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::eval::Evaluation;
use crate::checkpoint::write_atomic;

/// One optimizer step, as logged.
#[derive(Clone, Debug)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Mean loss of the step's targets, in nats.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Scheduled learning rate.
    pub lr: f64,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Index of the phase.
    pub phase: usize,
    /// Tokens of this step.
    pub tokens: u64,
    /// Tokens of all steps so far.
    pub total_tokens: u64,
    /// Seconds of this step.
    pub seconds: f64,
    /// Share of the machine's measured peak, where it is known.
    pub mfu: Option<f64>,
    /// Whether the step was skipped because its numbers were not finite.
    pub skipped: bool,
}

/// The log files of a run directory; nothing but standard error without one.
pub struct Log {
    metrics: Option<File>,
    samples: Option<File>,
}

impl Log {
    /// Standard error only.
    pub fn to_stderr() -> Log {
        Log { metrics: None, samples: None }
    }

    /// Opens the logs of a run. Lines after step `resumed` are of steps that will be made again: they are dropped.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn open(dir: &Path, resumed: u64) -> anyhow::Result<Log> {
        let open = |name: &str| -> anyhow::Result<Option<File>> {
            let path = dir.join(name);
            keep_until(&path, resumed)?;
            let file = File::options().create(true).append(true).open(&path);
            Ok(Some(file.with_context(|| format!("opening {}", path.display()))?))
        };
        Ok(Log { metrics: open("metrics.jsonl")?, samples: open("samples.jsonl")? })
    }

    /// A line to read, on standard error.
    pub fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }

    /// Logs a step.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn step(&mut self, r: &StepRecord) -> anyhow::Result<()> {
        let rate = r.tokens as f64 / r.seconds;
        append(
            &mut self.metrics,
            json!({
                "step": r.step, "train/loss": r.loss, "train/grad_norm": r.grad_norm, "train/lr": r.lr,
                "train/seq": r.seq, "train/phase": r.phase + 1, "train/tokens": r.total_tokens,
                "train/dt": r.seconds, "train/tok_per_sec": rate, "train/mfu": r.mfu, "train/skipped": r.skipped,
            }),
        )?;
        let skipped = if r.skipped { "  SKIPPED: not finite" } else { "" };
        self.note(&format!(
            "step {:>6}/{}  loss {:.4}  lr {:.2e}  norm {:.3}  {:.0} ms  {rate:.0} tok/s{skipped}",
            r.step,
            r.steps,
            r.loss,
            r.lr,
            r.grad_norm,
            r.seconds * 1e3,
        ));
        Ok(())
    }

    /// Logs an evaluation of the weights of `which`.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn evaluation(&mut self, step: u64, prefix: &str, e: &Evaluation) -> anyhow::Result<()> {
        let mut line = json!({ "step": step });
        line[format!("{prefix}/loss")] = json!(e.loss);
        line[format!("{prefix}/bpb")] = json!(e.bpb);
        for score in &e.scores {
            line[format!("{prefix}/bpb/{}", score.source)] = json!(score.bpb());
        }
        append(&mut self.metrics, line)?;
        let parts: Vec<String> = e.scores.iter().map(|s| format!("{} {:.4}", s.source, s.bpb())).collect();
        self.note(&format!("{prefix}: {:.4} bits per byte ({})", e.bpb, parts.join(", ")));
        Ok(())
    }

    /// Logs a sample.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn sample(&mut self, step: u64, prompt: &str, text: &str) -> anyhow::Result<()> {
        append(&mut self.samples, json!({ "step": step, "prompt": prompt, "text": text }))?;
        self.note(&format!("sample: {}", text.replace('\n', " ")));
        Ok(())
    }
}

/// One line in one write: a killed process leaves whole lines but for the last.
fn append(file: &mut Option<File>, line: Value) -> anyhow::Result<()> {
    match file {
        Some(file) => file.write_all(format!("{line}\n").as_bytes()).context("writing the logs of the run"),
        None => Ok(()),
    }
}

/// Drops the lines after a step, and a half-written last one.
fn keep_until(path: &PathBuf, step: u64) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let reader = BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?);
    write_atomic(path, |temporary| {
        let mut out = BufWriter::new(File::create(temporary)?);
        for line in reader.lines() {
            let line = line?;
            let of = serde_json::from_str::<Value>(&line).ok().and_then(|v| v["step"].as_u64());
            if of.is_some_and(|s| s <= step) {
                writeln!(out, "{line}")?;
            }
        }
        Ok(out.flush()?)
    })
}

/// Writes a small text file of the run directory, whole or not at all.
///
/// # Errors
/// Whatever the file system reports.
pub fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, |temporary| Ok(fs::write(temporary, text)?))
}
