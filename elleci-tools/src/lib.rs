//! The library behind Elleci's binaries: data preparation, the trainer, and the files they read and write.

pub mod report;
