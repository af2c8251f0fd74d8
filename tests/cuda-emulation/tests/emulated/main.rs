//! Every kernel, and whole training steps, on the emulated device against `elleci-core`.

mod faults;
mod forms;
mod kernels;
mod machine;
mod step;
mod training;
