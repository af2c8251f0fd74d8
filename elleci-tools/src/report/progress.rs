//! Progress on standard error: a bar where a person watches, else a line every so many steps.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::{duration, sci, si};
use super::metrics::StepRecord;

/// How much the run has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goal {
    /// Optimiser steps of the run.
    pub steps: u64,
    /// Tokens of the run.
    pub tokens: u64,
}

/// Shows how far a run is.
pub struct Progress {
    bar: Option<ProgressBar>,
    goal: Goal,
    log_every: u64,
    speed: Option<f64>,
}

/// Share of the old speed that each step keeps: an estimate over about 20 steps.
const SPEED_KEEP: f64 = 0.95;

impl Progress {
    /// `made` steps are done already. Without a terminal, every `log_every`-th step is a line (0: none), and so are the first step that
    /// this process makes and the last.
    pub fn new(goal: Goal, made: u64, log_every: u64) -> Progress {
        Progress::to(goal, made, log_every, std::io::stderr().is_terminal())
    }

    fn to(goal: Goal, made: u64, log_every: u64, terminal: bool) -> Progress {
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(goal.steps), ProgressDrawTarget::stderr_with_hz(8));
            let style = ProgressStyle::with_template("{bar:12.cyan/blue} {pos}/{len} | {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
            bar.set_position(made);
            bar
        });
        Progress { bar, goal, log_every, speed: None }
    }

    /// Takes a step into account; returns the line that was printed, if one was.
    pub fn step(&mut self, record: &StepRecord) -> Option<String> {
        let first = self.speed.is_none();
        if record.tokens_per_s.is_finite() && record.tokens_per_s > 0.0 {
            let speed = self.speed.unwrap_or(record.tokens_per_s);
            self.speed = Some(speed * SPEED_KEEP + record.tokens_per_s * (1.0 - SPEED_KEEP));
        }
        let eta = self.eta(record);
        if let Some(bar) = &self.bar {
            bar.set_position(record.step);
            bar.set_message(message(record, eta));
            return None;
        }
        let text = line(record, self.goal, eta);
        let due = self.log_every > 0
            && (first || record.step.is_multiple_of(self.log_every) || record.step == self.goal.steps);
        due.then(|| {
            print(&text);
            text
        })
    }

    /// Seconds to the end at the present speed, by tokens: a curriculum's later steps are longer than its first.
    fn eta(&self, record: &StepRecord) -> f64 {
        let left = self.goal.tokens.saturating_sub(record.tokens) as f64;
        self.speed.map_or(f64::NAN, |speed| left / speed)
    }

    /// Prints a line above the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| print(text)),
            None => print(text),
        }
    }

    /// Leaves the bar as it is.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// A run goes on when nobody listens any more, where `eprintln` would panic.
fn print(text: &str) {
    _ = writeln!(std::io::stderr(), "{text}");
}

/// `step 120/1000 | loss 4.321 | lr 1.5e-3 | norm 0.82 | 412 ms | 4.97k tok/s | 38% MFU | eta 6m10s`
pub fn line(r: &StepRecord, goal: Goal, eta_seconds: f64) -> String {
    let skipped = if r.skipped > 0 { format!(" | {} skipped", r.skipped) } else { String::new() };
    format!(
        "step {}/{} | loss {:.3} | lr {} | norm {:.2} | {} ms | {} tok/s{} | eta {}{skipped}",
        r.step,
        goal.steps,
        r.loss,
        sci(r.lr),
        r.grad_norm,
        si(r.ms),
        si(r.tokens_per_s),
        mfu(r),
        duration(eta_seconds),
    )
}

/// The share of the device's peak; nothing where no peak is known, as for a card.
fn mfu(r: &StepRecord) -> String {
    if r.mfu.is_finite() { format!(" | {:.0}% MFU", r.mfu * 100.0) } else { String::new() }
}

/// What stands beside the bar: the same, the most wanted first, because a terminal of 80 columns cuts the rest.
fn message(r: &StepRecord, eta_seconds: f64) -> String {
    format!(
        "loss {:.3} | {} tok/s{} | eta {} | lr {} | norm {:.2} | {} ms",
        r.loss,
        si(r.tokens_per_s),
        mfu(r),
        duration(eta_seconds),
        sci(r.lr),
        r.grad_norm,
        si(r.ms),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal = Goal { steps: 1000, tokens: 2_048_000 };

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            tokens: step * 2048,
            loss: 4.3211,
            lr: 1.5e-3,
            grad_norm: 0.8249,
            phase: 1,
            seq_len: 256,
            skipped: 0,
            ms: 412.3,
            tokens_per_s: 4967.2,
            mfu: 0.381,
        }
    }

    #[test]
    fn the_line_is_the_documented_one() {
        let want = "step 120/1000 | loss 4.321 | lr 1.5e-3 | norm 0.82 | 412 ms | 4.97k tok/s | 38% MFU | eta 6m10s";
        assert_eq!(line(&record(120), GOAL, 370.0), want);
        let beside_bar = message(&record(120), 370.0);
        assert!(beside_bar.starts_with("loss 4.321 | 4.97k tok/s | 38% MFU | eta 6m10s | lr 1.5e-3"), "{beside_bar}");
        let skipped = StepRecord { skipped: 2, loss: f64::NAN, ..record(120) };
        assert_eq!(line(&skipped, GOAL, f64::NAN).split(" | ").nth(1), Some("loss NaN"));
        assert!(line(&skipped, GOAL, f64::NAN).ends_with("eta ? | 2 skipped"));
    }

    #[test]
    fn without_a_terminal_the_first_the_last_and_every_nth_step_are_lines() {
        let printed = |log_every| {
            let mut progress = Progress::to(GOAL, 990, log_every, false);
            (991..=1000).filter(|&s| progress.step(&record(s)).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(printed(4), [991, 992, 996, 1000]);
        assert_eq!(printed(0), [0; 0]);
        let mut progress = Progress::to(GOAL, 0, 1, false);
        // (2,048,000 - 500 * 2048) / 4967.2 = 206.15 s
        assert!(progress.step(&record(500)).is_some_and(|l| l.ends_with("eta 3m26s")));
    }
}
