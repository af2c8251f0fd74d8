//! The memory plan against what the allocator sees.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::memory::{PlanOptions, plan};
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::ops::head::HeadPrecision;
use elleci_core::optim::{AdamW, AdamWConfig, StatePrecision, StepRates};
use elleci_core::params::Params;
use elleci_core::ternary::GradPrecision::{Float32, Int16};

struct Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; the counters are atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Peak bytes of building everything and running two steps.
fn measured(c: &ModelConfig, o: PlanOptions) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let mut model = Model::new(c.clone(), initialise(c, 1)).unwrap();
    let mut ws =
        Workspace::new(c, o.batch, o.seq, o.checkpointing).with_grad_precision(o.gradients).with_head_precision(o.head);
    let mut grads = Params::zeros(model.layout().clone());
    let mut adamw = AdamW::new(model.layout().clone(), AdamWConfig::default(), o.states);
    let n = o.batch * o.seq;
    let tokens: Vec<u32> = (0..n as u32).map(|i| i * 7 % c.vocab_size as u32).collect();
    let weights = vec![1.0; n];
    let batch = Batch { batch: o.batch, seq: o.seq, tokens: &tokens, targets: &tokens, weights: &weights };
    for _ in 0..2 {
        model.loss_and_grad(&mut ws, &batch, 1.0 / n as f32, &mut grads).unwrap();
        let rates = StepRates { lr_of: &|_| 1e-3, weight_decay: 0.1, grad_scale: 1.0 };
        model.update(|params| adamw.step(params, &grads, &rates));
    }
    PEAK.load(Relaxed) - before
}

#[test]
fn the_plan_is_what_the_allocator_sees() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        for (preset, batch, seq, checkpointing, states, gradients) in [
            ("nano", 8, 256, Checkpointing::None, StatePrecision::F32, Float32),
            ("nano", 8, 256, Checkpointing::None, StatePrecision::F32, Int16),
            ("nano", 8, 256, Checkpointing::EveryLayer, StatePrecision::Block8, Int16),
            ("mini", 2, 256, Checkpointing::None, StatePrecision::Block8, Int16),
            ("mini", 2, 256, Checkpointing::EveryKth(3), StatePrecision::F32, Float32),
        ] {
            let c = ModelConfig::preset(preset).unwrap();
            let head = if gradients == Int16 { HeadPrecision::Int16 } else { HeadPrecision::Float32 };
            let o = PlanOptions { batch, seq, checkpointing, states, gradients, head, average: false };
            let (planned, seen) = (plan(&c, o).total() as f64, measured(&c, o) as f64);
            let ratio = planned / seen;
            println!(
                "{preset} {checkpointing:?} {states:?} {gradients:?}: planned {planned} seen {seen} ratio {ratio:.4}"
            );
            assert!(
                (0.95..=1.05).contains(&ratio),
                "{preset} {checkpointing:?} {states:?} {gradients:?}: planned {planned}, seen {seen}"
            );
        }
    });
}

#[test]
fn what_the_plan_promises() {
    let c = ModelConfig::preset("elleci-1.5b").unwrap();
    let o = |batch, average, states| PlanOptions {
        batch,
        seq: 1024,
        checkpointing: Checkpointing::EveryLayer,
        states,
        gradients: Int16,
        head: HeadPrecision::Int16,
        average,
    };
    for (batch, average) in [(1, true), (4, false), (8, false), (16, false), (16, true)] {
        let total = |states| plan(&c, o(batch, average, states)).total() as f64;
        let saved = 1.0 - total(StatePrecision::Block8) / total(StatePrecision::F32);
        println!("elleci-1.5b, {batch} x 1024, running mean {average}: 8-bit states save {:.1} %", 100.0 * saved);
    }
    let of = |states| plan(&c, o(1, false, states));
    let (wide, narrow) = (of(StatePrecision::F32), of(StatePrecision::Block8));
    assert!(narrow.optimizer as f64 <= 0.35 * wide.optimizer as f64, "{narrow:?} {wide:?}");
    assert!(narrow.total() as f64 <= 0.75 * wide.total() as f64, "{} {}", narrow.total(), wide.total());
    let mini = ModelConfig::preset("mini").unwrap();
    let activations = |checkpointing| {
        plan(
            &mini,
            PlanOptions {
                batch: 4,
                seq: 256,
                checkpointing,
                states: StatePrecision::F32,
                gradients: Int16,
                head: HeadPrecision::Int16,
                average: false,
            },
        )
        .activations
    };
    let (all, few) = (activations(Checkpointing::None), activations(Checkpointing::EveryLayer));
    assert!(few as f64 <= 0.6 * all as f64, "{few} of {all}");
}
