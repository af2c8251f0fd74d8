//! The ternary projection (BitNet b1.58): quantisers and integer products.
