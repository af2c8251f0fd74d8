//! `elleci-data`: corpora to token shards.

use clap::Parser;
use elleci_tools::data::cli::{Cli, run};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("elleci-data: {error:#}");
            ExitCode::FAILURE
        }
    }
}
