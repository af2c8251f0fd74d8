//! One checked launch a kernel: sizes are compared before anything runs, so that a kernel may trust its arguments.
//!
//! Shapes are as in `elleci-core`: activations `[tokens, channels]` float32, weights `[out, in]`.

pub mod attention;
pub mod loss;
pub mod mamba;
pub mod norm;
pub mod optim;
pub mod product;
pub mod ssd;
pub mod ternary;

use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Threads of a block of every kernel that works on tiles or rows.
pub const THREADS: u32 = 256;
/// Shared memory of a reduction over a block: a float64 for each of its warps.
pub(crate) const ROOM: u32 = 8 * THREADS / 32;

/// The arithmetic of the products in tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// float32 multiply-adds: for parity.
    F32,
    /// bf16 tensor cores with float32 sums.
    Bf16,
    /// As bf16, but for the gradients that go through ternary projections: e4m3 with a scale a token.
    Fp8,
}

impl Products {
    /// Bytes of an element of a tile, and elements of padding a row.
    pub(crate) fn tile(self) -> (u32, u32) {
        match self {
            Products::F32 => (4, 4),
            Products::Bf16 | Products::Fp8 => (2, 8),
        }
    }

    /// Bytes of a padded tile.
    pub(crate) fn tile_bytes(self, rows: u32, width: u32) -> u32 {
        let (bytes, pad) = self.tile();
        rows * (width + pad) * bytes
    }

    /// The kernel of this arithmetic.
    pub(crate) fn pick<T>(self, f32: T, bf16: T) -> T {
        match self {
            Products::F32 => f32,
            Products::Bf16 | Products::Fp8 => bf16,
        }
    }
}

/// Rows of a norm that was quantised, and what its backward needs: codes `[rows, pitch]`, scales and rstd `[rows]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// int8, rows padded with zeros to [`padded`] columns
    pub codes: Buf,
    /// A code times this is the value
    pub scales: Buf,
    /// Reciprocal root mean square
    pub rstd: Buf,
}

/// Columns of a row of codes, int8 or packed: a multiple of 64.
pub fn padded(width: usize) -> usize {
    width.next_multiple_of(64)
}

/// Columns of a wider row-major buffer: where they begin, and the row's width.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// The buffer
    pub buf: Buf,
    /// First column
    pub from: usize,
    /// Elements of a row
    pub stride: usize,
}

impl Columns {
    /// All columns of a buffer.
    pub fn all(buf: Buf, width: usize) -> Columns {
        Columns { buf, from: 0, stride: width }
    }

    /// The pointer to the first row, checked for `rows` rows of `width` columns.
    pub(crate) fn arg(&self, rows: usize, width: usize) -> Arg {
        assert_eq!(self.buf.dtype, Dtype::F32);
        Arg::Buf(self.first(rows, width))
    }

    /// The same of float32 or bf16, with which of them it is.
    pub(crate) fn floats(&self, rows: usize, width: usize) -> Arg {
        assert!(matches!(self.buf.dtype, Dtype::F32 | Dtype::Bf16));
        Arg::Floats(self.first(rows, width))
    }

    fn first(&self, rows: usize, width: usize) -> Buf {
        assert!(self.from + width <= self.stride && rows * self.stride <= self.buf.len, "columns of {:?}", self.buf);
        self.buf.part(self.from, self.buf.len - self.from)
    }
}

/// A size as the kernels take it.
pub(crate) fn int(value: usize) -> Arg {
    Arg::Int(i32::try_from(value).expect("sizes are checked when a plan is made"))
}

/// A buffer of exactly these elements.
pub(crate) fn exact(buf: Buf, dtype: Dtype, len: usize) -> Arg {
    assert_eq!((buf.dtype, buf.len), (dtype, len));
    Arg::Buf(buf)
}

/// A float32 buffer with room for at least these elements.
pub(crate) fn room(buf: Buf, len: usize) -> Arg {
    assert!(buf.dtype == Dtype::F32 && buf.len >= len, "{len} floats in {buf:?}");
    Arg::Buf(buf)
}

/// Weights or gradients of exactly these elements.
pub(crate) fn floats(buf: Buf, len: usize) -> Arg {
    assert!(matches!(buf.dtype, Dtype::F32 | Dtype::Bf16) && buf.len == len, "{len} weights in {buf:?}");
    Arg::Floats(buf)
}

/// Blocks of [`THREADS`] for one thread an element.
pub(crate) fn elementwise(len: usize) -> Launch {
    Launch { grid: [u32::try_from(len.div_ceil(THREADS as usize)).expect("fits"), 1, 1], threads: THREADS, shared: 0 }
}

/// Rows that one block takes when a gradient is summed over rows: some 256 blocks, whatever the device, so that the order of
/// additions is the same on all.
pub fn rows_each(rows: usize) -> usize {
    rows.div_ceil(256).max(4)
}

/// `out[i] += Σ_rows partials[row, i]`, row after row.
///
/// # Errors
/// A fault of the device.
pub fn column_sum(dev: &mut dyn Device, partials: Buf, rows: usize, width: usize, out: Buf) -> Result<()> {
    let args = [room(partials, rows * width), int(rows), int(width), exact(out, Dtype::F32, width)];
    dev.launch("column_sum", elementwise(width), &args)
}
