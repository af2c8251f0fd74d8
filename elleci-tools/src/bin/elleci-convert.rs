//! `elleci-convert`: models from every form to every form that can be written.

use std::process::ExitCode;

use clap::Parser;
use elleci_tools::convert::{self, cli::Cli};
use elleci_tools::exit::finish;

fn main() -> ExitCode {
    finish(convert::run(&Cli::parse()))
}
