//! Getting corpora.

pub mod demo;
#[cfg(feature = "hub")]
pub mod eval;
mod fortune;
mod html;
#[cfg(feature = "hub")]
pub mod hub;
pub mod language;
mod roff;
