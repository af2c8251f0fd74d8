//! `elleci-train`: trains an Elleci model.

use std::process::ExitCode;

use clap::Parser;
use elleci_tools::exit::finish;
use elleci_tools::train::cli::{Cli, Command};
use elleci_tools::train::{session, step};

fn main() -> ExitCode {
    let cli = Cli::parse();
    finish(match &cli.command {
        Some(Command::Step(args)) => step::run(args),
        None => session::run(&cli.train),
    })
}
