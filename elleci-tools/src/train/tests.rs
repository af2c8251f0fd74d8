//! The loop on a model that is small enough to follow: softmax of one row of logits a previous token, trained by
//! gradient descent with momentum. It has weights, an optimizer state and a running mean, as the real one.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use elleci_core::model::{Batch, Checkpointing};

use super::backend::{Backend, Counters, Group, StepEnd, StepOutcome, cpu_pass_rows};
use super::batches::{Feed, MicroBatch, RandomFeed, StepData};
use super::layers::{Layer, load};
use super::log::Log;
use super::plan::{Plan, Rates, checkpointing};
use super::*;
use crate::checkpoint::tensors::{Tensor, TensorFile};
use crate::checkpoint::{Checkpoint, TokenizerId};
use elleci_core::optim::norm::clip_factor;

const VOCAB: usize = 16;

struct Bigram {
    weights: Vec<f32>,
    momentum: Vec<f32>,
    average: Vec<f32>,
    grads: Vec<f32>,
    counters: Counters,
    /// Calls of `accumulate`, counted over all, whose loss is not a number
    poison: std::ops::Range<u64>,
    calls: u64,
    loss: f64,
    ended: Option<StepOutcome>,
}

impl Bigram {
    fn new() -> Bigram {
        let zeros = || vec![0.0; VOCAB * VOCAB];
        Bigram {
            weights: zeros(),
            momentum: zeros(),
            average: zeros(),
            grads: zeros(),
            counters: Counters::default(),
            poison: 0..0,
            calls: 0,
            loss: 0.0,
            ended: None,
        }
    }

    fn group(&self, group: Group) -> &Vec<f32> {
        match group {
            Group::Weights => &self.weights,
            Group::Optimizer => &self.momentum,
            Group::Average => &self.average,
        }
    }

    /// `Σ w·CE`; its gradient times `scale` goes to `grads`, where there is one.
    fn forward(weights: &[f32], batch: &Batch<'_>, scale: f32, mut grads: Option<&mut [f32]>) -> f64 {
        let mut loss = 0.0;
        for ((&token, &target), &w) in batch.tokens.iter().zip(batch.targets).zip(batch.weights) {
            let row = token as usize % VOCAB * VOCAB;
            let logits = &weights[row..row + VOCAB];
            let sum: f32 = logits.iter().map(|l| l.exp()).sum();
            let target = target as usize % VOCAB;
            loss += f64::from(w * (sum.ln() - logits[target]));
            if let Some(grads) = grads.as_deref_mut() {
                for i in 0..VOCAB {
                    let hit = if i == target { 1.0 } else { 0.0 };
                    grads[row + i] += scale * w * (logits[i].exp() / sum - hit);
                }
            }
        }
        loss
    }
}

impl Backend for Bigram {
    fn accumulate(&mut self, batch: &Batch<'_>, scale: f32) -> anyhow::Result<()> {
        self.calls += 1;
        let loss = Bigram::forward(&self.weights, batch, scale, Some(&mut self.grads));
        self.loss += if self.poison.contains(&self.calls) { f64::NAN } else { loss };
        Ok(())
    }

    fn update(&mut self, rates: &Rates, end: StepEnd) -> anyhow::Result<()> {
        let norm = self.grads.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        let outcome = StepOutcome::new(std::mem::take(&mut self.loss) / end.weight, norm);
        if outcome.updated {
            let grad_scale = if end.clip > 0.0 { clip_factor(norm, end.clip) } else { 1.0 };
            for i in 0..self.weights.len() {
                self.momentum[i] = 0.9 * self.momentum[i] + grad_scale * self.grads[i];
                self.weights[i] -= 1e3 * rates.lr as f32 * self.momentum[i];
            }
            self.counters.updates += 1;
        }
        self.grads.fill(0.0);
        assert!(self.ended.replace(outcome).is_none(), "the step before was not read");
        Ok(())
    }

    fn outcome(&mut self) -> anyhow::Result<StepOutcome> {
        self.ended.take().ok_or_else(|| anyhow::anyhow!("no step was ended"))
    }

    fn average(&mut self) -> anyhow::Result<()> {
        self.counters.averaged += 1;
        let n = self.counters.averaged as f32;
        self.average.iter_mut().zip(&self.weights).for_each(|(a, w)| *a += (w - *a) / n);
        Ok(())
    }

    fn evaluate(&mut self, batch: &Batch<'_>) -> anyhow::Result<f64> {
        Ok(Bigram::forward(&self.weights, batch, 0.0, None))
    }

    fn sample(&mut self, prompt: &[u32], pick: &mut dyn FnMut(&[f32]) -> Option<u32>) -> anyhow::Result<()> {
        let mut token = prompt.last().copied();
        while let Some(t) = token {
            token = pick(&self.weights[t as usize % VOCAB * VOCAB..][..VOCAB]);
        }
        Ok(())
    }

    fn adopt_average(&mut self) -> anyhow::Result<bool> {
        self.weights.clone_from(&self.average);
        Ok(self.counters.averaged > 0)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn export(&self, group: Group) -> anyhow::Result<Vec<Tensor<'_>>> {
        Ok(vec![Tensor::f32("w", &[VOCAB, VOCAB], self.group(group))])
    }

    fn import(&mut self, group: Group, file: &TensorFile, counters: Counters) -> anyhow::Result<()> {
        let mut values = vec![0.0; VOCAB * VOCAB];
        file.read_floats("w", &[VOCAB, VOCAB], &mut values)?;
        match group {
            Group::Weights => self.weights = values,
            Group::Optimizer => self.momentum = values,
            Group::Average => self.average = values,
        }
        self.counters = counters;
        Ok(())
    }
}

/// Random steps that know where they are: every token is a function of the step.
struct Numbered {
    config: RunConfig,
    at: u64,
    masked: bool,
}

impl Feed for Numbered {
    fn next(&mut self, shape: elleci_core::optim::schedule::StepShape, weights: &[f64]) -> anyhow::Result<StepData> {
        let mut config = self.config.clone();
        config.training.seed = self.at;
        self.at += 1;
        let mut data = RandomFeed::new(&config).next(shape, weights)?;
        for (i, micro) in data.micro.iter_mut().enumerate() {
            // The next token mostly follows from this one, so that there is something to learn.
            for t in 0..micro.tokens.len() {
                micro.targets[t] = (micro.tokens[t] * 7 + u32::from(t % 5 == 0)) % VOCAB as u32;
            }
            if self.masked {
                // Very different numbers of targets in the micro-batches.
                for w in micro.weights.iter_mut().skip(5 * (2 * i + 1)) {
                    *w = 0.0;
                }
            }
        }
        data.weight = data.micro.iter().map(MicroBatch::weight).sum();
        Ok(data)
    }

    fn cursor(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::json!(self.at))
    }

    fn restore(&mut self, cursor: &serde_json::Value) -> anyhow::Result<()> {
        self.at = cursor.as_u64().expect("written by cursor");
        Ok(())
    }

    fn tokenizer(&self) -> TokenizerId {
        TokenizerId { hash: "test".into(), vocab_size: VOCAB }
    }

    fn sources(&self) -> Vec<String> {
        self.config.data.sources.keys().cloned().collect()
    }

    fn held_out(
        &self,
        _: usize,
        rows: usize,
        seq: usize,
    ) -> Box<dyn Iterator<Item = anyhow::Result<(MicroBatch, u64)>> + '_> {
        let n = rows * seq;
        let batch = MicroBatch { rows, seq, tokens: vec![1; n], targets: vec![7; n], weights: vec![1.0; n] };
        Box::new(std::iter::once(Ok((batch, 3 * n as u64))))
    }
}

static GO: AtomicBool = AtomicBool::new(false);

fn run<'a>(dir: Option<&Path>, settings: &[&str], stop: &'a AtomicBool) -> Run<'a> {
    let common = ["training.steps=30", "training.batch=2", "training.save_interval=7", "swa.start=0.5"];
    let layers: Vec<Layer> = common.iter().chain(settings).map(|s| Layer::assignment(s).unwrap()).collect();
    let config = load(None, &layers).unwrap();
    let feed = Numbered { config: config.clone(), at: 0, masked: settings.contains(&"training.accumulation=2") };
    Run {
        plan: Plan::new(&config, &feed.sources()),
        backend: Box::new(Bigram::new()),
        feed: Box::new(feed),
        text: None,
        store: dir.map(|d| Store::open(&d.join("checkpoints")).unwrap()),
        log: dir.map_or_else(|| Log::to_stderr(None), |d| Log::open(d, None, 0).unwrap()),
        recorder: None,
        progress: Progress::default(),
        peak: None,
        machine: Vec::new(),
        stop,
        config,
        ahead: None,
    }
}

fn latest(dir: &Path) -> Checkpoint {
    Store::latest(&dir.join("checkpoints"), |m| panic!("{m}")).unwrap().unwrap()
}

#[test]
fn losses_fall_and_a_resumed_run_repeats_them_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = run(None, &[], &GO).train(30).unwrap().losses;
    assert!(whole[29] < 0.7 * whole[0], "{} -> {}", whole[0], whole[29]);
    // Steps 1..=17 with a checkpoint at 14, then again from 14: in the middle of the running mean (from 15 on).
    for stop_at in [17, 22] {
        let dir = dir.path().join(stop_at.to_string());
        let mut first = run(Some(&dir), &["training.keep_last=0"], &GO);
        first.store = None;
        std::fs::create_dir_all(&dir).unwrap();
        let mut first = run(Some(&dir), &["training.keep_last=0"], &GO);
        first.train(stop_at).unwrap();
        for (_, path) in Store::list(&dir.join("checkpoints")).unwrap() {
            let checkpoint = Checkpoint::open(&path).unwrap();
            let mut second = run(None, &["training.keep_last=0"], &GO);
            second.resume(&checkpoint).unwrap();
            let at = second.progress.step as usize;
            assert_eq!(second.train(30).unwrap().losses, whole[at..], "from step {at}");
        }
        assert_eq!(latest(&dir).state.step, stop_at);
    }
}

#[test]
fn accumulation_equals_the_large_batch() {
    // The same tokens in one micro-batch or in two of very different weight.
    let weigh = |split: bool| {
        let mut run = run(None, &["training.accumulation=2", "training.batch=1"], &GO);
        let plan = Plan::new(&run.config, &run.feed.sources());
        let mut data = run.feed.next(plan.at(0).shape, plan.at(0).weights).unwrap();
        if !split {
            let second = data.micro.pop().unwrap();
            let first = &mut data.micro[0];
            first.rows += 1;
            first.tokens.extend(second.tokens);
            first.targets.extend(second.targets);
            first.weights.extend(second.weights);
        }
        for micro in &data.micro {
            run.backend.accumulate(&micro.view(), (1.0 / data.weight) as f32).unwrap();
        }
        run.backend.update(&plan.at(0).rates, StepEnd { weight: data.weight, clip: 1.0 }).unwrap();
        let outcome = run.backend.outcome().unwrap();
        (outcome.loss, outcome.grad_norm)
    };
    let ((a, b), (c, d)) = (weigh(true), weigh(false));
    // The double adds position by position, in the same order either way: not one bit may differ.
    assert_eq!((a.to_bits(), b.to_bits()), (c.to_bits(), d.to_bits()));
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_counted() {
    let mut poisoned = run(None, &[], &GO);
    let mut bigram = Bigram::new();
    bigram.poison = 11..12;
    poisoned.backend = Box::new(bigram);
    let losses = poisoned.train(30).unwrap().losses;
    assert_eq!(losses.iter().filter(|l| !l.is_finite()).count(), 1);
    assert!(losses[10].is_nan());
    assert_eq!((poisoned.progress.step, poisoned.progress.skipped, poisoned.backend.counters().updates), (30, 1, 29));
    assert!(losses[29] < 0.7 * losses[0]);
}

/// A run that has diverged is no success, and its checkpoints from before stay.
#[test]
fn a_run_that_is_not_finite_any_more_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut diverged = run(Some(dir.path()), &[], &GO);
    let mut bigram = Bigram::new();
    bigram.poison = 16..u64::MAX;
    diverged.backend = Box::new(bigram);
    let error = format!("{:#}", diverged.train(30).unwrap_err());
    assert!(error.contains("to step 25") && error.contains("diverged") && error.contains("peak_lr"), "{error}");
    assert!(latest(dir.path()).state.step >= 14, "{}", latest(dir.path()).state.step);
    // Nine are borne.
    let mut bigram = Bigram::new();
    bigram.poison = 11..20;
    let mut borne = run(None, &[], &GO);
    borne.backend = Box::new(bigram);
    assert_eq!((borne.train(30).map(|_| ()).is_ok(), borne.progress.skipped), (true, 9));
}

#[test]
fn a_signal_saves_and_the_run_goes_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(true);
    let mut first = run(Some(dir.path()), &[], &stop);
    let error = first.train(30).unwrap_err();
    assert!(error.downcast_ref::<Interrupted>().is_some(), "{error:#}");
    let mut second = run(None, &[], &GO);
    second.resume(&latest(dir.path())).unwrap();
    assert_eq!(second.progress.step, 1);
    assert_eq!(second.train(30).unwrap().losses, run(None, &[], &GO).train(30).unwrap().losses[1..]);
}

#[test]
fn a_resumed_log_has_every_step_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = run(Some(dir.path()), &[], &GO);
    first.train(16).unwrap();
    // As if the process had died after step 16, with 14 the last checkpoint, in the middle of a line.
    std::fs::remove_dir_all(dir.path().join("checkpoints/step-00000016")).unwrap();
    let path = dir.path().join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap() + "{\"step\": 1";
    std::fs::write(&path, text).unwrap();
    let mut second = run(None, &[], &GO);
    second.resume(&latest(dir.path())).unwrap();
    second.log = Log::open(dir.path(), None, second.progress.step).unwrap();
    second.train(30).unwrap();
    let steps: Vec<u64> = std::fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .filter(|v| v["kind"] == "step")
        .map(|v| v["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=30).collect::<Vec<_>>());
}

#[test]
fn another_configuration_or_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(Some(dir.path()), &[], &GO).train(8).unwrap();
    let checkpoint = latest(dir.path());
    let error = run(None, &["optimizer.weight_decay=0.2"], &GO).resume(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("optimizer.weight_decay"), "{error}");
    let mut other = checkpoint.state.clone();
    other.tokenizer.hash = "other".into();
    let error = run(None, &[], &GO).resume(&Checkpoint { dir: checkpoint.dir, state: other }).unwrap_err();
    assert!(error.to_string().contains("tokenizer"), "{error}");
}

/// The same step in one micro-batch of four sequences and in two of two, on the real backend.
/// The smallest shape of everything, with more settings.
fn tiny(settings: &[&str]) -> RunConfig {
    let shape = [
        "model.d_model=32",
        "model.d_inner=64",
        "model.head_dim=16",
        "model.d_state=8",
        "model.kv_rank=8",
        "model.ffn_hidden=48",
        "model.n_heads=2",
        "model.vocab_size=16",
    ];
    let layers: Vec<Layer> = shape.iter().chain(settings).map(|s| Layer::assignment(s).unwrap()).collect();
    load(None, &layers).unwrap()
}

#[test]
fn a_large_micro_batch_is_worked_on_in_passes() {
    let of = [(16, 1024), (7, 1024), (8, 256), (9, 256), (1, 5000), (3, 2048)]
        .map(|(rows, seq)| cpu_pass_rows(256, rows, seq));
    assert_eq!(of, [2, 1, 8, 3, 1, 1]);
    assert_eq!((cpu_pass_rows(1024, 16, 1024), cpu_pass_rows(2048, 16, 1024), cpu_pass_rows(8192, 16, 256)), (2, 1, 4));
    let config = tiny(&[]);
    let (rows, seq) = (12, 256);
    let tokens: Vec<u32> = (0..rows * seq).map(|i| (i * i % 13) as u32).collect();
    let weights: Vec<f32> = (0..rows * seq).map(|i| (i % 3) as f32).collect();
    let whole = Batch { batch: rows, seq, tokens: &tokens, targets: &tokens, weights: &weights };
    assert_eq!(cpu_pass_rows(config.model.d_model, rows, seq), 6);
    let backend = || {
        let weights = session::weights(&config, None, false).unwrap();
        session::new_cpu_backend(&config, weights, Checkpointing::None).unwrap()
    };
    let plan = Plan::new(&config, &["it".to_string()]);
    let step = |batches: &[Batch<'_>]| {
        let mut backend = backend();
        let evaluated: f64 = batches.iter().map(|b| backend.evaluate(b).unwrap()).sum();
        batches.iter().for_each(|b| backend.accumulate(b, 1e-3).unwrap());
        backend.update(&plan.at(0).rates, StepEnd { weight: 1e3, clip: 1.0 }).unwrap();
        let outcome = backend.outcome().unwrap();
        [outcome.loss, outcome.grad_norm, evaluated].map(f64::to_bits)
    };
    let halves: Vec<Batch<'_>> = whole.split(6).unwrap().collect();
    assert_eq!(halves.len(), 2);
    assert_eq!(step(std::slice::from_ref(&whole)), step(&halves));
    let short = Batch { tokens: &tokens[1..], ..whole };
    let mut backend = backend();
    assert!(backend.accumulate(&short, 1.0).is_err() && backend.evaluate(&short).is_err());
}

#[test]
fn accumulation_equals_the_large_batch_on_the_cpu() {
    let config = tiny(&["training.batch=2", "training.accumulation=2"]);
    let mut feed = Numbered { config: config.clone(), at: 0, masked: true };
    let plan = Plan::new(&config, &feed.sources());
    let split = feed.next(plan.at(0).shape, plan.at(0).weights).unwrap().micro;
    let mut whole = split[0].clone();
    whole.rows += split[1].rows;
    whole.tokens.extend(&split[1].tokens);
    whole.targets.extend(&split[1].targets);
    whole.weights.extend(&split[1].weights);
    let weight = whole.weight();
    let (few, many) = (split[0].weight(), split[1].weight());
    assert!(few * 1.5 < many, "the micro-batches weigh {few} and {many}");
    let step = |micro: &[MicroBatch]| {
        let weights = session::weights(&config, None, false).unwrap();
        let mut backend = session::new_cpu_backend(&config, weights, checkpointing(&config).unwrap()).unwrap();
        micro.iter().for_each(|m| backend.accumulate(&m.view(), (1.0 / weight) as f32).unwrap());
        backend.update(&plan.at(0).rates, StepEnd { weight, clip: 1.0 }).unwrap();
        let outcome = backend.outcome().unwrap();
        (outcome.loss, outcome.grad_norm)
    };
    let ((a, b), (c, d)) = (step(&split), step(&[whole]));
    // Both add the same numbers in another order; where that moves a value over a boundary of the int8 quantiser, it moves by
    // 1/127 of one of thousands. A mean of the two means would be wrong by a tenth.
    assert!((a - c).abs() < 1e-3 * c && (b - d).abs() < 1e-3 * d, "{a} {c}, {b} {d}");
}
