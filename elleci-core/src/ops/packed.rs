//! The blocked float32 product that training spends most of its time in, for machines with AVX-512.
//!
//! ```text
//! for a block of B, at most [512, 512]:            packed once, shared by all threads: panels of 64 columns
//!   for a tile of rows of C:                       one task
//!     for every 6 rows of A:                       in the first-level cache
//!       for every panel of B:                      from the second-level cache
//!         C[6, 64] += A[6, 512] · B[512, 64]       in registers
//! ```
//!
//! B is anything that can write its panels ([`Operand`]): a view of floats, the ternary codes of a matrix, or int8
//! activations with their scales; so those are never widened in memory as a whole. A is read where it is if its rows are
//! contiguous; if its columns are, a tile of it is transposed first. Memory is slower than the products: while a tile
//! runs, the part of A that comes next is prefetched, a line for every eight rows of B.
//!
//! Every element of C is summed over blocks of B in order, and inside of a block in the order of its rows, whatever the
//! tiles are: the bits do not depend on the number of threads.

use alloc::vec::Vec;
use core::cell::Cell;
use core::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis, ShapeBuilder, s};

use super::avx512::{Avx512, DEPTH, ROWS, RUNS, Row, WIDTH, floats};
use super::matmul::Out;
use crate::{par, simd};

/// Columns of a packed block of B at most: a megabyte of it, half the second-level cache.
const COLUMNS: usize = 512;
/// Multiply-adds that make a tile worth a task of its own.
const TILE_MACS: usize = 1 << 22;
/// Rows of a tile of a transposed A at most.
const COPY_ROWS: usize = 96;
/// Rows of B in one go when A is transposed. Its columns are often a power of two apart, and no more of them than this
/// fit into the cache sets that they share while they wait to be copied.
const COPY_DEPTH: usize = 256;
/// Floats between the rows of a copied A: an odd number of cache lines, so that they spread over the cache.
const PITCH: usize = COPY_DEPTH + 16;

/// The right-hand side of a product, `[depth, columns]`.
pub(crate) trait Operand: Sync {
    /// Rows and columns.
    fn dim(&self) -> (usize, usize);
    /// Writes rows `rows`, columns `col..col + 32`, into `panel`; columns past the last as 0.
    fn pack(&self, kernel: Avx512, rows: Range<usize>, col: usize, panel: &mut [Row]);
}

impl Operand for ArrayView2<'_, f32> {
    fn dim(&self) -> (usize, usize) {
        ArrayView2::dim(self)
    }

    #[inline(always)]
    fn pack(&self, kernel: Avx512, rows: Range<usize>, col: usize, panel: &mut [Row]) {
        let cols = (self.ncols() - col).min(WIDTH);
        let part = self.slice(s![rows, col..col + cols]);
        let rows = part.nrows();
        if cols < WIDTH {
            panel.fill(Row::ZERO);
        }
        if part.strides()[1] == 1 || cols == 1 {
            for (row, out) in part.rows().into_iter().zip(panel) {
                let row = row.to_slice().expect("unit stride");
                match <&[f32; WIDTH]>::try_from(row) {
                    Ok(row) => out.0 = *row,
                    Err(_) => out.0[..cols].copy_from_slice(row),
                }
            }
        } else if part.strides()[0] == 1 || rows == 1 {
            kernel.transpose(part, floats(panel), WIDTH);
        } else {
            for (row, out) in part.rows().into_iter().zip(panel) {
                out.0.iter_mut().zip(row).for_each(|(out, v)| *out = *v);
            }
        }
    }
}

/// Whether [`multiply`] can read `a` and write `c`.
pub(crate) fn fits(a: &ArrayView2<f32>, c: &ArrayViewMut2<f32>) -> bool {
    a.strides().contains(&1) && c.strides()[1] == 1
}

/// Whether packing pays against a product that packs for itself: enough rows must share packed B (fewer, where B has to
/// be transposed, which others do worse), and enough columns a transposed A. Measured; see docs/LOG.md.
pub(crate) fn pays(a: &ArrayView2<f32>, b_transposed: bool, columns: usize) -> bool {
    let (m, k) = a.dim();
    m * k * columns >= 1 << 20
        && m >= if b_transposed { 24 } else { 64 }
        && columns >= if transposed(a) { 160 } else { 16 }
}

/// `C = A · B` or `C += A · B`, spread over the current thread pool. See [`fits`].
pub(crate) fn multiply(kernel: Avx512, a: ArrayView2<f32>, b: &impl Operand, mut c: ArrayViewMut2<f32>, out: Out) {
    let (k, n) = b.dim();
    assert!(a.ncols() == k && c.dim() == (a.nrows(), n), "product: {:?} x {:?} -> {:?}", a.dim(), (k, n), c.dim());
    if k == 0 && out == Out::Store {
        c.fill(0.0);
    }
    let depth = if transposed(&a) { COPY_DEPTH } else { DEPTH };
    for col in (0..n).step_by(COLUMNS) {
        let cols = col..n.min(col + COLUMNS);
        for first in (0..k).step_by(depth) {
            let rows = first..k.min(first + depth);
            with_buffer(&PACKED_B, rows.len() * cols.len().div_ceil(WIDTH), Row::ZERO, |packed| {
                let panels = packed.chunks_mut(rows.len()).enumerate().collect();
                par::for_each(panels, |(p, panel): (_, &mut [Row])| {
                    simd::vectorize(
                        #[inline(always)]
                        || b.pack(kernel, rows.clone(), cols.start + p * WIDTH, panel),
                    );
                });
                let out = if first == 0 { out } else { Out::Add };
                multiply_block(kernel, a, rows.clone(), packed, c.slice_mut(s![.., cols.clone()]), out);
            });
        }
    }
}

/// The part of the product that one packed block of B, rows `rows`, contributes to its columns of C.
fn multiply_block(
    kernel: Avx512,
    a: ArrayView2<f32>,
    rows: Range<usize>,
    packed: &[Row],
    mut c: ArrayViewMut2<f32>,
    out: Out,
) {
    let (m, n) = c.dim();
    let (tiles, splits) = cut(m, n, rows.len(), transposed(&a), par::threads());
    let (groups, columns) = (m.div_ceil(ROWS), n.div_ceil(splits).next_multiple_of(WIDTH));
    let mut items = Vec::new();
    for tile in 0..tiles {
        let start = tile * groups / tiles * ROWS;
        let end = ((tile + 1) * groups / tiles * ROWS).min(m);
        let (here, below) = c.split_at(Axis(0), end - start);
        c = below;
        let parts = ColumnChunks { rest: Some(here), columns };
        for (part, panels) in parts.zip(packed.chunks(columns / WIDTH * rows.len())) {
            items.push(Tile { first_row: start, panels, c: part });
        }
    }
    let len = if transposed(&a) { COPY_ROWS * PITCH } else { 0 };
    par::for_each(items, |tile| {
        with_buffer(&COPIED_A, len, 0.0, |copy| multiply_tile(kernel, a, rows.clone(), tile, out, copy));
    });
}

/// Tiles of rows, and parts of columns, for `threads`. (The cut moves no bits: every element of C is summed in the same
/// order by whatever tile it falls into.)
fn cut(m: usize, n: usize, k: usize, transposed: bool, threads: usize) -> (usize, usize) {
    let least = if transposed { m.div_ceil(COPY_ROWS) } else { 1 };
    if threads == 1 {
        return (least, 1);
    }
    let wanted = (m * n * k / TILE_MACS).clamp(1, 4 * threads);
    let tiles = least.max(wanted).next_multiple_of(threads).min(m.div_ceil(4 * ROWS));
    (tiles, wanted.div_ceil(tiles))
}

/// A part of C that one task computes.
struct Tile<'a> {
    first_row: usize,
    panels: &'a [Row],
    c: ArrayViewMut2<'a, f32>,
}

/// Cuts a view into runs of columns.
struct ColumnChunks<'a> {
    rest: Option<ArrayViewMut2<'a, f32>>,
    columns: usize,
}

impl<'a> Iterator for ColumnChunks<'a> {
    type Item = ArrayViewMut2<'a, f32>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest.take()?;
        if rest.ncols() <= self.columns {
            return Some(rest);
        }
        let (here, later) = rest.split_at(Axis(1), self.columns);
        self.rest = Some(later);
        Some(here)
    }
}

fn multiply_tile(kernel: Avx512, a: ArrayView2<f32>, rows: Range<usize>, mut tile: Tile, out: Out, copy: &mut [f32]) {
    let (start, end) = (tile.first_row, tile.first_row + tile.c.nrows());
    let part = a.slice(s![start..end, rows.clone()]);
    let copied = transposed(&a);
    if copied {
        kernel.transpose(part, copy, PITCH);
    }
    let mut ahead = Ahead::new(&a, end, rows.start);
    for (g, mut c) in tile.c.axis_chunks_iter_mut(Axis(0), ROWS).enumerate() {
        let group = if copied {
            let shape = (c.nrows(), rows.len()).strides((PITCH, 1));
            ArrayView2::from_shape(shape, &copy[g * ROWS * PITCH..]).expect("the copy has all rows")
        } else {
            ahead = Ahead::new(&a, start + (g + 1) * ROWS, rows.start);
            part.slice(s![g * ROWS..g * ROWS + c.nrows(), ..])
        };
        for (panel, c) in tile.panels.chunks(rows.len()).zip(c.axis_chunks_iter_mut(Axis(1), WIDTH)) {
            kernel.tile(group, panel, c, out, ahead.next(rows.len().div_ceil(DEPTH / RUNS)));
        }
    }
}

/// Where the elements of A lie that will be read next, eight cache lines at a time. The addresses are only ever
/// prefetched: near the edges of A they may lie outside of it.
struct Ahead {
    at: *const f32,
    /// Floats to the next row (column, if transposed).
    stride: isize,
    /// Runs in a row, and how many have been given.
    runs: (usize, usize),
}

impl Ahead {
    fn new(a: &ArrayView2<f32>, row: usize, column: usize) -> Ahead {
        let (strides, along) = (a.strides(), transposed(a) as usize);
        let at = a.as_ptr().wrapping_offset(row as isize * strides[0] + column as isize * strides[1]);
        Ahead {
            at,
            stride: strides[along],
            runs: (if along == 0 { DEPTH } else { COPY_ROWS.next_multiple_of(128) } / 128, 0),
        }
    }

    /// The next `count` runs.
    #[inline(always)]
    fn next(&mut self, count: usize) -> [*const f32; RUNS] {
        let (in_row, given) = self.runs;
        self.runs.1 += count;
        core::array::from_fn(|i| {
            let run = given + i;
            self.at.wrapping_offset((run / in_row) as isize * self.stride).wrapping_add(run % in_row * 128)
        })
    }
}

/// Whether the rows of A, rather than its columns, are what lies side by side.
fn transposed(a: &ArrayView2<f32>) -> bool {
    a.strides()[1] != 1 && a.ncols() > 1
}

std::thread_local! {
    static COPIED_A: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static PACKED_B: Cell<Vec<Row>> = const { Cell::new(Vec::new()) };
}

/// Lends a buffer that the thread keeps. A task that the thread picks up meanwhile finds none and makes its own.
fn with_buffer<T: Copy, R>(
    cell: &'static std::thread::LocalKey<Cell<Vec<T>>>,
    len: usize,
    zero: T,
    f: impl FnOnce(&mut [T]) -> R,
) -> R {
    let mut buffer = cell.take();
    if buffer.len() < len {
        buffer.resize(len, zero);
    }
    let result = f(&mut buffer[..len]);
    cell.set(buffer);
    result
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::ops::matmul::{mat, mat_mut};

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919 % 2003) as f32 - 1001.0) / 1024.0).collect()
    }

    /// Every stride that is taken, sizes around every block boundary, and the old output left alone or added to.
    #[test]
    fn equals_the_definition_with_the_same_bits_at_every_thread_count() {
        let Some(kernel) = Avx512::detect() else { return };
        let sizes = [
            (1, 1, 1),
            (6, 512, 64),
            (7, 513, 65),
            (5, 3, 17),
            (121, 40, 33),
            (250, 1030, 100),
            (130, 70, 530),
            (64, 0, 9),
        ];
        for (m, k, n) in sizes {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let at: Vec<f32> = (0..m * k).map(|i| a[i % m * k + i / m]).collect();
            let bt: Vec<f32> = (0..k * n).map(|i| b[i % k * n + i / k]).collect();
            for (start, out) in [(f32::NAN, Out::Store), (0.25, Out::Add)] {
                // By the strides of A, which decide about the order of summation.
                let mut seen: [Option<Vec<f32>>; 2] = [None, None];
                for case in 0..8 {
                    let a = if case & 1 == 0 { mat(&a, m, k) } else { mat(&at, k, m).reversed_axes() };
                    let b = if case & 2 == 0 { mat(&b, k, n) } else { mat(&bt, n, k).reversed_axes() };
                    // A frame around the output must stay as it was.
                    let mut c = vec![start; (m + 1) * (n + 3)];
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + case / 4 * 2).build().unwrap();
                    let view = mat_mut(&mut c, m + 1, n + 3).slice_move(s![..m, ..n]);
                    pool.install(|| multiply(kernel, a, &b, view, out));
                    let c = mat(&c, m + 1, n + 3);
                    assert!(
                        c.slice(s![m.., ..]).iter().chain(c.slice(s![.., n..])).all(|v| v.to_bits() == start.to_bits())
                    );
                    let c: Vec<f32> = c.slice(s![..m, ..n]).iter().copied().collect();
                    let same = |seen: &Vec<f32>| seen.iter().zip(&c).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(seen[case & 1].as_ref().is_none_or(same), "({m}, {k}, {n}) case {case}");
                    seen[case & 1] = Some(c);
                }
                for (i, got) in seen.into_iter().flat_map(|c| c.unwrap().into_iter().enumerate()) {
                    let product = |l: usize| a[i / n * k + l] as f64 * b[l * n + i % n] as f64;
                    let want = (0..k).map(product).sum::<f64>() + if out == Out::Add { start as f64 } else { 0.0 };
                    // Factors below 1: at most k + 2 roundings of sums below k + 1.
                    let bound = (k + 2) as f64 * (k + 1) as f64 * 2f64.powi(-24);
                    assert!((got as f64 - want).abs() <= bound, "({m}, {k}, {n}) {i}: {got} {want}");
                }
            }
        }
    }
}
