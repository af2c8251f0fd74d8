use alloc::vec;

use super::*;
use crate::ternary::GradPrecision;
use crate::ternary::GradScratch;

struct Case {
    matrix: TernaryMatrix,
    dy: Vec<f32>,
    q: Vec<i8>,
    scales: Vec<f32>,
    tokens: usize,
}

impl Case {
    /// Rows and channels of very different magnitudes.
    fn new(tokens: usize, out: usize, input: usize) -> Case {
        let mut state = 0x5eed_u64;
        let mut unit = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let w: Vec<f32> = (0..out * input).map(|_| unit()).collect();
        let magnitude = |i: usize| [1.0, 1e-3, 30.0, 1e-6][i % 4];
        let dy = (0..tokens * out).map(|i| unit() * magnitude(i / out) * magnitude(i % out / 3)).collect();
        let q = (0..tokens * input).map(|_| (unit() * 128.0).floor() as i8).collect();
        let scales = (0..tokens).map(|_| 0.01 + 0.005 * unit()).collect();
        Case { matrix: TernaryMatrix::from_weights(&w, out, input), dy, q, scales, tokens }
    }

    fn x(&self) -> Activations<'_> {
        Activations { codes: &self.q, scales: &self.scales }
    }

    /// `(dx, dW)`, started from a value, with the kernels of one level.
    fn run(&self, isa: Isa, start: f32, out: Out) -> (Vec<f32>, Vec<f32>) {
        let (out_dim, in_dim) = (self.matrix.out_dim(), self.matrix.in_dim());
        let (mut dx, mut dw) = (vec![start; self.tokens * in_dim], vec![start; out_dim * in_dim]);
        // Buffers that another product has left dirty.
        let mut scratch = Int16Scratch { words: vec![-1; 7], ..Int16Scratch::default() };
        let level = self.matrix.gradients_int16_with(isa, &self.dy, self.x(), (&mut dx, out), &mut dw, &mut scratch);
        assert_eq!(level, if isa == Isa::Avx512 { Isa::Avx2 } else { isa });
        (dx, dw)
    }

    /// The same from the formulas of the module, an element at a time.
    fn definition(&self, start: f32, out: Out) -> (Vec<f32>, Vec<f32>) {
        let (out_dim, in_dim) = (self.matrix.out_dim(), self.matrix.in_dim());
        let (mut dx, mut dw) = (vec![start; self.tokens * in_dim], vec![start; out_dim * in_dim]);
        // Codes of some values, and the scale.
        let quantise = |v: &[f32]| {
            let amax = v.iter().fold(2f32.powi(-100), |a, v| a.max(v.abs()));
            let codes = v.iter().map(|v| libm::rintf(v * (32_767.0 / amax)) as i64).collect::<Vec<_>>();
            (codes, amax / 32_767.0)
        };
        for t in 0..self.tokens {
            let (r, scale) = quantise(&self.dy[t * out_dim..][..out_dim]);
            let scale = self.matrix.gamma() * scale;
            for i in 0..in_dim {
                for (part, r) in r.chunks(2 * DEPTH).enumerate() {
                    let code = |o: usize| self.matrix.code(part * 2 * DEPTH + o, i) as i64;
                    let sum: i64 = r.iter().enumerate().map(|(o, r)| r * code(o)).sum();
                    let at = &mut dx[t * in_dim + i];
                    *at = sum as f32 * scale + if part > 0 || out == Out::Add { *at } else { 0.0 };
                }
            }
        }
        for first in (0..self.tokens).step_by(CHUNK) {
            let tokens = first..self.tokens.min(first + CHUNK);
            for o in 0..out_dim {
                let column: Vec<f32> = tokens.clone().map(|t| self.dy[t * out_dim + o] * self.scales[t]).collect();
                let (c, scale) = quantise(&column);
                for i in 0..in_dim {
                    let q = tokens.clone().map(|t| self.q[t * in_dim + i] as i64);
                    dw[o * in_dim + i] += c.iter().zip(q).map(|(c, q)| c * q).sum::<i64>() as f32 * scale;
                }
            }
        }
        (dx, dw)
    }
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine())
}

/// Sizes at every block boundary: odd depths, rows, columns, chunks, tasks, depths cut in two.
const SIZES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (5, 7, 3), (65, 130, 66), (511, 6, 129), (513, 49, 64), (1030, 3, 5), (3, 1030, 70), (50, 200, 600)];

#[test]
fn every_isa_gives_the_bits_of_the_definition() {
    for (tokens, out_dim, in_dim) in SIZES {
        let case = Case::new(tokens, out_dim, in_dim);
        for (start, out) in [(f32::NAN, Out::Store), (0.25, Out::Add)] {
            let (dx, _) = case.definition(start, out);
            let (_, dw) = case.definition(0.25, out);
            for isa in levels() {
                assert_eq!(case.run(isa, start, out).0, dx, "dx {isa:?} ({tokens}, {out_dim}, {in_dim})");
                assert_eq!(case.run(isa, 0.25, out).1, dw, "dW {isa:?} ({tokens}, {out_dim}, {in_dim})");
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let case = Case::new(600, 150, 130);
    let alone = case.run(Isa::detect(), 0.0, Out::Store);
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| case.run(Isa::detect(), 0.0, Out::Store)), alone, "{threads}");
    }
}

/// The bounds that the module states, against the exact product in float64.
#[test]
fn the_error_is_what_the_module_says() {
    for (tokens, out_dim, in_dim) in SIZES {
        let case = Case::new(tokens, out_dim, in_dim);
        let (dx, dw) = case.run(Isa::detect(), 0.0, Out::Store);
        let m = &case.matrix;
        let (dy, ulp) = (|t: usize, o: usize| case.dy[t * out_dim + o] as f64, 2f64.powi(-24));
        for t in 0..tokens {
            let amax = (0..out_dim).map(|o| dy(t, o).abs()).fold(0.0, f64::max);
            for i in 0..in_dim {
                let term = |o: usize| dy(t, o) * m.gamma() as f64 * m.code(o, i) as f64;
                let (exact, all): (f64, f64) =
                    ((0..out_dim).map(term).sum(), (0..out_dim).map(|o| term(o).abs()).sum());
                let weights = (0..out_dim).filter(|o| m.code(*o, i) != 0).count() as f64;
                // Half a step a weight; the step itself, the product with its inverse and what becomes of the sum
                // take at most 8 roundings.
                let bound = m.gamma() as f64 * amax / 65_534.0 * weights + 8.0 * ulp * all;
                let got = dx[t * in_dim + i] as f64;
                assert!((got - exact).abs() <= bound, "dx {t} {i}: {got} {exact} {bound:e}");
            }
        }
        for o in 0..out_dim {
            let scaled = |t: usize| dy(t, o) * case.scales[t] as f64;
            for i in 0..in_dim {
                let q = |t: usize| case.q[t * in_dim + i] as f64;
                let (mut exact, mut bound) = (0.0, 0.0);
                for first in (0..tokens).step_by(CHUNK) {
                    let chunk = first..tokens.min(first + CHUNK);
                    let amax = chunk.clone().map(|t| scaled(t).abs()).fold(0.0, f64::max);
                    let codes: f64 = chunk.clone().map(|t| q(t).abs()).sum();
                    exact += chunk.clone().map(|t| scaled(t) * q(t)).sum::<f64>();
                    // As above, and the additions of the chunks.
                    bound += amax / 65_534.0 * codes + 8.0 * ulp * chunk.map(|t| (scaled(t) * q(t)).abs()).sum::<f64>();
                }
                let got = dw[o * in_dim + i] as f64;
                assert!((got - exact).abs() <= bound, "dW {o} {i}: {got} {exact} {bound:e}");
            }
        }
    }
}

/// Nothing wraps where all products are as large as they can be.
#[test]
fn extremes_are_exact() {
    for (tokens, out_dim) in [(CHUNK + 1, 2), (2, 70_000)] {
        for (sign, code) in [(1.0, -128), (-1.0, -128), (1.0, 127)] {
            let matrix = TernaryMatrix::from_weights(&vec![1.0; out_dim], out_dim, 1);
            let dy = vec![sign * 32_767.0; tokens * out_dim];
            let case = Case { matrix, dy, q: vec![code; tokens], scales: vec![1.0; tokens], tokens };
            for isa in levels() {
                let (dx, dw) = case.run(isa, 0.0, Out::Store);
                // Scales of 1; sums of up to 32 bits are rounded to floats a chunk at a time, and those are added.
                let part = |depth: usize| (32_767 * depth as i64) as f32;
                let sum = |depth: usize, cut: usize| {
                    (0..depth).step_by(cut).fold(0.0f32, |sum, first| sum + part((depth - first).min(cut)))
                };
                assert!(dx.iter().all(|v| *v == sign * sum(out_dim, 2 * DEPTH)), "dx {isa:?} {}", dx[0]);
                let chunk = |tokens: usize| sign * (32_767 * code as i64 * tokens as i64) as f32;
                let want = (0..tokens).step_by(CHUNK).map(|t| chunk((tokens - t).min(CHUNK))).sum::<f32>();
                assert!(dw.iter().all(|v| *v == want), "dW {isa:?} {} {want}", dw[0]);
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows_and_stays_where_it_is() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = Case::new(70, 9, 5);
        case.dy[66 * 9 + 4] = bad;
        for isa in levels() {
            let (dx, dw) = case.run(isa, 0.0, Out::Store);
            assert!(dx.iter().enumerate().all(|(i, v)| v.is_finite() == (i / 5 != 66)), "{bad} {isa:?} {dx:?}");
            assert!(dw.iter().enumerate().all(|(i, v)| v.is_finite() == (i / 5 != 4)), "{bad} {isa:?} {dw:?}");
        }
    }
}

#[test]
fn zeros_and_the_smallest_gradients() {
    let mut case = Case::new(3, 4, 2);
    for (value, want) in [(0.0, 0.0), (f32::MIN_POSITIVE / 8.0, 0.0)] {
        case.dy.fill(value);
        let (dx, dw) = case.run(Isa::detect(), 0.0, Out::Store);
        assert!(dx.iter().chain(&dw).all(|v| *v == want), "{value:e}: {dx:?} {dw:?}");
    }
}

#[test]
fn the_scratch_is_as_large_as_planned() {
    for (tokens, out_dim, in_dim) in SIZES.into_iter().chain([(40, 300, 70_000)]) {
        let case = Case::new(tokens, out_dim, in_dim);
        let mut scratch = GradScratch::new(GradPrecision::Int16);
        let (mut dx, mut dw) = (vec![0.0; tokens * in_dim], vec![0.0; out_dim * in_dim]);
        case.matrix.gradients(&case.dy, case.x(), (&mut dx, Out::Store), &mut dw, &mut scratch);
        let s = &scratch.int16;
        let bytes = 4 * (s.words.capacity() + s.scales.capacity() + s.largest.capacity())
            + size_of::<Line>() * s.packed.capacity();
        let planned = GradScratch::planned_bytes(GradPrecision::Int16, tokens, [(out_dim, in_dim)].into_iter());
        assert_eq!(bytes, planned, "({tokens}, {out_dim}, {in_dim})");
    }
}
