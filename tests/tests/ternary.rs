//! The ternary projection against LibTorch: integers exactly, on every instruction set of this machine; floats and the
//! straight-through gradients within rounding.

use elleci_core::ops::matmul::Out;
use elleci_core::simd::Isa;
use elleci_core::ternary::{TernaryMatrix, quantize_row, weight_grad};
use elleci_tests::arbitrary::cases;
use elleci_tests::compare::{Noise, Tally, check_all, to_f64};
use elleci_tests::ops;
use elleci_tests::vjp::{Inputs, vjp};
use proptest::prelude::*;
use tch::{Kind, Tensor};

/// Sizes around panels (64 rows), groups (4 columns) and blocks of tokens, and anything else.
fn size(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1..max, 1 => prop::sample::select(vec![1usize, 3, 4, 5, 40, 63, 64, 65, 127, 128, 129, 352])]
}

fn codes_of(matrix: &TernaryMatrix) -> Vec<i8> {
    let (rows, cols) = (matrix.out_dim(), matrix.in_dim());
    (0..rows * cols).map(|i| matrix.code(i / cols, i % cols)).collect()
}

fn integers(codes: &[i8], rows: usize) -> Tensor {
    Tensor::from_slice(codes).view([rows as i64, -1])
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn sums_are_equal_on_every_instruction_set(tokens in size(80), rows in size(200), cols in size(300), extreme: bool, seed: u64) {
        let mut noise = Noise::new(seed);
        let w = noise.normals(rows * cols, 0.02);
        let matrix = TernaryMatrix::from_weights(&w, rows, cols);
        let codes: Vec<i8> = (0..tokens * cols)
            .map(|_| if extreme { if noise.below(2) == 0 { 127 } else { -127 } } else { (noise.below(255) as i32 - 127) as i8 })
            .collect();
        let want = ops::integer_product(&integers(&codes, tokens), &integers(&codes_of(&matrix), rows));
        let mut expected = vec![0i64; tokens * rows];
        want.contiguous().copy_data(&mut expected, tokens * rows);
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine()) {
            let mut sums = vec![0i32; tokens * rows];
            let ran = matrix.sums_with(isa, &codes, tokens, &mut sums);
            prop_assert_eq!(ran, isa);
            prop_assert!(sums.iter().zip(&expected).all(|(a, b)| i64::from(*a) == *b), "{}", isa.name());
        }
    }

    /// `W₃` and γ: equal to the definition in float64, but for weights within float32 rounding of ±γ/2.
    #[test]
    fn weight_codes(rows in size(120), cols in size(120), scale in prop_oneof![Just(1e-7f32), 1e-3f32..2.0], seed: u64) {
        let mut noise = Noise::new(seed);
        let w = noise.normals(rows * cols, scale);
        let matrix = TernaryMatrix::from_weights(&w, rows, cols);
        let tensor = Tensor::from_slice(&w).to_kind(Kind::Double);
        let gamma = to_f64(&ops::gamma(&tensor))[0];
        // The core sums in float64 and rounds once.
        prop_assert!((gamma - f64::from(matrix.gamma())).abs() <= gamma * 2f64.powi(-24));
        for (w, code) in w.iter().zip(codes_of(&matrix)) {
            let value = (f64::from(*w) / gamma).clamp(-1.0, 1.0);
            // γ is off by half a unit in the last place and the quotient by another.
            prop_assert!((value - f64::from(code)).abs() <= 0.5 * (1.0 + 2f64.powi(-22)), "{w} {gamma} -> {code}");
        }
    }

    /// The projection of rows as they come from a norm, and both gradients, given the integers.
    #[test]
    fn projection_and_gradients(tokens in size(60), rows in size(150), cols in size(150), seed: u64) {
        let mut noise = Noise::new(seed);
        let inputs = Inputs::default()
            .normal("x", &[tokens, cols], 1.0, &mut noise)
            .normal("w", &[rows, cols], 0.02, &mut noise)
            .normal("dy", &[tokens, rows], 1.0, &mut noise);
        let (x, w, dy) = (inputs.data("x"), inputs.data("w"), inputs.data("dy"));
        let matrix = TernaryMatrix::from_weights(w, rows, cols);
        let (mut q, mut scales) = (vec![0i8; x.len()], vec![0.0; tokens]);
        for ((x, q), scale) in x.chunks_exact(cols).zip(q.chunks_exact_mut(cols)).zip(&mut scales) {
            *scale = quantize_row(x, q);
        }
        let (given_q, given_w) = (integers(&q, tokens), integers(&codes_of(&matrix), rows));
        let references = vjp(&inputs, |i| {
            let kind = i["x"].kind();
            let x = ops::quantise_activation(&i["x"], &given_q.to_kind(kind));
            ops::linear(&x, &ops::quantise_weight(&i["w"], &given_w.to_kind(kind)))
        });
        let (mut y, mut dx, mut dw) = (vec![0.0; tokens * rows], vec![0.0; x.len()], vec![0.0; w.len()]);
        let mut scratch = Vec::new();
        matrix.forward(&q, &scales, tokens, &mut y);
        matrix.input_grad(dy, tokens, &mut dx, Out::Store, &mut scratch);
        weight_grad(dy, &q, &scales, tokens, rows, cols, &mut dw, Out::Store, &mut scratch);
        let found = [("y", y), ("dx", dx), ("dw", dw)].map(|(name, values)| (name.to_string(), values));
        check_all(&references, &found.into(), &mut Tally::default()).map_err(TestCaseError::fail)?;
    }
}
