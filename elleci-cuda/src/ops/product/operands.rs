//! Operands of the products on tensor cores, laid out in memory that the plan has set aside.

use super::{Dense, Gemm, Ternary};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Operand, Order, Result};
use crate::ops::{Products, ROOM, Rows, THREADS, elementwise, exact, floats, int, padded, room};

/// Memory for the operands of one product at a time.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    /// The gradient or the activations of a product: bytes
    pub left: Buf,
    /// Its weights, or the activations beside a gradient: bytes
    pub right: Buf,
    /// Scales of a gradient's tokens in e4m3
    pub scales: Option<Buf>,
    /// A product of the library that is still to be scaled, as wide as the model
    pub product: Option<Buf>,
    /// The library's own
    pub library: Option<Buf>,
}

/// Which part of a [`Workspace`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the parts")]
pub enum Room {
    Left,
    Right,
}

/// Bytes that a [`Workspace`]'s parts need for a set of products.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Needs {
    pub left: usize,
    pub right: usize,
}

impl Needs {
    /// And a ternary projection `[out, input]` of `rows` rows, with its gradients.
    pub fn ternary(self, products: Products, rows: usize, out: usize, input: usize) -> Needs {
        let codes = out * padded(input);
        match products {
            Products::F32 => Needs { right: self.right.max(codes), ..self },
            Products::Bf16 => self.halves(rows * padded(out), (rows * padded(input)).max(codes)),
            Products::Fp8 => {
                let turned = (input * padded(out)).div_ceil(2); // bytes
                self.halves(rows * padded(out), (rows * padded(input)).max(codes.div_ceil(2)).max(turned))
            }
        }
    }

    /// And a dense product of `rows` rows, with its gradients.
    pub fn dense(self, products: Products, rows: usize, out: usize, input: usize, bf16_weights: bool) -> Needs {
        let weights = if takes_directly(bf16_weights, input) { 0 } else { out * padded(input) };
        match products {
            Products::F32 => self,
            _ => self.halves(rows * padded(out).max(padded(input)), (rows * padded(input)).max(weights)),
        }
    }

    fn halves(self, left: usize, right: usize) -> Needs {
        Needs { left: self.left.max(2 * left), right: self.right.max(2 * right) }
    }
}

/// Whether a dense matrix is an operand as it lies: bf16, rows of whole 16 bytes.
fn takes_directly(bf16: bool, input: usize) -> bool {
    bf16 && input.is_multiple_of(8)
}

/// A block a row.
pub(super) fn row_each(rows: usize, shared: u32) -> Launch {
    Launch {
        grid: [u32::try_from(rows).expect("sizes are checked when a plan is made"), 1, 1],
        threads: THREADS,
        shared,
    }
}

impl Workspace {
    fn part(&self, part: Room, dtype: Dtype, len: usize) -> Buf {
        let whole = if part == Room::Left { self.left } else { self.right };
        whole.part(0, len * dtype.bytes() as usize).with(dtype)
    }

    pub(super) fn product(&self) -> Buf {
        self.product.expect("planned where the library's products are scaled afterwards")
    }

    pub(super) fn library(&self) -> Buf {
        self.library.expect("planned where the library multiplies")
    }

    /// bf16 `[rows, padded(width)]` of a matrix of float32 or bf16.
    pub(super) fn halves(&self, dev: &mut dyn Device, at: Room, x: Buf, rows: usize, width: usize) -> Result<Operand> {
        let (pitch, x) = (padded(width), x.part(0, rows * width));
        let buf = self.part(at, Dtype::Bf16, rows * pitch);
        let args = [floats(x, x.len), int(width), int(pitch), Arg::Buf(buf)];
        dev.launch("to_halves", row_each(rows, 0), &args)?;
        Ok(Operand { buf, pitch, order: Order::K })
    }

    /// bf16 of a dense matrix, itself where that is possible.
    pub(super) fn weight_halves(&self, dev: &mut dyn Device, w: Dense) -> Result<Operand> {
        match takes_directly(w.weights.dtype == Dtype::Bf16, w.input) {
            true => Ok(Operand { buf: w.weights, pitch: w.input, order: Order::K }),
            false => self.halves(dev, Room::Right, w.weights, w.out, w.input),
        }
    }

    /// bf16 `[rows, padded(input)]` of quantised rows.
    pub(super) fn code_halves(&self, dev: &mut dyn Device, x: Rows, input: usize) -> Result<Operand> {
        let (rows, pitch) = (x.scales.len, padded(input));
        let buf = self.part(Room::Right, Dtype::Bf16, rows * pitch);
        let codes = exact(x.codes, Dtype::I8, rows * pitch);
        let args = [codes, exact(x.scales, Dtype::F32, rows), int(rows), int(pitch), Arg::Buf(buf)];
        dev.launch("codes_to_halves", elementwise(rows * pitch / 4), &args)?;
        Ok(Operand { buf, pitch, order: Order::K })
    }

    /// Ternary codes as an operand: as they are kept, or laid out here.
    fn ternary(&self, dev: &mut dyn Device, w: Ternary, dtype: Dtype, kept: Option<Buf>) -> Result<Buf> {
        let laid_out = match kept {
            Some(buf) => return Ok(buf),
            None => self.part(Room::Right, dtype, unpacked_len(w.out, w.input, dtype)),
        };
        unpack(dev, w, laid_out)?;
        Ok(laid_out)
    }

    pub(super) fn ternary_bytes(&self, dev: &mut dyn Device, w: Ternary) -> Result<Operand> {
        let buf = self.ternary(dev, w, Dtype::I8, w.unpacked.map(|u| u.bytes))?;
        Ok(Operand { buf, pitch: padded(w.input), order: Order::K })
    }

    /// As the second operand of `dy · W₃`: rows are k.
    pub(super) fn ternary_halves(&self, dev: &mut dyn Device, w: Ternary) -> Result<Operand> {
        let buf = self.ternary(dev, w, Dtype::Bf16, w.unpacked.and_then(|u| u.backward))?;
        Ok(Operand { buf, pitch: padded(w.input), order: Order::Row })
    }

    /// The same in e4m3, turned.
    pub(super) fn ternary_e4m3(&self, dev: &mut dyn Device, w: Ternary) -> Result<Operand> {
        let buf = self.ternary(dev, w, Dtype::E4m3, w.unpacked.and_then(|u| u.backward))?;
        Ok(Operand { buf, pitch: padded(w.out), order: Order::K })
    }

    /// Rows in e4m3, and the scales of each.
    pub(super) fn e4m3_rows(&self, dev: &mut dyn Device, x: Buf, rows: usize, width: usize) -> Result<(Operand, Buf)> {
        let pitch = padded(width);
        let buf = self.part(Room::Left, Dtype::E4m3, rows * pitch);
        let scales = self.scales.expect("planned where products are in e4m3").part(0, rows);
        let args = [room(x, rows * width), int(width), int(pitch), Arg::Buf(buf), Arg::Buf(scales)];
        dev.launch("to_e4m3_rows", row_each(rows, ROOM), &args)?;
        Ok((Operand { buf, pitch, order: Order::K }, scales))
    }
}

/// Elements of the codes of an `[out, input]` matrix as an operand of this type.
pub(crate) fn unpacked_len(out: usize, input: usize, dtype: Dtype) -> usize {
    if dtype == Dtype::E4m3 { input * padded(out) } else { out * padded(input) }
}

/// Lays a matrix's codes out as an operand: int8 or bf16 `[out, padded(input)]`, or e4m3 `[input, padded(out)]`.
///
/// # Errors
/// A fault of the device.
pub(crate) fn unpack(dev: &mut dyn Device, w: Ternary, to: Buf) -> Result<()> {
    let to_arg = exact(to, to.dtype, unpacked_len(w.out, w.input, to.dtype));
    let kernel = match to.dtype {
        Dtype::E4m3 => {
            let (row_bytes, pitch) = (padded(w.input) / 4, padded(w.out));
            let args = [w.packed_arg(), int(w.out), int(w.input), int(row_bytes), int(pitch), to_arg];
            let grid = [(pitch / 64) as u32, w.input.div_ceil(64) as u32, 1];
            let launch = Launch { grid, threads: THREADS, shared: 64 * (64 + 16) };
            return dev.launch("ternary_to_e4m3_turned", launch, &args);
        }
        Dtype::Bf16 => "ternary_to_halves",
        Dtype::I8 => "ternary_to_bytes",
        other => unreachable!("{other:?} is no type of codes"),
    };
    let words = to.len / 16; // a thread each
    dev.launch(kernel, elementwise(words), &[w.packed_arg(), int(words), to_arg])
}

/// Bytes of the library's own workspace: 32 MiB are NVIDIA's advice for a Hopper card, and few tokens have small products.
pub(crate) fn library_bytes(tokens: usize) -> usize {
    if tokens >= 4096 { 32 << 20 } else { 8 << 20 }
}

/// Whether the library's products are scaled afterwards, from a place of their own.
pub(crate) fn scales_afterwards(gemm: Gemm, products: Products, bf16_stream: bool) -> bool {
    gemm == Gemm::Library && (products == Products::Fp8 || bf16_stream)
}
