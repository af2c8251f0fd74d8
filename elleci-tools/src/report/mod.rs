//! What a training run writes for people: metrics, TensorBoard events, plots, one page, and a line or bar of progress.
//!
//! Nothing here knows the trainer: it is given [`StepRecord`]s and [`EvalRecord`]s.

pub mod events;
pub mod format;
pub mod metrics;
pub mod page;
pub mod peak;
pub mod plot;
pub mod progress;

pub use events::EventWriter;
pub use metrics::{EvalRecord, Metrics, Record, SourceEval, StepRecord};
pub use page::{Page, Sample};
pub use peak::Peak;
pub use plot::Plot;
pub use progress::Progress;
