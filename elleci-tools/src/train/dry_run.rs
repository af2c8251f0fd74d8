//! `--dry-run`: what a run will take, then some real steps to measure how long.

use std::fmt::Write;
use std::sync::atomic::AtomicBool;

use elleci_core::config::LayerKind;
use elleci_core::memory::{MemoryPlan, PlanOptions, plan, work_per_token};
use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_core::params::ParamLayout;

use super::batches::{Feed, RandomFeed, ShardFeed};
use super::cli::TrainArgs;
use super::config::RunConfig;
use super::device::{Device, available_memory};
use super::log::Log;
use super::plan::{Plan, checkpointing, gradients, head, largest_pass, precision};
use super::session::cpu_backend;
use super::{Progress, Run};
use crate::report::format::{duration, si, thousands};
use crate::report::{Goal, Peak};

/// Steps timed unless `--steps` says otherwise.
const STEPS: u64 = 20;

/// Prints the plan of a run to standard output and times its first steps.
///
/// # Errors
/// Faulty data; a fault of the device.
pub fn run(args: &TrainArgs, mut config: RunConfig) -> anyhow::Result<()> {
    let device = Device::choose(&config.training.device, config.training.threads)?;
    eprintln!("elleci-train {} | {}", env!("CARGO_PKG_VERSION"), device.announcement);
    let peak = Peak::measure(device.threads);
    let total = config.training.steps;
    let schedule = Plan::new(&config, &config.data.sources.keys().cloned().collect::<Vec<_>>());
    let memory = memory_of(&config, &schedule, checkpointing(&config), precision(&config));
    print!("{}", describe(&config, &schedule, &memory, peak));

    let (need, free) = (memory.total() as u64, available_memory());
    if need > free {
        println!(
            "\nNot stepping: a step needs {} and this machine has {} free. Smaller: {}.",
            bytes(need),
            bytes(free),
            smaller(&config)
        );
        return Ok(());
    }
    let steps = args.steps.unwrap_or(STEPS).min(total);
    // One batch of held-out text is enough for an estimate.
    config.training.eval_tokens = 1;
    let seconds_per_flop = device.install(|| time_steps(args, &config, peak, steps))?;
    let eta = total_flops(&config, &schedule) * seconds_per_flop;
    println!("\nMeasured     {steps} steps; the whole run takes {} at that rate", duration(eta));
    Ok(())
}

/// Seconds of a step for each of its operations: the median over the first `steps` steps of the run.
fn time_steps(args: &TrainArgs, config: &RunConfig, peak: Peak, steps: u64) -> anyhow::Result<f64> {
    let feed: Box<dyn Feed> = if config.data.dir.as_os_str().is_empty() {
        eprintln!("no --data: the steps are timed on random tokens");
        Box::new(RandomFeed::new(config))
    } else {
        Box::new(ShardFeed::open(config)?)
    };
    let plan = Plan::new(config, &feed.sources());
    let goal = Goal { steps, tokens: (0..steps).map(|s| plan.at(s).shape.tokens() as u64).sum() };
    let stop = AtomicBool::new(false);
    let mut run = Run {
        text: None,
        store: None,
        log: Log::to_stderr(Some(goal)),
        recorder: None,
        progress: Progress::default(),
        peak: Some(peak),
        machine: Vec::new(),
        stop: &stop,
        plan,
        backend: Box::new(cpu_backend(config, args.init.as_deref(), false)?),
        feed,
        config: config.clone(),
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

/// Bytes that a run needs at most.
pub fn planned_bytes(config: &RunConfig, schedule: &Plan) -> u64 {
    memory_of(config, schedule, checkpointing(config), precision(config)).total() as u64
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
fn smaller(config: &RunConfig) -> String {
    let mut ways = Vec::new();
    if checkpointing(config) != Checkpointing::EveryLayer {
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

fn describe(config: &RunConfig, schedule: &Plan, memory: &MemoryPlan, peak: Peak) -> String {
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
    let flops = total_flops(config, schedule);
    let least = duration(flops / (peak.gflops * 1e9));
    line("", format!("{flops:.2e} FLOPs in all: {least} at this machine's float32 peak of {:.0} GFLOP/s", peak.gflops));
    let (rows, seq) = largest_pass(config, schedule);
    line("Memory", format!("of a step, {rows} x {seq} tokens at a time:"));
    let mut part =
        |what: &str, n: usize, note: String| _ = writeln!(out, "  {what:<30}{:>10}  {note}", bytes(n as u64));
    let other = |kept, states| memory_of(config, schedule, kept, states);
    part("weights (float32)", memory.weights, String::new());
    part("ternary forms", memory.ternary, String::new());
    part("gradients", memory.gradients, String::new());
    let (kept, states) = (checkpointing(config), precision(config));
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
        let of = |states| memory_of(&config, &schedule, checkpointing(&config), states);
        let (wide, narrow) = (of(StatePrecision::F32), of(StatePrecision::Block8));
        assert!(narrow.average > 0 && narrow.activations > 0);
        assert!(narrow.optimizer as f64 <= 0.35 * wide.optimizer as f64, "{narrow:?} {wide:?}");
        assert!(narrow.total() as f64 <= 0.75 * wide.total() as f64, "{narrow:?} {wide:?}");
    }
}
