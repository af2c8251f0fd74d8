//! Times whole optimizer steps on a card: `bench --preset elleci-1.5b --seq 1024 --batch 1,4,16 --products bf16,float32`.
//!
//!   --preset NAME        nano, mini, small-160m, elleci-1.5b
//!   --seq N              tokens of a sequence
//!   --batch N,...        sequences of a micro-batch; one that does not fit is said to
//!   --products P,...     bf16, float32, fp8
//!   --gemm G,...         cublaslt, own: who multiplies [cublaslt where it is installed]
//!   --stream P           of the residual stream: bf16, float32 [float32]
//!   --masters P          of matrices and their gradients: bf16, float32 [float32 matrices with bf16 gradients]
//!   --steps N            steps that are timed, after two that are not
//!   --seconds N          ends before the next measurement when so many have passed
//!   --int8 X --bf16 X    measured product rates of the card in TFLOP/s; the share of the time that products at these rates take
//!                        is then given (MFU)
//!   --check              only says what the first card is and whether it can be used
//!   --out FILE           all results as JSON
//!
//! A step is one micro-batch with its update. Checkpointing is the fastest form that fits. Every figure is a median.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::memory::work_per_token;
use elleci_core::model::{Batch, Checkpointing};
use elleci_core::optim::{AdamWConfig, StatePrecision};
use elleci_core::params::Params;
use elleci_cuda::arena::{Arena, Buf, Dtype};
use elleci_cuda::device::{Ability, Arg, Device, Launch, Matmul, Recording, Result as DeviceResult};
use elleci_cuda::driver::{Card, Mark, probe};
use elleci_cuda::ops::Products;
use elleci_cuda::ops::product::Gemm;
use elleci_cuda::plan::{Options, Plan};
use elleci_cuda::trainer::{Rates, Trainer};

mod args;

use args::{Args, args};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Steps that are made and not timed.
const WARM_UP: usize = 2;

/// Kernels as they were launched: name, beginning, end.
type Launches = Vec<(&'static str, Mark, Mark)>;

/// A card that a trainer owns and the measurement looks at; while `profile` is on, every launch is timed.
#[derive(Clone)]
struct Shared {
    card: Rc<RefCell<Card>>,
    profile: Rc<RefCell<Option<Launches>>>,
}

impl Shared {
    fn timed(&self, name: &'static str, run: impl FnOnce(&mut Card) -> DeviceResult<()>) -> DeviceResult<()> {
        let mut card = self.card.borrow_mut();
        match self.profile.borrow_mut().as_mut() {
            None => run(&mut card),
            Some(launches) => {
                let before = card.mark()?;
                run(&mut card)?;
                launches.push((name, before, card.mark()?));
                Ok(())
            }
        }
    }
}

impl Device for Shared {
    fn describe(&self) -> String {
        self.card.borrow().describe()
    }
    fn room(&mut self) -> DeviceResult<u64> {
        self.card.borrow_mut().room()
    }
    fn reserve(&mut self, arena: &Arena) -> DeviceResult<()> {
        self.card.borrow_mut().reserve(arena)
    }
    fn relabel(&mut self, arena: &Arena) -> DeviceResult<()> {
        self.card.borrow_mut().relabel(arena)
    }
    fn base(&self) -> u64 {
        self.card.borrow().base()
    }
    fn write(&mut self, to: Buf, bytes: &[u8]) -> DeviceResult<()> {
        self.card.borrow_mut().write(to, bytes)
    }
    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> DeviceResult<()> {
        self.card.borrow_mut().read(from, bytes)
    }
    fn zero(&mut self, buf: Buf) -> DeviceResult<()> {
        self.card.borrow_mut().zero(buf)
    }
    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> DeviceResult<()> {
        self.timed(kernel, |card| card.launch(kernel, launch, args))
    }
    fn offers(&self, ability: Ability) -> DeviceResult<()> {
        self.card.borrow().offers(ability)
    }
    fn matmul(&mut self, product: &Matmul, workspace: Buf) -> DeviceResult<()> {
        let name = match (product.a.buf.dtype, product.out.dtype) {
            (Dtype::I8, _) => "cuBLASLt int8",
            (Dtype::E4m3, _) => "cuBLASLt e4m3",
            _ if product.a.order == product.b.order => "cuBLASLt bf16, weights or forward",
            _ => "cuBLASLt bf16, gradients",
        };
        self.timed(name, |card| card.matmul(product, workspace))
    }
    fn record(&mut self) -> DeviceResult<()> {
        self.card.borrow_mut().record()
    }
    fn recorded(&mut self) -> DeviceResult<Recording> {
        self.card.borrow_mut().recorded()
    }
    fn replay(&mut self, recording: Recording) -> DeviceResult<()> {
        self.card.borrow_mut().replay(recording)
    }
}

/// Random tokens.
struct Data {
    batch: usize,
    seq: usize,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Data {
    fn new(batch: usize, seq: usize, vocab: usize) -> Data {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut tokens = || -> Vec<u32> {
            let mut one = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 33) % vocab as u64) as u32
            };
            (0..batch * seq).map(|_| one()).collect()
        };
        Data { batch, seq, tokens: tokens(), targets: tokens(), weights: vec![1.0; batch * seq] }
    }

    fn view(&self) -> Batch<'_> {
        let Data { batch, seq, tokens, targets, weights } = self;
        Batch { batch: *batch, seq: *seq, tokens, targets, weights }
    }
}

fn step(trainer: &mut Trainer, data: &Data) -> Result<f64> {
    let weight = data.tokens.len() as f64;
    trainer.accumulate(&data.view(), (1.0 / weight) as f32)?;
    trainer.update(&Rates { lr_of: &|_| 1e-4, weight_decay: 0.1, clip: 1.0, weight })?;
    Ok(trainer.outcome()?.map_or(f64::NAN, |o| o.loss))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One measurement.
struct Figures {
    batch: usize,
    products: Products,
    gemm: Gemm,
    checkpointing: Checkpointing,
    /// Milliseconds of a step by the host's clock, and of its recorded launches by the card's
    step_ms: f64,
    device_ms: f64,
    /// Sum of all kernels' times, each between two events
    kernels_ms: f64,
    launches: usize,
    by_kernel: Vec<(&'static str, usize, f64)>,
    planned: u64,
    used: u64,
    loss: f64,
}

/// The model whose steps are timed.
struct Model {
    config: ModelConfig,
    weights: Params,
    /// Bytes of the card that were free before anything was asked of it
    free: u64,
}

fn measure(card: &Rc<RefCell<Card>>, a: &Args, model: &Model, o: Options) -> Result<Figures> {
    let shared = Shared { card: card.clone(), profile: Rc::default() };
    let (config, weights) = (&model.config, &model.weights);
    let mut trainer = Trainer::new(Box::new(shared.clone()), weights, config, AdamWConfig::default(), o, 1)?;
    let data = Data::new(o.batch, o.seq, config.vocab_size);
    for _ in 0..WARM_UP {
        step(&mut trainer, &data)?;
    }
    let (mut host, mut device, mut loss) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..a.steps {
        let (began, from) = (Instant::now(), card.borrow().mark()?);
        loss = step(&mut trainer, &data)?;
        let to = card.borrow().mark()?;
        host.push(began.elapsed().as_secs_f64() * 1e3);
        device.push(card.borrow().milliseconds(&from, &to)?);
    }
    let used = model.free.saturating_sub(card.borrow().memory()?.0);

    // The same step launch by launch, each between two events. What the events themselves take is subtracted.
    trainer.without_recording();
    let mut empty: Vec<f64> = Vec::new();
    for _ in 0..100 {
        let (from, to) = (card.borrow().mark()?, card.borrow().mark()?);
        empty.push(card.borrow().milliseconds(&from, &to)?);
    }
    let event = median(&mut empty);
    step(&mut trainer, &data)?;
    *shared.profile.borrow_mut() = Some(Vec::new());
    step(&mut trainer, &data)?;
    let launches = shared.profile.borrow_mut().take().unwrap_or_default();
    let mut by_kernel: BTreeMap<&'static str, (usize, f64)> = BTreeMap::new();
    for (kernel, from, to) in &launches {
        let entry = by_kernel.entry(kernel).or_default();
        entry.0 += 1;
        entry.1 += (card.borrow().milliseconds(from, to)? - event).max(0.0);
    }
    let mut by_kernel: Vec<_> = by_kernel.into_iter().map(|(k, (n, ms))| (k, n, ms)).collect();
    by_kernel.sort_by(|a, b| b.2.total_cmp(&a.2));
    Ok(Figures {
        batch: o.batch,
        products: o.products,
        gemm: o.gemm,
        checkpointing: o.checkpointing,
        step_ms: median(&mut host),
        device_ms: median(&mut device),
        kernels_ms: by_kernel.iter().map(|k| k.2).sum(),
        launches: launches.len(),
        by_kernel,
        planned: trainer.reserved(),
        used,
        loss,
    })
}

/// The options of a measurement in the fastest form that fits; `None` where none does.
fn fitting(
    a: &Args,
    config: &ModelConfig,
    batch: usize,
    (products, gemm): (Products, Gemm),
    room: u64,
) -> Result<Option<Options>> {
    let bf16 = a.masters;
    let n = config.n_layers;
    let kept = [Checkpointing::None, Checkpointing::EveryKth(n.div_ceil(2)), Checkpointing::EveryLayer];
    for (checkpointing, unpacked) in kept.into_iter().flat_map(|k| [(k, true), (k, false)]) {
        let o = Options {
            batch,
            seq: a.seq,
            whole_step: true,
            checkpointing,
            bf16_masters: bf16.unwrap_or(false),
            bf16_gradients: bf16.unwrap_or(true),
            states: StatePrecision::Block8,
            products,
            unpacked,
            gemm,
            bf16_stream: a.bf16_stream,
            average: false,
            guard: 0,
        };
        if Plan::new(config, o)?.arena.bytes() <= room {
            return Ok(Some(o));
        }
    }
    Ok(None)
}

fn name(products: Products) -> &'static str {
    match products {
        Products::Bf16 => "bf16",
        Products::F32 => "float32",
        Products::Fp8 => "fp8",
    }
}

fn multiplier(gemm: Gemm) -> &'static str {
    match gemm {
        Gemm::Own => "own kernels",
        Gemm::Library => "cuBLASLt",
    }
}

/// The library where it is installed; says why where it is not.
fn best_gemm(card: &Card) -> Gemm {
    match card.offers(Ability::Library) {
        Ok(()) => Gemm::Library,
        Err(e) => {
            println!("products by our own kernels: {e}");
            Gemm::Own
        }
    }
}

/// Everything that is to be measured, in order.
fn measurements(a: &Args, gemms: &[Gemm]) -> Vec<(Products, Gemm, usize)> {
    let kinds = a.products.iter().flat_map(|p| gemms.iter().map(move |g| (*p, *g)));
    kinds.flat_map(|(p, g)| a.batches.iter().map(move |b| (p, g, *b))).collect()
}

/// What it took, as a line of JSON and of the table.
fn report(a: &Args, config: &ModelConfig, f: &Figures) -> (String, String) {
    let tokens = (f.batch * a.seq) as f64;
    let rate = tokens / f.step_ms * 1e3;
    let work = work_per_token(config, a.seq);
    let least_s = 2.0 * (work.int8_macs / a.int8 + work.float_macs / a.bf16) / 1e12;
    let mfu = rate * least_s;
    let gaps = 1.0 - f.kernels_ms / f.device_ms;
    let number = |v: f64| if v.is_finite() { format!("{v:.4}") } else { "null".into() };
    let mut kernels = String::new();
    for (k, n, ms) in &f.by_kernel {
        _ = write!(
            kernels,
            "{}{{\"kernel\":\"{k}\",\"launches\":{n},\"ms\":{ms:.4}}}",
            if kernels.is_empty() { "" } else { "," }
        );
    }
    let json = format!(
        "{{\"batch\":{},\"seq\":{},\"products\":\"{}\",\"gemm\":\"{}\",\"checkpointing\":\"{:?}\",\"step_ms\":{},\"device_ms\":{},\"kernels_ms\":{},\
         \"launches\":{},\"tokens_per_s\":{},\"mfu\":{},\"gap_share\":{},\"planned_bytes\":{},\"used_bytes\":{},\"loss\":{},\"by_kernel\":[{kernels}]}}",
        f.batch,
        a.seq,
        name(f.products),
        multiplier(f.gemm),
        f.checkpointing,
        number(f.step_ms),
        number(f.device_ms),
        number(f.kernels_ms),
        f.launches,
        number(rate),
        number(mfu),
        number(gaps),
        f.planned,
        f.used,
        number(f.loss)
    );
    let gib = |b: u64| b as f64 / (1u64 << 30) as f64;
    let share = |v: f64| if v.is_finite() { format!("{:.1}%", 100.0 * v) } else { "not measured".into() };
    let row = format!(
        " | {:?} | {:.1} | {:.0} | {} | {} | {:.2} | {:.2} ({:+.1}%) |",
        f.checkpointing,
        f.step_ms,
        rate,
        share(mfu),
        share(gaps),
        gib(f.planned),
        gib(f.used),
        100.0 * (f.used as f64 / f.planned as f64 - 1.0)
    );
    (json, row)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let a = args()?;
    let began = Instant::now();
    let config = ModelConfig::preset(&a.preset)?;
    let facts = probe(0)?;
    if a.check {
        let ((major, minor), (cuda, minor_cuda)) = (facts.capability, facts.driver);
        println!("{}, compute capability {major}.{minor}, driver of CUDA {cuda}.{minor_cuda}", facts.name);
        println!("{}", facts.library.map_or_else(|e| e.to_string(), |()| "cuBLASLt is installed".into()));
        return Ok(());
    }
    let (card, compiled) = (Rc::new(RefCell::new(Card::open(0)?)), began.elapsed().as_secs_f64());
    let model = Model { weights: initialise(&config, 0), free: card.borrow().memory()?.0, config };
    let config = &model.config;
    println!(
        "{}: {}, driver of CUDA {}.{}, kernels compiled in {compiled:.1} s",
        a.preset, facts.name, facts.driver.0, facts.driver.1
    );
    println!(
        "| micro-batch | products | by | kept | ms a step | tokens/s | MFU | gaps | planned GiB | used GiB |\n|---|---|---|---|---|---|---|---|---|---|"
    );
    let mut results: Vec<String> = Vec::new();
    let gemms = match a.gemm.as_slice() {
        [] => vec![best_gemm(&card.borrow())],
        given => given.to_vec(),
    };
    for (products, gemm, batch) in measurements(&a, &gemms) {
        let room = card.borrow_mut().room()?;
        let cells = format!("| {batch} x {} | {} | {}", a.seq, name(products), multiplier(gemm));
        if began.elapsed().as_secs_f64() > a.seconds {
            println!("{cells} | not measured: the time was over |||||||");
            continue;
        }
        let Some(options) = fitting(&a, config, batch, (products, gemm), room)? else {
            println!("{cells} | does not fit |||||||");
            continue;
        };
        // One that fails must not take the others' results along.
        match measure(&card, &a, &model, options) {
            Ok(figures) => {
                let (json, row) = report(&a, config, &figures);
                println!("{cells}{row}");
                for (kernel, n, ms) in figures.by_kernel.iter().take(8) {
                    eprintln!("  {:5.1}%  {ms:9.3} ms  {n:4} x {kernel}", 100.0 * ms / figures.kernels_ms);
                }
                results.push(json);
            }
            Err(e) => println!("{cells} | failed: {e} |||||||"),
        }
    }
    if let Some(out) = &a.out {
        let (major, minor) = facts.capability;
        let rates = format!("{{\"int8\":{},\"bf16\":{}}}", json_number(a.int8), json_number(a.bf16));
        let text = format!(
            "{{\"preset\":\"{}\",\"device\":\"{}\",\"capability\":\"{major}.{minor}\",\"cuda\":\"{}.{}\",\"tflops\":{rates},\"results\":[\n{}\n]}}\n",
            a.preset,
            facts.name,
            facts.driver.0,
            facts.driver.1,
            results.join(",\n")
        );
        std::fs::write(out, text)?;
    }
    Ok(())
}

fn json_number(v: f64) -> String {
    if v.is_finite() { v.to_string() } else { "null".into() }
}
