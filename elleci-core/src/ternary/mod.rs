//! The ternary projection (BitNet b1.58): `Ternary(x; W) = (W₃ · q) · (γ · amax/127)`.
//!
//! `q` is the int8 form of a token ([`quantize_row`]), `W₃` the ternary form of a matrix ([`TernaryMatrix`]). Their
//! product is an integer, so every instruction set gives the same one; `portable` is the definition that the others
//! are held against, and `kernel::dispatch` the only place that chooses. The gradients are those of the
//! straight-through estimator: [`TernaryMatrix::gradients`].

mod grad;
pub(crate) mod int16;
mod kernel;
mod matrix;
pub mod packed;
mod portable;
mod quantize;

#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod vnni;

pub use grad::{GradPrecision, GradScratch, weight_grad};
pub use int16::Activations;
pub use matrix::TernaryMatrix;
pub use quantize::{absmean, quantize_row, quantize_row_reference, ternary_code};

#[cfg(test)]
mod tests;
