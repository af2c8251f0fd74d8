//! Optimiser states, schedules and averages: everything between a gradient and the next weights.
//!
//! The order of a step: [`norm::global_norm`] (a step whose norm is not finite is skipped by the caller),
//! [`norm::clip_factor`], the rates of [`schedule`], [`AdamW::step`](adamw::AdamW::step), [`Swa::update`](swa::Swa::update).
//! Nothing here allocates per element, and all of it gives the same bits at every thread count.

pub mod adamw;
pub mod blockwise8;
pub mod norm;
pub mod schedule;
pub mod state;
pub mod swa;

pub use adamw::{AdamW, AdamWConfig, StatePrecision, StepRates, state_bytes};
pub use state::{StateData, StateError, StateTensor, StateType};
