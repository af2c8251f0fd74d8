use alloc::vec;

use super::*;

struct Case {
    tokens: usize,
    d: usize,
    vocab: usize,
    normed: Vec<f32>,
    head: Vec<f32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

/// How sharp the softmax is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    /// Logits of a standard deviation of about a half.
    Flat,
    /// About 12: a few entries have everything.
    Peaked,
    /// Tokens of either kind, and rows of the head of very different sizes.
    Mixed,
}

#[derive(Clone, Debug, PartialEq)]
struct Gradients {
    loss: f64,
    dnormed: Vec<f32>,
    dhead: Vec<f32>,
}

const SCALE: f32 = 0.01;

impl Case {
    fn new(tokens: usize, vocab: usize, d: usize, rows: Rows) -> Case {
        let mut state = 0x5eed_u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 40
        };
        let unit = |v: u64| v as f32 / (1 << 23) as f32 - 1.0;
        // Uniform on ±1 has a variance of 1/3, a logit one of size²·d/9.
        let size = 3.0 / (d as f32).sqrt();
        let sharp =
            |t: usize| if rows == Rows::Flat || rows == Rows::Mixed && t.is_multiple_of(2) { 0.5 } else { 12.0 };
        let wide = |v: usize| if rows == Rows::Mixed { [1.0, 1e-3, 0.3, 1e-9][v % 4] } else { 1.0 };
        let normed = (0..tokens * d).map(|i| unit(draw()) * sharp(i / d)).collect();
        let head = (0..vocab * d).map(|i| unit(draw()) * size * wide(i / d)).collect();
        let targets = (0..tokens).map(|_| (draw() % vocab as u64) as u32).collect();
        let weights = (0..tokens).map(|t| [1.0, 0.0, 0.5, 1.0, -0.25, 1.0][t % 6]).collect();
        Case { tokens, d, vocab, normed, head, targets, weights }
    }

    fn input(&self) -> HeadInput<'_> {
        HeadInput { normed: &self.normed, head: &self.head, targets: &self.targets, weights: &self.weights }
    }

    fn run_with(&self, scratch: &mut Int16Head, isa: Isa) -> Option<Gradients> {
        let mut logits = vec![f32::NAN; Int16Head::logits_len(self.tokens, self.vocab)];
        let (mut dnormed, mut dhead) = (vec![f32::NAN; self.tokens * self.d], vec![0.0; self.vocab * self.d]);
        let loss = scratch.loss_grad(isa, self.input(), SCALE, &mut logits, &mut dnormed, &mut dhead)?;
        Some(Gradients { loss, dnormed, dhead })
    }

    fn run(&self, isa: Isa) -> Gradients {
        self.run_with(&mut Int16Head::default(), isa).expect("all is finite")
    }
}

/// In float64, from the formulas, with the bounds that the module states: `(loss, its bound)`, `[(dx, bound)]`, `[(dW,
/// bound)]`.
type Bounded = ((f64, f64), Vec<(f64, f64)>, Vec<(f64, f64)>);

/// The scale of some values, rounded up by what float32 may have added.
fn scale_of(values: impl Iterator<Item = f64> + Clone, limit: f64) -> f64 {
    let amax = values.clone().fold(2f64.powi(-60), |a, v| a.max(v.abs()));
    let norm = values.map(|v| v * v).sum::<f64>().sqrt();
    (amax / 32767.0).max(norm / limit) * 1.001
}

/// `½ (s_a Σ|b| + s_b Σ|a|) + ¼ n s_a s_b`
fn product_error(a: &[f64], s_a: f64, b: &[f64], s_b: f64) -> f64 {
    let sum = |v: &[f64]| v.iter().map(|v| v.abs()).sum::<f64>();
    0.5 * (s_a * sum(b) + s_b * sum(a)) + 0.25 * a.len() as f64 * s_a * s_b
}

fn limit(depth: usize) -> f64 {
    46_300.0 - 0.5 * (depth as f64).sqrt()
}

fn definition(c: &Case) -> Bounded {
    let f = |v: &[f32]| v.iter().map(|v| *v as f64).collect::<Vec<f64>>();
    let (w, x) = (f(&c.head), f(&c.normed));
    let (row, token) = (|v: usize| &w[v * c.d..][..c.d], |t: usize| &x[t * c.d..][..c.d]);
    let ulp = 2f64.powi(-24);
    // e·g and what may be wrong with it
    let (mut p, mut dp) = (vec![0.0; c.tokens * c.vocab], vec![0.0; c.tokens * c.vocab]);
    let mut loss = (0.0, 0.0);
    let mut dx = vec![(0.0, 0.0); c.tokens * c.d];
    let row_scales: Vec<f64> = (0..c.vocab).map(|v| scale_of(row(v).iter().copied(), limit(c.d))).collect();
    let column_scales: Vec<Vec<f64>> = (0..c.vocab)
        .step_by(BLOCK)
        .map(|b| {
            let rows = b..c.vocab.min(b + BLOCK);
            (0..c.d).map(|i| scale_of(rows.clone().map(|v| w[v * c.d + i]), limit(rows.len()))).collect()
        })
        .collect();
    for t in (0..c.tokens).filter(|t| c.weights[*t] != 0.0) {
        let weight = c.weights[t] as f64;
        let s_x = scale_of(token(t).iter().copied(), limit(c.d));
        let logits: Vec<f64> = (0..c.vocab).map(|v| row(v).iter().zip(token(t)).map(|(a, b)| a * b).sum()).collect();
        let max = logits.iter().fold(f64::MIN, |a, v| a.max(*v));
        // Rounding of the codes, of three float operations, of the difference from the largest, of exp.
        let wrong: Vec<f64> = (0..c.vocab)
            .map(|v| product_error(row(v), row_scales[v], token(t), s_x) + 8.0 * ulp * (logits[v].abs() + max.abs()))
            .collect();
        let most = wrong.iter().fold(0.0f64, |a, v| a.max(*v));
        let e: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let total: f64 = e.iter().sum();
        let target = c.targets[t] as usize;
        loss.0 += weight * (total.ln() + max - logits[target]);
        // ln Z moves by at most the largest error of a logit; Z itself is a sum of 64, then 16 partial sums a block.
        loss.1 += weight.abs() * (2.0 * most + 100.0 * ulp);
        let g = weight * SCALE as f64 / total;
        // e/Z moves by both errors; below e^-86.9 exp gives 0.
        let relative = |v: usize| (wrong[v] + most).exp_m1() + 110.0 * ulp;
        for v in 0..c.vocab {
            p[t * c.vocab + v] = g * e[v];
            dp[t * c.vocab + v] = (g * e[v]).abs() * relative(v) + g.abs() * 1e-37;
        }
        let theta = 64.0 * total / c.vocab as f64;
        for i in 0..c.d {
            let (mut value, mut bound) = (-weight * SCALE as f64 * w[target * c.d + i], 0.0);
            bound += value.abs() * 4.0 * ulp;
            for (b, scales) in column_scales.iter().enumerate() {
                let rows = b * BLOCK..c.vocab.min((b + 1) * BLOCK);
                let column: Vec<f64> = rows.clone().map(|v| w[v * c.d + i]).collect();
                let capped: Vec<f64> = rows.clone().map(|v| e[v].min(theta)).collect();
                let squares = capped.iter().map(|v| v * v).sum::<f64>().max(
                    e[rows.clone()].iter().map(|v| v * v).sum::<f64>().min(theta * e[rows.clone()].iter().sum::<f64>()),
                );
                let largest = capped.iter().fold(2f64.powi(-60), |a, v| a.max(*v));
                // The scale follows e, which may be wrong by `relative`.
                let wide = 1.001 * (1.0 + relative(0).max((2.0 * most).exp_m1()));
                let s_e = (largest / 32767.0).max(squares.sqrt() / limit(c.vocab.min(BLOCK))) * wide;
                bound += g.abs() * product_error(&capped, s_e, &column, scales[i]);
                for (v, w) in rows.zip(&column) {
                    value += g * e[v] * w;
                    // Its own error, and that of the additions of blocks and entries above θ.
                    bound += dp[t * c.vocab + v] * w.abs() + (g * e[v] * w).abs() * 600.0 * ulp;
                }
            }
            dx[t * c.d + i] = (value, bound);
        }
    }
    let mut dw = vec![(0.0, 0.0); c.vocab * c.d];
    let n = chunk_tokens(c.tokens, c.vocab);
    for first in (0..c.tokens).step_by(n) {
        let tokens: Vec<usize> = (first..c.tokens.min(first + n)).filter(|t| c.weights[*t] != 0.0).collect();
        let len = c.tokens.min(first + n) - first;
        let channels: Vec<Vec<f64>> = (0..c.d).map(|i| tokens.iter().map(|t| x[t * c.d + i]).collect()).collect();
        let scales: Vec<f64> = channels.iter().map(|c| scale_of(c.iter().copied(), limit(len))).collect();
        for v in 0..c.vocab {
            let p_row: Vec<f64> = tokens.iter().map(|t| p[t * c.vocab + v]).collect();
            let wrong: Vec<f64> = tokens.iter().map(|t| dp[t * c.vocab + v]).collect();
            let s_p = scale_of(p_row.iter().zip(&wrong).map(|(p, d)| p.abs() + d), limit(n));
            for i in 0..c.d {
                let at = &mut dw[v * c.d + i];
                at.1 += product_error(&p_row, s_p, &channels[i], scales[i]);
                for ((p, d), x) in p_row.iter().zip(&wrong).zip(&channels[i]) {
                    at.0 += p * x;
                    at.1 += d * x.abs() + (p * x).abs() * 20.0 * ulp;
                }
                for t in tokens.iter().filter(|t| c.targets[**t] as usize == v) {
                    let one = c.weights[*t] as f64 * SCALE as f64 * x[t * c.d + i];
                    at.0 -= one;
                    at.1 += one.abs() * 20.0 * ulp;
                }
            }
        }
    }
    (loss, dx, dw)
}

/// Sizes at block boundaries: odd depths and vocabularies, partial panels, one and several blocks, one token.
const SIZES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (5, 7, 3), (65, 130, 66), (130, 1025, 33), (7, 2600, 130), (64, 2048, 64)];

#[test]
fn the_error_is_what_the_module_says() {
    for (tokens, vocab, d) in SIZES {
        for rows in [Rows::Flat, Rows::Peaked, Rows::Mixed] {
            let case = Case::new(tokens, vocab, d, rows);
            let got = case.run(Isa::detect());
            let (loss, dx, dw) = definition(&case);
            let how = format!("({tokens}, {vocab}, {d}) {rows:?}");
            assert!((got.loss - loss.0).abs() <= loss.1, "{how}: loss {} {loss:?}", got.loss);
            for (name, got, want) in [("dx", &got.dnormed, &dx), ("dW", &got.dhead, &dw)] {
                for (i, (got, (want, bound))) in got.iter().zip(want).enumerate() {
                    assert!((*got as f64 - want).abs() <= *bound + 1e-37, "{how} {name} {i}: {got} {want} ± {bound}");
                }
            }
        }
    }
}

/// The bounds of the test above are worst cases; rounding errors are independent, and in the norm far smaller. A logit's is
/// at most ½ s_W ‖x‖ / √3 ⊕ ½ s_x ‖W‖ / √3 in the root mean square, here (Gaussian-like rows of 64 and 130, scales by the
/// largest value) below 2e-5 for flat rows and 24 times that for peaked ones, whose p moves by as much, relatively; the
/// codes of p and the other operand add 2e-5 each. Allowed: 1e-4 and 1e-3 of the norm.
#[test]
fn the_gradients_norm_is_hardly_touched() {
    for (rows, allowed) in [(Rows::Flat, 1e-4), (Rows::Peaked, 1e-3)] {
        for (tokens, vocab, d) in [(130, 2600, 130), (64, 4096, 64)] {
            let case = Case::new(tokens, vocab, d, rows);
            let got = case.run(Isa::detect());
            let (_, dx, dw) = definition(&case);
            for (name, got, want) in [("dx", &got.dnormed, &dx), ("dW", &got.dhead, &dw)] {
                let error = got.iter().zip(want).map(|(g, w)| (*g as f64 - w.0).powi(2)).sum::<f64>().sqrt();
                let norm = want.iter().map(|w| w.0 * w.0).sum::<f64>().sqrt();
                std::println!("{rows:?} ({tokens}, {vocab}, {d}) {name}: {:e}", error / norm);
                assert!(error <= allowed * norm, "{rows:?} ({tokens}, {vocab}, {d}) {name}: {:e}", error / norm);
            }
        }
    }
}

#[test]
fn every_isa_and_thread_count_gives_the_same_bits() {
    for (tokens, vocab, d) in SIZES {
        let case = Case::new(tokens, vocab, d, Rows::Mixed);
        let mut scratch = Int16Head::default();
        // Buffers that another call has left dirty.
        Case::new(70, 1500, 70, Rows::Peaked).run_with(&mut scratch, Isa::detect());
        let want = case.run_with(&mut scratch, Isa::Portable).unwrap();
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine()) {
            assert!(case.run(isa) == want, "{isa:?} ({tokens}, {vocab}, {d})");
        }
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| case.run(Isa::detect())) == want, "{threads} threads ({tokens}, {vocab}, {d})");
        }
    }
}

/// The largest sums there are: equal rows without a sign, in every product. An int32 that overflowed would change its sign.
#[test]
fn sums_of_equal_values_fit() {
    for d in [64, 1025, 4096] {
        let mut case = Case::new(64, 65, d, Rows::Flat);
        case.normed.fill(0.01);
        case.head.fill(0.01);
        case.weights.fill(1.0);
        case.targets.fill(64);
        let got = case.run(Isa::Portable);
        // All logits are equal: p = 1/65.
        assert!((got.loss / 64.0 - 65f64.ln()).abs() < 1e-5, "{}", got.loss);
        for (i, g) in got.dhead.iter().enumerate() {
            let want = 64.0 * 0.01 * SCALE as f64 * (1.0 / 65.0 - (i / d == 64) as u8 as f64);
            assert!((*g as f64 / want - 1.0).abs() < 1e-3, "{d} {i}: {g} {want}");
        }
        assert!(got == case.run(Isa::detect()));
    }
}

/// Tokens of weight 0 may hold anything, targets included; what counts and is not finite is left to float32.
#[test]
fn what_is_not_finite() {
    let mut case = Case::new(20, 300, 40, Rows::Flat);
    let want = case.run(Isa::detect());
    case.targets[1] = u32::MAX;
    case.normed[40..80].fill(f32::NAN);
    let got = case.run(Isa::detect());
    assert!(got == want && want.dnormed[40..80].iter().all(|v| *v == 0.0));
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        let mut broken = Case::new(20, 300, 40, Rows::Flat);
        broken.normed[3 * 40 + 39] = bad;
        assert_eq!(broken.run_with(&mut Int16Head::default(), Isa::detect()), None, "input {bad}");
        let mut broken = Case::new(20, 300, 40, Rows::Flat);
        broken.head[299 * 40] = bad;
        assert_eq!(broken.run_with(&mut Int16Head::default(), Isa::detect()), None, "head {bad}");
    }
}
