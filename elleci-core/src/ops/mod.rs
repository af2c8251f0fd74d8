//! The operations of the model. Each has a readable scalar definition; the fast path is held against it.

pub mod activation;
pub mod attention;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod avx512;
pub mod conv;
pub mod head;
pub(crate) mod lanes;
pub mod loss;
pub mod matmul;
pub mod norm;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod packed;
pub mod rope;
pub mod rows;
pub mod ssd;
pub(crate) mod transpose;
