//! Every instruction set gives the integers of the definition, which stay in their range and near the floats.

use super::*;

/// Shapes with whole vectors, lines and panels, and without; up to where the largest code of an activation is halved.
const SHAPES: [(usize, usize); 12] = [
    (1, 1),
    (3, 5),
    (4, 16),
    (9, 31),
    (64, 32),
    (65, 33),
    (130, 64),
    (200, 100),
    (67, 256),
    (5, 513),
    (20, 1030),
    (6, 4097),
];

/// What the module's text says, for one output.
fn definition(codes: &[i8], scale: f32, x: &[f32]) -> (f32, f32) {
    let amax = x.iter().fold(FLOOR, |a, v| a.max(v.abs()));
    let mut limit = 32_767i64;
    loop {
        let r: Vec<i64> = x.iter().map(|v| libm::rintf(v * (limit as f32 / amax)) as i64).collect();
        if 128 * r.iter().map(|r| r.abs()).sum::<i64>() < 1 << 31 {
            let sum: i64 = r.iter().zip(codes).map(|(r, c)| r * *c as i64).sum();
            let step = amax / limit as f32;
            return (i32::try_from(sum).unwrap() as f32 * step * scale, step);
        }
        limit /= 2;
    }
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine())
}

/// Runs on every level, and holds each against the definition; returns the outputs.
fn check(rows: usize, cols: usize, codes: &[i8], scales: &[f32], x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / cols;
    let want: Vec<u32> = (0..tokens * rows)
        .map(|i| {
            let (t, r) = (i / rows, i % rows);
            definition(&codes[r * cols..][..cols], scales[r], &x[t * cols..][..cols]).0.to_bits()
        })
        .collect();
    let mut y = vec![f32::NAN; tokens * rows];
    for isa in levels() {
        // Tasks of all rows, and of few.
        for task in [rows.next_multiple_of(ROWS), ROWS] {
            y.fill(f32::NAN);
            assert_eq!(forward(isa, Matrix { codes, scales, cols }, task, x, &mut y), ran(isa), "{isa:?}");
            let got: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
            assert_eq!(got, want, "{isa:?}, {rows} x {cols}, {tokens} tokens, tasks of {task}");
        }
    }
    y
}

/// The level of a kernel that there is.
fn ran(ceiling: Isa) -> Isa {
    match ceiling {
        Isa::Avx512 => Isa::Avx2,
        Isa::Neon | Isa::NeonDot => Isa::Portable,
        other => other,
    }
}

#[test]
fn all_levels_give_the_same_integers() {
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 32) as u32
    };
    for (rows, cols) in SHAPES {
        let codes: Vec<i8> = (0..rows * cols).map(|_| random() as i8).collect();
        let scales: Vec<f32> = (0..rows).map(|_| random() as f32 / (1u64 << 32) as f32).collect();
        for tokens in (1..=13).chain([16, 17, 20, 25]) {
            let x: Vec<f32> = (0..tokens * cols).map(|_| random() as f32 / (1u64 << 32) as f32 - 0.5).collect();
            let y = check(rows, cols, &codes, &scales, &x);
            for (t, x) in x.chunks(cols).enumerate() {
                for r in 0..rows {
                    let (codes, scale) = (&codes[r * cols..][..cols], scales[r]);
                    let exact: f64 = codes.iter().zip(x).map(|(c, x)| *c as f64 * scale as f64 * *x as f64).sum();
                    let weights: f64 = codes.iter().map(|c| (*c as f64 * scale as f64).abs()).sum();
                    let step = definition(codes, scale, x).1 as f64;
                    // Half a step for every activation; two roundings on its way to an integer, one of the inverse and one of the
                    // product, 2^-24 of it each; three of the sum, and one of the step.
                    let bound =
                        weights * (step / 2.0 + 0.5 * 2.0 * 2f64.powi(-24)) + weights * 0.5 * 4.0 * 2f64.powi(-24);
                    assert!((y[t * rows + r] as f64 - exact).abs() <= bound, "{rows} x {cols}");
                }
            }
        }
    }
}

#[test]
fn the_largest_sums_fit() {
    for cols in [1, 64, 512, 513, 2048, 4097] {
        for (code, value) in [(i8::MIN, 1.0f32), (i8::MIN, -1.0), (i8::MAX, 1.0), (i8::MAX, -1.0)] {
            let (rows, tokens) = (5, 5);
            let x = vec![value; tokens * cols];
            check(rows, cols, &vec![code; rows * cols], &[1.0; 5], &x);
        }
    }
    let mut codes = vec![0; 512];
    assert_eq!(quantize(&[-3.0; 512], &mut codes), 3.0 / 32_767.0);
    assert!(codes.iter().all(|c| *c == -32_767));
    let mut codes = vec![0; 513];
    assert_eq!(quantize(&[3.0; 513], &mut codes), 3.0 / 16_383.0);
    assert!(codes.iter().all(|c| *c == 16_383));
}

#[test]
fn the_smallest_and_the_largest_activations() {
    for amax in [0.0, f32::from_bits(1), 1e-38, 1e-30, 1e30, 1e36] {
        let x = [amax, -amax, amax / 2.0, 0.0];
        let y = check(1, 4, &[127, 1, 2, 3], &[0.5], &x);
        assert!(y[0].is_finite());
        // What is below the floor's unit counts as zero.
        let want = if amax < 1e-35 { 0.0 } else { 63.5 * amax as f64 };
        assert!((y[0] as f64 - want).abs() <= want * 1e-4, "{amax}: {}", y[0]);
    }
}

#[test]
fn what_is_not_finite_stays_in_its_token() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for tokens in [2, 8] {
            let mut x = vec![1.0; tokens * 40];
            x[47] = bad;
            for isa in levels() {
                let mut y = vec![0.0; tokens * 70];
                let (codes, scales) = (vec![1; 70 * 40], vec![0.5; 70]);
                forward(isa, Matrix { codes: &codes, scales: &scales, cols: 40 }, 4, &x, &mut y);
                for (t, y) in y.chunks(70).enumerate() {
                    assert!(y.iter().all(|v| v.is_finite() == (t != 1)), "{isa:?}");
                }
            }
        }
    }
}
