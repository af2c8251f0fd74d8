//! The oracle held against itself and against arithmetic that needs no oracle: two forms of the scan, causality, and
//! cases of known value. A parity test proves no more than its oracle does.

use elleci_core::config::ModelConfig;
use elleci_tests::arbitrary::{BatchData, cases, model_config};
use elleci_tests::compare::{Noise, to_f64};
use elleci_tests::core_run::trained_like;
use elleci_tests::ops::{self, Scan, Ssd};
use elleci_tests::oracle::Oracle;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64], noise: &mut Noise) -> Tensor {
    let n = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&noise.normals(n, 1.0)).view(shape).to_kind(Kind::Double)
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn both_scans_are_one_function(
        batch in 1i64..4, time in 1i64..40, heads in 1i64..4, width in 1i64..9, n in 1i64..9, chunk in 1i64..20, seed: u64,
    ) {
        let mut noise = Noise::new(seed);
        let x = random(&[batch, time, heads, width], &mut noise);
        let dt = random(&[batch, time, heads], &mut noise).softplus();
        let a = -random(&[heads], &mut noise).exp();
        let (b, c) = (random(&[batch, time, n], &mut noise), random(&[batch, time, n], &mut noise));
        let inputs = Ssd { x: &x, dt: &dt, a: &a, b: &b, c: &c };
        let [sequential, chunked] = [Scan::Sequential, Scan::Chunked(chunk)].map(|scan| ops::ssd(&inputs, scan));
        // float64: sums of at most 40 * 9 terms that stay below some hundreds.
        prop_assert!((sequential - chunked).abs().max().double_value(&[]) < 1e-10);
    }
}

#[test]
fn the_future_does_not_reach_the_past() {
    let mut runner = proptest::test_runner::TestRunner::new(cases(8));
    let check = |(config, seed): (ModelConfig, u64)| {
        let mut noise = Noise::new(seed);
        let params = trained_like(&config, &mut noise);
        let oracle = Oracle::new(&config, &params, Kind::Double, Scan::Sequential, None);
        let tokens = BatchData::random(2, 9, config.vocab_size, &mut noise).to_oracle(config.vocab_size).tokens;
        let last = tokens.narrow(1, 8, 1);
        let changed = Tensor::cat(&[tokens.narrow(1, 0, 8), (last + 1).remainder(config.vocab_size as i64)], 1);
        let [a, b] = [tokens, changed].map(|t| oracle.logits(&t));
        let moved = (a - b).abs().amax([0, 2].as_slice(), false);
        prop_assert_eq!(moved.narrow(0, 0, 8).max().double_value(&[]), 0.0);
        prop_assert!(moved.double_value(&[8]) > 0.0);
        Ok(())
    };
    runner.run(&(model_config(), any::<u64>()), check).unwrap();
}

#[test]
fn quantisers_follow_the_definition() {
    let x = Tensor::from_slice(&[127.0f64, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0, 0.49]);
    assert_eq!(to_f64(&ops::activation_codes(&x)), [127., 0., 2., 2., 0., -2., -2., 126., -127., 0.]);
    let w = Tensor::from_slice(&[0.5f64, -0.5, 1.5, -1.5, 0.51, 0.0, 2.0, 1.49]); // mean of magnitudes: 1
    assert_eq!(to_f64(&ops::gamma(&w)), [1.0]);
    assert_eq!(to_f64(&ops::weight_codes(&w)), [0., 0., 1., -1., 1., 0., 1., 1.]);
    let x = x.set_requires_grad(true);
    let y = ops::quantise_activation(&x, &ops::activation_codes(&x));
    y.dot(&Tensor::arange(10, (Kind::Double, Device::Cpu))).backward();
    assert_eq!(to_f64(&x.grad()), (0..10).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn zero_weights_ignore_any_target() {
    let mut noise = Noise::new(3);
    let logits = random(&[3, 5], &mut noise);
    let weights = Tensor::from_slice(&[1.0f64, 0.0, 0.5]);
    let loss = |middle: i64| {
        ops::weighted_cross_entropy(&logits, &Tensor::from_slice(&[1, middle, 4]), &weights).double_value(&[])
    };
    assert_eq!(loss(0), loss(3));
    let mean = logits.cross_entropy_loss::<Tensor>(
        &Tensor::from_slice(&[1i64, -100, -100]),
        None,
        tch::Reduction::Mean,
        -100,
        0.0,
    );
    let first = ops::weighted_cross_entropy(
        &logits,
        &Tensor::from_slice(&[1i64, 0, 0]),
        &Tensor::from_slice(&[1.0f64, 0.0, 0.0]),
    );
    assert!((mean - first).abs().double_value(&[]) < 1e-14);
}
