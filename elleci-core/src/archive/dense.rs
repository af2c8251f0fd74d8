//! Full-precision matrices in an archive, and their product with tokens.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use half::{bf16, f16};
use ndarray::{ArrayViewMut2, Axis};
use pulp::{Simd, WithSimd};

use super::{ALIGNMENT, checksum, int8};
use crate::ops::lanes::{dispatch, dots, products};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{Isa, prefetch, vectorize};

/// How the values of a full-precision matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseFormat {
    /// float32: as trained.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of float32.
    Bf16,
    /// int8 with one float32 scale a row (`amax/127`): all scales, padded to 64 bytes, then all codes. Multiplied in integers.
    Int8,
}

impl DenseFormat {
    /// All.
    pub const ALL: [DenseFormat; 4] = [DenseFormat::F32, DenseFormat::F16, DenseFormat::Bf16, DenseFormat::Int8];

    /// The name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            DenseFormat::F32 => "f32",
            DenseFormat::F16 => "f16",
            DenseFormat::Bf16 => "bf16",
            DenseFormat::Int8 => "int8",
        }
    }

    /// The largest number that a value is stored as.
    pub(super) fn largest(self) -> f32 {
        match self {
            DenseFormat::F16 => f16::MAX.to_f32(),
            DenseFormat::Bf16 => bf16::MAX.to_f32(),
            DenseFormat::F32 | DenseFormat::Int8 => f32::MAX,
        }
    }

    /// Bytes of one value.
    fn width(self) -> usize {
        match self {
            DenseFormat::F32 => 4,
            DenseFormat::F16 | DenseFormat::Bf16 => 2,
            DenseFormat::Int8 => 1,
        }
    }

    /// Bytes before the values.
    fn scales(self, rows: usize) -> Option<usize> {
        match self {
            DenseFormat::Int8 => rows.checked_mul(4)?.checked_next_multiple_of(ALIGNMENT),
            _ => Some(0),
        }
    }

    /// Bytes of a matrix, a multiple of 64. `None` when they do not fit an address.
    pub(super) fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let values = rows.checked_mul(cols)?.checked_mul(self.width())?;
        self.scales(rows)?.checked_add(values)?.checked_next_multiple_of(ALIGNMENT)
    }

    /// Where a stored matrix has bytes without a meaning, which are zero: behind the scales and behind the values.
    pub(super) fn padding(self, rows: usize, cols: usize) -> Option<[Range<usize>; 2]> {
        let values = self.scales(rows)?;
        let scales = if self == DenseFormat::Int8 { rows * 4 } else { 0 };
        Some([scales..values, values + rows * cols * self.width()..self.bytes(rows, cols)?])
    }

    /// Where the values of a row are stored.
    pub(super) fn row_bytes(self, rows: usize, cols: usize, row: usize) -> Option<Range<usize>> {
        let (start, len) = (self.scales(rows)?, cols * self.width());
        Some(start + row * len..start + (row + 1) * len)
    }

    /// Stores a matrix.
    pub(super) fn encode(self, values: &[f32], cols: usize, bytes: &mut [u8]) {
        let rows = values.len() / cols.max(1);
        let (scales, codes) = bytes.split_at_mut(self.scales(rows).expect("the caller has made room for them"));
        // What is too large becomes the largest number: no infinity gets into an archive.
        let clamp = |v: &f32| v.clamp(-self.largest(), self.largest());
        let put = |at: usize, le: &[u8], codes: &mut [u8]| codes[at * le.len()..][..le.len()].copy_from_slice(le);
        match self {
            DenseFormat::F32 => values.iter().enumerate().for_each(|(i, v)| put(i, &v.to_le_bytes(), codes)),
            DenseFormat::F16 => {
                values.iter().enumerate().for_each(|(i, v)| put(i, &f16::from_f32(clamp(v)).to_le_bytes(), codes));
            }
            DenseFormat::Bf16 => {
                values.iter().enumerate().for_each(|(i, v)| put(i, &bf16::from_f32(clamp(v)).to_le_bytes(), codes));
            }
            DenseFormat::Int8 => {
                for (r, row) in values.chunks_exact(cols).enumerate() {
                    let amax = row.iter().fold(f32::MIN_POSITIVE, |a, v| a.max(v.abs()));
                    // Rounded up, the scale of the largest floats would give infinity back.
                    let scale = amax / 127.0;
                    let scale = if (scale * 127.0).is_finite() { scale } else { scale.next_down() };
                    put(r, &scale.to_le_bytes(), scales);
                    for (code, v) in codes[r * cols..].iter_mut().zip(row) {
                        *code = libm::rintf(v * (127.0 / amax)).clamp(-127.0, 127.0) as i8 as u8;
                    }
                }
            }
        }
    }
}

/// A full-precision matrix `[rows, cols]` in someone else's memory.
#[derive(Clone, Copy, Debug)]
pub struct DenseMatrix<'a> {
    rows: usize,
    cols: usize,
    values: Values<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    F32(&'a [f32]),
    /// Bits
    F16(&'a [u16]),
    Bf16(&'a [u16]),
    Int8 {
        scales: &'a [f32],
        codes: &'a [i8],
    },
}

/// Rows that meet a token's values together: as many chains of additions hide their latency, and their float32 values stay in the
/// first-level cache up to some 2,500 columns.
pub(super) const ROWS: usize = 4;
/// Bytes that make a task.
const TASK_BYTES: usize = 64 << 10;
/// Rows that are asked for before they are needed.
const AHEAD: usize = 3;
/// Rows are padded to whole vectors of the widest kind.
const LANES: usize = 16;

impl<'a> DenseMatrix<'a> {
    /// # Panics
    /// When `bytes` is shorter than the shape needs or not aligned for its values.
    pub(super) fn new(format: DenseFormat, rows: usize, cols: usize, bytes: &'a [u8]) -> DenseMatrix<'a> {
        let n = rows * cols;
        let (scales, data) = bytes.split_at(format.scales(rows).expect("the index has checked the sizes"));
        let data = &data[..n * format.width()];
        let values = match format {
            DenseFormat::F32 => Values::F32(bytemuck::cast_slice(data)),
            DenseFormat::F16 => Values::F16(bytemuck::cast_slice(data)),
            DenseFormat::Bf16 => Values::Bf16(bytemuck::cast_slice(data)),
            DenseFormat::Int8 => {
                Values::Int8 { scales: &bytemuck::cast_slice(scales)[..rows], codes: bytemuck::cast_slice(data) }
            }
        };
        DenseMatrix { rows, cols, values }
    }

    /// One row as a matrix; its values from `bytes`, which are stored as the matrix is, or from the matrix itself.
    pub(super) fn only(&self, row: usize, bytes: Option<&'a [u8]>) -> DenseMatrix<'a> {
        let range = row * self.cols..(row + 1) * self.cols;
        let values = match self.values {
            Values::F32(v) => Values::F32(bytes.map_or(&v[range], bytemuck::cast_slice)),
            Values::F16(v) => Values::F16(bytes.map_or(&v[range], bytemuck::cast_slice)),
            Values::Bf16(v) => Values::Bf16(bytes.map_or(&v[range], bytemuck::cast_slice)),
            Values::Int8 { scales, codes } => {
                Values::Int8 { scales: &scales[row..row + 1], codes: bytes.map_or(&codes[range], bytemuck::cast_slice) }
            }
        };
        DenseMatrix { rows: 1, cols: self.cols, values }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The hash of a row as it is stored, its scale included.
    pub(super) fn row_hash(&self, row: usize) -> u64 {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.values {
            Values::F32(v) => checksum(bytemuck::cast_slice(&v[range])),
            Values::F16(v) | Values::Bf16(v) => checksum(bytemuck::cast_slice(&v[range])),
            Values::Int8 { scales, codes } => {
                checksum(bytemuck::cast_slice(&codes[range])) ^ checksum(&scales[row].to_le_bytes()).rotate_left(1)
            }
        }
    }

    /// One row as float32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        vectorize(
            #[inline(always)]
            || {
                self.expand(row, out);
                if let Values::Int8 { scales, .. } = self.values {
                    out.iter_mut().for_each(|v| *v *= scales[row]);
                }
            },
        );
    }

    /// Asks for a row, if there is such a one.
    #[inline(always)]
    fn prefetch(&self, row: usize) {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.values {
            Values::F32(v) => v.get(range).map(prefetch),
            Values::F16(v) | Values::Bf16(v) => v.get(range).map(prefetch),
            Values::Int8 { codes, .. } => codes.get(range).map(prefetch),
        };
    }

    /// A row without its scale.
    #[inline(always)]
    fn expand(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.values {
            Values::F32(v) => out.copy_from_slice(&v[range]),
            Values::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, v)| *o = f16_value(*v)),
            Values::Bf16(v) => {
                out.iter_mut().zip(&v[range]).for_each(|(o, v)| *o = f32::from_bits((*v as u32) << 16));
            }
            Values::Int8 { codes, .. } => out.iter_mut().zip(&codes[range]).for_each(|(o, v)| *o = *v as f32),
        }
    }

    /// The values as they are stored, and bytes of a row.
    fn stored(&self) -> (*const u8, usize) {
        match self.values {
            Values::F32(v) => (v.as_ptr().cast(), 4 * self.cols),
            Values::F16(v) | Values::Bf16(v) => (v.as_ptr().cast(), 2 * self.cols),
            Values::Int8 { codes, .. } => (codes.as_ptr().cast(), self.cols),
        }
    }

    /// Rows of a task.
    fn task(&self) -> usize {
        (TASK_BYTES / self.stored().1.max(1)).next_multiple_of(ROWS).max(ROWS)
    }

    /// Tells idle threads that [`DenseMatrix::forward`] comes next.
    pub(crate) fn expect(&self) {
        let (task, (at, row)) = (self.task(), self.stored());
        par::expect(self.rows.div_ceil(task), |i| at.wrapping_add(i * task * row));
    }

    /// `y` `[tokens, rows]` `= x · Wᵀ` with `x` `[tokens, cols]`. An output's bits depend on its token and row alone.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn forward(&self, x: &[f32], tokens: usize, y: &mut [f32]) {
        assert_eq!((x.len(), y.len()), (tokens * self.cols, tokens * self.rows), "activations");
        if tokens == 0 || self.rows == 0 || self.cols == 0 {
            return;
        }
        let task = self.task();
        if let Values::Int8 { scales, codes } = self.values {
            int8::forward(Isa::detect(), int8::Matrix { codes, scales, cols: self.cols }, task, x, y);
            return;
        }
        let (cols, width) = (self.cols, self.cols.next_multiple_of(LANES));
        let padded = (width != cols).then(|| {
            let mut padded = vec![0.0f32; tokens * width];
            padded.chunks_exact_mut(width).zip(x.chunks_exact(cols)).for_each(|(p, x)| p[..cols].copy_from_slice(x));
            padded
        });
        let padded = padded.as_deref().unwrap_or(x);
        let mut y = mat_mut(y, tokens, self.rows);
        let items: Vec<_> = y.axis_chunks_iter_mut(Axis(1), task).enumerate().collect();
        par::for_each(items, |(i, mut y)| {
            #[cfg(all(feature = "std", target_arch = "x86_64"))]
            let done = match super::dense_avx512::detect() {
                Some(simd) => self.on_avx512(simd, i * task, padded, width, y.view_mut()),
                None => self.on_avx2(i * task, padded, width, y.view_mut()),
            };
            #[cfg(not(all(feature = "std", target_arch = "x86_64")))]
            let done = 0;
            if done < y.ncols() {
                let mut weights = vec![0.0f32; ROWS * width];
                let (first, y) = (i * task + done, y.slice_axis_mut(Axis(1), (done..).into()));
                dispatch(Tile { matrix: self, first, x: padded, width, y, weights: &mut weights });
            }
        });
    }
}

#[cfg(all(feature = "std", target_arch = "x86_64"))]
impl DenseMatrix<'_> {
    /// The products of rows `first ..` with tokens `x` `[tokens, width]`, as far as these rows are whole blocks and binary16. Returns how
    /// many they are.
    fn on_avx512(
        &self,
        simd: pulp::x86::V4,
        first: usize,
        x: &[f32],
        width: usize,
        mut y: ArrayViewMut2<f32>,
    ) -> usize {
        use super::dense_avx512::dots;
        let Values::F16(values) = self.values else { return 0 };
        let whole = y.ncols() / ROWS * ROWS;
        dots(simd, &values[first * self.cols..][..whole * self.cols], (self.cols, width), x, |at, t, sums| {
            for (t, sums) in (t..).zip(sums) {
                let mut y = y.row_mut(t);
                y.as_slice_mut().expect("rows of the output are contiguous")[at..at + ROWS].copy_from_slice(sums);
            }
        });
        whole
    }

    /// [`DenseMatrix::on_avx512`] on AVX2, if there is that.
    fn on_avx2(&self, first: usize, x: &[f32], width: usize, mut y: ArrayViewMut2<f32>) -> usize {
        use super::dense_avx2 as avx2;
        let (Values::F16(values), Some(simd)) = (self.values, avx2::Avx2::detect()) else { return 0 };
        let (whole, mut room) = (y.ncols() / ROWS * ROWS, avx2::Room::new(simd));
        for at in (0..whole).step_by(ROWS) {
            let row = first + at;
            let run = row * self.cols..(row + ROWS) * self.cols;
            avx2::dots(simd, &values[run], (self.cols, width), x, &mut room, |t, sums| {
                let mut y = y.row_mut(t);
                y.as_slice_mut().expect("rows of the output are contiguous")[at..at + ROWS].copy_from_slice(&sums);
            });
        }
        whole
    }
}

/// Some rows with all tokens: floats, of whatever format.
struct Tile<'a> {
    matrix: &'a DenseMatrix<'a>,
    first: usize,
    /// `[tokens, width]`
    x: &'a [f32],
    /// Columns, with the zeros behind them
    width: usize,
    y: ArrayViewMut2<'a, f32>,
    /// `[ROWS, width]`
    weights: &'a mut [f32],
}

impl WithSimd for Tile<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Tile { matrix, first, x, width, mut y, weights } = self;
        for (b, mut y) in y.axis_chunks_iter_mut(Axis(1), ROWS).enumerate() {
            let first = first + b * ROWS;
            for r in 0..y.ncols() {
                matrix.prefetch(first + r + AHEAD);
                matrix.expand(first + r, &mut weights[r * width..][..matrix.cols]);
            }
            let mut tokens = y.rows_mut().into_iter();
            for x in x.chunks(2 * width) {
                let sums: [[f32; ROWS]; 2] = match x.len() / width {
                    2 => products(simd, weights, x),
                    _ => [dots(simd, weights, x), [0.0; ROWS]],
                };
                for (mut y, sums) in tokens.by_ref().take(x.len() / width).zip(sums) {
                    y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum);
                }
            }
        }
    }
}

/// The value of binary16 bits, in operations that vectorise everywhere. Infinities and NaNs, which no archive holds, come out
/// as large numbers.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    let magnitude = f32::from_bits((bits as u32 & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits as u32 & 0x8000) << 16)
}

#[cfg(test)]
mod tests;
