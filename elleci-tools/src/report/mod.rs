//! What a training run writes for people: metrics, TensorBoard events, plots, one page, and a line or bar of progress.
//!
//! Nothing here knows the trainer: it is given [`StepRecord`]s and [`EvalRecord`]s.

pub mod events;
pub mod format;
pub mod machine;
pub mod metrics;
pub mod page;
pub mod peak;
pub mod plot;
pub mod progress;
pub mod run;

pub use events::EventWriter;
pub use metrics::{EvalRecord, Metrics, Record, Sample, SourceEval, StepRecord};
pub use page::Page;
pub use peak::Peak;
pub use plot::Plot;
pub use progress::{Goal, Progress};
pub use run::{RunFacts, write_report};
