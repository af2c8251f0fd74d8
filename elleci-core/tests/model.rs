//! The whole model against itself: threads and checkpointing must not change what it computes.

mod common;

use common::odd_config;
use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::model::{Batch, Checkpointing, Model, ModelError, Workspace};
use elleci_core::ops::head::HeadPrecision;
use elleci_core::params::Params;
use elleci_core::ternary::GradPrecision;

struct Data {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Data {
    fn new(c: &ModelConfig, n: usize) -> Data {
        let mut state = 12345u64;
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u32
        };
        let tokens: Vec<u32> = (0..n).map(|_| draw() % c.vocab_size as u32).collect();
        let targets = (0..n).map(|_| draw() % c.vocab_size as u32).collect();
        // some positions ignored, some weighted, one negative as in preference tuning
        let weights = (0..n).map(|i| [1.0, 0.0, 0.5, 1.0, -0.25, 1.0][i % 6]).collect();
        Data { tokens, targets, weights }
    }

    fn batch(&self, batch: usize) -> Batch<'_> {
        let seq = self.tokens.len() / batch;
        Batch { batch, seq, tokens: &self.tokens, targets: &self.targets, weights: &self.weights }
    }
}

const FLOAT32: (GradPrecision, HeadPrecision) = (GradPrecision::Float32, HeadPrecision::Float32);
const INT16: (GradPrecision, HeadPrecision) = (GradPrecision::Int16, HeadPrecision::Float32);
const ALL_INT16: (GradPrecision, HeadPrecision) = (GradPrecision::Int16, HeadPrecision::Int16);

fn gradients(model: &Model, batch: &Batch, checkpointing: Checkpointing, threads: usize) -> (f64, Params) {
    gradients_in(FLOAT32, model, batch, checkpointing, threads)
}

fn gradients_in(
    (precision, head): (GradPrecision, HeadPrecision),
    model: &Model,
    batch: &Batch,
    checkpointing: Checkpointing,
    threads: usize,
) -> (f64, Params) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut ws = Workspace::new(model.config(), batch.batch, batch.seq, checkpointing)
            .with_grad_precision(precision)
            .with_head_precision(head);
        let mut grads = Params::zeros(model.layout().clone());
        let loss = model.loss_and_grad(&mut ws, batch, 0.01, &mut grads).unwrap();
        let alone = model.loss(&mut ws, batch).unwrap();
        match head.here() {
            HeadPrecision::Float32 => assert_eq!(loss, alone, "the loss alone has the same bits"),
            // The rounding of logits, none of them above 1 here: 2e-4 of that for a token.
            HeadPrecision::Int16 => assert!((loss - alone).abs() <= 2e-4 * batch.tokens.len() as f64, "{loss} {alone}"),
        }
        (loss, grads)
    })
}

#[test]
fn threads_and_checkpointing_do_not_change_a_bit() {
    for c in [odd_config(), ModelConfig { n_layers: 4, vocab_size: 700, ..ModelConfig::preset("nano").unwrap() }] {
        let model = Model::new(c.clone(), initialise(&c, 3)).unwrap();
        let data = Data::new(&c, 3 * 130);
        let batch = data.batch(3);
        for precision in [FLOAT32, INT16, ALL_INT16] {
            let (loss, grads) = gradients_in(precision, &model, &batch, Checkpointing::None, 1);
            assert!(grads.data().iter().all(|g| g.is_finite()));
            for (checkpointing, threads) in [
                (Checkpointing::None, 2),
                (Checkpointing::None, 5),
                (Checkpointing::EveryLayer, 2),
                (Checkpointing::EveryKth(2), 2),
            ] {
                let (other_loss, other) = gradients_in(precision, &model, &batch, checkpointing, threads);
                let how = format!("{precision:?} {checkpointing:?} on {threads} threads");
                assert_eq!(loss.to_bits(), other_loss.to_bits(), "{how}");
                assert!(grads.data() == other.data(), "{how}");
            }
        }
    }
}

/// Int16 leaves the loss as it is, and every parameter's gradient nearly so. A product's rounding errors are independent
/// and uniform, of variance 1/12 of a step squared, where a row or channel of n Gaussian values has a largest one of
/// less than 5 standard deviations, so a step of 5/32767 of one: relative to the product, which has grown by √n
/// just as they have, that is 5/32767/√12 = 4.4e-5. A gradient passes at most 3 such products a block and 10 blocks, whose
/// errors add up as squares: 4.4e-5 · √30 = 2.4e-4. Twice that is allowed, as gradients are not Gaussian.
#[test]
fn int16_gradients_are_those_of_float32() {
    for c in [odd_config(), ModelConfig { n_layers: 4, vocab_size: 700, ..ModelConfig::preset("nano").unwrap() }] {
        let model = Model::new(c.clone(), initialise(&c, 3)).unwrap();
        let data = Data::new(&c, 3 * 130);
        let (loss, exact) = gradients(&model, &data.batch(3), Checkpointing::None, 2);
        let (same, grads) = gradients_in(INT16, &model, &data.batch(3), Checkpointing::None, 2);
        assert_eq!(loss.to_bits(), same.to_bits());
        assert!(grads.data() != exact.data(), "int16 did not run");
        // The head adds rounding of p and of its own operands: a code's, 1/46300/√12 of its row's norm and no more than
        // three of them, 1.1e-5.
        let (_, all) = gradients_in(ALL_INT16, &model, &data.batch(3), Checkpointing::None, 2);
        if ALL_INT16.1.here() == HeadPrecision::Int16 {
            assert!(all.data() != grads.data(), "int16 did not run in the head");
        }
        for (grads, allowed) in [(grads, 4.8e-4), (all, 4.8e-4 + 1.1e-5)] {
            for p in model.layout().params() {
                let (a, b) = (&grads.data()[p.range.clone()], &exact.data()[p.range.clone()]);
                let norm = |d: &mut dyn Iterator<Item = f64>| d.map(|d| d * d).sum::<f64>().sqrt();
                let error = norm(&mut a.iter().zip(b).map(|(a, b)| (a - b) as f64));
                let size = norm(&mut b.iter().map(|b| *b as f64));
                assert!(error <= allowed * size, "{}: {:e}", p.name, error / size);
            }
        }
    }
}

#[test]
fn every_parameter_receives_a_gradient() {
    let c = odd_config();
    let model = Model::new(c.clone(), initialise(&c, 3)).unwrap();
    let data = Data::new(&c, 2 * 64);
    let (_, grads) = gradients(&model, &data.batch(2), Checkpointing::None, 1);
    for p in model.layout().params() {
        assert!(grads.data()[p.range.clone()].iter().any(|g| *g != 0.0), "{} has no gradient", p.name);
    }
}

#[test]
fn gradients_of_micro_batches_add_up_to_those_of_the_batch() {
    let c = odd_config();
    let model = Model::new(c.clone(), initialise(&c, 3)).unwrap();
    let data = Data::new(&c, 4 * 48);
    let (loss, whole) = gradients(&model, &data.batch(4), Checkpointing::None, 2);
    let mut ws = Workspace::new(&c, 2, 48, Checkpointing::None);
    let mut grads = Params::zeros(model.layout().clone());
    let mut sum = 0.0;
    for half in 0..2 {
        let at = half * 96..(half + 1) * 96;
        let (tokens, targets, weights) = (&data.tokens[at.clone()], &data.targets[at.clone()], &data.weights[at]);
        sum += model
            .loss_and_grad(&mut ws, &Batch { batch: 2, seq: 48, tokens, targets, weights }, 0.01, &mut grads)
            .unwrap();
    }
    assert!((sum - loss).abs() < 1e-9 * loss.abs());
    for p in model.layout().params() {
        let (a, b) = (&grads.data()[p.range.clone()], &whole.data()[p.range.clone()]);
        let norm = b.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        let diff = a.iter().zip(b).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum::<f64>().sqrt();
        // Only the order of 192 float32 additions differs: relative error at most 192 * 2^-24 of the sum of
        // magnitudes; 16 covers cancellation between tokens.
        assert!(diff <= 16.0 * 192.0 * 2f64.powi(-24) * norm + 1e-12, "{}: {diff:e} of {norm:e}", p.name);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let c = odd_config();
    let model = Model::new(c.clone(), initialise(&c, 3)).unwrap();
    let mut ws = Workspace::new(&c, 1, 8, Checkpointing::None);
    let mut data = Data::new(&c, 8);
    assert_eq!(model.loss(&mut ws, &data.batch(2)), Err(ModelError::Workspace { expected: (1, 8), got: (2, 4) }));
    data.targets[1] = 9999; // its weight is 0: never looked at
    assert!(model.loss(&mut ws, &data.batch(1)).is_ok());
    data.tokens[3] = 301;
    assert_eq!(model.loss(&mut ws, &data.batch(1)), Err(ModelError::Token { token: 301, vocab_size: 301 }));
    let short = Batch { batch: 1, seq: 8, tokens: &[0; 7], targets: &[0; 8], weights: &[1.0; 8] };
    assert_eq!(model.loss(&mut ws, &short), Err(ModelError::BatchShape));
    let nano = ModelConfig::preset("nano").unwrap();
    assert!(matches!(Model::new(nano, initialise(&c, 3)), Err(ModelError::Layout { .. })));
}
