//! `elleci-run`: runs an Elleci model.

use std::process::ExitCode;

use clap::Parser;
use elleci_tools::exit::finish;
use elleci_tools::run;

fn main() -> ExitCode {
    finish(run::run(&run::cli::Cli::parse()))
}
