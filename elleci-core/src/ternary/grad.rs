//! The straight-through gradients: `dx = (γ·W₃)ᵀ · dy` and `dW = dyᵀ · (q · scale)`.

use alloc::vec::Vec;

use super::kernel::{DEPTH, LINES, ROWS};
use super::matrix::TernaryMatrix;
use crate::ops::matmul::{Out, mat, mat_mut, matmul};
use crate::{par, simd};

/// Rows of activations that are widened by one task.
const WIDEN_ROWS: usize = 64;

impl TernaryMatrix {
    /// `dx` `[tokens, in]` `(=|+=) dy` `[tokens, out]` `· (γ·W₃)`. `scratch` is overwritten.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn input_grad(&self, dy: &[f32], tokens: usize, dx: &mut [f32], out: Out, scratch: &mut Vec<f32>) {
        let (rows, cols) = (self.out_dim(), self.in_dim());
        scratch.resize(rows * cols, 0.0);
        let items: Vec<_> = scratch.chunks_mut((ROWS * cols).max(1)).enumerate().collect();
        let gamma = self.gamma();
        par::for_each(items, |(p, wide)| {
            for (r, wide) in wide.chunks_mut(cols).enumerate() {
                for (group, wide) in self.panel(p, 0).chunks(LINES).zip(wide.chunks_mut(DEPTH)) {
                    for (wide, code) in wide.iter_mut().zip(&group[r / 16].0[r % 16 * DEPTH..]) {
                        *wide = (*code as i32 - 1) as f32 * gamma;
                    }
                }
            }
        });
        matmul(mat(dy, tokens, rows), mat(scratch, rows, cols), mat_mut(dx, tokens, cols), out);
    }
}

/// `dw` `[out, in]` `(=|+=) dyᵀ · (q · scale)`, with `dy` `[tokens, out]`, `q` `[tokens, in]`, `scales` `[tokens]`.
/// `scratch` is overwritten.
///
/// # Panics
/// When a slice does not have its size.
#[expect(clippy::too_many_arguments, reason = "three sizes and five buffers: a struct would only rename them")]
pub fn weight_grad(
    dy: &[f32],
    q: &[i8],
    scales: &[f32],
    tokens: usize,
    out_dim: usize,
    in_dim: usize,
    dw: &mut [f32],
    out: Out,
    scratch: &mut Vec<f32>,
) {
    assert!(q.len() == tokens * in_dim && scales.len() == tokens, "activations of {tokens} x {in_dim}");
    scratch.resize(tokens * in_dim, 0.0);
    let chunk = (WIDEN_ROWS * in_dim).max(1);
    let items: Vec<_> = scratch.chunks_mut(chunk).zip(q.chunks(chunk)).zip(scales.chunks(WIDEN_ROWS)).collect();
    par::for_each(items, |((wide, q), scales)| {
        simd::vectorize(|| {
            for ((wide, q), scale) in wide.chunks_mut(in_dim).zip(q.chunks(in_dim)).zip(scales) {
                for (wide, q) in wide.iter_mut().zip(q) {
                    *wide = *q as f32 * scale;
                }
            }
        });
    });
    matmul(mat(dy, tokens, out_dim).reversed_axes(), mat(scratch, tokens, in_dim), mat_mut(dw, out_dim, in_dim), out);
}
