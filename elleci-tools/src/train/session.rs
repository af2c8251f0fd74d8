//! From a command line to a finished run: what to resume, where data and weights come from, what is left at the end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail, ensure};
use elleci_core::init::initialise;
use elleci_core::model::{Checkpointing, Model};
use elleci_core::optim::AdamWConfig;
use elleci_core::params::Params;
use elleci_cuda::device::Device as _;
use elleci_cuda::driver::{Card, Facts};

use super::backend::{Backend, CpuBackend, Group};
use super::batches::{Feed, ShardFeed};
use super::bundled;
use super::cli::TrainArgs;
use super::config::RunConfig;
use super::cuda::CudaBackend;
use super::cuda::choice::{Choice, choose, describe, settle};
use super::device::{Device, available_memory};
use super::log::{Log, first_and_last_loss, write_text};
use super::plan::{Plan, differences, precision, step_form};
use super::record::Recorder;
use super::samples::Text;
use super::step::load_model;
use super::{Progress, Run, dry_run, layers};
use crate::checkpoint::tensors::digest;
use crate::checkpoint::{CHECKPOINTS, Checkpoint, STATE_FILE, State, Store};
use crate::data::tokenizer::Tokenizer;
use crate::exit::usage;
use crate::hf;
use crate::report::format::thousands;
use crate::report::{Goal, Peak};

const FINAL: &str = "final";
const FINAL_AVERAGE: &str = "final-swa";
/// Held by the process that writes to a run.
const LOCK: &str = ".lock";
/// What a run writes under its folder.
const RUN_FILES: [&str; 8] =
    [CHECKPOINTS, FINAL, FINAL_AVERAGE, "config.toml", "metrics.jsonl", "metrics.csv", "report.html", "loss.svg"];

/// Runs plain training, or a dry run.
///
/// # Errors
/// Whatever stops the run, with its exit code as [`crate::exit::finish`] has it.
pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let layers = args.layers()?;
    let config_with = |resumed: Option<&Checkpoint>| match resumed {
        // What is not said again stays as it was.
        Some(checkpoint) if args.preset.is_none() && args.config.is_none() => {
            layers::load_over(&checkpoint.state.config, &layers)
        }
        _ => layers::load(args.preset.as_deref(), &layers),
    };
    if args.dry_run {
        let resumed = match args.resume.as_str() {
            "auto" | "never" => None,
            dir => Some(open_resume(Path::new(dir), |message| crate::exit::errln!("warning: {message}"))?.1),
        };
        return dry_run::run(args, config_with(resumed.as_ref())?);
    }
    let (out, resumed) = find(args, &layers)?;
    let config = config_with(resumed.as_ref())?;
    if let Some(Checkpoint { state, .. }) = &resumed {
        // Before anything is said of a run that is finished: it may be another than is asked for.
        state.accepts(&config)?;
        if state.step > config.training.steps && !is_finished(&out, state, &config) {
            return Err(usage(format!(
                "training.steps is {}, and the checkpoint is of step {}: give --steps at least as many",
                config.training.steps, state.step
            )));
        }
    }
    let device = Device::for_training(&config.training.device, config.training.threads)?;
    crate::exit::errln!("elleci-train {} | {}", env!("CARGO_PKG_VERSION"), device.announcement);
    if let Some(checkpoint) = &resumed
        && is_finished(&out, &checkpoint.state, &config)
    {
        say_finished(&out, &checkpoint.state);
        if args.init.is_some() {
            crate::exit::errln!("--init is not used: it is for a run that begins");
        }
        return Ok(());
    }
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let _lock = lock(&out)?;
    let stop = stop_on_signals()?;
    device.install(|| train(args, config, &out, resumed.as_ref(), &device, stop))
}

/// Where the run goes, and the checkpoint that it goes on from.
fn find(args: &TrainArgs, layers: &[layers::Layer]) -> anyhow::Result<(PathBuf, Option<Checkpoint>)> {
    let report = |message: String| crate::exit::errln!("warning: {message}");
    let given = args.out.clone();
    let preset = || layers::load(args.preset.as_deref(), layers).map(|c| PathBuf::from("runs").join(c.preset));
    match args.resume.as_str() {
        "auto" => {
            let out = given.map_or_else(preset, Ok)?;
            let found = Store::latest(&out.join(CHECKPOINTS), report)?;
            if found.is_none() {
                check_fresh(&out)?;
            }
            Ok((out, found))
        }
        "never" => {
            let out = given.map_or_else(preset, Ok)?;
            if !Store::list(&out.join(CHECKPOINTS))?.is_empty() {
                return Err(usage(format!(
                    "--resume never: {} holds a run; give another --out, or let it go on with --resume auto",
                    out.display()
                )));
            }
            check_fresh(&out)?;
            Ok((out, None))
        }
        dir => {
            let dir = PathBuf::from(dir);
            let (run, checkpoint) = open_resume(&dir, report)?;
            let out = given.unwrap_or_else(|| run.clone());
            let own = out.exists() && out.canonicalize()? == run.canonicalize()?;
            if let Some(name) = foreign(&out)?.filter(|_| !own) {
                return Err(usage(format!(
                    "--resume {}: {} holds another run already (`{name}`); give another --out to branch off",
                    dir.display(),
                    out.display()
                )));
            }
            let newer = Store::list(&out.join(CHECKPOINTS))?.into_iter().find(|(s, _)| *s > checkpoint.state.step);
            if let Some((step, _)) = newer {
                return Err(usage(format!(
                    "--resume {}: {} already has a checkpoint of step {step}; give another --out to branch off",
                    dir.display(),
                    out.display()
                )));
            }
            Ok((out, Some(checkpoint)))
        }
    }
}

/// What in a folder would be written over that is not of a run without a checkpoint yet. Such a run, one's own, begins again.
fn foreign(out: &Path) -> anyhow::Result<Option<&'static str>> {
    let begun = out.join(LOCK).exists() && Store::list(&out.join(CHECKPOINTS))?.is_empty();
    let mut files = RUN_FILES.into_iter().filter(|name| !begun || name.starts_with(FINAL));
    Ok(files.find(|name| out.join(name).exists()))
}

/// Whether a run may begin in a folder.
fn check_fresh(out: &Path) -> anyhow::Result<()> {
    match foreign(out)? {
        None => Ok(()),
        Some(name) => Err(usage(format!(
            "--out {}: it holds `{name}`, and no checkpoint that goes with it; give another --out",
            out.display()
        ))),
    }
}

/// A checkpoint, or the newest of a run, with the folder of its run.
fn open_resume(dir: &Path, report: impl FnMut(String)) -> anyhow::Result<(PathBuf, Checkpoint)> {
    if dir.join(STATE_FILE).is_file() {
        let run = dir.canonicalize()?.parent().and_then(Path::parent).map(Path::to_path_buf);
        return Ok((run.unwrap_or_else(|| dir.to_path_buf()), Checkpoint::open(dir)?));
    }
    if !dir.is_dir() {
        return Err(usage(format!("--resume {}: there is no such directory", dir.display())));
    }
    match Store::latest(&dir.join(CHECKPOINTS), report)? {
        Some(checkpoint) => Ok((dir.to_path_buf(), checkpoint)),
        None => Err(usage(format!("--resume {}: neither a checkpoint nor a run with checkpoints", dir.display()))),
    }
}

/// Whether all steps are done and the exported model is that of the last checkpoint: both files are written alike.
fn is_finished(out: &Path, state: &State, config: &RunConfig) -> bool {
    let exported = digest(&out.join(FINAL).join(Group::Weights.file())).ok();
    state.step >= config.training.steps && exported.as_ref() == state.files.get(Group::Weights.file())
}

fn say_finished(out: &Path, state: &State) {
    let (at, steps) = (out.display(), thousands(state.step));
    crate::exit::errln!(
        "{at} holds a finished run of {steps} steps; its model is {at}/{FINAL}. Nothing was changed. To go on:\n  \
         elleci-train --resume {at} --steps {}    the same run, longer\n  \
         elleci-train --out DIR                   another run",
        state.step * 2
    );
}

/// One process at a time writes to a run.
fn lock(out: &Path) -> anyhow::Result<File> {
    let path = out.join(LOCK);
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => bail!("{} is being trained by another process", out.display()),
        Err(fs::TryLockError::Error(e)) => Err(e).with_context(|| format!("locking {}", path.display())),
    }
}

/// The first Ctrl-C or termination signal lets the step that runs finish; the second ends the process.
fn stop_on_signals() -> anyhow::Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        crate::exit::errln!("\nfinishing this step, then saving; once more to stop at once");
    })
    .context("installing the signal handler")?;
    Ok(&STOP)
}

struct LoadedText(Tokenizer);

impl Text for LoadedText {
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(self.0.encode(text))
    }

    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        Ok(self.0.decode(tokens))
    }

    fn end_of_text(&self) -> u32 {
        crate::data::tokenizer::END_OF_TEXT_ID
    }
}

fn train(
    args: &TrainArgs,
    config: RunConfig,
    out: &Path,
    resumed: Option<&Checkpoint>,
    device: &Device,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut located = config.clone();
    if located.data.tokenizer.is_dir() {
        located.data.tokenizer.push("tokenizer.json");
    }
    if bundled::applies(&config) {
        located.data.dir = bundled::prepare_in(out, config.model.vocab_size)?;
    }
    let feed = ShardFeed::open(&located)?;
    let tokenizer = feed.tokenizer_file(&located);
    if !config.data.tokenizer.as_os_str().is_empty() {
        check_tokenizer(&located.data.tokenizer, &feed)?;
    }
    if let Some(init) = args.init.as_deref().filter(|_| resumed.is_none()) {
        compare_tokenizers(init, &feed);
    }
    let plan = Plan::new(&config, &feed.sources());
    let weights = weights(&config, args.init.as_deref(), resumed.is_some())?;
    let peak = Peak::measure(device.threads);
    let mut machine = crate::report::machine::facts(&peak);
    // No card's peak is known: the share of it reached is not a number there.
    let (backend, peak): (Box<dyn Backend>, _) = match &device.card {
        None => (Box::new(cpu_backend(&config, &plan, weights)?), Some(peak)),
        Some(card) => {
            machine.push(("Card".into(), format!("{}, driver of CUDA {}.{}", card.name, card.driver.0, card.driver.1)));
            (Box::new(card_backend(&config, &plan, &weights, card)?), None)
        }
    };
    let mut run = Run {
        text: tokenizer.as_deref().map(load_text).transpose()?,
        store: Some(Store::open(&out.join(CHECKPOINTS))?),
        log: Log::to_stderr(None),
        recorder: args.record_batches.as_deref().map(Recorder::create).transpose()?,
        progress: Progress::default(),
        backend,
        feed: Box::new(feed),
        peak,
        machine,
        stop,
        plan,
        config,
        ahead: None,
    };
    if run.text.is_none() {
        crate::exit::errln!(
            "warning: no tokenizer.json beside the data: no samples, and the exported model will have none"
        );
    }
    if let Some(checkpoint) = resumed {
        run.resume(checkpoint)?;
        crate::exit::errln!("resuming from {}", checkpoint.dir.display());
        if args.init.is_some() {
            crate::exit::errln!(
                "--init is not used: the run goes on from its own weights (another --out starts another run)"
            );
        }
        let (then, now) = (checkpoint.state.config.training.steps, run.plan.steps());
        if then != now {
            crate::exit::errln!(
                "the run now has {now} steps instead of {then}: schedules follow the new number from here on"
            );
        }
    }
    write_text(&out.join("config.toml"), &toml::to_string(&run.config)?)?;
    let goal = Goal { steps: run.plan.steps(), tokens: run.plan.total_tokens() };
    run.log = Log::open(out, Some(goal), run.progress.step)?;
    announce(&run);
    run.train(run.plan.steps()).map_err(|e| after_a_fault(e, &run))?;
    if let Some(store) = &run.store {
        // One too many is left where a process was killed right after its last checkpoint.
        store.prune(run.config.training.keep_last)?;
    }
    finish(&mut run, out, tokenizer.as_deref())
}

/// Says of a device's fault what is left, and how to go on.
fn after_a_fault(error: anyhow::Error, run: &Run<'_>) -> anyhow::Error {
    let of_device =
        error.chain().any(|e| e.is::<elleci_cuda::trainer::Error>() || e.is::<elleci_cuda::device::DeviceError>());
    if !of_device {
        return error;
    }
    let newest = run.store.as_ref().and_then(|s| s.newest());
    match newest {
        Some((step, path)) => error.context(format!(
            "the card failed in step {}; the checkpoint of step {step} is good ({}), and the same command goes on from it, with \
             --device cpu too",
            run.progress.step + 1,
            path.display()
        )),
        None => error.context(format!("the card failed in step {}; there is no checkpoint yet", run.progress.step + 1)),
    }
}

fn load_text(path: &Path) -> anyhow::Result<Box<dyn Text>> {
    Ok(Box::new(LoadedText(Tokenizer::load(path)?)))
}

/// A tokenizer that was named must be the one that made the shards.
fn check_tokenizer(path: &Path, feed: &ShardFeed) -> anyhow::Result<()> {
    let (found, expected) = (Tokenizer::load(path)?.sha256().to_string(), feed.tokenizer().hash);
    ensure!(
        found == expected,
        "data.tokenizer {} (hash {found}) did not make this data (hash {expected}); prepare the data with it, or leave \
         data.tokenizer empty",
        path.display()
    );
    Ok(())
}

/// Says so where the weights to start from were trained with other tokens than the data has: as many may mean something else.
fn compare_tokenizers(init: &Path, feed: &ShardFeed) {
    let newest = || Store::latest(&init.join(CHECKPOINTS), |_| ()).ok().flatten();
    let theirs = match Checkpoint::open(init).ok().or_else(newest) {
        Some(checkpoint) => Some(checkpoint.state.tokenizer.hash),
        None => Tokenizer::load(&init.join(hf::TOKENIZER)).ok().map(|t| t.sha256().to_string()),
    };
    if theirs.is_some_and(|theirs| theirs != feed.tokenizer().hash) {
        crate::exit::errln!(
            "warning: --init {}: its tokenizer is not the one that made the data: what its tokens mean must be learnt anew",
            init.display()
        );
    }
}

/// Fresh weights, or those of `--init`. Where a checkpoint follows, fresh weights need not be drawn.
pub(super) fn weights(config: &RunConfig, init: Option<&Path>, resumed: bool) -> anyhow::Result<Params> {
    let Some(path) = init.filter(|_| !resumed) else {
        return Ok(match resumed {
            true => Params::zeros(elleci_core::params::ParamLayout::new(&config.model)),
            false => initialise(&config.model, config.training.seed),
        });
    };
    let (model, params) = load_model(path).with_context(|| format!("--init {}", path.display()))?;
    let other = differences(&model, &config.model);
    if !other.is_empty() {
        let told = other.iter().map(|(key, theirs, ours)| format!("`{key}` is {theirs}, this run has {ours}"));
        let set = other.iter().map(|(key, theirs, _)| format!("model.{key}={theirs}"));
        return Err(usage(format!(
            "--init {}: its {}; set {}",
            path.display(),
            told.collect::<Vec<_>>().join("; its "),
            set.collect::<Vec<_>>().join(" ")
        )));
    }
    Ok(params)
}

/// The CPU backend with these weights. Says so where the machine's memory looks too small.
pub(super) fn cpu_backend(config: &RunConfig, schedule: &Plan, weights: Params) -> anyhow::Result<CpuBackend> {
    let kept = dry_run::kept_on_cpu(config, schedule);
    let (need, free) = (dry_run::planned_bytes(config, schedule, kept), available_memory());
    if need > free {
        crate::exit::errln!(
            "warning: a step needs {need} bytes of memory and {free} are free; --dry-run tells what takes them"
        );
    }
    new_cpu_backend(config, weights, kept)
}

pub(super) fn new_cpu_backend(config: &RunConfig, weights: Params, kept: Checkpointing) -> anyhow::Result<CpuBackend> {
    let o = &config.optimizer;
    let adamw = AdamWConfig { beta1: o.betas[0], beta2: o.betas[1], eps: o.eps };
    let model = Model::new(config.model.clone(), weights)?;
    Ok(CpuBackend::new(model, adamw, precision(config), step_form(config, kept)))
}

/// The card with these weights, used as its memory allows.
pub(super) fn card_backend(
    config: &RunConfig,
    schedule: &Plan,
    weights: &Params,
    card: &Facts,
) -> anyhow::Result<CudaBackend> {
    // What the card lacks, or what does not fit, is said before the kernels are compiled.
    let (likely, _) = settle(config, |ability| card.offers(ability))?;
    choose(&likely, schedule, card.room()).with_context(|| format!("cuda:{}", card.ordinal))?;
    let mut device = Card::open(card.ordinal)?;
    let (config, products) = settle(config, |ability| device.offers(ability))?;
    let choice: Choice = choose(&config, schedule, device.room()?).with_context(|| device.describe())?;
    crate::exit::errln!("{products}");
    crate::exit::err!("{}", describe(&config, &choice));
    CudaBackend::new(Box::new(device), &config, weights, &choice)
}

fn announce(run: &Run<'_>) {
    let layout = elleci_core::params::ParamLayout::new(&run.config.model);
    let (all, ternary) = (thousands(layout.len() as u64), thousands(layout.ternary_elems() as u64));
    run.log.note(&format!(
        "{}: {all} parameters, {ternary} of them ternary | {} steps, {} tokens",
        run.config.preset,
        thousands(run.plan.steps()),
        thousands(run.plan.total_tokens())
    ));
}

/// The models and what to say about them.
fn finish(run: &mut Run<'_>, out: &Path, tokenizer: Option<&Path>) -> anyhow::Result<()> {
    if run.backend.counters().averaged > 0 {
        let average = run.backend.export(Group::Average)?;
        hf::write(&out.join(FINAL_AVERAGE), &run.config.model, average, tokenizer)?;
    }
    // Last: it is what tells a finished run.
    let model = hf::write(&out.join(FINAL), &run.config.model, run.backend.export(Group::Weights)?, tokenizer)?;
    let texts = run.continue_prompts()?;
    if run.backend.adopt_average()? {
        run.evaluate("swa")?;
    }
    run.log.page(&run.config, &run.machine, true)?;
    run.log.finish();
    let skipped = run.progress.skipped;
    if skipped > 0 {
        crate::exit::errln!("{skipped} steps were skipped: their loss or gradient norm was not finite");
    }
    if let Some((first, last)) = first_and_last_loss(out) {
        crate::exit::outln!("loss {first:.3} -> {last:.3} (first step, mean of the last ten)");
    }
    crate::exit::outln!("model {}", model.display());
    for (_, text) in texts {
        crate::exit::outln!("sample: {text}");
    }
    Ok(())
}
