//! The loops of the backward pass between its products, with explicit vectors.

use pulp::{Simd, WithSimd};

use super::CHUNK;
use super::chunked::{triangle_mask, triangle_row};
use crate::ops::lanes::{dot, exp_nonpositive, vectors, vectors_mut};

/// One step, all heads of a span. Tables by head and step are `[heads, CHUNK]`; rows are `[channels]`.
pub(super) struct DyRow<'a> {
    pub(super) i: usize,
    pub(super) p_dim: usize,
    pub(super) entry: &'a [f32],
    pub(super) exit: &'a [f32],
    pub(super) dt: &'a [f32],
    pub(super) d: &'a [f32],
    pub(super) x: &'a [f32],
    pub(super) dy: &'a [f32],
    /// `B R`; none if R is zero.
    pub(super) br: Option<&'a [f32]>,
    /// Written: `e o dY`.
    pub(super) e_dy: &'a mut [f32],
    /// Written: `d dY + w dt o (B R)`.
    pub(super) dx: &'a mut [f32],
    /// Written: `<x, B R>`.
    pub(super) write: &'a mut [f32],
    /// Added to: `<dy, x>`, `[heads]`.
    pub(super) dd: &'a mut [f32],
}

impl WithSimd for DyRow<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for h in 0..self.d.len() {
            let (at, part) = (h * CHUNK + self.i, h * self.p_dim..(h + 1) * self.p_dim);
            let (x, dy) = (&self.x[part.clone()], &self.dy[part.clone()]);
            let (e_dy, dx) = (&mut self.e_dy[part.clone()], &mut self.dx[part.clone()]);
            let (e, d) = (self.entry[at], self.d[h]);
            self.dd[h] += dot(simd, dy, x);
            match self.br {
                Some(br) => {
                    let br = &br[part];
                    let scale = self.exit[at] * self.dt[at];
                    for ((e_dy, dx), (dy, br)) in e_dy.iter_mut().zip(dx).zip(dy.iter().zip(br)) {
                        *e_dy = e * dy;
                        *dx = d * dy + scale * br;
                    }
                    self.write[at] = dot(simd, x, br);
                }
                None => {
                    for ((e_dy, dx), dy) in e_dy.iter_mut().zip(dx).zip(dy) {
                        *e_dy = e * dy;
                        *dx = d * dy;
                    }
                    self.write[at] = 0.0;
                }
            }
        }
    }
}

/// One head inside a chunk; matrices are `[CHUNK, CHUNK]`.
///
/// The gradient of step i's exponent is the sum of `dM_kj M_kj` over the rectangle k >= i > j. Walking the rows
/// upwards, `inside` holds the column sums (without dt_j) of the rows seen so far, which is what a rectangle needs:
/// one vector addition and one dot product a row, and nothing subtracted.
pub(super) struct Inside<'a> {
    pub(super) len: usize,
    pub(super) cum: &'a [f32],
    pub(super) dt: &'a [f32],
    pub(super) g: &'a [f32],
    pub(super) dm: &'a [f32],
    /// Written on and below the diagonal.
    pub(super) m: &'a mut [f32],
    /// Added to: `dM o L o dt`.
    pub(super) dg: &'a mut [f32],
    /// Written: the column sums of `dM o G o L`.
    pub(super) inside: &'a mut [f32],
    /// Written: the exponents' gradients from inside the chunk.
    pub(super) rectangles: &'a mut [f32],
}

impl WithSimd for Inside<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (all_cum, dt) = (vectors::<S>(self.cum), vectors::<S>(self.dt));
        self.inside.fill(0.0);
        let inside = vectors_mut::<S>(self.inside);
        for i in (0..self.len).rev() {
            let row = i * CHUNK..i * CHUNK + triangle_row(i);
            let (g, dm) = (vectors::<S>(&self.g[row.clone()]), vectors::<S>(&self.dm[row.clone()]));
            let (m, dg) = (vectors_mut::<S>(&mut self.m[row.clone()]), vectors_mut::<S>(&mut self.dg[row]));
            let n = m.len();
            let (cum, dt, inside) = (&all_cum[..n], &dt[..n], &mut inside[..n]);
            let (g, dm, dg) = (&g[..n], &dm[..n], &mut dg[..n]);
            let here = simd.splat_f32s(self.cum[i]);
            let mut rectangle = simd.splat_f32s(0.0);
            for v in 0..n {
                let decay = exp_nonpositive(simd, simd.sub_f32s(here, cum[v]));
                let decay = simd.mul_f32s(decay, triangle_mask::<S>(i, v, false));
                let mixed = simd.mul_f32s(g[v], decay);
                m[v] = simd.mul_f32s(mixed, dt[v]);
                dg[v] = simd.mul_add_e_f32s(dm[v], simd.mul_f32s(decay, dt[v]), dg[v]);
                let sum = simd.mul_add_e_f32s(dm[v], mixed, inside[v]);
                inside[v] = sum;
                let before = simd.mul_f32s(dt[v], triangle_mask::<S>(i, v, true));
                rectangle = simd.mul_add_e_f32s(sum, before, rectangle);
            }
            self.rectangles[i] = simd.reduce_sum_f32s(rectangle);
        }
    }
}

/// `out[h, i] = <a_i, b_i>` over the channels of head h, for `[len, channels]` matrices.
pub(super) struct RowDots<'a> {
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) len: usize,
    pub(super) p_dim: usize,
    pub(super) channels: usize,
    pub(super) out: &'a mut [f32],
}

impl WithSimd for RowDots<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.a.chunks_exact(self.channels).zip(self.b.chunks_exact(self.channels));
        for (i, (a, b)) in rows.take(self.len).enumerate() {
            for (h, (a, b)) in a.chunks_exact(self.p_dim).zip(b.chunks_exact(self.p_dim)).enumerate() {
                self.out[h * CHUNK + i] = dot(simd, a, b);
            }
        }
    }
}

/// The sum of `a o b` over the columns `first..first + p_dim` of two `[rows, channels]` matrices.
pub(super) struct ColumnsDot<'a> {
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) channels: usize,
    pub(super) first: usize,
    pub(super) p_dim: usize,
}

impl WithSimd for ColumnsDot<'_> {
    type Output = f32;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let part = self.first..self.first + self.p_dim;
        let rows = self.a.chunks_exact(self.channels).zip(self.b.chunks_exact(self.channels));
        rows.map(|(a, b)| dot(simd, &a[part.clone()], &b[part.clone()])).sum()
    }
}
