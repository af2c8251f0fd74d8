//! The chunked scan, against the recurrence in float64.

use elleci_core::ops::ssd::{SsdShape, reference};
use elleci_cuda::ops::Products;
use elleci_cuda::ops::ssd::{self, Input, Saved, Scratch, Shape, Towards};

use super::{BF16, F32};
use crate::machine::{Bench, Numbers, close, read};

fn check(products: Products, bound: f64, s: Shape) {
    let mut numbers = Numbers::new(s.seq as u64);
    let (t, width) = (s.tokens(), s.inner() + 2 * s.d_state);
    let xbc = numbers.vec(t * width, 1.0);
    // Step sizes and rates as after initialisation: decays from nearly 1 to 0.2 a step.
    let dt: Vec<f32> = numbers.vec(t * s.heads, 1.0).iter().map(|v| 0.001 + 0.05 * (v + 1.0)).collect();
    let a_log: Vec<f32> = numbers.vec(s.heads, 1.3).iter().map(|v| v + 1.4).collect();
    let skip = numbers.vec(s.heads, 1.0);
    let dy = numbers.vec(t * s.inner(), 1.0);
    let mut bench = Bench::new();
    let input = Input {
        xbc: bench.floats(&xbc),
        dt: bench.floats(&dt),
        a_log: bench.floats(&a_log),
        skip: bench.floats(&skip),
    };
    let saved = Saved { states: bench.room(s.states_len()), decay: bench.room(s.chunk_heads()) };
    let (y, dy_buf) = (bench.room(dy.len()), bench.floats(&dy));
    let scratch = Scratch {
        dstates: bench.room(s.states_len()),
        dbc: bench.room(s.dbc_len()),
        da_log: bench.room(s.chunk_heads()),
        dskip: bench.room(s.chunk_heads()),
    };
    let towards = Towards {
        dxbc: bench.room(xbc.len()),
        ddt: bench.room(dt.len()),
        a_log: bench.floats(&vec![0.0; s.heads]),
        skip: bench.floats(&vec![0.0; s.heads]),
    };
    let mut device = bench.start(43);
    ssd::forward(&mut device, products, s, input, saved, y).unwrap();
    ssd::backward(&mut device, products, s, input, saved, dy_buf, scratch, towards).unwrap();

    let shape = SsdShape { batch: s.batch, seq: s.seq, heads: s.heads, head_dim: s.head_dim, d_state: s.d_state };
    let f64s = |v: &[f32]| v.iter().map(|v| *v as f64).collect::<Vec<_>>();
    let f32s = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<_>>();
    let a: Vec<f64> = a_log.iter().map(|v| -(*v as f64).exp()).collect();
    let (xbc, dt, skip, dy) = (f64s(&xbc), f64s(&dt), f64s(&skip), f64s(&dy));
    close("y", &read(&mut device, y), &f32s(&reference::forward(shape, &xbc, &dt, &a, &skip)), bound);
    let g = reference::backward(shape, &xbc, &dt, &a, &skip, &dy);
    close("dxbc", &read(&mut device, towards.dxbc), &f32s(&g.dxbc), bound);
    // A step's exponent acts on all later steps of its chunk: 64 sums that partly cancel.
    close("ddt", &read(&mut device, towards.ddt), &f32s(&g.ddt), 4.0 * bound);
    let da_log: Vec<f32> = g.da.iter().zip(&a).map(|(d, a)| (d * a) as f32).collect();
    close("a_log", &read(&mut device, towards.a_log), &da_log, 4.0 * bound);
    close("skip", &read(&mut device, towards.skip), &f32s(&g.dd), bound);
}

#[test]
fn scan_in_float32() {
    check(Products::F32, F32, Shape { batch: 2, seq: 70, heads: 3, head_dim: 5, d_state: 6 });
    check(Products::F32, F32, Shape { batch: 1, seq: 1, heads: 1, head_dim: 1, d_state: 1 });
    // Three chunks, two groups of heads.
    check(Products::F32, F32, Shape { batch: 1, seq: 150, heads: 9, head_dim: 4, d_state: 9 });
}

#[test]
fn scan_on_tensor_cores() {
    check(Products::Bf16, BF16, Shape { batch: 1, seq: 100, heads: 2, head_dim: 64, d_state: 128 });
}
