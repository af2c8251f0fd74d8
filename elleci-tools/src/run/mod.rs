//! `elleci-run`: a model at work.

pub mod answer;
pub mod bench;
pub mod chat;
pub mod cli;
pub mod generate;
pub(crate) mod interrupt;
pub mod logits;
pub mod logprob;
pub mod model;
pub mod text;

#[cfg(feature = "serve")]
use crate::serve;

/// Runs what the command line asks for.
///
/// # Errors
/// Whatever the verb reports.
pub fn run(cli: &cli::Cli) -> anyhow::Result<()> {
    match &cli.command {
        cli::Command::Generate(args) => generate::run(args),
        cli::Command::Chat(args) => chat::run(args),
        cli::Command::Bench(args) => bench::run(args),
        cli::Command::Logits(args) => logits::run(args),
        #[cfg(feature = "serve")]
        cli::Command::Serve(args) => serve::run(args),
    }
}
