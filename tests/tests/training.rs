//! Ten steps of training in parity with LibTorch: gradients, clipping, AdamW with decay on matrices only.

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::model::{Checkpointing, Model, Workspace};
use elleci_core::optim::{AdamW, AdamWConfig, StatePrecision, StepRates, norm};
use elleci_core::params::Params;
use elleci_tests::arbitrary::BatchData;
use elleci_tests::compare::{Evaluation, FLOOR, NOISE_RUNS, Noise, ROUNDOFF, Tally, check_all, to_f64};
use elleci_tests::core_run::{self, as_batch, oracle_references};
use elleci_tests::ops::Scan;
use elleci_tests::oracle::Oracle;
use elleci_tests::train::{Recipe, Trainer};

const STEPS: usize = 10;

/// A small hybrid of odd sizes.
fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 101,
        d_model: 48,
        n_layers: 3,
        layer_pattern: "SAS".into(),
        n_heads: 3,
        kv_rank: 40,
        d_nope: 10,
        d_rope: 6,
        d_v: 12,
        d_inner: 60,
        head_dim: 20,
        d_state: 24,
        ffn_hidden: 88,
        ..ModelConfig::preset("nano").expect("a preset")
    }
}

fn batches(vocab: usize) -> Vec<BatchData> {
    let mut noise = Noise::new(21);
    (0..STEPS).map(|_| BatchData::random(3, 37, vocab, &mut noise)).collect()
}

/// A warm-up, so that every step has its own rate.
fn lr(step: usize) -> f64 {
    2e-3 * (step + 1) as f64 / STEPS as f64
}

fn mean(data: &BatchData) -> f64 {
    1.0 / data.tokens.len() as f64
}

/// The core's training step; returns the mean loss before it and the gradients.
struct CoreTrainer {
    model: Model,
    ws: Workspace,
    adamw: AdamW,
}

impl CoreTrainer {
    fn new(config: &ModelConfig, params: Params, data: &BatchData) -> CoreTrainer {
        let adamw = AdamW::new(params.layout().clone(), AdamWConfig::default(), StatePrecision::F32);
        let ws = Workspace::new(config, data.batch, data.seq, Checkpointing::EveryLayer);
        CoreTrainer { model: Model::new(config.clone(), params).expect("valid"), ws, adamw }
    }

    fn step(&mut self, data: &BatchData, recipe: Recipe, lr: f64) -> (f64, Params) {
        let mut grads = Params::zeros(self.model.layout().clone());
        let scale = mean(data);
        let loss = self.model.loss_and_grad(&mut self.ws, &as_batch(data), scale as f32, &mut grads).expect("fits");
        let clip = norm::clip_factor(norm::global_norm(&grads), recipe.clip);
        let rates = StepRates { lr_of: &|_| lr, weight_decay: recipe.weight_decay, grad_scale: clip };
        let adamw = &mut self.adamw;
        self.model.update(|params| adamw.step(params, &grads, &rates));
        (loss * scale, grads)
    }
}

/// Step by step: the core's gradients against the oracle's at the core's weights, and the core's weights against those
/// that LibTorch's AdamW makes, in float64, of the core's gradients.
#[test]
fn ten_steps_of_adamw() {
    let (config, recipe) = (config(), Recipe { clip: 0.5, ..Recipe::default() });
    let batches = batches(config.vocab_size);
    let params = initialise(&config, 9);
    let mut torch = Trainer::new(&params, tch::Kind::Double, recipe, (0.0, 0));
    let mut core = CoreTrainer::new(&config, params, &batches[0]);
    let (mut tally, mut clipped) = (Tally::default(), 0);
    for (step, data) in batches.iter().enumerate() {
        let run = core_run::run(&core.model, data, mean(data) as f32);
        let (references, _) =
            oracle_references(&config, core.model.params(), data, mean(data) as f32, Some(&run.codes));
        check_all(&references, &run.named, &mut tally).unwrap_or_else(|e| panic!("step {step}: {e}"));
        let lr = lr(step);
        let (_, grads) = core.step(data, recipe, lr);
        assert_eq!(grads.data(), run.grads.data(), "checkpointing changes no bit");
        clipped += usize::from(norm::global_norm(&grads) > recipe.clip);
        let layout = core.model.layout().clone();
        torch.step_with(&layout, &grads, lr);
        for p in layout.params() {
            let want = to_f64(&torch.vars[&p.name]);
            for (i, (found, want)) in core.model.params().data()[p.range.clone()].iter().zip(&want).enumerate() {
                // A step rounds the weight twice (decay, update): 2 * 2^-24 of it. The update is at most 2 lr in size
                // (|m| <= sqrt(v) * (1-b1)/sqrt(1-b2) times bias corrections below 2.3); its moments are sums of up to
                // ten terms with three roundings each, and root, division and correction add some: under 64 * 2^-24.
                let tolerance = (step + 1) as f64 * ROUNDOFF * (2.0 * want.abs() + 128.0 * lr);
                assert!((f64::from(*found) - want).abs() <= tolerance, "step {step}, {}[{i}]: {found} {want}", p.name);
            }
        }
    }
    assert!(clipped > 0, "the test is to see clipping");
    // From the initial weights, the gradients of dt_bias and a_log are 1e-5 of the largest.
    assert!(tally.share() > 0.9, "only {:.3} of {} comparisons are sharp", tally.share(), tally.total);
}

/// LibTorch trains alone and the core trains alone: the losses stay together as far as rounding allows. A flipped code
/// changes the gradients, the weights, and more codes, so what rounding allows is measured: LibTorch's own runs in float32
/// and from weights moved by half a unit in the last place spread around the true run's losses. The core's loss is one
/// more draw from that spread: the chance that one of ten lies 4 times as far out as all of six draws is below 1e-3, and
/// the draws are the same in every run.
#[test]
fn ten_steps_on_their_own() {
    let (config, recipe) = (config(), Recipe::default());
    // One batch throughout: the loss falls by much more than the runs differ.
    let batches = vec![batches(config.vocab_size).swap_remove(0); STEPS];
    let params = initialise(&config, 9);
    let alone = |evaluation: Evaluation| -> Vec<f64> {
        let kind = evaluation.mode().0;
        // One float32 run in the order of the recurrence; else the chunked form, which is faster.
        let scan = if evaluation == Evaluation::Single(false) { Scan::Sequential } else { Scan::Chunked(16) };
        let moved = if let Evaluation::Perturbed(seed) = evaluation { (ROUNDOFF, seed) } else { (0.0, 0) };
        let mut trainer = Trainer::new(&params, kind, recipe, moved);
        let step = |(step, data): (usize, &BatchData)| {
            let leaves = trainer.vars.iter().map(|(name, var)| (name.clone(), var.shallow_clone())).collect();
            let oracle = Oracle::with_leaves(&config, leaves, kind, scan, None);
            let loss = oracle.loss(&data.to_oracle(config.vocab_size)).1 * mean(data);
            trainer.step(&loss, lr(step));
            to_f64(&loss)[0]
        };
        batches.iter().enumerate().map(step).collect()
    };
    let truth = alone(Evaluation::Truth);
    let mut noise = [0.0f64; STEPS];
    for run in NOISE_RUNS.map(alone) {
        for ((noise, loss), truth) in noise.iter_mut().zip(&run).zip(&truth) {
            *noise = noise.max((loss - truth).abs());
        }
    }
    let mut core = CoreTrainer::new(&config, params.clone(), &batches[0]);
    let mut sofar: f64 = 0.0;
    for (step, data) in batches.iter().enumerate() {
        let loss = core.step(data, recipe, lr(step)).0;
        // Deviations do not shrink again: the noise of a step is at least that of the steps before.
        sofar = sofar.max(noise[step]);
        let tolerance = 4.0 * sofar + FLOOR * truth[step];
        let error = (loss - truth[step]).abs();
        eprintln!("step {step}: loss {loss:.7}, LibTorch {:.7}, off by {error:.1e}, noise {sofar:.1e}", truth[step]);
        assert!(error <= tolerance, "step {step}: {loss} instead of {}, allowed {tolerance:.1e}", truth[step]);
        assert!(
            tolerance < 0.2 * (truth[0] - truth[STEPS - 1]),
            "step {step}: a tolerance of {tolerance} proves nothing"
        );
    }
}
