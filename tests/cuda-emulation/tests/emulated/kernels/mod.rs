//! Every kernel against the core's own operation, or against a plain sum where the core's is not by itself.
//!
//! Bounds. `F32`: both sides round each of n additions by at most 2^-24 relative, so sums differ by about √n · 2^-24 of their
//! norm; n <= 600 in these shapes, and chains of two or three such sums stay below 2e-6. `BF16`: operands are rounded to 8
//! bits, an error of up to 2^-9 each (uniform: 2^-9/√3 rms); a product of two has 2^-9 · √(2/3) = 1.6e-3 rms and sums
//! keep that relative size. Chains of k products add up to √k times that; 1e-2 allows for six, and for cancellation.

mod attention;
mod elementwise;
mod optim;
mod products;
mod scan;
mod stream;

pub const F32: f64 = 2e-6;
pub const BF16: f64 = 1e-2;
