//! What a run leaves to read: metrics, TensorBoard events, one page; and progress on standard error.

use std::fs;
use std::path::{Path, PathBuf};

use super::config::RunConfig;
use super::eval::{Evaluation, Score};
use crate::checkpoint::write_atomic;
use crate::report::events::wall_time;
use crate::report::metrics::{read, truncate_after};
use crate::report::{
    EvalRecord, EventWriter, Goal, Metrics, Progress, Record, RunFacts, Sample, SourceEval, StepRecord, write_report,
};

/// Without a terminal, every so many steps are a line.
const LOG_EVERY: u64 = 10;

/// The log files of a run directory, and standard error.
pub struct Log {
    files: Option<Files>,
    progress: Option<Progress>,
}

struct Files {
    dir: PathBuf,
    metrics: Metrics,
    events: EventWriter,
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
        let files = Files {
            metrics: Metrics::open(dir)?,
            events: EventWriter::create(dir, (made > 0).then_some(made + 1))?,
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
        let source = |s: &Score| SourceEval { name: s.source.clone(), loss: s.loss(), bpb: s.bpb() };
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

    /// Logs a sample: `text` begins with `prompt`.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn sample(&mut self, step: u64, prompt: &str, text: &str) -> anyhow::Result<()> {
        self.note(&format!("sample: {}", text.replace('\n', " ")));
        let Some(Files { metrics, events, .. }) = &mut self.files else { return Ok(()) };
        let continued = text.strip_prefix(prompt).unwrap_or(text);
        metrics.sample(&Sample { step, prompt: prompt.into(), text: continued.into() })?;
        events.text("samples", step, &format!("**{prompt}**{continued}"), wall_time())
    }

    /// Writes `report.html` and `loss.svg` from the metrics. `machine`: (what, value).
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn page(&self, config: &RunConfig, machine: &[(String, String)], finished: bool) -> anyhow::Result<()> {
        let Some(Files { dir, .. }) = &self.files else { return Ok(()) };
        let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or("run");
        let state = if finished { "finished" } else { "in training" };
        let subtitle = format!("preset {}, {state}", config.preset);
        let config = toml::to_string(config)?;
        write_report(dir, &RunFacts { title: name, subtitle: &subtitle, machine, config: &config })
    }
}

/// Loss of the first step, and mean loss of the last ten, as the metrics of a run directory have them.
pub fn first_and_last_loss(dir: &Path) -> Option<(f64, f64)> {
    let loss = |record: &Record| match record {
        Record::Step(step) => Some(step.loss).filter(|l| l.is_finite()),
        _ => None,
    };
    let losses: Vec<f64> = read(dir).ok()?.iter().filter_map(loss).collect();
    let tail = &losses[losses.len().saturating_sub(10)..];
    Some((*losses.first()?, tail.iter().sum::<f64>() / tail.len() as f64))
}

/// Writes a small text file of the run directory, whole or not at all.
///
/// # Errors
/// Whatever the file system reports.
pub fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, |temporary| Ok(fs::write(temporary, text)?))
}
