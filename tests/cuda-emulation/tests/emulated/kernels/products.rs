//! Ternary weights and all matrix products.

use elleci_core::ternary::{TernaryMatrix, quantize_row};
use elleci_cuda::arena::{Buf, Dtype};
use elleci_cuda::device::{Arg, Device, Launch};
use elleci_cuda::ops::product::{self, Dense, Engine, Gemm, Gradient, Ternary, Workspace};
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
            tensors.push((weights, Ternary { packed, gamma: bench.room(1), unpacked: None, out, input }));
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
        unpacked: None,
        out,
        input,
    };
    Projection { rows, codes, scales, matrix, x, w }
}

/// Every way to multiply: in float32, on tensor cores by our own kernels and by the device's library.
const ENGINES: [(Products, Gemm); 5] = [
    (Products::F32, Gemm::Own),
    (Products::Bf16, Gemm::Own),
    (Products::Bf16, Gemm::Library),
    (Products::Fp8, Gemm::Own),
    (Products::Fp8, Gemm::Library),
];

/// The distance that each may have; see the head of `kernels`. e4m3 has 3 bits of mantissa: an error of up to 2^-4 of the value and
/// 2^-4/√3 = 0.036 rms, uniform; it is rounded alone, its other operand is exact, and sums keep the relative size.
fn bound(products: Products) -> f64 {
    match products {
        Products::F32 => F32,
        Products::Bf16 => BF16,
        Products::Fp8 => 0.045,
    }
}

/// An engine with room for operands of `left` and `right` bytes and a product of `wide` elements.
fn engine(bench: &mut Bench, (products, gemm): (Products, Gemm), left: usize, right: usize, wide: usize) -> Engine {
    let workspace = Workspace {
        left: bench.empty(Dtype::U8, left),
        right: bench.empty(Dtype::U8, right),
        scales: Some(bench.room(200)),
        product: Some(bench.room(wide)),
        library: Some(bench.empty(Dtype::U8, 1024)),
    };
    Engine { products, gemm, workspace }
}

/// The integers are the core's, and so are the bits of the result; small and large tiles, ragged edges, with and without the
/// residual stream added, by our own kernel and by the library (which leaves products of odd width to our own).
#[test]
fn the_forward_has_the_cores_bits() {
    let mut numbers = Numbers::new(2);
    for gemm in [Gemm::Own, Gemm::Library] {
        for (rows, out, input) in [(1, 1, 1), (65, 70, 100), (130, 140, 64), (128, 128, 300)] {
            let mut bench = Bench::new();
            let p = projection(&mut bench, &mut numbers, rows, out, input);
            let addend = numbers.vec(rows * out, 1.0);
            let (add, y, sum) = (bench.floats(&addend), bench.room(rows * out), bench.room(rows * out));
            let halves: Vec<bf16> = addend.iter().map(|v| bf16::from_f32(*v)).collect();
            let half_bytes = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
            let stream = bench.bytes(Dtype::Bf16, rows * out, half_bytes);
            let next = bench.empty(Dtype::Bf16, rows * out);
            let e = engine(&mut bench, (Products::F32, gemm), 0, out * padded(input), rows * out);
            let mut device = bench.start(11);
            let mut want = vec![0.0; rows * out];
            p.matrix.forward(&p.codes, &p.scales, rows, &mut want);
            product::ternary_forward(&mut device, &e, p.x, p.w, None, y).unwrap();
            assert_eq!(read(&mut device, y), want);
            product::ternary_forward(&mut device, &e, p.x, p.w, Some(add), sum).unwrap();
            let both: Vec<f32> = want.iter().zip(&addend).map(|(w, a)| a + w).collect();
            assert_eq!(read(&mut device, sum), both);
            // The residual stream in bf16: the same sums, rounded once.
            product::ternary_forward(&mut device, &e, p.x, p.w, Some(stream), next).unwrap();
            let both: Vec<u8> =
                want.iter().zip(&halves).flat_map(|(w, a)| bf16::from_f32(a.to_f32() + w).to_le_bytes()).collect();
            assert_eq!(read_bytes(&mut device, next), both);
        }
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
    for way in ENGINES {
        for (rows, out, input) in [(5, 3, 7), (70, 65, 130), (130, 80, 144)] {
            let mut bench = Bench::new();
            let p = projection(&mut bench, &mut numbers, rows, out, input);
            let dy = numbers.vec(rows * out, 1.0);
            let start = numbers.vec(out * input, 0.5);
            let (dy_buf, dw, dx) = (bench.floats(&dy), bench.floats(&start), bench.room(rows * input));
            let (left, right) = (2 * rows * padded(out), 2 * rows.max(padded(out)) * padded(input));
            let e = engine(&mut bench, way, left, right, rows * input);
            let mut device = bench.start(13);
            let gamma = p.matrix.gamma();
            let set = Gradient { buf: dx, add: false };
            product::ternary_backward(&mut device, &e, dy_buf, p.x, p.w, dw, set).unwrap();
            let x = |n: usize, k: usize| p.codes[k * input + n] as f32 * p.scales[k];
            let mut want = plain(out, input, p.rows, |m, k| dy[k * out + m], x);
            want.iter_mut().zip(&start).for_each(|(w, s)| *w += s);
            // The gradient of the weights is a product of bf16 in e4m3's engine too.
            close("dw", &read(&mut device, dw), &want, bound(way.0).min(BF16));
            let want = plain(rows, input, out, |m, k| dy[m * out + k], |n, k| gamma * p.matrix.code(k, n) as f32);
            close("dx", &read(&mut device, dx), &want, bound(way.0));
            let added = Gradient { buf: dx, add: true };
            product::ternary_backward(&mut device, &e, dy_buf, p.x, p.w, dw, added).unwrap();
            let twice: Vec<f32> = want.iter().map(|v| 2.0 * v).collect();
            close("dx twice", &read(&mut device, dx), &twice, bound(way.0));
        }
    }
}

#[test]
fn dense_products_with_either_master() {
    let mut numbers = Numbers::new(4);
    for way in ENGINES {
        // Rows of whole 16 bytes are operands as they lie, where masters are bf16; others are copied.
        for (bf16_masters, input) in [(false, 70), (true, 70), (true, 136)] {
            let bound = bound(way.0).min(BF16);
            let (rows, out) = (67, 35);
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
            let bytes = 2 * rows * padded(input);
            let e = engine(&mut bench, way, bytes, bytes, 1);
            let mut device = bench.start(17);
            let dense = Dense { weights, out, input };
            product::dense_forward(&mut device, &e, x_buf, rows, dense, y).unwrap();
            let want = plain(rows, out, input, |m, k| x[m * input + k], |n, k| w[n * input + k]);
            close("y", &read(&mut device, y), &want, bound);
            let set = Gradient { buf: dx, add: false };
            product::dense_backward(&mut device, &e, dy_buf, (x_buf, rows), dense, dw_bf16, set).unwrap();
            let want = plain(rows, input, out, |m, k| dy[m * out + k], |n, k| w[k * input + n]);
            close("dx", &read(&mut device, dx), &want, bound);
            let mut want = plain(out, input, rows, |m, k| dy[k * out + m], |n, k| x[k * input + n]);
            let got: Vec<f32> = read_bytes(&mut device, dw_bf16)
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect();
            // The sum itself is rounded to bf16 here: 2^-9 at most.
            close("dw in bf16", &got, &want, bound + 2e-3);
            product::dense_backward(&mut device, &e, dy_buf, (x_buf, rows), dense, dw, set).unwrap();
            want.iter_mut().for_each(|v| *v += 1.0);
            close("dw", &read(&mut device, dw), &want, bound);
        }
    }
}

/// Every e4m3 is itself, numbers between two of them go to the nearer, and all that is larger than the largest becomes that.
#[test]
fn e4m3_is_rounded_to_the_nearest() {
    let values: Vec<f32> = (0..127u8).map(elleci_cuda_emulation::e4m3).collect();
    let middles = values.windows(2).map(|v| (v[0] + v[1]) / 2.0);
    // The largest of a row becomes 448: with it, codes are the values themselves.
    let mut row: Vec<f32> = values.iter().copied().chain(middles).chain([-1.0, -0.001, -3.3]).collect();
    row.extend([448.0, f32::MIN_POSITIVE]);
    let width = row.len();
    let mut bench = Bench::new();
    let (x, out) = (bench.floats(&row), bench.empty(Dtype::U8, padded(width)));
    let scales = bench.room(1);
    let mut device = bench.start(5);
    let launch = Launch { grid: [1, 1, 1], threads: 256, shared: 64 };
    let int = |v: usize| Arg::Int(v as i32);
    let args = [Arg::Buf(x), int(width), int(padded(width)), Arg::Buf(out), Arg::Buf(scales)];
    device.launch("to_e4m3_rows", launch, &args).unwrap();
    let codes = read_bytes(&mut device, out);
    assert_eq!(read(&mut device, scales), [1.0]);
    for (i, v) in row.iter().enumerate() {
        let got = elleci_cuda_emulation::e4m3(codes[i]);
        let nearest = values.iter().map(|c| (c - v.abs()).abs()).fold(f32::INFINITY, f32::min);
        assert!((got.abs() - v.abs()).abs() <= nearest && got * v >= 0.0, "{v} became {got}");
        // A middle goes to the even code.
        if (127..253).contains(&i) {
            assert_eq!(codes[i] % 2, 0, "{v} became {got}");
        }
    }
    assert!(codes[width..].iter().all(|c| *c == 0), "padding");
}
