//! `elleci-data`: corpora to token shards.

use std::process::ExitCode;

use clap::Parser;
use elleci_tools::data::cli::{Cli, run};
use elleci_tools::exit::finish;

fn main() -> ExitCode {
    finish(run(Cli::parse()))
}
