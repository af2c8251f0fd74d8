//! The operations of the model. Each has a readable scalar definition; the fast path is held against it.
pub mod activation;
pub mod conv;
pub(crate) mod lanes;
pub mod matmul;
pub mod ssd;
