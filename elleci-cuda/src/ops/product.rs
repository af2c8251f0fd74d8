//! Matrix products: ternary projections, and the dense ones.
//!
//! In float32 every product is one kernel that reads its operands where they lie (`gemm.cu`). On tensor cores the operands are first
//! laid out in a [`Workspace`] (`operands.cu`), and then multiplied by the kernels of `matmul.cu` or by the device's library.

use super::{Products, Rows, exact, floats, int, padded, room};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Matmul, Operand, Order, Result};

mod operands;
mod own;

pub(crate) use operands::{Needs, library_bytes, scales_afterwards, unpack, unpacked_len};
pub use operands::{Room, Workspace};

/// Who multiplies the large products on tensor cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gemm {
    /// The kernels of `matmul.cu`.
    Own,
    /// The device's library: [`Device::matmul`].
    Library,
}

/// How products are made: in which arithmetic, by whom, and where their operands lie.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// Arithmetic.
    pub products: Products,
    /// Who multiplies.
    pub gemm: Gemm,
    /// Memory for operands.
    pub workspace: Workspace,
}

/// A ternary matrix `[out, in]` on the device.
#[derive(Clone, Copy, Debug)]
pub struct Ternary {
    /// Two bits a weight, rows padded to 64 columns: `[out, padded(in) / 4]` bytes
    pub packed: Buf,
    /// γ, one float32
    pub gamma: Buf,
    /// The operands of its products, where they are kept
    pub unpacked: Option<Unpacked>,
    /// Rows
    pub out: usize,
    /// Columns
    pub input: usize,
}

/// Ternary codes as the products read them, `[out, padded(in)]` but where it says otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Unpacked {
    /// int8: of the forward product
    pub bytes: Buf,
    /// bf16, or e4m3 `[in, padded(out)]`: of the gradient's; none where that is float32
    pub backward: Option<Buf>,
}

impl Ternary {
    /// Bytes of the packed codes of an `[out, input]` matrix.
    pub fn packed_bytes(out: usize, input: usize) -> usize {
        out * padded(input) / 4
    }

    pub(crate) fn packed_arg(&self) -> Arg {
        exact(self.packed, Dtype::U8, Ternary::packed_bytes(self.out, self.input))
    }
}

/// A gradient and whether it is added to what its buffer holds.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// `[rows, in]`, float32
    pub buf: Buf,
    /// += instead of =
    pub add: bool,
}

/// `y` `[rows, out]` `= (W₃ · q) · (γ · scale)`, plus `addend` where given. `y` and `addend` are float32 or bf16, and not the same.
///
/// # Errors
/// A fault of the device.
pub fn ternary_forward(
    dev: &mut dyn Device,
    e: &Engine,
    x: Rows,
    w: Ternary,
    addend: Option<Buf>,
    y: Buf,
) -> Result<()> {
    let (rows, depth) = (x.scales.len, padded(w.input));
    assert!(addend.is_none_or(|a| a.at != y.at), "sums may lie where y does");
    let codes = e.workspace.ternary_bytes(dev, w)?;
    let a = Operand { buf: x.codes.part(0, rows * depth), pitch: depth, order: Order::K };
    let product = |out| Matmul { a, b: codes, m: rows, n: w.out, k: depth, alpha: None, add: false, out };
    let scales = exact(x.scales, Dtype::F32, rows);
    let gamma = exact(w.gamma, Dtype::F32, 1);
    let y_arg = floats(y, rows * w.out);
    let addend_arg = addend.map_or(y_arg, |a| floats(a, rows * w.out));
    let add = int(addend.is_some() as usize);
    // The library takes int8 where rows of its result are multiples of 4.
    if e.gemm == Gemm::Library && w.out.is_multiple_of(4) {
        let place = if y.dtype == Dtype::F32 { y } else { e.workspace.product() };
        let sums = place.part(0, rows * w.out).with(Dtype::I32);
        dev.matmul(&product(sums), e.workspace.library())?;
        let args = [Arg::Buf(sums), int(w.out), scales, gamma, addend_arg, add, y_arg];
        return dev.launch("scale_sums", operands::row_each(rows, 0), &args);
    }
    own::scaled(dev, ["matmul_s8_small", "matmul_s8_large"], &product(y), &[scales, gamma, addend_arg, add, y_arg])
}

/// Both gradients of a projection of the quantised rows `x`: `dw` `[out, in] += dyᵀ · x`, and `dx` `[rows, in]` (= or +=)
/// `γ · dy · W₃`, straight through the quantiser.
///
/// # Errors
/// A fault of the device.
pub fn ternary_backward(
    dev: &mut dyn Device,
    e: &Engine,
    dy: Buf,
    x: Rows,
    w: Ternary,
    dw: Buf,
    dx: Gradient,
) -> Result<()> {
    let rows = x.scales.len;
    let (gamma, scales) = (exact(w.gamma, Dtype::F32, 1), exact(x.scales, Dtype::F32, rows));
    let (dy_arg, dx_arg, add) = (room(dy, rows * w.out), room(dx.buf, rows * w.input), int(dx.add as usize));
    if e.products == Products::F32 {
        let codes = exact(x.codes, Dtype::I8, rows * padded(w.input));
        let (dw, pitch) = (floats(dw, w.out * w.input), int(padded(w.input)));
        let args = [dy_arg, codes, scales, int(rows), int(w.out), int(w.input), pitch, dw];
        dev.launch("ternary_dw_f32", own::tiles_f32(w.out, w.input, Order::Row, Order::Row), &args)?;
        let args = [dy_arg, int(rows), int(w.out), w.packed_arg(), gamma, int(w.input), dx_arg, add];
        return dev.launch("ternary_dx_f32", own::tiles_f32(rows, w.input, Order::K, Order::Row), &args);
    }
    let g = e.workspace.halves(dev, Room::Left, dy, rows, w.out)?;
    let b = e.workspace.code_halves(dev, x, w.input)?;
    weight_gradient(dev, e, g, b, (w.out, w.input, rows), dw)?;
    if e.products == Products::Fp8 {
        return e4m3_dx(dev, e, dy, rows, w, dx);
    }
    let b = e.workspace.ternary_halves(dev, w)?;
    let product = Matmul {
        a: g,
        b,
        m: rows,
        n: w.input,
        k: w.out,
        alpha: Some(w.gamma),
        add: dx.add,
        out: dx.buf.part(0, rows * w.input),
    };
    multiply(dev, e, &product)
}

/// `dx` in e4m3: every token's gradient with a scale of its own, against the codes, which are exact.
fn e4m3_dx(dev: &mut dyn Device, e: &Engine, dy: Buf, rows: usize, w: Ternary, dx: Gradient) -> Result<()> {
    let (a, scales) = e.workspace.e4m3_rows(dev, dy, rows, w.out)?;
    let b = e.workspace.ternary_e4m3(dev, w)?;
    let len = rows * w.input;
    let (gamma, scales, add) = (exact(w.gamma, Dtype::F32, 1), exact(scales, Dtype::F32, rows), int(dx.add as usize));
    let product = |out| Matmul { a, b, m: rows, n: w.input, k: w.out, alpha: None, add: false, out };
    let dx_arg = room(dx.buf, len);
    // The library takes e4m3 where both sides are multiples of 16; k is padded.
    if e.gemm == Gemm::Library && w.input.is_multiple_of(16) {
        let place = if dx.add { e.workspace.product() } else { dx.buf }.part(0, len);
        dev.matmul(&Matmul { k: padded(w.out), ..product(place) }, e.workspace.library())?;
        let args = [Arg::Buf(place), int(w.input), scales, gamma, dx_arg, add];
        return dev.launch("scale_rows", operands::row_each(rows, 0), &args);
    }
    let kernels = ["matmul_e4m3_small", "matmul_e4m3_large"];
    own::scaled(dev, kernels, &product(dx.buf), &[scales, gamma, dx_arg, add])
}

/// `dw` `[out, in] += gᵀ · x`, both `[rows, ..]`.
fn weight_gradient(
    dev: &mut dyn Device,
    e: &Engine,
    g: Operand,
    x: Operand,
    (out, input, rows): (usize, usize, usize),
    dw: Buf,
) -> Result<()> {
    assert_eq!(dw.len, out * input);
    let turned = |o: Operand| Operand { order: Order::Row, ..o };
    let product = Matmul { a: turned(g), b: turned(x), m: out, n: input, k: rows, alpha: None, add: true, out: dw };
    multiply(dev, e, &product)
}

/// A product of bf16 operands.
fn multiply(dev: &mut dyn Device, e: &Engine, product: &Matmul) -> Result<()> {
    match e.gemm {
        Gemm::Library => dev.matmul(product, e.workspace.library()),
        Gemm::Own => own::halves(dev, product),
    }
}

/// A full-precision matrix `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct Dense {
    /// float32 or bf16
    pub weights: Buf,
    /// Rows
    pub out: usize,
    /// Columns
    pub input: usize,
}

/// `y` `[rows, out] = x · Wᵀ`.
///
/// # Errors
/// A fault of the device.
pub fn dense_forward(dev: &mut dyn Device, e: &Engine, x: Buf, rows: usize, w: Dense, y: Buf) -> Result<()> {
    let (x_arg, y_arg) = (room(x, rows * w.input), room(y, rows * w.out));
    if e.products == Products::F32 {
        let weights = floats(w.weights, w.out * w.input);
        let args = [x_arg, int(rows), int(w.input), weights, int(w.out), y_arg];
        return dev.launch("dense_forward_f32", own::tiles_f32(rows, w.out, Order::K, Order::K), &args);
    }
    let a = e.workspace.halves(dev, Room::Left, x, rows, w.input)?;
    let b = e.workspace.weight_halves(dev, w)?;
    let out = y.part(0, rows * w.out);
    multiply(dev, e, &Matmul { a, b, m: rows, n: w.out, k: w.input, alpha: None, add: false, out })
}

/// Both gradients of `y = x · Wᵀ`: `dw` `[out, in] += dyᵀ · x`, and `dx` `[rows, in]` (= or +=) `dy · W`.
///
/// # Errors
/// A fault of the device.
pub fn dense_backward(
    dev: &mut dyn Device,
    e: &Engine,
    dy: Buf,
    (x, rows): (Buf, usize),
    w: Dense,
    dw: Buf,
    dx: Gradient,
) -> Result<()> {
    let (dy_arg, dx_arg) = (room(dy, rows * w.out), room(dx.buf, rows * w.input));
    if e.products == Products::F32 {
        let weights = floats(w.weights, w.out * w.input);
        let (out, input) = (int(w.out), int(w.input));
        let args = [dy_arg, int(rows), out, weights, input, dx_arg, int(dx.add as usize)];
        dev.launch("dense_dx_f32", own::tiles_f32(rows, w.input, Order::K, Order::Row), &args)?;
        let args = [dy_arg, room(x, rows * w.input), int(rows), out, input, floats(dw, w.out * w.input)];
        return dev.launch("dense_dw_f32", own::tiles_f32(w.out, w.input, Order::Row, Order::Row), &args);
    }
    let g = e.workspace.halves(dev, Room::Left, dy, rows, w.out)?;
    let b = e.workspace.weight_halves(dev, w)?;
    let b = Operand { order: Order::Row, ..b };
    let out = dx.buf.part(0, rows * w.input);
    multiply(dev, e, &Matmul { a: g, b, m: rows, n: w.input, k: w.out, alpha: None, add: dx.add, out })?;
    let x = e.workspace.halves(dev, Room::Right, x, rows, w.input)?;
    weight_gradient(dev, e, g, x, (w.out, w.input, rows), dw)
}
