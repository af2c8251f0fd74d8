//! Ternary weights and all matrix products.

use elleci_core::ternary::{TernaryMatrix, quantize_row};
use elleci_cuda::arena::{Buf, Dtype};
use elleci_cuda::device::Device;
use elleci_cuda::ops::product::{self, Dense, Ternary};
use elleci_cuda::ops::ternary::{ENTRY, Quantizer, partials};
use elleci_cuda::ops::{Products, Rows, padded};
use half::bf16;

use super::{BF16, F32};
use crate::machine::{Bench, Numbers, close, read, read_bytes};

/// The codes of a packed matrix, one by one.
fn unpacked(packed: &[u8], out: usize, input: usize) -> Vec<i8> {
    let row = padded(input) / 4;
    let code = |r: usize, c: usize| [0, 1, 2, -1][(packed[r * row + c / 4] >> (c % 4 * 2) & 3) as usize];
    for r in 0..out {
        for c in input..padded(input) {
            assert_eq!(code(r, c), 0, "padding at ({r}, {c})");
        }
    }
    (0..out * input).map(|i| code(i / input, i % input)).collect()
}

fn packed(m: &TernaryMatrix) -> Vec<u8> {
    let row = padded(m.in_dim()) / 4;
    let mut bytes = vec![0u8; m.out_dim() * row];
    for r in 0..m.out_dim() {
        for c in 0..m.in_dim() {
            bytes[r * row + c / 4] |= (m.code(r, c) as u8 & 3) << (c % 4 * 2);
        }
    }
    bytes
}

/// γ to the bit, and every code, of several tensors at once: float32 and bf16 masters, sizes that fill no block.
#[test]
fn ternary_forms_equal_the_core() {
    let sizes = [(3, 5), (70, 130), (257, 300), (1, 64)];
    let mut numbers = Numbers::new(1);
    for bf16_masters in [false, true] {
        let mut bench = Bench::new();
        let (mut tensors, mut want) = (Vec::new(), Vec::new());
        for (i, (out, input)) in sizes.into_iter().enumerate() {
            let mut w = numbers.vec(out * input, 0.05 * (i + 1) as f32);
            let weights = if bf16_masters {
                let halves: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
                w = halves.iter().map(|v| v.to_f32()).collect();
                bench.bytes(Dtype::Bf16, w.len(), halves.iter().flat_map(|v| v.to_le_bytes()).collect())
            } else {
                bench.floats(&w)
            };
            let packed = bench.empty(Dtype::U8, Ternary::packed_bytes(out, input));
            tensors.push((weights, Ternary { packed, gamma: bench.room(1), out, input }));
            want.push(TernaryMatrix::from_weights(&w, out, input));
        }
        let table = bench.empty(Dtype::U8, tensors.len() * ENTRY);
        let partial = bench.empty(Dtype::F64, sizes.iter().map(|(o, i)| partials(*o, *i)).sum());
        let mut device = bench.start(7);
        let (quantizer, bytes) = Quantizer::new(&tensors, table, partial, device.base());
        device.write(table, &bytes).unwrap();
        quantizer.run(&mut device).unwrap();
        for ((_, form), want) in tensors.iter().zip(&want) {
            assert_eq!(read(&mut device, form.gamma)[0].to_bits(), want.gamma().to_bits());
            let codes = unpacked(&read_bytes(&mut device, form.packed), form.out, form.input);
            for (i, code) in codes.iter().enumerate() {
                assert_eq!(*code, want.code(i / form.input, i % form.input), "{i}");
            }
        }
    }
}

/// Quantised rows, padded, and the matrix that they meet, in a bench.
struct Projection {
    rows: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    matrix: TernaryMatrix,
    x: Rows,
    w: Ternary,
}

fn projection(bench: &mut Bench, numbers: &mut Numbers, rows: usize, out: usize, input: usize) -> Projection {
    let (mut codes, mut scales, mut wide) = (vec![0i8; rows * input], vec![], vec![0u8; rows * padded(input)]);
    for (r, row) in codes.chunks_exact_mut(input).enumerate() {
        scales.push(quantize_row(&numbers.vec(input, 2.0), row));
        for (i, code) in row.iter().enumerate() {
            wide[r * padded(input) + i] = *code as u8;
        }
    }
    let matrix = TernaryMatrix::from_weights(&numbers.vec(out * input, 0.02), out, input);
    let x =
        Rows { codes: bench.bytes(Dtype::I8, wide.len(), wide), scales: bench.floats(&scales), rstd: bench.room(1) };
    let bytes = packed(&matrix);
    let w = Ternary {
        packed: bench.bytes(Dtype::U8, bytes.len(), bytes),
        gamma: bench.floats(&[matrix.gamma()]),
        out,
        input,
    };
    Projection { rows, codes, scales, matrix, x, w }
}

/// The integers are the core's, and so are the bits of the result; small and large tiles, ragged edges, with and without the
/// residual stream added.
#[test]
fn the_forward_has_the_cores_bits() {
    let mut numbers = Numbers::new(2);
    for (rows, out, input) in [(1, 1, 1), (65, 70, 100), (130, 140, 64), (128, 128, 200)] {
        let mut bench = Bench::new();
        let p = projection(&mut bench, &mut numbers, rows, out, input);
        let addend = numbers.vec(rows * out, 1.0);
        let (add, y, sum) = (bench.floats(&addend), bench.room(rows * out), bench.room(rows * out));
        let mut device = bench.start(11);
        let mut want = vec![0.0; rows * out];
        p.matrix.forward(&p.codes, &p.scales, rows, &mut want);
        product::ternary_forward(&mut device, p.x, p.w, None, y).unwrap();
        assert_eq!(read(&mut device, y), want);
        product::ternary_forward(&mut device, p.x, p.w, Some(add), sum).unwrap();
        let want: Vec<f32> = want.iter().zip(&addend).map(|(w, a)| a + w).collect();
        assert_eq!(read(&mut device, sum), want);
    }
}

/// `Σ_k a(m, k) · b(n, k)` in float64.
fn plain(
    m: usize,
    n: usize,
    depth: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let sum = |i: usize| (0..depth).map(|k| a(i / n, k) as f64 * b(i % n, k) as f64).sum::<f64>() as f32;
    (0..m * n).map(sum).collect()
}

#[test]
fn ternary_gradients() {
    let mut numbers = Numbers::new(3);
    for (products, bound) in [(Products::F32, F32), (Products::Bf16, BF16)] {
        for (rows, out, input) in [(5, 3, 7), (70, 65, 130)] {
            let mut bench = Bench::new();
            let p = projection(&mut bench, &mut numbers, rows, out, input);
            let dy = numbers.vec(rows * out, 1.0);
            let start = numbers.vec(out * input, 0.5);
            let (dy_buf, dw, dx) = (bench.floats(&dy), bench.floats(&start), bench.room(rows * input));
            let mut device = bench.start(13);
            let gamma = p.matrix.gamma();
            let want = plain(rows, input, out, |m, k| dy[m * out + k], |n, k| gamma * p.matrix.code(k, n) as f32);
            product::ternary_dx(&mut device, products, dy_buf, rows, p.w, dx, false).unwrap();
            close("dx", &read(&mut device, dx), &want, bound);
            product::ternary_dx(&mut device, products, dy_buf, rows, p.w, dx, true).unwrap();
            let twice: Vec<f32> = want.iter().map(|v| 2.0 * v).collect();
            close("dx twice", &read(&mut device, dx), &twice, bound);
            let x = |n: usize, k: usize| p.codes[k * input + n] as f32 * p.scales[k];
            let mut want = plain(out, input, p.rows, |m, k| dy[k * out + m], x);
            want.iter_mut().zip(&start).for_each(|(w, s)| *w += s);
            product::ternary_dw(&mut device, products, dy_buf, p.x, (out, input), dw).unwrap();
            close("dw", &read(&mut device, dw), &want, bound);
        }
    }
}

#[test]
fn dense_products_with_either_master() {
    let mut numbers = Numbers::new(4);
    for (products, bound) in [(Products::F32, F32), (Products::Bf16, BF16)] {
        for bf16_masters in [false, true] {
            let (rows, out, input) = (67, 35, 70);
            let (x, dy) = (numbers.vec(rows * input, 1.0), numbers.vec(rows * out, 1.0));
            let halves: Vec<bf16> = numbers.vec(out * input, 0.1).iter().map(|v| bf16::from_f32(*v)).collect();
            let w: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            let mut bench = Bench::new();
            let bits = |v: &[bf16]| v.iter().flat_map(|v| v.to_le_bytes()).collect();
            let weights: Buf =
                if bf16_masters { bench.bytes(Dtype::Bf16, w.len(), bits(&halves)) } else { bench.floats(&w) };
            let (x_buf, dy_buf) = (bench.floats(&x), bench.floats(&dy));
            let (y, dx) = (bench.room(rows * out), bench.room(rows * input));
            let dw = bench.floats(&vec![1.0; out * input]);
            let dw_bf16 = bench.bytes(Dtype::Bf16, out * input, vec![0; 2 * out * input]);
            let mut device = bench.start(17);
            let dense = Dense { weights, out, input };
            product::dense_forward(&mut device, products, x_buf, rows, dense, y).unwrap();
            let want = plain(rows, out, input, |m, k| x[m * input + k], |n, k| w[n * input + k]);
            close("y", &read(&mut device, y), &want, bound);
            product::dense_dx(&mut device, products, dy_buf, rows, dense, dx, false).unwrap();
            let want = plain(rows, input, out, |m, k| dy[m * out + k], |n, k| w[k * input + n]);
            close("dx", &read(&mut device, dx), &want, bound);
            let mut want = plain(out, input, rows, |m, k| dy[k * out + m], |n, k| x[k * input + n]);
            product::dense_dw(&mut device, products, dy_buf, x_buf, rows, (out, input), dw_bf16).unwrap();
            let got: Vec<f32> = read_bytes(&mut device, dw_bf16)
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect();
            // The sum itself is rounded to bf16 here: 2^-9 at most.
            close("dw in bf16", &got, &want, bound + 2e-3);
            product::dense_dw(&mut device, products, dy_buf, x_buf, rows, (out, input), dw).unwrap();
            want.iter_mut().for_each(|v| *v += 1.0);
            close("dw", &read(&mut device, dw), &want, bound);
        }
    }
}
