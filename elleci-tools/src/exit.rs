//! How a tool ends: 0 done, 1 failed, 2 wrong usage or configuration, 130 stopped by the user.

use std::fmt;
use std::process::ExitCode;

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
    let Err(error) = result else { return ExitCode::SUCCESS };
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        eprintln!("{interrupted}");
        return ExitCode::from(130);
    }
    eprintln!("error: {error:#}");
    ExitCode::from(if error.downcast_ref::<Usage>().is_some() { 2 } else { 1 })
}
