//! How far an evaluation is: a bar where a person watches, else a line now and then.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::report::format::duration;

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(15);

/// Shows the share of the work that is done and the time that is left.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    start: Instant,
    told: Instant,
}

impl Progress {
    /// Of `total` units of work.
    pub fn new(total: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{bar:20.cyan/blue} {percent:>3}% | {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
            bar
        });
        let now = Instant::now();
        Progress { bar, total, done: 0, start: now, told: now }
    }

    /// So much of the work was done by an earlier run: it says nothing about the time that is left.
    pub fn skip(&mut self, units: u64) {
        self.total -= units.min(self.total - self.done);
        if let Some(bar) = &self.bar {
            bar.set_length(self.total);
        }
    }

    /// Some more is done, of the task `name`, which has answered `items` of `of`.
    pub fn step(&mut self, units: u64, name: &str, items: usize, of: usize) {
        self.done += units;
        let elapsed = self.start.elapsed().as_secs_f64();
        let left = if self.done > 0 {
            elapsed * self.total.saturating_sub(self.done) as f64 / self.done as f64
        } else {
            f64::NAN
        };
        let message = format!("{name} {items}/{of} | eta {}", duration(left));
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(message);
            }
            None if self.told.elapsed() >= INTERVAL => {
                self.told = Instant::now();
                let percent = 100.0 * self.done as f64 / self.total.max(1) as f64;
                self.note(&format!("{percent:3.0}% | {message}"));
            }
            None => {}
        }
    }

    /// A line above the bar. A run goes on when nobody reads it any more.
    pub fn note(&self, text: &str) {
        let print = || _ = writeln!(std::io::stderr(), "{text}");
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
