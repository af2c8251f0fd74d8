//! Launches of our own kernels: `gemm.cu` in float32, `matmul.cu` on tensor cores.

use crate::arena::Dtype;
use crate::device::{Arg, Device, Launch, Matmul, Operand, Order, Result};
use crate::ops::{Products, THREADS, floats, int};

/// Stages of tiles in shared memory, and bytes of k in each.
const STAGES: u32 = 4;
const DEPTH: u32 = 64;

/// The launch of a float32 product `[m, n]` with operands in these orders.
pub(super) fn tiles_f32(m: usize, n: usize, a: Order, b: Order) -> Launch {
    let (side, depth) = (64, 16);
    let bytes = |order| match order {
        Order::K => Products::F32.tile_bytes(side, depth),
        Order::Row => Products::F32.tile_bytes(depth, side),
    };
    let grid = [n.div_ceil(side as usize) as u32, m.div_ceil(side as usize) as u32, 1];
    Launch { grid, threads: THREADS, shared: bytes(a) + bytes(b) }
}

/// Large tiles, or small ones where large ones would be mostly empty.
fn tiles(p: &Matmul) -> (usize, Launch) {
    let large = p.m >= 128 && p.n >= 128;
    let side = if large { 128 } else { 64 };
    let bytes = |o: Operand| match o.order {
        Order::K => side * (DEPTH + 16),
        Order::Row => DEPTH / 2 * (2 * side + 16), // bf16
    };
    let grid = [p.n.div_ceil(side as usize) as u32, p.m.div_ceil(side as usize) as u32, 1];
    (large as usize, Launch { grid, threads: THREADS, shared: STAGES * (bytes(p.a) + bytes(p.b)) })
}

/// Operands and sizes, as every kernel of `matmul.cu` begins.
fn begin(p: &Matmul) -> [Arg; 7] {
    for o in [p.a, p.b] {
        let bytes = o.pitch as u64 * o.buf.dtype.bytes();
        assert!(bytes.is_multiple_of(16), "rows of {bytes} bytes: {o:?}");
    }
    [Arg::Buf(p.a.buf), int(p.a.pitch), Arg::Buf(p.b.buf), int(p.b.pitch), int(p.m), int(p.n), int(p.k)]
}

/// A product of bf16 operands.
pub(super) fn halves(dev: &mut dyn Device, p: &Matmul) -> Result<()> {
    assert_eq!((p.a.buf.dtype, p.b.buf.dtype), (Dtype::Bf16, Dtype::Bf16));
    let kernels = match (p.a.order, p.b.order) {
        (Order::K, Order::K) => ["matmul_kk_small", "matmul_kk_large"],
        (Order::K, Order::Row) => ["matmul_kr_small", "matmul_kr_large"],
        (Order::Row, Order::Row) => ["matmul_rr_small", "matmul_rr_large"],
        (Order::Row, Order::K) => unreachable!("no product of a step has this form"),
    };
    let alpha = p.alpha.map_or(Arg::Null, Arg::Buf);
    scaled(dev, kernels, p, &[alpha, floats(p.out, p.m * p.n), int(p.add as usize)])
}

/// A product by one of two kernels, for small tiles and for large ones, with what follows its sizes.
pub(super) fn scaled(dev: &mut dyn Device, kernels: [&'static str; 2], p: &Matmul, rest: &[Arg]) -> Result<()> {
    let (which, launch) = tiles(p);
    dev.launch(kernels[which], launch, &[&begin(p)[..], rest].concat())
}
