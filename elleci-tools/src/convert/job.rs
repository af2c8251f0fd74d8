//! What every long operation has: a bar, and an end when the user asks for it.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::Interrupted;

/// A running conversion.
pub struct Job {
    bar: ProgressBar,
}

/// Set by Ctrl-C or a termination signal.
static STOP: AtomicBool = AtomicBool::new(false);

impl Job {
    /// Watches for signals. The bar is on standard error, if a person watches.
    ///
    /// # Errors
    /// When the signal handler cannot be installed.
    pub fn start() -> anyhow::Result<Job> {
        let handler = || {
            // The first asks for the end. What is between two looks at it may take long: one more does not wait.
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        };
        ctrlc::set_handler(handler).context("installing the signal handler")?;
        Ok(Job::quiet())
    }

    /// Makes a write past the limit on file sizes an error, as a full disk is, where it would end the process without a word and
    /// leave what is half-written. For threads that are started from now on too.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn outlive_size_limit() -> anyhow::Result<()> {
        #[cfg(unix)]
        {
            use nix::sys::signal::{SigSet, Signal};
            SigSet::from(Signal::SIGXFSZ).thread_block().context("holding back SIGXFSZ")?;
        }
        Ok(())
    }

    /// Without signals.
    pub fn quiet() -> Job {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr_with_hz(8),
            false => ProgressDrawTarget::hidden(),
        };
        Job { bar: ProgressBar::with_draw_target(None, target) }
    }

    /// Begins a part of the work that is `bytes` long.
    pub fn begin(&self, what: &str, bytes: u64) {
        let style = ProgressStyle::with_template(
            "{msg:10} {bar:24.cyan/blue} {bytes}/{total_bytes} | {bytes_per_sec} | {eta} left",
        );
        self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
        self.bar.set_message(what.to_string());
        self.bar.set_length(bytes);
        self.bar.reset();
    }

    /// More is done.
    ///
    /// # Errors
    /// [`Interrupted`] once the user has asked for the end.
    pub fn advance(&self, bytes: u64) -> anyhow::Result<()> {
        self.bar.inc(bytes);
        self.check()
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Interrupted`] once the user has asked for the end.
    pub fn check(&self) -> anyhow::Result<()> {
        if STOP.load(Ordering::Relaxed) {
            self.finish();
            return Err(anyhow::Error::new(Interrupted("stopped; nothing was written".into())));
        }
        Ok(())
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
