//! The whole model against LibTorch: codes, logits, loss and every gradient, over random shapes.

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::model::Model;
use elleci_core::params::Params;
use elleci_tests::arbitrary::{BatchData, cases, model_config};
use elleci_tests::compare::Noise;
use elleci_tests::core_run::{self, oracle_references, trained_like};
use proptest::prelude::*;

/// How far past a tie a value may lie, in codes, when the core rounds it to the other side.
///
/// A value before rounding is at most 127 and off by the relative rounding error of the norm's input, its norm and the
/// product with 127/amax. The last two are some units in the last place (127 * 8 * 2^-24 = 6e-5 codes); the first is
/// the accumulated float32 error of the layers below, with the codes there given: about 1e-6 per layer relative to the
/// row's root mean square, times the row's crest factor of at most 127... of which only values near the maximum see 127
/// times the error. 2e-3 codes stand for a relative error of 1.6e-5 in the largest value of a row. A wrong formula is
/// off by whole codes.
const PAST_TIE: f64 = 2e-3;

fn check(config: &ModelConfig, params: Params, data: &BatchData, scale: f32) -> Result<(), TestCaseError> {
    let model = Model::new(config.clone(), params).expect("a valid config");
    let run = core_run::run(&model, data, scale);
    let (references, report) = oracle_references(config, model.params(), data, scale, Some(&run.codes));
    prop_assert!(report.past_tie <= PAST_TIE, "a code is {:.1e} past a tie", report.past_tie);
    // Flips need a value within PAST_TIE of a tie: a share of 2 * PAST_TIE of all values; five times that, and five for
    // the smallest tensors.
    let allowed = 5 + (10.0 * PAST_TIE * report.total as f64) as usize;
    prop_assert!(report.flips <= allowed, "{} of {} codes differ", report.flips, report.total);
    let mut failures = Vec::new();
    for (name, reference) in &references {
        failures.extend(reference.check(name, &run.named[name]).err());
    }
    prop_assert!(failures.is_empty(), "{}\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

fn shapes() -> impl Strategy<Value = (ModelConfig, usize, usize, u64)> {
    (model_config(), 1usize..4, prop_oneof![1usize..40, 60usize..70, 125usize..135], any::<u64>())
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn every_gradient_of_any_shape((config, batch, seq, seed) in shapes()) {
        let mut noise = Noise::new(seed);
        let params = trained_like(&config, &mut noise);
        let data = BatchData::random(batch, seq, config.vocab_size, &mut noise);
        check(&config, params, &data, 1.0 / data.tokens.len() as f32)?;
    }
}

/// Initial weights of the smallest preset, one sequence of a length that no chunk divides.
#[test]
fn the_nano_preset() {
    let config = ModelConfig::preset("nano").expect("a preset");
    let mut noise = Noise::new(11);
    let data = BatchData::random(2, 83, config.vocab_size, &mut noise);
    check(&config, initialise(&config, 5), &data, 0.5).unwrap();
}
