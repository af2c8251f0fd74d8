//! The whole model against LibTorch: codes, logits, loss and every gradient, over random shapes.

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::model::{Checkpointing, Model, Workspace};
use elleci_core::params::Params;
use elleci_tests::arbitrary::{BatchData, cases, model_config, narrowest};
use elleci_tests::compare::{Noise, Tally, check_all};
use elleci_tests::core_run::{self, as_batch, oracle_references, trained_like};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// How far past a tie a value may lie, in codes, when the core rounds it to the other side.
///
/// A value before rounding is at most 127 codes, and off by its relative error times that. The norm and the product with
/// 127/amax are good for 8 units in the last place: 127 * 8 * 2^-24 = 6e-5. The input of the norm carries the float32
/// error of the layers below (their codes given, so that it grows smoothly): the comparison of the logits shows 1e-6 of
/// the largest element and seldom 1e-5, times 127: 1e-3. A wrong formula is off by whole codes.
const PAST_TIE: f64 = 1e-3;

fn check(
    config: &ModelConfig,
    params: Params,
    data: &BatchData,
    scale: f32,
    tally: &mut Tally,
) -> Result<(), TestCaseError> {
    let model = Model::new(config.clone(), params).expect("a valid config");
    let run = core_run::run(&model, data, scale);
    let (references, report) = oracle_references(config, model.params(), data, scale, Some(&run.codes));
    prop_assert!(report.past_tie <= PAST_TIE, "a code is {:.1e} past a tie", report.past_tie);
    // A flip needs a value within PAST_TIE of a tie, on the wrong side: at most that share of all values if they are
    // spread evenly; twice that for uneven ones, and 5 for the smallest tensors.
    let allowed = 5 + (2.0 * PAST_TIE * report.total as f64) as usize;
    prop_assert!(report.flips <= allowed, "{} of {} codes differ", report.flips, report.total);
    check_all(&references, &run.named, tally).map_err(TestCaseError::fail)
}

fn shapes() -> impl Strategy<Value = (ModelConfig, usize, usize, u64)> {
    (model_config(), 1usize..4, prop_oneof![1usize..40, 60usize..70, 125usize..135], any::<u64>())
}

#[test]
fn every_gradient_of_any_shape() {
    let mut tally = Tally::default();
    let shared = std::cell::RefCell::new(&mut tally);
    TestRunner::new(cases(40))
        .run(&shapes(), |(config, batch, seq, seed)| {
            let mut noise = Noise::new(seed);
            let params = trained_like(&config, &mut noise);
            let data = BatchData::random(batch, seq, config.vocab_size, &mut noise);
            check(&config, params, &data, 1.0 / data.tokens.len() as f32, *shared.borrow_mut())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    assert!(tally.share() > 0.95, "only {:.3} of {} comparisons are sharp", tally.share(), tally.total);
}

/// Where every norm is one wide, most gradients are what cancellation leaves.
#[test]
fn every_width_of_one() {
    for (seed, pattern) in ["S", "A", "SA", "AS"].into_iter().enumerate() {
        let config = narrowest(pattern);
        let mut noise = Noise::new(seed as u64);
        let params = trained_like(&config, &mut noise);
        let data = BatchData::random(2, 5, config.vocab_size, &mut noise);
        let run = core_run::run(&Model::new(config.clone(), params.clone()).expect("valid"), &data, 1.0);
        let (references, report) = oracle_references(&config, &params, &data, 1.0, Some(&run.codes));
        assert!(report.past_tie <= PAST_TIE);
        check_all(&references, &run.named, &mut Tally::default()).unwrap_or_else(|e| panic!("{pattern}: {e}"));
    }
}

/// Initial weights of the smallest preset, sequences of a length that no chunk divides.
#[test]
fn the_nano_preset() {
    let config = ModelConfig::preset("nano").expect("a preset");
    let mut noise = Noise::new(11);
    let data = BatchData::random(2, 83, config.vocab_size, &mut noise);
    let mut tally = Tally::default();
    check(&config, initialise(&config, 5), &data, 0.5, &mut tally).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(tally.sharp, tally.total);
}

/// A wrong model must not pass: every kind of parameter moved by one part in a thousand is noticed.
#[test]
fn a_small_mistake_is_noticed() {
    let config =
        ModelConfig { layer_pattern: "SA".into(), n_layers: 2, ..ModelConfig::preset("nano").expect("a preset") };
    let config = ModelConfig { vocab_size: 97, d_model: 48, ffn_hidden: 352, kv_rank: 40, ..config };
    let mut noise = Noise::new(2);
    let params = trained_like(&config, &mut noise);
    let data = BatchData::random(2, 21, config.vocab_size, &mut noise);
    let run = core_run::run(&Model::new(config.clone(), params.clone()).expect("valid"), &data, 1.0);
    for p in params.layout().clone().params() {
        let mut wrong = params.clone();
        for x in &mut wrong.data_mut()[p.range.clone()] {
            *x *= 1.001;
        }
        let (references, _) = oracle_references(&config, &wrong, &data, 1.0, Some(&run.codes));
        assert!(check_all(&references, &run.named, &mut Tally::default()).is_err(), "{}", p.name);
    }
}

/// Weights that `scale` multiplies are the same as weights that were larger: gradients are linear in both, and are added
/// to what `grads` held.
#[test]
fn gradients_accumulate() {
    let config =
        ModelConfig { n_layers: 4, vocab_size: 50, d_model: 33, ..ModelConfig::preset("nano").expect("a preset") };
    let mut noise = Noise::new(4);
    let model = Model::new(config.clone(), trained_like(&config, &mut noise)).expect("valid");
    let data = BatchData::random(3, 19, config.vocab_size, &mut noise);
    let mut ws = Workspace::new(&config, 3, 19, Checkpointing::None);
    let mut once = Params::zeros(model.layout().clone());
    model.loss_and_grad(&mut ws, &as_batch(&data), 1.0, &mut once).expect("fits");
    let mut twice = Params::zeros(model.layout().clone());
    model.loss_and_grad(&mut ws, &as_batch(&data), 1.0, &mut twice).expect("fits");
    model.loss_and_grad(&mut ws, &as_batch(&data), 1.0, &mut twice).expect("fits");
    for p in model.layout().params() {
        let [a, b] = [&once, &twice].map(|g| &g.data()[p.range.clone()]);
        let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (a, b) in a.iter().zip(b) {
            // The second pass adds its partial sums to a total of at most `largest`, one rounding each: some hundreds
            // of additions (3 * 19 tokens and the sums' own blocks), of half a unit in the last place.
            assert!((2.0 * a - b).abs() <= 256.0 * f32::EPSILON * largest, "{}: {a} {b}", p.name);
        }
    }
}
