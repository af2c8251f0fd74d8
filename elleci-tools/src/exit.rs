//! How a tool ends: 0 done, 1 failed, 2 wrong usage or configuration, 130 stopped by the user. And how it speaks on the way: the standard
//! library's `println!` and `eprintln!` panic where nobody reads (`elleci-convert inspect X | head`) or nothing can be written.

use std::io::Write;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::{fmt, io};

/// What made a line of standard output get lost, if one was.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Writes to standard output. A reader that has gone away has seen what it wanted: the work goes on. Any other failure is reported by
/// [`finish`].
pub fn write(text: fmt::Arguments<'_>) {
    if let Err(error) = io::stdout().lock().write_fmt(text) {
        note(error);
    }
}

/// Writes to standard error, if that can be.
pub fn tell(text: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

fn note(error: io::Error) {
    if error.kind() != io::ErrorKind::BrokenPipe {
        LOST.get_or_init(|| error);
    }
}

/// `print!` by [`write`].
macro_rules! out {
    ($($text:tt)*) => { $crate::exit::write(format_args!($($text)*)) };
}

/// `println!` by [`write`].
macro_rules! outln {
    () => { $crate::exit::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::exit::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// `eprint!` that does not panic: what is told on the way may get lost, the work goes on.
macro_rules! err {
    ($($text:tt)*) => { $crate::exit::tell(format_args!($($text)*)) };
}

/// `eprintln!` likewise.
macro_rules! errln {
    ($($text:tt)*) => { $crate::exit::tell(format_args!("{}\n", format_args!($($text)*))) };
}

pub(crate) use {err, errln, out, outln};

/// A mistake in the arguments or the configuration: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A run that Ctrl-C or a termination signal ended in good order: exit code 130.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// A [`Usage`] error as `anyhow` carries it.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(message.into()))
}

/// Turns the result of a tool into its exit code, with the chain of causes on standard error.
pub fn finish(result: anyhow::Result<()>) -> ExitCode {
    if let Err(error) = io::stdout().flush() {
        note(error);
    }
    let lost = || LOST.get().map(|e| io::Error::new(e.kind(), format!("standard output: {e}")).into());
    let Some(error) = result.err().or_else(lost) else { return ExitCode::SUCCESS };
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        errln!("{interrupted}");
        return ExitCode::from(130);
    }
    errln!("error: {error:#}{}", remedy(&error));
    ExitCode::from(if error.downcast_ref::<Usage>().is_some() { 2 } else { 1 })
}

/// What to do about an error that no tool can do anything about, for the end of its message.
fn remedy(error: &anyhow::Error) -> &'static str {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    for kind in kinds {
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                return "; free space there, then run the same command again";
            }
            io::ErrorKind::ReadOnlyFilesystem => return "; choose a place that can be written",
            _ => {}
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_full_disk_has_a_remedy_wherever_it_stands_in_the_chain() {
        let full = |kind| Err::<(), _>(io::Error::from(kind)).context("writing x").context("saving").unwrap_err();
        assert!(remedy(&full(io::ErrorKind::StorageFull)).contains("free space"));
        assert!(remedy(&full(io::ErrorKind::ReadOnlyFilesystem)).contains("can be written"));
        assert_eq!(remedy(&full(io::ErrorKind::NotFound)), "");
    }
}
