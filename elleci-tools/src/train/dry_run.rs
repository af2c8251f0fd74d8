//! `--dry-run`: what a run will take, then some real steps to measure how long.

use std::fmt::Write;
use std::sync::atomic::AtomicBool;

use elleci_core::config::LayerKind;
use elleci_core::memory::{MemoryPlan, PlanOptions, plan, work_per_token};
use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_core::params::ParamLayout;
use elleci_cuda::driver::probe;

use super::backend::Backend;
use super::batches::{Feed, RandomFeed, ShardFeed};
use super::cli::TrainArgs;
use super::config::RunConfig;
use super::cuda::choice;
use super::device::{Device, Target, available_memory};
use super::log::Log;
use super::plan::{Plan, checkpointing, gradients, head, largest_pass, precision};
use super::session::{card_backend, cpu_backend, weights};
use super::{Progress, Run};
use crate::exit::usage;
use crate::report::format::{duration, si, thousands};
use crate::report::{Goal, Peak};

/// Steps timed unless `--steps` says otherwise.
const STEPS: u64 = 20;

/// Prints the plan of a run to standard output and times its first steps.
///
/// # Errors
/// Faulty data; a fault of the device.
pub fn run(args: &TrainArgs, config: RunConfig) -> anyhow::Result<()> {
    let schedule = Plan::new(&config, &config.data.sources.keys().cloned().collect::<Vec<_>>());
    match Target::parse(&config.training.device)? {
        Target::Cpu if args.cuda_memory.is_some() => Err(usage("--cuda-memory is for --device cuda")),
        Target::Cpu => on_cpu(args, config, &schedule),
        Target::Cuda(ordinal) => on_card(args, config, &schedule, ordinal),
    }
}

/// The plan of a card: of the one that is there, or of one with the memory that is asked about.
fn on_card(args: &TrainArgs, mut config: RunConfig, schedule: &Plan, ordinal: usize) -> anyhow::Result<()> {
    let probed = probe(ordinal);
    if let Ok(card) = &probed {
        config = choice::settle(&config, |ability| card.offers(ability))?.0;
    }
    let (room, what) = match (args.cuda_memory, &probed) {
        (Some(bytes), _) => {
            (Some(bytes), format!("a card with {:.2} GiB free (--cuda-memory)", bytes as f64 / (1u64 << 30) as f64))
        }
        (None, Ok(card)) => (Some(card.room()), format!("cuda:{ordinal} {}", card.name)),
        (None, Err(e)) => (None, format!("no card: {e}")),
    };
    crate::exit::errln!("elleci-train {} | {what}", env!("CARGO_PKG_VERSION"));
    crate::exit::out!("{}", describe_run(&config, schedule));
    let Some(room) = room else {
        crate::exit::out!("{}", choice::describe(&config, &choice::choose(&config, schedule, u64::MAX)?));
        crate::exit::outln!(
            "\nThat is the fastest form; --cuda-memory 12GiB says what it is on a card with so much free. Not stepping: {what}"
        );
        return Ok(());
    };
    crate::exit::out!("{}", choice::describe(&config, &choice::choose(&config, schedule, room)?));
    if args.cuda_memory.is_some() {
        crate::exit::outln!("\nNot stepping: --cuda-memory asks for the plan alone");
        return Ok(());
    }
    let device = Device::for_training(&config.training.device, config.training.threads)?;
    measure(args, config, schedule, &device, None)
}

fn on_cpu(args: &TrainArgs, config: RunConfig, schedule: &Plan) -> anyhow::Result<()> {
    let device = Device::cpu(config.training.threads);
    crate::exit::errln!("elleci-train {} | {}", env!("CARGO_PKG_VERSION"), device.announcement);
    let peak = Peak::measure(device.threads);
    let kept = kept_on_cpu(&config, schedule);
    let memory = memory_of(&config, schedule, kept, precision(&config));
    crate::exit::out!("{}{}", describe_run(&config, schedule), describe(&config, schedule, (&memory, kept), peak));

    let (need, free) = (memory.total() as u64, available_memory());
    if need > free {
        crate::exit::outln!(
            "\nNot stepping: a step needs {} and this machine has {} free. Smaller: {}.",
            bytes(need),
            bytes(free),
            smaller(&config, kept)
        );
        return Ok(());
    }
    measure(args, config, schedule, &device, Some(peak))
}

/// Times the first steps, and says how long the whole run takes at that rate.
fn measure(
    args: &TrainArgs,
    mut config: RunConfig,
    schedule: &Plan,
    device: &Device,
    peak: Option<Peak>,
) -> anyhow::Result<()> {
    let steps = args.steps.unwrap_or(STEPS).min(config.training.steps);
    // One batch of held-out text is enough for an estimate.
    config.training.eval_tokens = 1;
    let seconds_per_flop = device.install(|| time_steps(args, &config, device, peak, steps))?;
    let eta = total_flops(&config, schedule) * seconds_per_flop;
    crate::exit::outln!("\nMeasured     {steps} steps; the whole run takes {} at that rate", duration(eta));
    Ok(())
}

/// Seconds of a step for each of its operations: the median over the first `steps` steps of the run.
fn time_steps(
    args: &TrainArgs,
    config: &RunConfig,
    device: &Device,
    peak: Option<Peak>,
    steps: u64,
) -> anyhow::Result<f64> {
    let feed: Box<dyn Feed> = if config.data.dir.as_os_str().is_empty() {
        crate::exit::errln!("no --data: the steps are timed on random tokens");
        Box::new(RandomFeed::new(config))
    } else {
        Box::new(ShardFeed::open(config)?)
    };
    let plan = Plan::new(config, &feed.sources());
    let goal = Goal { steps, tokens: (0..steps).map(|s| plan.at(s).shape.tokens() as u64).sum() };
    let stop = AtomicBool::new(false);
    let weights = weights(config, args.init.as_deref(), false)?;
    let backend: Box<dyn Backend> = match &device.card {
        None => Box::new(cpu_backend(config, &plan, weights)?),
        Some(card) => Box::new(card_backend(config, &plan, &weights, card)?),
    };
    let mut run = Run {
        text: None,
        store: None,
        log: Log::to_stderr(Some(goal)),
        recorder: None,
        progress: Progress::default(),
        peak,
        machine: Vec::new(),
        stop: &stop,
        plan,
        backend,
        feed,
        config: config.clone(),
        ahead: None,
    };
    let outcome = run.train(steps)?;
    run.log.finish();
    let per_flop = |(i, s): (usize, &f64)| {
        let shape = run.plan.at(i as u64).shape;
        s / (work_per_token(&config.model, shape.seq_len).flops() * shape.tokens() as f64)
    };
    let mut rates: Vec<f64> = outcome.seconds.iter().enumerate().map(per_flop).collect();
    if rates.len() > 1 {
        // The first step pays for fresh memory; a long run does not see that.
        rates.remove(0);
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

/// Bytes that a run on the CPU needs at most.
pub fn planned_bytes(config: &RunConfig, schedule: &Plan, kept: Checkpointing) -> u64 {
    memory_of(config, schedule, kept, precision(config)).total() as u64
}

/// Activations that a run on the CPU keeps: as configured, or the most that its memory allows.
pub fn kept_on_cpu(config: &RunConfig, schedule: &Plan) -> Checkpointing {
    checkpointing(config).unwrap_or_else(|| {
        let free = available_memory();
        let mut forms = choice::forms(config.model.n_layers).into_iter();
        forms.find(|kept| planned_bytes(config, schedule, *kept) <= free).unwrap_or(Checkpointing::EveryLayer)
    })
}

fn memory_of(config: &RunConfig, schedule: &Plan, kept: Checkpointing, states: StatePrecision) -> MemoryPlan {
    let (batch, seq) = largest_pass(config, schedule);
    let average = config.swa.start < 1.0;
    let (gradients, head) = (gradients(config), head(config));
    plan(&config.model, PlanOptions { batch, seq, checkpointing: kept, states, gradients, head, average })
}

fn total_flops(config: &RunConfig, schedule: &Plan) -> f64 {
    let of = |(shape, steps): (elleci_core::optim::schedule::StepShape, u64)| {
        work_per_token(&config.model, shape.seq_len).flops() * (shape.tokens() as u64 * steps) as f64
    };
    schedule.stages().into_iter().map(of).sum()
}

/// What would make a step smaller and is not in place yet.
fn smaller(config: &RunConfig, kept: Checkpointing) -> String {
    let mut ways = Vec::new();
    if kept != Checkpointing::EveryLayer {
        ways.push("--set training.checkpointing=layer");
    }
    if precision(config) != StatePrecision::Block8 {
        ways.push("--set optimizer.states=8bit");
    }
    if config.swa.start < 1.0 {
        ways.push("--set swa.start=1.0 (no running mean)");
    }
    ways.push("a smaller --preset");
    ways.join(", ")
}

/// Bytes in decimal units.
fn bytes(n: u64) -> String {
    format!("{}B", si(n as f64))
}

/// Model, length and arithmetic, which are the same everywhere.
fn describe_run(config: &RunConfig, schedule: &Plan) -> String {
    let mut out = String::new();
    let mut line = |what: &str, text: String| _ = writeln!(out, "{what:<13}{text}");
    let model = &config.model;
    let layout = ParamLayout::new(model);
    let (all, ternary) = (thousands(layout.len() as u64), thousands(layout.ternary_elems() as u64));
    line("Model", format!("{}: {all} parameters, {ternary} of them ternary", config.preset));
    let (steps, tokens) = (schedule.steps(), schedule.total_tokens());
    line("Run", format!("{} steps, {} tokens", thousands(steps), thousands(tokens)));
    for (shape, steps) in schedule.stages() {
        let (steps, sequences, seq) = (thousands(steps), shape.sequences, shape.seq_len);
        line("", format!("{steps} steps of {sequences} x {seq} tokens, micro-batches of {} x {seq}", shape.rows(0)));
    }
    let mut label = "Arithmetic";
    for (shape, _) in schedule.stages() {
        let work = work_per_token(model, shape.seq_len);
        let (all, int8, float) = (si(work.flops()), si(2.0 * work.int8_macs), si(2.0 * work.float_macs));
        line(label, format!("{all} FLOPs a token in sequences of {} ({int8} int8, {float} float32)", shape.seq_len));
        label = "";
    }
    line("", format!("{:.2e} FLOPs in all", total_flops(config, schedule)));
    out
}

/// What a CPU's peak makes of the arithmetic, and its memory.
fn describe(config: &RunConfig, schedule: &Plan, (memory, kept): (&MemoryPlan, Checkpointing), peak: Peak) -> String {
    let mut out = String::new();
    let mut line = |what: &str, text: String| _ = writeln!(out, "{what:<13}{text}");
    let least = duration(total_flops(config, schedule) / (peak.gflops * 1e9));
    line("", format!("{least} at this machine's float32 peak of {:.0} GFLOP/s", peak.gflops));
    let (rows, seq) = largest_pass(config, schedule);
    line("Memory", format!("of a step, {rows} x {seq} tokens at a time:"));
    let mut part =
        |what: &str, n: usize, note: String| _ = writeln!(out, "  {what:<30}{:>10}  {note}", bytes(n as u64));
    let other = |kept, states| memory_of(config, schedule, kept, states);
    part("weights (float32)", memory.weights, String::new());
    part("ternary forms", memory.ternary, String::new());
    part("gradients", memory.gradients, String::new());
    let states = precision(config);
    let wide = other(kept, StatePrecision::F32);
    let narrow = other(kept, StatePrecision::Block8);
    let states_note = format!("float32 {}, 8-bit {}", bytes(wide.optimizer as u64), bytes(narrow.optimizer as u64));
    part("optimizer states", memory.optimizer, states_note);
    let (none, every) = (other(Checkpointing::None, states), other(Checkpointing::EveryLayer, states));
    let kept_note = format!(
        "all kept {}, checkpointed every layer {}",
        bytes(none.activations as u64),
        bytes(every.activations as u64)
    );
    part("activations", memory.activations, kept_note);
    part("scratch", memory.scratch, String::new());
    part("running mean of the weights", memory.average, String::new());
    let wide_note = format!("with float32 states {}", bytes(wide.total() as u64));
    part("total", memory.total(), format!("{wide_note}; {} free on this machine", bytes(available_memory())));
    let (token, state) = cache_bytes(config);
    let note = format!("caches of one sampled text: {token} bytes a token, {} whatever its length", bytes(state));
    _ = writeln!(out, "  {note}");
    out
}

/// What decoding keeps: bytes a token (attention layers), and bytes whatever the length (Mamba-2 layers).
fn cache_bytes(config: &RunConfig) -> (u64, u64) {
    let c = &config.model;
    let mla = c.layer_kinds().iter().filter(|k| **k == LayerKind::Mla).count();
    let token = mla * (c.kv_rank + 4 + 4 * c.d_rope);
    let state = 4 * (c.d_inner * c.d_state + (c.d_conv - 1) * c.conv_channels());
    (token as u64, ((c.n_layers - mla) * state) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::layers::load;

    /// The reference run as it stands: batch, running mean and all.
    #[test]
    fn eight_bit_states_save_a_quarter_of_the_reference_step() {
        let config = load(Some("elleci-1.5b"), &[]).unwrap();
        let schedule = Plan::new(&config, &config.data.sources.keys().cloned().collect::<Vec<_>>());
        let of = |states| memory_of(&config, &schedule, Checkpointing::EveryLayer, states);
        let (wide, narrow) = (of(StatePrecision::F32), of(StatePrecision::Block8));
        assert!(narrow.average > 0 && narrow.activations > 0);
        assert!(narrow.optimizer as f64 <= 0.35 * wide.optimizer as f64, "{narrow:?} {wide:?}");
        assert!(narrow.total() as f64 <= 0.75 * wide.total() as f64, "{narrow:?} {wide:?}");
    }
}
