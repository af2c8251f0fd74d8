//! The library behind Elleci's binaries: data preparation, the trainer, and the files they read and write.

// These panic where nobody reads; see `exit`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod checkpoint;
pub mod convert;
pub mod data;
pub mod eval;
pub mod exit;
pub mod hf;
pub mod mapped;
pub mod pth;
pub mod report;
pub mod run;
#[cfg(feature = "serve")]
pub mod serve;
pub mod train;
