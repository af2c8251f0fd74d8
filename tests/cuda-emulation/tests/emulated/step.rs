//! Whole training steps through the real host code, against `elleci-core`.

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::optim::norm::{clip_factor, global_norm};
use elleci_core::optim::swa::Swa;
use elleci_core::optim::{AdamW, AdamWConfig, StatePrecision, StepRates};
use elleci_core::params::{Id, Params};
use elleci_cuda::arena::Use;
use elleci_cuda::ops::product::Gemm;
use elleci_cuda::ops::{Products, Rows, padded};
use elleci_cuda::plan::{Options, Plan};
use elleci_cuda::trainer::{Rates, Trainer};
use elleci_cuda_emulation::Emulated;

use crate::machine::{Numbers, device, distance};

/// A model with a layer of each kind (two of Mamba), and no size that is a multiple of a tile.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 50,
        d_model: 24,
        n_layers: 3,
        layer_pattern: "SAS".into(),
        max_seq_len: 128,
        n_heads: 2,
        kv_rank: 9,
        d_nope: 6,
        d_rope: 4,
        d_v: 10,
        d_inner: 30,
        head_dim: 10,
        d_state: 7,
        ffn_hidden: 40,
        ..ModelConfig::preset("nano").unwrap()
    }
}

/// Weights with larger gains of the matrices than at the start of a training, so that every branch counts.
pub fn weights(c: &ModelConfig) -> Params {
    let mut params = initialise(c, 5);
    let layout = params.layout().clone();
    for (i, p) in layout.params().iter().enumerate() {
        if p.kind.decays() {
            params[Id(i)].iter_mut().for_each(|w| *w *= 6.0);
        }
    }
    params
}

pub struct Data {
    batch: usize,
    seq: usize,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Data {
    pub fn new(seed: u64, batch: usize, seq: usize) -> Data {
        let mut numbers = Numbers::new(seed);
        let mut tokens = |n: usize| (0..n).map(|_| numbers.below(50)).collect::<Vec<_>>();
        let (t, targets) = (tokens(batch * seq), tokens(batch * seq));
        let weights = (0..batch * seq).map(|i| if i % 5 == 0 { 0.0 } else { 1.0 }).collect();
        Data { batch, seq, tokens: t, targets, weights }
    }

    pub fn batch(&self) -> Batch<'_> {
        let Data { batch, seq, tokens, targets, weights } = self;
        Batch { batch: *batch, seq: *seq, tokens, targets, weights }
    }
}

pub fn options(products: Products, checkpointing: Checkpointing, batch: usize, seq: usize) -> Options {
    Options {
        batch,
        seq,
        whole_step: false,
        checkpointing,
        bf16_masters: false,
        bf16_gradients: false,
        states: StatePrecision::F32,
        products,
        unpacked: false,
        gemm: Gemm::Own,
        bf16_stream: false,
        average: true,
        guard: 64,
    }
}

pub fn trainer(c: &ModelConfig, w: &Params, o: Options, seed: u64) -> Trainer {
    Trainer::new(device(seed), w, c, AdamWConfig::default(), o, 1).unwrap()
}

/// What the core makes of a batch: loss, gradients, and the int8 rows of every norm.
pub struct Core {
    pub loss: f64,
    pub grads: Params,
    codes: Vec<Vec<i8>>,
}

pub fn core(c: &ModelConfig, w: &Params, data: &Data, scale: f32) -> Core {
    let model = Model::new(c.clone(), w.clone()).unwrap();
    let mut workspace = Workspace::new(c, data.batch, data.seq, Checkpointing::None);
    let mut grads = Params::zeros(model.layout().clone());
    let loss = model.loss_and_grad(&mut workspace, &data.batch(), scale, &mut grads).unwrap();
    let codes = workspace.quantized_rows(model.layout()).into_iter().map(|(_, rows)| rows.codes.clone()).collect();
    Core { loss, grads, codes }
}

/// The int8 rows of every norm as a step without checkpointing leaves them, in the order of the core's.
fn codes(t: &mut Trainer) -> Vec<Vec<i8>> {
    let c = t.plan().config.clone();
    let mut rows = Vec::new();
    for s in &t.plan().saved {
        rows.push((s.mixer_norm, c.d_model));
        rows.extend(s.mamba.map(|m| (m.gated, c.d_inner)));
        rows.extend(s.mla.into_iter().flat_map(|m| [(m.latent, c.kv_rank), (m.out, c.n_heads * c.d_v)]));
        rows.extend([(s.ffn_norm, c.d_model), (s.hidden, c.ffn_hidden)]);
    }
    let mut own = |(rows, width): (Rows, usize)| {
        let bytes = t.read_bytes(rows.codes).unwrap();
        bytes.chunks(padded(width)).flat_map(|row| row[..width].iter().map(|b| *b as i8)).collect()
    };
    rows.into_iter().map(&mut own).collect()
}

fn flips(a: &[Vec<i8>], b: &[Vec<i8>]) -> usize {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    a.iter().flatten().zip(b.iter().flatten()).filter(|(a, b)| a != b).count()
}

/// The core with the codes that the device has: the core itself or, where a value lay so near to a rounding boundary of the int8
/// quantiser that sums of another order fell on its other side, the core with its embeddings moved by half a unit in the last
/// place or so until they fall there too. Also returns in how many codes the device differs from the core itself.
fn twin(c: &ModelConfig, w: &Params, data: &Data, scale: f32, codes: &[Vec<i8>]) -> (Core, usize) {
    let plain = core(c, w, data, scale);
    let differing = flips(&plain.codes, codes);
    if differing == 0 {
        return (plain, 0);
    }
    let mut fewest = differing;
    for seed in 0..40 {
        let mut numbers = Numbers::new(1000 + seed);
        let mut moved = w.clone();
        let id = moved.layout().tok_emb();
        moved[id].iter_mut().for_each(|x| *x *= 1.0 + numbers.one() * NUDGE);
        let other = core(c, &moved, data, scale);
        match flips(&other.codes, codes) {
            0 => return (other, differing),
            n => fewest = fewest.min(n),
        }
    }
    panic!(
        "the device differs from the core in {differing} codes, and by rounding alone it would in {fewest} at least"
    );
}

/// The largest distance of a tensor's gradient from the core's, and the tensor.
pub fn worst(got: &Params, want: &Params) -> (f64, String) {
    let layout = want.layout().clone();
    let each = layout.params().iter().enumerate().map(|(i, p)| (distance(&got[Id(i)], &want[Id(i)]), p.name.clone()));
    each.fold((0.0, String::new()), |a, b| if b.0 > a.0 || b.0.is_nan() { b } else { a })
}

/// Forward sums differ from the core's in their order, by some 1e-6 of a value. A value that near to a rounding boundary of the
/// int8 quantiser gets another code, and one such flip is enough for hundreds in later layers: a code is 1/127 of a token's
/// largest. Such a step is another function, so it is held against the core with the very same codes; see [`twin`].
///
/// With equal codes only float32 sums remain: 2^-24 an operation, √140 of them over the tokens, and the same through some
/// twenty products, norms and scans in turn: 3e-6. Gradients of a few values a tensor (`dt_bias`, `a_log`) are sums that cancel
/// to a tenth.
const ROUNDING: f64 = 3e-5;

/// How far the twin's embeddings are moved, at most: some two units in the last place. It adds to the distance what a fifth
/// of the rounding above does.
const NUDGE: f32 = 3e-7;

/// Several batches: some have no flip, others hundreds.
#[test]
fn loss_and_gradients_equal_the_cores_with_the_same_codes() {
    let c = config();
    let w = weights(&c);
    for (seed, batch, seq) in [(100, 1, 6), (101, 1, 7), (1, 2, 70), (3, 2, 70)] {
        let data = Data::new(seed, batch, seq);
        let mut t = trainer(&c, &w, options(Products::F32, Checkpointing::None, batch, seq), seed);
        t.accumulate(&data.batch(), 0.01).unwrap();
        let loss = t.last_loss().unwrap();
        let (want, differing) = twin(&c, &w, &data, 0.01, &codes(&mut t));
        let (distance, name) = worst(&t.gradients().unwrap(), &want.grads);
        println!("{batch} x {seq}: {differing} codes differ; with the same codes {name} is the worst: {distance:.1e}");
        assert!(distance <= ROUNDING, "{name}: {distance:e} ({differing} codes differ from the core's own)");
        assert!((loss - want.loss).abs() <= 1e-6 * want.loss, "{loss} {}", want.loss);
    }
}

/// Every mode computes the same bits, and a step that is replayed does so again.
#[test]
fn checkpointing_and_replay_keep_every_bit() {
    let c = config();
    let w = weights(&c);
    let data = Data::new(1, 2, 70);
    let modes = [(0, Checkpointing::None), (3, Checkpointing::EveryLayer), (9, Checkpointing::EveryKth(2))];
    let mut first: Option<(f64, Params)> = None;
    for (seed, checkpointing) in modes {
        let mut t = trainer(&c, &w, options(Products::F32, checkpointing, 2, 70), seed);
        t.accumulate(&data.batch(), 0.01).unwrap();
        let loss = t.last_loss().unwrap();
        let got = t.gradients().unwrap();
        let (want_loss, want) = first.get_or_insert_with(|| (loss, got.clone()));
        assert_eq!(loss, *want_loss, "{checkpointing:?}");
        assert!(got.data() == want.data(), "{checkpointing:?}: {:?}", worst(&got, want));
        let (norm, want_norm) = (t.grad_norm().unwrap(), global_norm(&got));
        assert!((norm - want_norm).abs() <= 1e-9 * want_norm, "{norm} {want_norm}");
        // What follows does not depend on the mode, and a step takes seconds here.
        if checkpointing != Checkpointing::EveryKth(2) {
            continue;
        }
        // The same batch once more, replayed from the recording, doubles them to the last bit or two.
        t.accumulate(&data.batch(), 0.01).unwrap();
        let mut twice = got.clone();
        twice.data_mut().iter_mut().for_each(|g| *g *= 2.0);
        let (distance, name) = worst(&t.gradients().unwrap(), &twice);
        assert!(distance <= 1e-6, "{name}: {distance:e} when accumulated");
        // Scored with another plan, that of an evaluation.
        assert!((t.evaluate(&data.batch()).unwrap() - loss).abs() <= 1e-12 * loss.abs());
    }
}

/// A step of one micro-batch, whose activations lie in the memory of gradients: the same bits, steps and evaluations of other shapes
/// between them; and what would destroy gradients is refused.
#[test]
fn activations_in_the_memory_of_gradients_change_no_bit() {
    let c = config();
    let w = weights(&c);
    // Gradients are larger than the streams of so few tokens, so that all of these lie there.
    let shapes = [(1, 12), (1, 9), (1, 12)];
    let steps = |o: Options, tied: bool| {
        let c = ModelConfig { tie_embeddings: tied, ..c.clone() };
        let w = if tied { weights(&c) } else { w.clone() };
        let mut t = trainer(&c, &w, o, 0);
        let mut seen = Vec::new();
        for (seed, (batch, seq)) in shapes.into_iter().enumerate() {
            let data = Data::new(seed as u64, batch, seq);
            seen.push(t.evaluate(&data.batch()).unwrap());
            t.accumulate(&data.batch(), 0.02).unwrap();
            seen.extend(t.gradients().unwrap().data().iter().map(|g| *g as f64));
            if o.whole_step {
                let text = t.accumulate(&data.batch(), 0.02).unwrap_err().to_string();
                assert!(text.contains("a second micro-batch"), "{text}");
                assert!(t.evaluate(&data.batch()).unwrap_err().to_string().contains("before the step has ended"));
            }
            t.update(&Rates { lr_of: &|_| 1e-3, weight_decay: 0.1, clip: 0.05, weight: 50.0 }).unwrap();
            seen.push(t.outcome().unwrap().unwrap().norm);
        }
        // What is dropped leaves nothing behind.
        t.accumulate(&Data::new(9, 1, 12).batch(), 0.02).unwrap();
        t.discard().unwrap();
        t.accumulate(&Data::new(0, 1, 12).batch(), 0.02).unwrap();
        seen.extend(t.gradients().unwrap().data().iter().map(|g| *g as f64));
        (seen, t.plan().arena.lent_to(Use::Activations))
    };
    for (checkpointing, tied) in [(Checkpointing::EveryLayer, false), (Checkpointing::EveryKth(2), true)] {
        let apart = Options { guard: 0, ..options(Products::F32, checkpointing, 1, 12) };
        let (want, none) = steps(apart, tied);
        let (got, lent) = steps(Options { whole_step: true, ..apart }, tied);
        assert!(none == 0 && lent > 0, "{lent}");
        assert!(want == got, "{checkpointing:?}");
    }
}

/// bf16 rounds every operand of the backward and of the head: 2^-9 each, through three layers. The direction of each tensor's
/// gradient stays.
#[test]
fn tensor_core_products_keep_the_gradients_direction() {
    let c = config();
    let w = weights(&c);
    let data = Data::new(2, 1, 65);
    let Core { loss: want_loss, grads: want, .. } = core(&c, &w, &data, 0.02);
    let mut t = trainer(&c, &w, options(Products::Bf16, Checkpointing::EveryLayer, 1, 65), 0);
    t.accumulate(&data.batch(), 0.02).unwrap();
    let loss = t.last_loss().unwrap();
    assert!((loss - want_loss).abs() <= 1e-2 * want_loss, "{loss} {want_loss}");
    let (distance, name) = worst(&t.gradients().unwrap(), &want);
    assert!(distance <= 0.1, "{name}: {distance:e}");
}

/// Largest norm in the test below.
const CLIP: f64 = 0.05;

/// Four steps of two shapes, with AdamW, clipping, decay and running mean, in float32 throughout.
#[test]
fn steps_follow_the_core() {
    let c = config();
    let w = weights(&c);
    let mut model = Model::new(c.clone(), w.clone()).unwrap();
    let layout = model.layout().clone();
    let mut adam = AdamW::new(layout.clone(), AdamWConfig::default(), StatePrecision::F32);
    let mut mean = Swa::new(layout.clone());
    let mut t = trainer(&c, &w, options(Products::F32, Checkpointing::EveryLayer, 1, 40), 0);
    let lr_of = |id: Id| 1e-3 * (1.0 + id.0 as f64 * 0.01);
    for step in 0..4 {
        // The second shape is larger than what was reserved: everything moves.
        let data = if step < 2 { Data::new(step, 1, 40) } else { Data::new(step, 2, 66) };
        let mut workspace = Workspace::new(&c, data.batch, data.seq, Checkpointing::None);
        let mut grads = Params::zeros(layout.clone());
        let want = model.loss_and_grad(&mut workspace, &data.batch(), 0.02, &mut grads).unwrap();
        t.accumulate(&data.batch(), 0.02).unwrap();
        let norm = global_norm(&grads);
        let rates = StepRates { lr_of: &lr_of, weight_decay: 0.1, grad_scale: clip_factor(norm, CLIP) };
        assert!(rates.grad_scale < 0.9, "the gradients are clipped: their norm is {norm}");
        model.update(|p| adam.step(p, &grads, &rates));
        t.update(&Rates { lr_of: &lr_of, weight_decay: 0.1, clip: CLIP, weight: 50.0 }).unwrap();
        let got = t.outcome().unwrap().unwrap();
        // Codes that differ by one move the loss of some 50 tokens, and the norm, by less than this.
        assert!((got.loss - want / 50.0).abs() <= 1e-3 * got.loss, "step {step}: {got:?} {want}");
        assert!((got.norm - norm).abs() <= 1e-2 * norm && got.updated, "step {step}: {got:?} {norm}");
        mean.update(model.params());
        t.average().unwrap();
    }
    assert_eq!(t.counters(), (4, 4));
    let weights = t.weights().unwrap();
    // Adam's step is the sign of a gradient where that is tiny: the weights differ by at most four steps of the rate there.
    let (distance, name) = worst(&weights, model.params());
    assert!(distance <= 0.02, "{name}: {distance:e}");
    let furthest = weights.data().iter().zip(model.params().data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest <= 4.0 * 2.0 * 2.5e-3, "{furthest}");
    let (distance, name) = worst(&t.mean().unwrap().unwrap(), mean.mean());
    assert!(distance <= 0.02, "{name}: {distance:e}");
}

/// The memory of the smallest form: bf16 masters and gradients, 8-bit states; and the loss falls.
#[test]
fn the_smallest_form_learns() {
    let c = config();
    let w = weights(&c);
    let data = Data::new(4, 2, 33);
    let o = Options {
        bf16_masters: true,
        bf16_gradients: true,
        states: StatePrecision::Block8,
        average: false,
        ..options(Products::Bf16, Checkpointing::EveryLayer, 2, 33)
    };
    let mut t = trainer(&c, &w, o, 0);
    let mut losses = Vec::new();
    for step in 0..6 {
        if step == 4 {
            t.without_recording(); // launches one by one, as a profile does, instead of the recorded ones
        }
        t.accumulate(&data.batch(), 0.02).unwrap();
        t.update(&Rates { lr_of: &|_| 5e-3, weight_decay: 0.0, clip: 0.0, weight: 1.0 }).unwrap();
        losses.push(t.outcome().unwrap().unwrap().loss);
    }
    assert!(losses[5] < 0.8 * losses[0], "{losses:?}");
}

/// What is asked of the device is what the plan says, to the byte.
#[test]
fn the_device_is_asked_for_exactly_the_plan() {
    let c = config();
    let o = Options { guard: 0, ..options(Products::F32, Checkpointing::EveryLayer, 2, 20) };
    let plan = Plan::new(&c, o).unwrap();
    let mut device = Emulated::new(0);
    elleci_cuda::device::Device::reserve(&mut device, &plan.arena).unwrap();
    assert_eq!(device.bytes(), plan.arena.bytes());
    drop(device);
    let data = Data::new(6, 2, 20);
    let mut t = trainer(&c, &weights(&c), o, 0);
    t.accumulate(&data.batch(), 1.0).unwrap();
    assert!(t.last_loss().unwrap().is_finite());
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let c = config();
    let mut t = trainer(&c, &weights(&c), options(Products::F32, Checkpointing::None, 1, 8), 0);
    let mut data = Data::new(7, 1, 8);
    data.tokens[3] = 50;
    assert!(t.accumulate(&data.batch(), 1.0).unwrap_err().to_string().contains("token 50"));
    data.tokens.pop();
    assert!(t.accumulate(&data.batch(), 1.0).unwrap_err().to_string().contains("batch * seq"));
}
