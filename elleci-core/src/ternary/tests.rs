use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::ops::matmul::Out;
use crate::simd::Isa;

/// Levels that this machine runs.
pub(super) fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine())
}

/// Weights whose codes are the given ones: γ is their mean magnitude, and 1 > γ/2 always.
pub(super) fn matrix(codes: &[i8], out: usize, input: usize) -> TernaryMatrix {
    let w: Vec<f32> = codes.iter().map(|c| *c as f32).collect();
    let m = TernaryMatrix::from_weights(&w, out, input);
    for (i, c) in codes.iter().enumerate() {
        assert_eq!(m.code(i / input, i % input), *c);
    }
    m
}

/// `W₃ · q` straight from the codes.
pub(super) fn definition(codes: &[i8], q: &[i8], out: usize, input: usize) -> Vec<i32> {
    let dot = |a: &[i8], b: &[i8]| a.iter().zip(b).map(|(a, b)| *a as i32 * *b as i32).sum();
    q.chunks(input).flat_map(|q| codes.chunks(input).map(move |w| dot(w, q)).take(out)).collect()
}

#[test]
fn the_isa_asked_for_runs() {
    let ran = matrix(&[1, -1], 1, 2).sums_with(Isa::detect(), &[3, 5], 1, &mut [0]);
    assert_eq!(ran, Isa::detect());
    if let Ok(name) = std::env::var("ELLECI_ISA") {
        assert_eq!(ran.name(), name, "ELLECI_ISA asks for {name}, which this machine does not run");
    }
    for isa in levels() {
        assert_eq!(matrix(&[1, -1], 1, 2).sums_with(isa, &[3, 5], 1, &mut [0]), isa);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_isa_gives_the_same_integers(
        tokens in prop_oneof![0usize..14, 90usize..110],
        out in 1usize..150,
        input in prop_oneof![1usize..40, 250usize..270, 500usize..520],
        seed in any::<u64>(),
    ) {
        let mut rng = Lcg(seed);
        let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        let m = matrix(&codes, out, input);
        let want = definition(&codes, &q, out, input);
        for isa in levels() {
            let mut got = vec![i32::MIN; tokens * out];
            prop_assert_eq!(m.sums_with(isa, &q, tokens, &mut got), isa);
            prop_assert_eq!(&got, &want, "{:?}", isa);
        }
    }
}

/// Nothing saturates or wraps, at the longest rows that a config allows.
#[test]
fn extremes_are_exact() {
    for input in [252, 256, 260, 8192, 132_104] {
        for (code, q) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
            let (m, q) = (matrix(&vec![code; 2 * input], 2, input), vec![q; 7 * input]);
            for isa in levels() {
                let mut got = vec![0; 14];
                m.sums_with(isa, &q, 7, &mut got);
                assert_eq!(got, vec![code as i32 * q[0] as i32 * input as i32; 14], "{isa:?} {input}");
            }
        }
    }
}

#[test]
fn tiles_and_threads_change_nothing() {
    for (tokens, out, input) in [(1, 4096, 300), (200, 1300, 130), (3, 70, 20_000)] {
        let mut rng = Lcg(7);
        let w: Vec<f32> = (0..out * input).map(|_| rng.unit()).collect();
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        let scales: Vec<f32> = (0..tokens).map(|t| 0.01 + t as f32 * 1e-3).collect();
        let mut m = TernaryMatrix::from_weights(&vec![1.0; out * input], out, input);
        m.update(&w);
        let codes: Vec<i8> = (0..out * input).map(|i| m.code(i / input, i % input)).collect();
        assert!(codes.iter().zip(&w).all(|(c, w)| *c == ternary_code(*w, m.gamma())));
        let want = definition(&codes, &q, out, input);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut sums, mut y) = (vec![0; tokens * out], vec![0.0; tokens * out]);
            pool.install(|| {
                m.sums(&q, tokens, &mut sums);
                m.forward(&q, &scales, tokens, &mut y);
            });
            assert_eq!(sums, want);
            let scaled = |i: usize| want[i] as f32 * (m.gamma() * scales[i / out]);
            assert!((0..y.len()).all(|i| y[i].to_bits() == scaled(i).to_bits()));
        }
    }
}

#[test]
fn gradients_match_the_definition() {
    for (tokens, out, input) in [(1, 1, 1), (5, 7, 3), (70, 130, 66), (300, 257, 129), (2, 1000, 31)] {
        let mut rng = Lcg(11);
        let w: Vec<f32> = (0..out * input).map(|_| rng.unit()).collect();
        let dy: Vec<f32> = (0..tokens * out).map(|_| rng.unit()).collect();
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        let scales: Vec<f32> = (0..tokens).map(|_| 0.005 + 0.005 * rng.unit().abs()).collect();
        let m = TernaryMatrix::from_weights(&w, out, input);
        let mut scratch = Vec::new();
        for (start, mode) in [(0.0, Out::Store), (0.5, Out::Add)] {
            let (mut dx, mut dw) = (vec![0.5; tokens * input], vec![0.5; out * input]);
            m.input_grad(&dy, tokens, &mut dx, mode, &mut scratch);
            weight_grad(&dy, &q, &scales, tokens, out, input, &mut dw, mode, &mut scratch);
            let dequantised = |t: usize, i: usize| q[t * input + i] as f64 * scales[t] as f64;
            // Factors are at most 1 and 1.28 in magnitude; a sum of k products accumulates at most k + 2 roundings of
            // 2^-24 relative to the sum of magnitudes, itself at most 1.28 k + 0.5.
            let bound = |k: usize| (k + 2) as f64 * (1.28 * k as f64 + 0.5) * 2f64.powi(-24);
            for t in 0..tokens {
                for i in 0..input {
                    let exact = |o: usize| dy[t * out + o] as f64 * m.gamma() as f64 * m.code(o, i) as f64;
                    let want = start + (0..out).map(exact).sum::<f64>();
                    assert!((dx[t * input + i] as f64 - want).abs() <= bound(out), "dx {t} {i}");
                }
            }
            for o in 0..out {
                for i in 0..input {
                    let exact = |t: usize| dy[t * out + o] as f64 * dequantised(t, i);
                    let want = start + (0..tokens).map(exact).sum::<f64>();
                    assert!((dw[o * input + i] as f64 - want).abs() <= bound(tokens), "dw {o} {i}");
                }
            }
        }
    }
}

/// Knuth's MMIX generator: enough for test data.
pub(super) struct Lcg(pub u64);

impl Lcg {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() & 0xff_ffff) as f32 / (1 << 23) as f32 - 1.0
    }
}
