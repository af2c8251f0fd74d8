//! The trainer: one straight loop over a [`Backend`] and a [`Feed`].

pub mod backend;
pub mod batches;
pub mod bundled;
pub mod cli;
pub mod config;
pub mod cuda;
pub mod device;
pub mod dry_run;
pub mod eval;
pub mod layers;
pub mod log;
pub mod plan;
pub mod record;
mod run;
pub mod samples;
pub mod session;
pub mod step;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::ensure;

use crate::checkpoint::Store;
use crate::exit::Interrupted;
use crate::report::{Peak, StepRecord};
use backend::{Backend, StepEnd};
use batches::{Feed, StepData};
use config::RunConfig;
use log::Log;
use plan::Plan;
use record::Recorder;
use samples::Text;

/// Where a run stands, apart from tensors and data.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Steps skipped because loss or norm was not finite.
    pub skipped: u64,
    /// Seconds of training.
    pub seconds: f64,
}

/// A run with everything that it works on.
pub struct Run<'a> {
    /// The effective configuration.
    pub config: RunConfig,
    /// Its schedules.
    pub plan: Plan,
    /// Where the model lives.
    pub backend: Box<dyn Backend + 'a>,
    /// Where steps come from.
    pub feed: Box<dyn Feed + 'a>,
    /// The tokenizer, where it is known: samples need it.
    pub text: Option<Box<dyn Text + 'a>>,
    /// Where checkpoints go; `None` in a dry run.
    pub store: Option<Store>,
    /// Where numbers go.
    pub log: Log,
    /// Writes every micro-batch, where asked for.
    pub recorder: Option<Recorder>,
    /// Where the run stands.
    pub progress: Progress,
    /// The machine's measured peak, where it is known.
    pub peak: Option<Peak>,
    /// The machine, for the page of the run: (what, value).
    pub machine: Vec<(String, String)>,
    /// Set by a signal: the step that runs is the last.
    pub stop: &'a AtomicBool,
    /// The data of the next step, read while the device works on this one.
    pub ahead: Option<Ahead>,
}

/// Data that has been read and not been trained on.
pub struct Ahead {
    data: anyhow::Result<StepData>,
    /// Where the feed stood before it was read: where a checkpoint goes on.
    cursor: serde_json::Value,
}

/// Steps in a row that may come to nothing; clipping and a spike explain one, not so many.
const SKIPS: u64 = 10;

/// What a call of [`Run::train`] did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Every step's loss, as logged.
    pub losses: Vec<f64>,
    /// Seconds of every step.
    pub seconds: Vec<f64>,
}

impl Run<'_> {
    /// Trains from where the run stands until step `until`, then saves.
    ///
    /// # Errors
    /// A fault of data, device or disk; [`Interrupted`], after saving, when `stop` was set.
    pub fn train(&mut self, until: u64) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut in_a_row = 0;
        while self.progress.step < until {
            let started = Instant::now();
            let step = self.plan.at(self.progress.step);

            let data = match self.ahead.take() {
                Some(ahead) => ahead.data?,
                None => self.feed.next(step.shape, step.weights)?,
            };
            if let Some(recorder) = &mut self.recorder {
                recorder.write(self.progress.step, &data, &step.rates)?;
            }

            let scale = (1.0 / data.weight) as f32;
            for micro in &data.micro {
                self.backend.accumulate(&micro.view(), scale)?;
            }
            let end = StepEnd { weight: data.weight, clip: self.config.training.clip };
            self.backend.update(&step.rates, end)?;
            if step.averages {
                self.backend.average()?;
            }
            if self.progress.step + 1 < until {
                let (cursor, next) = (self.feed.cursor()?, self.plan.at(self.progress.step + 1));
                self.ahead = Some(Ahead { data: self.feed.next(next.shape, next.weights), cursor });
            }
            let came = self.backend.outcome()?;
            self.progress.skipped += u64::from(!came.updated);
            in_a_row = if came.updated { 0 } else { in_a_row + 1 };

            let seconds = started.elapsed().as_secs_f64();
            let rate = data.tokens as f64 / seconds;
            let record = StepRecord {
                step: self.progress.step + 1,
                tokens: self.progress.tokens + data.tokens,
                loss: came.loss,
                lr: step.rates.lr,
                grad_norm: came.grad_norm,
                phase: step.phase + 1,
                seq_len: step.shape.seq_len,
                skipped: self.progress.skipped,
                ms: seconds * 1e3,
                tokens_per_s: rate,
                mfu: self.utilisation(step.shape.seq_len, rate),
            };
            self.progress.step += 1;
            self.progress.tokens += data.tokens;
            self.progress.seconds += seconds;
            self.log.step(&record)?;
            outcome.losses.push(record.loss);
            outcome.seconds.push(seconds);

            // Without a checkpoint: those from before must not give way to one of this.
            ensure!(in_a_row < SKIPS, self.diverged());

            let stop = self.stop.load(Ordering::Relaxed);
            let last = self.progress.step == until;
            let due = |interval: u64| !stop && (last || (interval > 0 && self.progress.step.is_multiple_of(interval)));
            let training = &self.config.training;
            let (eval, sample) = (due(training.eval_interval), due(training.sample_interval));
            let save = stop || due(training.save_interval);
            if eval {
                self.evaluate("val")?;
            }
            if sample {
                self.sample()?;
            }
            if save {
                self.save()?;
            }
            if stop && !last {
                return Err(anyhow::Error::new(Interrupted(self.stopped())));
            }
        }
        Ok(outcome)
    }
}
