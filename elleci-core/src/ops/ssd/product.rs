//! The small products inside a chunk.
//!
//! A general product packs both sides and knows nothing of triangles; at 64 rows that is a good part of its time.
//! Here the left side is read where it lies, the right side is copied in panels of four vectors (at its own pitch its
//! rows would fall into few sets of the cache), and a triangular left side is multiplied as one.

use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use pulp::{Simd, WithSimd};

use super::chunked::row_mut;
use super::transpose::transpose16;
use crate::ops::lanes::{load, store, vectors, vectors_mut};
use crate::ops::matmul::Out;

/// Rows of the right side that are multiplied in one go.
const DEPTH: usize = 128;
/// Vectors of a panel of the right side, and of a row of the register tile.
const TILE: usize = 4;
/// Elements of working memory of a product.
pub(super) const PANEL: usize = DEPTH * TILE * 16;

/// The left side `[rows, depth]`: rows (or with `transposed` columns) lie `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) stride: usize,
    pub(super) transposed: bool,
    pub(super) part: Part,
}

/// Where a left side is not zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    All,
    /// On and below the diagonal.
    Lower,
    /// On and above the diagonal.
    Upper,
}

/// `c = a b` or `c += a b`.
pub(super) struct Product<'a, 'b> {
    pub(super) a: Left<'a>,
    pub(super) b: ArrayView2<'a, f32>,
    pub(super) c: ArrayViewMut2<'b, f32>,
    pub(super) out: Out,
    /// [`PANEL`] elements.
    pub(super) panel: &'b mut [f32],
}

impl WithSimd for Product<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (rows, cols) = self.c.dim();
        let fits = self.b.dim() == (self.a.depth, cols) && self.a.rows == rows;
        assert!(fits, "product: {} x {} times {:?}", self.a.rows, self.a.depth, self.b.dim());
        let groups = rows.div_ceil(6);
        for col in (0..cols).step_by(TILE * S::F32_LANES) {
            for first in (0..self.a.depth).step_by(DEPTH) {
                let depth = first..self.a.depth.min(first + DEPTH);
                let end = cols.min(col + TILE * S::F32_LANES);
                let b = self.b.slice(s![depth.clone(), col..end]);
                let panel = &mut self.panel[..depth.len() * TILE * S::F32_LANES];
                pack(simd, b, panel);
                let mut tile = Tile {
                    a: self.a,
                    panel: vectors::<S>(panel),
                    first,
                    c: self.c.slice_mut(s![.., col..end]),
                    add: first > 0 || self.out == Out::Add,
                };
                for g in 0..groups {
                    // Groups of five and six rows rather than of six and a small rest.
                    let (start, end) = (g * rows / groups, (g + 1) * rows / groups);
                    let depth = match self.a.part {
                        Part::All => depth.clone(),
                        Part::Lower => depth.start..end.clamp(depth.start, depth.end),
                        Part::Upper => start.clamp(depth.start, depth.end)..depth.end,
                    };
                    match end - start {
                        1 => tile.run::<S, 1>(simd, start, depth),
                        2 => tile.run::<S, 2>(simd, start, depth),
                        3 => tile.run::<S, 3>(simd, start, depth),
                        4 => tile.run::<S, 4>(simd, start, depth),
                        5 => tile.run::<S, 5>(simd, start, depth),
                        _ => tile.run::<S, 6>(simd, start, depth),
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn pack<S: Simd>(simd: S, b: ArrayView2<f32>, panel: &mut [f32]) {
    if b.strides()[1] != 1 && b.ncols() > 1 {
        return pack_columns(b, panel, TILE * S::F32_LANES);
    }
    let panel = vectors_mut::<S>(panel);
    for (row, out) in b.rows().into_iter().zip(panel.chunks_exact_mut(TILE)) {
        let row = row.to_slice().expect("the right side lies in rows or columns");
        for (v, out) in out.iter_mut().enumerate() {
            *out = if v * S::F32_LANES < row.len() { load(simd, row, v) } else { simd.splat_f32s(0.0) };
        }
    }
}

/// As [`pack`] for a right side that lies in columns, with rows of the panel `width` apart.
fn pack_columns(b: ArrayView2<f32>, panel: &mut [f32], width: usize) {
    let (rows, cols) = b.dim();
    let column = |j: usize| {
        let column = b.index_axis_move(Axis(1), j);
        column.to_slice().expect("the right side lies in rows or columns")
    };
    let whole = if width < 16 { 0 } else { rows & !15 };
    for first in (0..cols & !15).step_by(16) {
        let columns: [&[f32]; 16] = core::array::from_fn(|j| column(first + j));
        for k in (0..whole).step_by(16) {
            let square = columns.map(|column| column[k..].first_chunk().expect("a whole square"));
            transpose16(square, &mut panel[k * width + first..], width);
        }
    }
    if cols < width {
        panel.chunks_exact_mut(width).for_each(|row| row[cols..].fill(0.0));
    }
    for j in 0..cols {
        let done = if j < cols & !15 { whole } else { 0 };
        for (k, v) in column(j).iter().enumerate().skip(done) {
            panel[k * width + j] = *v;
        }
    }
}

struct Tile<'a, 'b, V> {
    a: Left<'a>,
    panel: &'b [V],
    /// The row of the right side that the panel starts with.
    first: usize,
    c: ArrayViewMut2<'b, f32>,
    add: bool,
}

impl<V> Tile<'_, '_, V> {
    /// `ROWS` rows of the output from `start`, over a range of the depth.
    #[inline(always)]
    fn run<S: Simd<f32s = V>, const ROWS: usize>(&mut self, simd: S, start: usize, depth: core::ops::Range<usize>)
    where
        V: Copy,
    {
        let mut sums = [[simd.splat_f32s(0.0); TILE]; ROWS];
        let panel = &self.panel[(depth.start - self.first) * TILE..];
        let Left { data, stride, .. } = self.a;
        if self.a.transposed {
            for (k, b) in depth.zip(panel.chunks_exact(TILE)) {
                let a = &data[k * stride + start..][..ROWS];
                for r in 0..ROWS {
                    for v in 0..TILE {
                        sums[r][v] = simd.mul_add_e_f32s(simd.splat_f32s(a[r]), b[v], sums[r][v]);
                    }
                }
            }
        } else {
            let mut rows = [&data[..0]; ROWS];
            for r in 0..ROWS {
                rows[r] = &data[(start + r) * stride..][depth.clone()];
            }
            for (k, b) in (0..depth.len()).zip(panel.chunks_exact(TILE)) {
                for r in 0..ROWS {
                    let a = simd.splat_f32s(rows[r][k]);
                    for v in 0..TILE {
                        sums[r][v] = simd.mul_add_e_f32s(a, b[v], sums[r][v]);
                    }
                }
            }
        }
        // A copy: what is indexed by a variable lives in memory, and the sums of the loop above must not.
        let mut done = [[simd.splat_f32s(0.0); TILE]; ROWS];
        for r in 0..ROWS {
            for v in 0..TILE {
                done[r][v] = sums[r][v];
            }
        }
        self.write(simd, start, &done);
    }

    #[inline(always)]
    fn write<S: Simd<f32s = V>>(&mut self, simd: S, start: usize, sums: &[[V; TILE]])
    where
        V: Copy,
    {
        for (r, sums) in sums.iter().enumerate() {
            let c = row_mut(&mut self.c, start + r);
            for (v, sum) in sums.iter().enumerate() {
                if v * S::F32_LANES < c.len() {
                    let sum = if self.add { simd.add_f32s(load(simd, c, v), *sum) } else { *sum };
                    store(simd, c, v, sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::lanes::dispatch;
    use crate::ops::matmul::{mat, mat_mut, matmul_serial};
    use alloc::vec;
    use alloc::vec::Vec;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        // Small integers: every product and sum below is exact, so the two must be equal.
        (0..n).map(|i| ((i + seed) * 7919 % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn equals_the_general_product_at_sizes_around_every_boundary() {
        for (m, k, n) in [(1, 1, 1), (5, 7, 15), (6, 64, 64), (64, 130, 65), (23, 128, 100), (13, 257, 16), (7, 3, 130)]
        {
            for (transposed, out) in [(false, Out::Store), (true, Out::Store), (false, Out::Add), (true, Out::Add)] {
                for part in [Part::All, Part::Lower, Part::Upper] {
                    let (mut a, b) = (values(m * k, 1), values(k * n, 2));
                    let at = |i: usize, l: usize| if transposed { l * m + i } else { i * k + l };
                    for (i, l) in (0..m).flat_map(|i| (0..k).map(move |l| (i, l))) {
                        if part == Part::Lower && l > i || part == Part::Upper && l < i {
                            a[at(i, l)] = 0.0;
                        }
                    }
                    let bt: Vec<f32> = (0..k * n).map(|i| b[i % k * n + i / k]).collect();
                    let dense = if transposed { mat(&a, k, m).reversed_axes() } else { mat(&a, m, k) };
                    let mut want = vec![3.0; m * n];
                    matmul_serial(dense, mat(&b, k, n), mat_mut(&mut want, m, n), out);
                    let stride = if transposed { m } else { k };
                    let a = Left { data: &a, rows: m, depth: k, stride, transposed, part };
                    for b in [mat(&b, k, n), mat(&bt, n, k).reversed_axes()] {
                        let mut got = vec![if out == Out::Add { 3.0 } else { f32::NAN }; m * n];
                        let c = mat_mut(&mut got, m, n);
                        dispatch(Product { a, b, c, out, panel: &mut vec![f32::NAN; PANEL] });
                        assert_eq!(got, want, "({m}, {k}, {n}) transposed {transposed} strides {:?}", b.strides());
                    }
                }
            }
        }
    }
}
