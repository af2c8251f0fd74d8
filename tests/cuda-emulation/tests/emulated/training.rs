//! `elleci-train`'s loop on the device: checkpoints that move between it and the CPU, faults, and what the host waits for.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use elleci_core::init::initialise;
use elleci_core::model::{Batch, Checkpointing, Model};
use elleci_core::ops::head::HeadPrecision;
use elleci_core::optim::schedule::StepShape;
use elleci_core::optim::{AdamWConfig, StatePrecision};
use elleci_core::ternary::GradPrecision;
use elleci_cuda::arena::{Arena, Buf};
use elleci_cuda::device::{Ability, Arg, Device, DeviceError, Launch, Matmul, Recording, Result};
use elleci_tools::checkpoint::tensors::Bytes;
use elleci_tools::checkpoint::{Checkpoint, Store, TokenizerId};
use elleci_tools::train::backend::{Backend, CpuBackend, Group, StepEnd, StepForm};
use elleci_tools::train::batches::{Feed, MicroBatch, StepData};
use elleci_tools::train::config::RunConfig;
use elleci_tools::train::cuda::CudaBackend;
use elleci_tools::train::cuda::choice::{Mean, choose};
use elleci_tools::train::layers::{Layer, load};
use elleci_tools::train::log::Log;
use elleci_tools::train::plan::{Plan, Rates};
use elleci_tools::train::{Progress, Run};

use crate::machine::{Numbers, device};

const VOCAB: u32 = 50;
const STEPS: u64 = 4;

/// A run of a tiny model: two lengths of sequences, two micro-batches a step, a running mean from the middle on, and one matrix
/// that is large enough for 8-bit states.
const RUN: [&str; 22] = [
    "model.vocab_size=50",
    "model.d_model=32",
    "model.n_layers=2",
    "model.layer_pattern=SA",
    "model.max_seq_len=24",
    "model.n_heads=2",
    "model.kv_rank=8",
    "model.d_inner=64",
    "model.head_dim=16",
    "model.d_state=8",
    "model.ffn_hidden=40",
    "training.steps=4",
    "training.batch=2",
    "training.accumulation=2",
    "training.sequence=[{until=0.5,length=16},{until=1.0,length=24}]",
    "training.save_interval=2",
    "training.keep_last=0",
    "training.eval_interval=0",
    "training.checkpointing=auto",
    "swa.start=0.3",
    "cuda.products=float32",
    "cuda.gemm=own",
];

fn config(more: &[&str]) -> RunConfig {
    let layers: Vec<Layer> = RUN.iter().chain(more).map(|s| Layer::assignment(s).unwrap()).collect();
    load(Some("nano"), &layers).unwrap()
}

/// Steps by their number alone; the next token follows from this one.
struct Numbered(u64);

impl Numbered {
    fn micro(&self, rows: usize, seq: usize, seed: u64) -> MicroBatch {
        let mut numbers = Numbers::new(1000 * self.0 + seed);
        let tokens: Vec<u32> = (0..rows * seq).map(|_| numbers.below(VOCAB)).collect();
        let targets = tokens.iter().map(|t| (t * 7 + 1) % VOCAB).collect();
        let weights = (0..rows * seq).map(|i| if i % 7 == 3 { 0.0 } else { 1.0 }).collect();
        MicroBatch { rows, seq, tokens, targets, weights }
    }
}

impl Feed for Numbered {
    fn next(&mut self, shape: StepShape, _: &[f64]) -> anyhow::Result<StepData> {
        let micro: Vec<_> =
            (0..shape.micro_batches).map(|i| self.micro(shape.rows(i), shape.seq_len, i as u64)).collect();
        self.0 += 1;
        Ok(StepData { weight: micro.iter().map(MicroBatch::weight).sum(), tokens: shape.tokens() as u64, micro })
    }

    fn cursor(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::json!(self.0))
    }

    fn restore(&mut self, cursor: &serde_json::Value) -> anyhow::Result<()> {
        self.0 = cursor.as_u64().unwrap();
        Ok(())
    }

    fn tokenizer(&self) -> TokenizerId {
        TokenizerId { hash: "test".into(), vocab_size: VOCAB as usize }
    }

    fn sources(&self) -> Vec<String> {
        vec!["numbers".into()]
    }

    fn held_out(
        &self,
        _: usize,
        rows: usize,
        seq: usize,
    ) -> Box<dyn Iterator<Item = anyhow::Result<(MicroBatch, u64)>> + '_> {
        let batch = Numbered(99).micro(rows, seq, 0);
        Box::new(std::iter::once(Ok((batch, 3 * (rows * seq) as u64))))
    }
}

/// What a [`Watched`] device has seen, and what it is to do.
#[derive(Default)]
struct Watch {
    asked: Cell<u64>,
    reads: Cell<usize>,
    replays: Cell<usize>,
    /// Reads and replays after which every call fails: a sticky error
    fails_after: Cell<Option<(usize, usize)>>,
}

/// The device under test, watched.
struct Watched {
    inner: Box<dyn Device>,
    watch: Rc<Watch>,
}

impl Watched {
    fn sound(&self) -> Result<()> {
        let (reads, replays) = (self.watch.reads.get(), self.watch.replays.get());
        match self.watch.fails_after.get().is_some_and(|(r, p)| reads >= r || replays >= p) {
            true => Err(DeviceError::Driver { action: "run a recorded step", reason: "an injected ECC error".into() }),
            false => Ok(()),
        }
    }
}

impl Device for Watched {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn room(&mut self) -> Result<u64> {
        self.inner.room()
    }
    fn reserve(&mut self, arena: &Arena) -> Result<()> {
        self.watch.asked.set(arena.bytes());
        self.inner.reserve(arena)
    }
    fn relabel(&mut self, arena: &Arena) -> Result<()> {
        self.inner.relabel(arena)
    }
    fn base(&self) -> u64 {
        self.inner.base()
    }
    fn write(&mut self, to: Buf, bytes: &[u8]) -> Result<()> {
        self.sound()?;
        self.inner.write(to, bytes)
    }
    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> Result<()> {
        self.sound()?;
        self.watch.reads.set(self.watch.reads.get() + 1);
        self.inner.read(from, bytes)
    }
    fn zero(&mut self, buf: Buf) -> Result<()> {
        self.inner.zero(buf)
    }
    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        self.inner.launch(kernel, launch, args)
    }
    fn offers(&self, ability: Ability) -> Result<()> {
        self.inner.offers(ability)
    }
    fn matmul(&mut self, product: &Matmul, workspace: Buf) -> Result<()> {
        self.inner.matmul(product, workspace)
    }
    fn record(&mut self) -> Result<()> {
        self.inner.record()
    }
    fn recorded(&mut self) -> Result<Recording> {
        self.inner.recorded()
    }
    fn replay(&mut self, recording: Recording) -> Result<()> {
        self.sound()?;
        self.watch.replays.set(self.watch.replays.get() + 1);
        self.inner.replay(recording)
    }
}

fn schedule(config: &RunConfig) -> Plan {
    Plan::new(config, &["numbers".to_string()])
}

/// The model on the device under test, in the form that `choose` picks; `guard` bytes apart, so that overruns are seen.
fn on_device(
    config: &RunConfig,
    watch: &Rc<Watch>,
    change: impl FnOnce(&mut elleci_tools::train::cuda::choice::Choice),
) -> CudaBackend {
    let mut choice = choose(config, &schedule(config), 1 << 30).unwrap();
    choice.options.guard = 64;
    change(&mut choice);
    let watched = Watched { inner: device(0), watch: watch.clone() };
    CudaBackend::new(Box::new(watched), config, &initialise(&config.model, config.training.seed), &choice).unwrap()
}

fn on_cpu(config: &RunConfig) -> CpuBackend {
    let form = StepForm {
        checkpointing: Checkpointing::None,
        gradients: GradPrecision::Float32,
        head: HeadPrecision::Float32,
    };
    let model = Model::new(config.model.clone(), initialise(&config.model, config.training.seed)).unwrap();
    CpuBackend::new(model, AdamWConfig::default(), StatePrecision::Block8, form)
}

static GO: AtomicBool = AtomicBool::new(false);

fn run<'a>(config: &RunConfig, backend: impl Backend + 'a, dir: &Path) -> Run<'a> {
    Run {
        plan: schedule(config),
        backend: Box::new(backend),
        feed: Box::new(Numbered(0)),
        text: None,
        store: Some(Store::open(dir).unwrap()),
        log: Log::to_stderr(None),
        recorder: None,
        progress: Progress::default(),
        peak: None,
        machine: Vec::new(),
        stop: &GO,
        config: config.clone(),
        ahead: None,
    }
}

/// The checkpoint of a step.
fn checkpoint(dir: &Path, step: u64) -> Checkpoint {
    let (_, path) = Store::list(dir).unwrap().into_iter().find(|(s, _)| *s == step).unwrap();
    Checkpoint::open(&path).unwrap()
}

/// What a backend would save.
fn saved(backend: &dyn Backend, group: Group) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let tensors = backend.export(group).unwrap().into_iter().map(|t| {
        let bytes = match t.bytes {
            Bytes::Ready(bytes) => bytes.into_owned(),
            Bytes::Later(make) => make().unwrap(),
        };
        (t.name, t.shape, bytes)
    });
    tensors.collect()
}

/// How far the losses of the device may be from the CPU's.
///
/// The first step has the same weights: its sums differ in their order alone, and where that moves a value over a boundary of the
/// int8 quantiser by 1/127 of a token's largest. A token has 32 or more values, whose roundings are independent: 1/127/√32 = 1.4e-3
/// of a row at the very most, if all flipped, and some one in a thousand do. Later steps start from weights that Adam moved by the
/// sign of a gradient where that is tiny: two rates (3e-3) apart at the most, on weights of 0.02, in a few of each thousand.
const FIRST: f64 = 1e-4;
const LATER: f64 = 1e-3;

fn near(device: &[f64], cpu: &[f64], first: f64) {
    assert_eq!(device.len(), cpu.len());
    for (i, (a, b)) in device.iter().zip(cpu).enumerate() {
        let bound = if i == 0 { first } else { LATER };
        println!("step {}: {a:.6} on the device, {b:.6} on the CPU, {:.1e} apart", i + 1, (a - b).abs() / b);
        assert!((a - b).abs() <= bound * b, "step {}: {a} {b}", i + 1);
    }
}

/// One run on the device; the same resumed there; on the CPU; and begun on the device, continued on the CPU and then on the device.
#[test]
fn a_run_moves_between_the_device_and_the_cpu() {
    let config = config(&[]);
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let dir = |i: usize| dirs[i].path();
    let watch = Rc::default();
    let whole = run(&config, on_device(&config, &watch, |_| ()), dir(0)).train(STEPS).unwrap().losses;
    let cpu = run(&config, on_cpu(&config), dir(1)).train(STEPS).unwrap().losses;
    near(&whole, &cpu, FIRST);

    // Resumed in the middle of it, and of the running mean: the same bits to the end.
    let mut resumed = run(&config, on_device(&config, &watch, |_| ()), dir(2));
    resumed.resume(&checkpoint(dir(0), 2)).unwrap();
    assert_eq!(resumed.train(STEPS).unwrap().losses, whole[2..]);
    assert_eq!(checkpoint(dir(2), STEPS).state.files, checkpoint(dir(0), STEPS).state.files);
    drop(resumed);

    // The CPU saves again what it took over from the device, byte for byte; goes on; and hands back.
    let mut moved = run(&config, on_cpu(&config), dir(3));
    moved.resume(&checkpoint(dir(0), 2)).unwrap();
    moved.save().unwrap();
    assert_eq!(checkpoint(dir(3), 2).state.files, checkpoint(dir(0), 2).state.files);
    assert!(checkpoint(dir(3), 2).state.files.contains_key("swa.safetensors"));
    near(&moved.train(3).unwrap().losses, &whole[2..3], LATER);
    let mut back = run(&config, on_device(&config, &watch, |_| ()), dir(3));
    back.resume(&checkpoint(dir(3), 3)).unwrap();
    assert_eq!(saved(back.backend.as_ref(), Group::Optimizer), {
        let mut cpu = run(&config, on_cpu(&config), dir(2));
        cpu.resume(&checkpoint(dir(3), 3)).unwrap();
        saved(cpu.backend.as_ref(), Group::Optimizer)
    });
    near(&back.train(STEPS).unwrap().losses, &whole[3..], LATER);
}

fn rates(config: &RunConfig) -> Rates {
    schedule(config).at(1).rates
}

/// Two micro-batches and an update are queued without one read; what came of them takes one.
#[test]
fn a_step_waits_for_nothing_but_its_outcome() {
    let config = config(&[]);
    let watch = Rc::default();
    let mut backend = on_device(&config, &watch, |_| ());
    let data = Numbered(0).next(schedule(&config).at(0).shape, &[]).unwrap();
    for step in 0..2 {
        let before = watch.reads.get();
        for micro in &data.micro {
            backend.accumulate(&micro.view(), 0.02).unwrap();
        }
        backend.update(&rates(&config), StepEnd { weight: data.weight, clip: 1.0 }).unwrap();
        backend.average().unwrap();
        assert_eq!(watch.reads.get(), before, "step {step}");
        assert!(backend.outcome().unwrap().updated);
        assert_eq!(watch.reads.get(), before + 1);
        assert!(backend.outcome().is_err(), "an outcome is read once");
    }
    // Two kinds of recordings: the micro-batch twice a step, and its end.
    assert_eq!(watch.replays.get(), 6);
}

/// A loss that is not finite changes nothing, on the device as on the CPU, and the next step goes on.
#[test]
fn a_step_that_is_not_finite_is_skipped_on_the_device() {
    let config = config(&[]);
    let watch = Rc::default();
    let mut both: [Box<dyn Backend>; 2] = [Box::new(on_device(&config, &watch, |_| ())), Box::new(on_cpu(&config))];
    for backend in &mut both {
        let micro = Numbered(0).micro(2, 16, 0);
        let step = |backend: &mut dyn Backend, weights: &[f32]| {
            let batch = Batch { weights, ..micro.view() };
            backend.accumulate(&batch, 0.02).unwrap();
            backend.update(&rates(&config), StepEnd { weight: 20.0, clip: 1.0 }).unwrap();
            backend.outcome().unwrap()
        };
        assert!(step(backend.as_mut(), &micro.weights).updated);
        let all = |b: &dyn Backend| [saved(b, Group::Weights), saved(b, Group::Optimizer)];
        let before = all(backend.as_ref());
        let mut poisoned = micro.weights.clone();
        poisoned[5] = f32::NAN;
        let outcome = step(backend.as_mut(), &poisoned);
        assert!(!outcome.updated, "{outcome:?}");
        assert!(!(outcome.loss.is_finite() && outcome.grad_norm.is_finite()), "{outcome:?}");
        assert!(all(backend.as_ref()) == before, "weights and states stay");
        assert_eq!(backend.counters().updates, 1);
        let after = step(backend.as_mut(), &micro.weights);
        assert!(after.updated && after.grad_norm.is_finite(), "no gradient is left over: {after:?}");
        assert_eq!(backend.counters().updates, 2);
    }
}

/// What is planned is what is asked for, once, evaluation and longer sequences included.
#[test]
fn the_device_is_asked_for_what_was_planned() {
    let settings = ["training.steps=2", "training.accumulation=1", "training.eval_interval=1", "cuda.ternary=packed"];
    let config = config(&settings);
    let choice = choose(&config, &schedule(&config), 1 << 30).unwrap();
    assert_eq!(choice.options.checkpointing, Checkpointing::None, "there is room");
    let dir = tempfile::tempdir().unwrap();
    let watch = Rc::default();
    let backend = on_device(&config, &watch, |c| c.options.guard = 0);
    assert_eq!((watch.asked.get(), backend.reserved()), (choice.bytes, choice.bytes));
    run(&config, backend, dir.path()).train(2).unwrap();
    assert_eq!(watch.asked.get(), choice.bytes);
    // With less memory, the layers are computed twice, or fewer sequences go through at once.
    let smaller = choose(&config, &schedule(&config), choice.bytes - 1).unwrap();
    assert!(
        smaller.bytes < choice.bytes && smaller.options.checkpointing != Checkpointing::None,
        "{:?}",
        smaller.options
    );
}

/// Fewer sequences at once, other activations kept, the mean on the host: the same run but for the order of some additions.
#[test]
fn the_form_of_a_pass_changes_no_result() {
    let config = config(&["training.steps=2", "swa.start=0.0", "training.accumulation=1"]);
    let watch = Rc::default();
    let ends = [(2, Checkpointing::None, Mean::Device), (1, Checkpointing::EveryLayer, Mean::Host)].map(
        |(rows, kept, mean)| {
            let dir = tempfile::tempdir().unwrap();
            let backend = on_device(&config, &watch, |c| {
                (c.options.batch, c.options.checkpointing, c.mean) = (rows, kept, mean);
                c.options.average = mean == Mean::Device;
                c.options.whole_step = rows == 2;
            });
            let mut run = run(&config, backend, dir.path());
            let losses = run.train(2).unwrap().losses;
            let averaged = run.backend.counters().averaged;
            assert_eq!(
                saved(run.backend.as_ref(), Group::Average).len(),
                saved(run.backend.as_ref(), Group::Weights).len()
            );
            assert!(run.backend.adopt_average().unwrap());
            assert!(saved(run.backend.as_ref(), Group::Average) == saved(run.backend.as_ref(), Group::Weights));
            let mut texts = Vec::new();
            run.backend
                .sample(&[1, 2, 3], &mut |logits| {
                    (texts.len() < 4).then(|| {
                        texts.push(logits.to_vec());
                        5
                    })
                })
                .unwrap();
            assert!(texts.len() == 4 && texts.iter().flatten().all(|l| l.is_finite()));
            (losses, averaged)
        },
    );
    let [(a, n), (b, m)] = ends;
    assert_eq!((n, m), (2, 2));
    // The losses of the first step are sums of the same numbers.
    assert!((a[0] - b[0]).abs() <= 1e-12 * a[0], "{a:?} {b:?}");
    near(&a, &b, 1e-12);
}

/// A sticky error: the run ends with it, the last checkpoint is good, and goes on to the same bits.
#[test]
fn a_fault_of_the_device_leaves_the_last_checkpoint_good() {
    let config = config(&["training.steps=3", "training.accumulation=1", "training.save_interval=1"]);
    let dir = tempfile::tempdir().unwrap();
    let watch: Rc<Watch> = Rc::default();
    let begin = |name: &str| run(&config, on_device(&config, &watch, |_| ()), &dir.path().join(name));
    let mut sound = begin("sound");
    let mut whole = sound.train(2).unwrap().losses;
    let reads_of_two = watch.reads.get();
    whole.extend(sound.train(3).unwrap().losses);
    drop(sound);
    // Two replays a step: when the third is to be ended, and while the second is saved.
    for (name, reads, replays, good) in [("step", usize::MAX, 5, 2), ("save", reads_of_two - 3, usize::MAX, 1)] {
        watch.replays.set(0);
        watch.reads.set(0);
        watch.fails_after.set(Some((reads, replays)));
        let error = begin(name).train(3).unwrap_err();
        watch.fails_after.set(None);
        let text = format!("{error:#}");
        assert!(text.contains("injected ECC"), "{text}");
        assert!(error.chain().any(|e| e.is::<elleci_cuda::trainer::Error>() || e.is::<DeviceError>()), "{text}");
        let newest = Store::latest(&dir.path().join(name), |m| panic!("{m}")).unwrap().unwrap();
        assert_eq!(newest.state.step, good, "{name}");
        if name == "step" {
            let mut resumed = begin(name);
            resumed.resume(&newest).unwrap();
            assert_eq!(resumed.train(3).unwrap().losses, whole[2..]);
        }
    }
}

/// Steps beside the CPU backend: twenty on a card, where the bundle runs this, and five in the emulation.
#[test]
fn many_steps_follow_the_cpu() {
    let on_card = std::env::var("ELLECI_CUDA_TEST").as_deref() == Ok("card");
    let steps = if on_card { 20 } else { 5 };
    let length = format!("training.steps={steps}");
    let config = config(&[&length, "training.accumulation=1", "training.save_interval=0"]);
    let dir = tempfile::tempdir().unwrap();
    let watch = Rc::default();
    let device = run(&config, on_device(&config, &watch, |_| ()), dir.path()).train(steps).unwrap().losses;
    let cpu = run(&config, on_cpu(&config), &dir.path().join("cpu")).train(steps).unwrap().losses;
    near(&device, &cpu, FIRST);
    assert!(device[steps as usize - 1] < device[0], "{device:?}");
}
