//! Getting corpora.

pub mod demo;
mod fortune;
mod html;
pub mod language;
mod roff;
