//! The operations of the model. Each has a readable scalar definition; the fast path is held against it.
pub mod matmul;

#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod avx512;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod packed;
