//! Matrix products: ternary projections, and the dense ones.

use super::{Products, Rows, THREADS, exact, floats, int, padded, room};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// A ternary matrix `[out, in]` on the device.
#[derive(Clone, Copy, Debug)]
pub struct Ternary {
    /// Two bits a weight, rows padded to 64 columns: `[out, padded(in) / 4]` bytes
    pub packed: Buf,
    /// γ, one float32
    pub gamma: Buf,
    /// Rows
    pub out: usize,
    /// Columns
    pub input: usize,
}

impl Ternary {
    /// Bytes of the packed codes of an `[out, input]` matrix.
    pub fn packed_bytes(out: usize, input: usize) -> usize {
        out * padded(input) / 4
    }

    fn packed_arg(&self) -> Arg {
        exact(self.packed, Dtype::U8, Ternary::packed_bytes(self.out, self.input))
    }
}

/// `y` `[rows, out]` `= (W₃ · q) · (γ · scale)`, plus `addend` where given (which may be `y` itself).
///
/// # Errors
/// A fault of the device.
pub fn ternary_forward(dev: &mut dyn Device, x: Rows, w: Ternary, addend: Option<Buf>, y: Buf) -> Result<()> {
    let rows = x.scales.len;
    let depth = padded(w.input);
    // Small tiles where large ones would be mostly empty.
    let (kernel, tile) = match rows >= 128 && w.out >= 128 {
        true => ("ternary_forward_large", 128),
        false => ("ternary_forward_small", 64),
    };
    let args = [
        exact(x.codes, Dtype::I8, rows * depth),
        exact(x.scales, Dtype::F32, rows),
        int(rows),
        int(depth),
        w.packed_arg(),
        exact(w.gamma, Dtype::F32, 1),
        int(w.out),
        addend.map_or(Arg::Null, |a| room(a, rows * w.out)),
        room(y, rows * w.out),
    ];
    let grid = [w.out.div_ceil(tile) as u32, rows.div_ceil(tile) as u32, 1];
    dev.launch(kernel, Launch { grid, threads: THREADS, shared: 2 * tile as u32 * 80 }, &args)
}

/// Whether rows (`[row][k]`) or k (`[k][row]`) of an operand are outermost in its tile.
#[derive(Clone, Copy)]
enum Order {
    K,
    Row,
}

/// The launch of a product `[m, n]` with operands in these orders.
fn tiles(products: Products, m: usize, n: usize, a: Order, b: Order) -> Launch {
    let (side, depth) = products.pick((64, 16), (128, 32));
    let bytes = |order| match order {
        Order::K => products.tile_bytes(side, depth),
        Order::Row => products.tile_bytes(depth, side),
    };
    let grid = [n.div_ceil(side as usize) as u32, m.div_ceil(side as usize) as u32, 1];
    Launch { grid, threads: THREADS, shared: bytes(a) + bytes(b) }
}

/// `dx` `[rows, in]` (= or +=) `γ · dy · W₃`.
///
/// # Errors
/// A fault of the device.
pub fn ternary_dx(
    dev: &mut dyn Device,
    products: Products,
    dy: Buf,
    rows: usize,
    w: Ternary,
    dx: Buf,
    add: bool,
) -> Result<()> {
    let args = [
        room(dy, rows * w.out),
        int(rows),
        int(w.out),
        w.packed_arg(),
        exact(w.gamma, Dtype::F32, 1),
        int(w.input),
        room(dx, rows * w.input),
        int(add as usize),
    ];
    let launch = tiles(products, rows, w.input, Order::K, Order::Row);
    dev.launch(products.pick("ternary_dx_f32", "ternary_dx_bf16"), launch, &args)
}

/// `dw` `[out, in] += dyᵀ · x` of the quantised rows `x`.
///
/// # Errors
/// A fault of the device.
pub fn ternary_dw(
    dev: &mut dyn Device,
    products: Products,
    dy: Buf,
    x: Rows,
    (out, input): (usize, usize),
    dw: Buf,
) -> Result<()> {
    let rows = x.scales.len;
    let args = [
        room(dy, rows * out),
        exact(x.codes, Dtype::I8, rows * padded(input)),
        exact(x.scales, Dtype::F32, rows),
        int(rows),
        int(out),
        int(input),
        int(padded(input)),
        floats(dw, out * input),
    ];
    let launch = tiles(products, out, input, Order::Row, Order::Row);
    dev.launch(products.pick("ternary_dw_f32", "ternary_dw_bf16"), launch, &args)
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
pub fn dense_forward(dev: &mut dyn Device, products: Products, x: Buf, rows: usize, w: Dense, y: Buf) -> Result<()> {
    let args = [
        room(x, rows * w.input),
        int(rows),
        int(w.input),
        floats(w.weights, w.out * w.input),
        int(w.out),
        room(y, rows * w.out),
    ];
    let launch = tiles(products, rows, w.out, Order::K, Order::K);
    dev.launch(products.pick("dense_forward_f32", "dense_forward_bf16"), launch, &args)
}

/// `dx` `[rows, in]` (= or +=) `dy · W`.
///
/// # Errors
/// A fault of the device.
pub fn dense_dx(
    dev: &mut dyn Device,
    products: Products,
    dy: Buf,
    rows: usize,
    w: Dense,
    dx: Buf,
    add: bool,
) -> Result<()> {
    let args = [
        room(dy, rows * w.out),
        int(rows),
        int(w.out),
        floats(w.weights, w.out * w.input),
        int(w.input),
        room(dx, rows * w.input),
        int(add as usize),
    ];
    let launch = tiles(products, rows, w.input, Order::K, Order::Row);
    dev.launch(products.pick("dense_dx_f32", "dense_dx_bf16"), launch, &args)
}

/// `dw` `[out, in] += dyᵀ · x`.
///
/// # Errors
/// A fault of the device.
pub fn dense_dw(
    dev: &mut dyn Device,
    products: Products,
    dy: Buf,
    x: Buf,
    rows: usize,
    (out, input): (usize, usize),
    dw: Buf,
) -> Result<()> {
    let args = [room(dy, rows * out), room(x, rows * input), int(rows), int(out), int(input), floats(dw, out * input)];
    let launch = tiles(products, out, input, Order::Row, Order::Row);
    dev.launch(products.pick("dense_dw_f32", "dense_dw_bf16"), launch, &args)
}
