//! Getting corpora.

pub mod demo;
mod fortune;
mod html;
#[cfg(feature = "hub")]
pub mod hub;
pub mod language;
mod roff;
