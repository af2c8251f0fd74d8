//! Elleci held against LibTorch: the specification written once more in `tch`, with LibTorch's autograd for every
//! gradient, and the measure by which the two are compared.
//!
//! Building this crate needs LibTorch: `LIBTORCH=$(scripts/libtorch.sh) cargo test --release -p elleci-tests`.

pub mod arbitrary;
pub mod compare;
pub mod core_run;
pub mod ops;
pub mod oracle;
pub mod train;
pub mod vjp;
