//! The trainer.
pub mod backend;
pub mod batches;
pub mod config;
pub mod layers;
pub mod plan;
