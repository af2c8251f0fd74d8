//! The operations of the model. Each has a readable scalar definition; the fast path is held against it.

pub mod activation;
pub mod attention;
pub mod conv;
pub(crate) mod lanes;
pub mod loss;
pub mod matmul;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod ssd;
