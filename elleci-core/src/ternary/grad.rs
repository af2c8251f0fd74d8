//! The straight-through gradients: `dx = (γ·W₃)ᵀ · dy` and `dW = dyᵀ · (q · scale)`.
//!
//! In float32 ([`GradPrecision::Float32`]) both are products with one narrow operand. Where the packed product runs, the
//! narrow operand is widened panel by panel as it is packed; elsewhere it is widened as a whole, into the caller's scratch.
//! In int16 ([`GradPrecision::Int16`]) they are integer products: see `int16`.

use alloc::vec::Vec;

use super::int16::{Activations, Int16Scratch};
use super::kernel::{DEPTH, LINES, ROWS};
use super::matrix::TernaryMatrix;
use crate::ops::matmul::{Out, mat, mat_mut, matmul};
#[cfg(all(feature = "std", target_arch = "x86_64"))]
use crate::ops::{
    avx512::{Avx512, Row, WIDTH},
    packed::{self, Operand},
};
use crate::{par, simd};

/// Rows of activations that are widened by one task.
const WIDEN_ROWS: usize = 64;
/// Tokens from which the packed product pays: widening first costs more than packing for few.
#[cfg(all(feature = "std", target_arch = "x86_64"))]
const PACKED_ROWS: usize = 16;

/// The form in which the incoming gradient of a ternary projection enters its two products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GradPrecision {
    /// As it is.
    #[default]
    Float32,
    /// Rounded to int16: a token at a time for `dx`, an output channel of at most 512 tokens at a time for `dW`. An element
    /// is off by at most 1/65,534 of the largest of that token or channel; twice as fast with AVX-512 VNNI. The other
    /// operand is one of exact integers in either case.
    Int16,
}

/// How gradients of projections are computed, and the buffers of that, grown on use.
#[derive(Debug, Default)]
pub struct GradScratch {
    precision: GradPrecision,
    /// Float expansion of the operand that is not a float
    expand: Vec<f32>,
    pub(super) int16: Int16Scratch,
}

impl GradScratch {
    /// Empty buffers.
    pub fn new(precision: GradPrecision) -> GradScratch {
        GradScratch { precision, ..GradScratch::default() }
    }

    /// Bytes after the gradients of projections `[out, in]` of `tokens`.
    pub fn planned_bytes(
        precision: GradPrecision,
        tokens: usize,
        shapes: impl Iterator<Item = (usize, usize)>,
    ) -> usize {
        match precision {
            GradPrecision::Float32 => {
                4 * shapes.map(|(out, input)| (out * input).max(tokens * input)).max().unwrap_or(0)
            }
            GradPrecision::Int16 => Int16Scratch::planned_bytes(tokens, shapes),
        }
    }
}

impl TernaryMatrix {
    /// Both gradients of the projection: `dx` `[tokens, in]` `(=|+=) dy` `[tokens, out]` `· (γ·W₃)`, and `dw` `[out, in]`
    /// `+= dyᵀ · x`.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn gradients(
        &self,
        dy: &[f32],
        x: Activations,
        (dx, out): (&mut [f32], Out),
        dw: &mut [f32],
        scratch: &mut GradScratch,
    ) {
        match scratch.precision {
            GradPrecision::Float32 => {
                let tokens = x.scales.len();
                let (rows, cols) = (self.out_dim(), self.in_dim());
                self.input_grad(dy, tokens, dx, out, &mut scratch.expand);
                weight_grad(dy, x.codes, x.scales, tokens, rows, cols, dw, Out::Add, &mut scratch.expand);
            }
            GradPrecision::Int16 => self.gradients_int16(dy, x, (dx, out), dw, &mut scratch.int16),
        }
    }

    /// `dx` `[tokens, in]` `(=|+=) dy` `[tokens, out]` `· (γ·W₃)`. `scratch` may be overwritten.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn input_grad(&self, dy: &[f32], tokens: usize, dx: &mut [f32], out: Out, scratch: &mut Vec<f32>) {
        let (rows, cols) = (self.out_dim(), self.in_dim());
        let (dy, dx) = (mat(dy, tokens, rows), mat_mut(dx, tokens, cols));
        #[cfg(all(feature = "std", target_arch = "x86_64"))]
        if tokens >= PACKED_ROWS
            && let Some(kernel) = Avx512::detect()
        {
            return packed::multiply(kernel, dy, self, dx, out);
        }
        self.widen(scratch);
        matmul(dy, mat(scratch, rows, cols), dx, out);
    }

    /// `γ·W₃` `[out, in]`.
    fn widen(&self, wide: &mut Vec<f32>) {
        let (rows, cols) = (self.out_dim(), self.in_dim());
        wide.resize(rows * cols, 0.0);
        let items: Vec<_> = wide.chunks_mut((ROWS * cols).max(1)).enumerate().collect();
        par::for_each(items, |(p, wide)| {
            for (r, wide) in wide.chunks_mut(cols).enumerate() {
                for (group, wide) in self.panel(p, 0).chunks(LINES).zip(wide.chunks_mut(DEPTH)) {
                    for (wide, code) in wide.iter_mut().zip(&group[r / 16].0[r % 16 * DEPTH..]) {
                        *wide = (*code as i32 - 1) as f32 * self.gamma();
                    }
                }
            }
        });
    }
}

/// `γ·W₃` as the right-hand side: its rows are the output rows of the matrix.
#[cfg(all(feature = "std", target_arch = "x86_64"))]
impl Operand for TernaryMatrix {
    fn dim(&self) -> (usize, usize) {
        (self.out_dim(), self.in_dim())
    }

    #[inline(always)]
    fn pack(&self, _: Avx512, rows: core::ops::Range<usize>, col: usize, panel: &mut [Row]) {
        let cols = (self.in_dim() - col).min(WIDTH);
        for (row, out) in rows.zip(panel) {
            let groups = self.panel(row / ROWS, col / DEPTH).chunks(LINES);
            for (group, out) in groups.zip(out.0.as_chunks_mut::<DEPTH>().0) {
                let codes: [u8; DEPTH] = group[row % ROWS / 16].0.as_chunks().0[row % 16];
                *out = codes.map(|code| (code as i32 - 1) as f32 * self.gamma());
            }
            // The padding of the codes would be -1.
            out.0[cols..].fill(0.0);
        }
    }
}

/// `q · scale` `[tokens, in]`.
struct Tokens<'a> {
    q: &'a [i8],
    scales: &'a [f32],
    in_dim: usize,
}

#[cfg(all(feature = "std", target_arch = "x86_64"))]
impl Operand for Tokens<'_> {
    fn dim(&self) -> (usize, usize) {
        (self.scales.len(), self.in_dim)
    }

    #[inline(always)]
    fn pack(&self, _: Avx512, rows: core::ops::Range<usize>, col: usize, panel: &mut [Row]) {
        for (t, out) in rows.zip(panel) {
            let q = &self.q[t * self.in_dim..][..self.in_dim][col..];
            match q.first_chunk::<WIDTH>() {
                Some(q) => out.0 = q.map(|q| q as f32 * self.scales[t]),
                None => {
                    out.0[q.len()..].fill(0.0);
                    out.0.iter_mut().zip(q).for_each(|(out, q)| *out = *q as f32 * self.scales[t]);
                }
            }
        }
    }
}

impl Tokens<'_> {
    fn widen(&self, wide: &mut Vec<f32>) {
        let in_dim = self.in_dim;
        wide.resize(self.q.len(), 0.0);
        let chunk = (WIDEN_ROWS * in_dim).max(1);
        let items: Vec<_> =
            wide.chunks_mut(chunk).zip(self.q.chunks(chunk)).zip(self.scales.chunks(WIDEN_ROWS)).collect();
        par::for_each(items, |((wide, q), scales)| {
            simd::vectorize(
                #[inline(always)]
                || {
                    for ((wide, q), scale) in wide.chunks_mut(in_dim).zip(q.chunks(in_dim)).zip(scales) {
                        for (wide, q) in wide.iter_mut().zip(q) {
                            *wide = *q as f32 * scale;
                        }
                    }
                },
            );
        });
    }
}

/// `dw` `[out, in]` `(=|+=) dyᵀ · (q · scale)`, with `dy` `[tokens, out]`, `q` `[tokens, in]`, `scales` `[tokens]`.
/// `scratch` may be overwritten.
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
    let (dy, dw) = (mat(dy, tokens, out_dim).reversed_axes(), mat_mut(dw, out_dim, in_dim));
    let activations = Tokens { q, scales, in_dim };
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if packed::pays(&dy, false, in_dim)
        && let Some(kernel) = Avx512::detect()
    {
        return packed::multiply(kernel, dy, &activations, dw, out);
    }
    activations.widen(scratch);
    matmul(dy, mat(scratch, tokens, in_dim), dw, out);
}
