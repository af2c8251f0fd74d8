//! `elleci-eval`: evaluates an Elleci model.

use std::process::ExitCode;

use clap::Parser;
use elleci_tools::eval;
use elleci_tools::exit::finish;

fn main() -> ExitCode {
    finish(eval::run(&eval::cli::Cli::parse()))
}
