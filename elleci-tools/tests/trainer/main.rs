//! `elleci-train` as a whole binary.

mod cli;
#[cfg(unix)]
mod faults;
mod scene;
