//! `elleci-eval`: numbers for a model that can be compared with others'.
//!
//! Tasks are data ([`task`]); [`item`] makes questions of their rows, [`engine`] asks the model, [`metrics`] makes values of the
//! answers, and [`report`] shows them.

pub mod cache;
pub mod cli;
pub mod compare;
pub mod data;
pub mod engine;
pub mod item;
pub mod log;
pub mod metrics;
mod progress;
pub mod report;
pub mod suite;
pub mod task;
pub mod template;
pub mod text_match;

use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use elleci_core::sampler::SamplerOptions;
use serde_json::json;

use self::cache::{Answers, Cache, Kept};
use self::cli::{Cli, Command, ListArgs, RunArgs, Suite};
use self::engine::{Continuation, Continue, Engine, Pair, Stem};
use self::item::Item;
use self::metrics::{Answer, item_values};
use self::progress::Progress;
use self::report::{Absent, Facts, TaskResult};
use self::task::{Kind, Task};
use self::template::Row;
use crate::data::files::write_atomically;
use crate::exit::{Interrupted, usage};
use crate::run::interrupt::Generating;
use crate::run::model::OpenModel;
use crate::train::device::Device;

/// Items that are asked between two looks at Ctrl-C, and kept together.
const WAVE: usize = 128;
/// Texts that are generated together.
const GENERATE_WAVE: usize = 32;
/// Part of the name that answers are kept under: another number wherever the same question gets other bits.
const ANSWERS: u32 = 2;

/// Runs what the command line asks for.
///
/// # Errors
/// Whatever the verb reports.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        None => evaluate(&cli.run),
        Some(Command::List(args)) => list(args),
        Some(Command::Compare(args)) => compare::run(args),
    }
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let tasks = task::built_in()?;
    if args.json {
        crate::exit::outln!("{}", json!({ "tasks": tasks }));
        return Ok(());
    }
    let mut rows = vec![["task", "what", "metrics", "shots", "source", "licence"].map(String::from).to_vec()];
    for task in &tasks {
        let metrics: Vec<&str> = task.metrics.iter().map(|m| m.name()).collect();
        let source = task.source.as_ref();
        rows.push(vec![
            task.name.clone(),
            task.title.clone(),
            metrics.join(", "),
            task.shots.to_string(),
            source.map_or("bundled".into(), |s| format!("{} {}", s.repo, s.config)),
            source.map_or("that of this program".into(), |s| s.licence.clone()),
        ]);
    }
    crate::exit::out!("{}", report::layout(&rows));
    Ok(())
}

/// A task with its questions and what is known of the answers.
struct Prepared {
    task: Task,
    shots: usize,
    rows: Vec<Row>,
    items: Vec<Item>,
    /// Items that will be asked: the first so many.
    wanted: usize,
    place: String,
    key: String,
    answers: Answers,
}

impl Prepared {
    fn missing(&self) -> Vec<&Item> {
        self.items[..self.wanted].iter().filter(|i| !self.answers.known.contains_key(&i.doc)).collect()
    }
}

fn evaluate(args: &RunArgs) -> anyhow::Result<()> {
    let start = Instant::now();
    let date = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let tasks = chosen(args)?;
    // A place that cannot be written is found before hours of answers.
    if let Some(path) = args.json.as_deref().filter(|path| *path != Path::new("-")) {
        crate::data::files::check_target(path).context("--json")?;
    }
    if let Some(dir) = &args.log {
        std::fs::create_dir_all(dir).with_context(|| format!("--log: creating {}", dir.display()))?;
    }
    let device = Device::choose(&args.device.device, args.device.threads)?;
    eprintln!("{}", device.announcement);
    device.install(|| {
        let open = OpenModel::chosen(args.model.as_deref())?;
        eprintln!("{}", open.announcement());
        let max_length = args.max_length.map_or(open.config().max_seq_len, |n| n as usize);
        let mut engine = Engine::new(&open, max_length)?;
        let model_hash = format!("{:016x}-{}", open.packed().fingerprint(), &open.need_tokenizer()?.sha256()[..16]);
        let (mut prepared, mut absent) = prepare_all(args, tasks, &model_hash, max_length)?;
        let finished = answer_all(args, &mut engine, &mut prepared, &mut absent)?;
        let seconds = start.elapsed().as_secs_f64();
        let facts = Facts {
            model: open.name.clone(),
            path: args.model.as_ref().map_or("bundled".into(), |path| path.display().to_string()),
            parameters: open.parameters(),
            model_hash,
            max_length,
            limit: args.limit,
            seed: args.seed,
            device: device.announcement.clone(),
            date,
            seconds,
        };
        write_results(args, &prepared, &absent, &facts)?;
        eprintln!("{} tokens in {:.1} s", crate::report::format::thousands(engine.fed), start.elapsed().as_secs_f64());
        if !finished {
            let kept =
                if args.no_cache { "nothing was kept (--no-cache)" } else { "answers are kept: run again to go on" };
            return Err(Interrupted(format!("stopped; {kept}")).into());
        }
        let explicit = |a: &&Absent| !a.no_data || !args.tasks.is_empty();
        match absent.iter().find(explicit) {
            Some(a) => {
                anyhow::bail!("{} of the tasks could not run; the first is {}: {}", absent.len(), a.name, a.reason)
            }
            None => Ok(()),
        }
    })
}

/// The tasks that the arguments ask for.
fn chosen(args: &RunArgs) -> anyhow::Result<Vec<Task>> {
    let all = task::built_in()?;
    let mut tasks = Vec::new();
    let suite = args.suite.or((args.tasks.is_empty() && args.text.is_empty()).then_some(Suite::It));
    match suite {
        Some(Suite::It) => tasks.extend(all.iter().cloned()),
        Some(Suite::Bundled) => tasks.extend(all.iter().filter(|t| t.source.is_none()).cloned()),
        None => {}
    }
    for task in task::select(&all, &args.tasks)? {
        if tasks.iter().all(|t| t.name != task.name) {
            tasks.push(task);
        }
    }
    Ok(tasks)
}

/// Data and questions of every task. A task that cannot run is reported, and the others go on.
fn prepare_all(
    args: &RunArgs,
    tasks: Vec<Task>,
    model_hash: &str,
    max_length: usize,
) -> anyhow::Result<(Vec<Prepared>, Vec<Absent>)> {
    let dir = args.cache.clone().or_else(Cache::default_dir).filter(|_| !args.no_cache);
    if dir.is_none() && !args.no_cache {
        eprintln!("warning: there is no place for a cache (HOME is not set); answers are not kept. See --cache");
    }
    let cache = Cache::new(dir);
    let (mut prepared, mut absent) = (Vec::new(), Vec::new());
    if let Some(dir) = args.data.as_ref().filter(|d| !d.is_dir()) {
        return Err(usage(format!("--data: {} is no directory", dir.display())));
    }
    for task in tasks {
        let shots = args.shots.map_or(task.shots, |n| if task.kind == Kind::Rolling { 0 } else { n as usize });
        let rows = data::load(&task, args.data.as_deref(), shots);
        let ready = rows.and_then(|rows| Ok((item::items(&task, &rows, shots)?, rows)));
        match ready {
            Ok((items, rows)) => {
                let (rows, place) = (rows.rows, rows.place);
                prepared.push(prepare(args, &cache, model_hash, max_length, task, shots, (rows, items, place))?);
            }
            Err(error) => {
                let no_data = error.downcast_ref::<data::Missing>().is_some();
                absent.push(Absent { name: task.name.clone(), reason: format!("{error:#}"), no_data });
            }
        }
    }
    for path in &args.text {
        let text = std::fs::read(path).with_context(|| format!("--text: {}: cannot read", path.display()))?;
        let text = String::from_utf8(text).with_context(|| format!("--text: {}: not UTF-8", path.display()))?;
        let task = suite::text_task(path, prepared.len());
        let row: Row = [("text".to_string(), json!(text))].into_iter().collect();
        let rows = data::Rows { rows: vec![row], place: path.display().to_string(), ..data::Rows::default() };
        let items = item::items(&task, &rows, 0).with_context(|| format!("--text: {}", path.display()))?;
        let found = (rows.rows, items, rows.place);
        prepared.push(prepare(args, &cache, model_hash, max_length, task, 0, found)?);
    }
    report_absent(&absent);
    Ok((prepared, absent))
}

fn prepare(
    args: &RunArgs,
    cache: &Cache,
    model_hash: &str,
    max_length: usize,
    task: Task,
    shots: usize,
    (rows, items, place): (Vec<Row>, Vec<Item>, String),
) -> anyhow::Result<Prepared> {
    let mut hash = blake3::Hasher::new();
    // Only a generated text depends on the seed.
    let seed = if task.kind == Kind::Generate { args.seed } else { 0 };
    serde_json::to_writer(&mut hash, &json!([task, shots, max_length, seed, model_hash, ANSWERS]))?;
    serde_json::to_writer(&mut hash, &items)?;
    let key = hash.finalize().to_hex().to_string();
    let answers = cache.open(model_hash, &task.name, &key)?;
    let wanted = args.limit.map_or(items.len(), |n| items.len().min(n as usize));
    Ok(Prepared { task, shots, rows, items, wanted, place, key, answers })
}

/// Names the tasks that do not run: one line for all that only lack data and were not asked for by name.
fn report_absent(absent: &[Absent]) {
    for a in absent.iter().filter(|a| !a.no_data) {
        eprintln!("{}: cannot run: {}", a.name, a.reason);
    }
    let without: Vec<&Absent> = absent.iter().filter(|a| a.no_data).collect();
    match without.as_slice() {
        [] => {}
        [one] => eprintln!("{}: {}", one.name, one.reason),
        [first, ..] => {
            // The variants of a task are told once.
            let mut names: Vec<&str> = without.iter().filter_map(|a| a.name.split("_prompt-").next()).collect();
            names.dedup();
            eprintln!(
                "{} tasks have no data and are left out: {}\n  {}: {}\n  `elleci-data fetch --eval --out DIR` gets them \
                 all, then `--data DIR`",
                names.len(),
                names.join(", "),
                first.name,
                first.reason
            );
        }
    }
}

/// Asks everything that is not known. False if Ctrl-C ended it.
fn answer_all(
    args: &RunArgs,
    engine: &mut Engine<'_>,
    prepared: &mut Vec<Prepared>,
    absent: &mut Vec<Absent>,
) -> anyhow::Result<bool> {
    let interrupt = Generating::begin();
    let total = prepared.iter().map(|p| p.missing().iter().map(|i| i.weight()).sum::<u64>()).sum();
    let mut progress = Progress::new(total);
    let mut index = 0;
    let mut finished = true;
    while index < prepared.len() {
        let p = &mut prepared[index];
        match answer_task(args, engine, p, &interrupt, &mut progress) {
            Ok(()) => index += 1,
            Err(error) => {
                let reason = format!("{error:#}");
                progress.note(&format!("{}: cannot run: {reason}", p.task.name));
                absent.push(Absent { name: p.task.name.clone(), reason, no_data: false });
                prepared.remove(index);
            }
        }
        if interrupt.stopped() {
            finished = prepared.iter().all(|p| p.missing().is_empty());
            break;
        }
    }
    progress.finish();
    Ok(finished)
}

/// Asks what is missing of one task.
fn answer_task(
    args: &RunArgs,
    engine: &mut Engine<'_>,
    p: &mut Prepared,
    interrupt: &Generating,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let scored = matches!(p.task.kind, Kind::MultipleChoice | Kind::Loglikelihood);
    let missing: Vec<Item> = p.missing().into_iter().cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let stem = if scored { stem(engine, &p.items)? } else { None };
    let wave = if p.task.kind == Kind::Generate { GENERATE_WAVE } else { WAVE };
    let mut done = p.wanted - missing.len();
    for items in missing.chunks(wave) {
        if interrupt.stopped() {
            break;
        }
        let answers = match p.task.kind {
            Kind::Generate => generate(args, engine, &p.task, items)?,
            Kind::Rolling => match rolling(engine, &p.task, items, interrupt)? {
                Some(answers) => answers,
                None => break,
            },
            _ => score(engine, items, stem.as_ref())?,
        };
        done += answers.len();
        p.answers.add(items.iter().map(|i| i.doc).zip(answers).collect())?;
        progress.step(items.iter().map(Item::weight).sum(), &p.task.name, done, p.wanted);
    }
    Ok(())
}

/// What the contexts of a task begin with: what its last two items have in common.
fn stem(engine: &mut Engine<'_>, items: &[Item]) -> anyhow::Result<Option<Stem>> {
    let [.., a, b] = items else { return Ok(None) };
    let first = |engine: &mut Engine<'_>, item: &Item| engine.pair(&item.context, &item.continuations[0]);
    let (a, b) = (first(engine, a)?, first(engine, b)?);
    engine.stem(&a, &b)
}

fn score(engine: &mut Engine<'_>, items: &[Item], stem: Option<&Stem>) -> anyhow::Result<Vec<Kept>> {
    let mut pairs: Vec<Pair> = Vec::new();
    for item in items {
        for continuation in &item.continuations {
            let pair = engine.pair(&item.context, continuation);
            pairs.push(pair.with_context(|| format!("item {} ({:?})", item.doc, continuation))?);
        }
    }
    let scores = engine.score(&pairs, stem)?;
    let mut start = 0;
    let mut answers = Vec::with_capacity(items.len());
    for item in items {
        let own = start..start + item.continuations.len();
        start = own.end;
        let cut = pairs[own.clone()].iter().any(|p| p.truncated > 0);
        let answer = Answer::Scores(scores[own].iter().map(|s| (s.logprob, s.greedy)).collect());
        answers.push(Kept { answer, cut });
    }
    Ok(answers)
}

/// The log-likelihoods of whole texts; `None` if Ctrl-C came in between.
fn rolling(
    engine: &mut Engine<'_>,
    task: &Task,
    items: &[Item],
    interrupt: &Generating,
) -> anyhow::Result<Option<Vec<Kept>>> {
    let mut owners = Vec::new();
    let mut windows = Vec::new();
    for (i, item) in items.iter().enumerate() {
        for window in engine.windows(&item.context, task.overlap)? {
            owners.push(i);
            windows.push(window);
        }
    }
    let mut totals = vec![0.0; items.len()];
    for (windows, owners) in windows.chunks(16).zip(owners.chunks(16)) {
        if interrupt.stopped() {
            return Ok(None);
        }
        for (score, owner) in engine.score(windows, None)?.iter().zip(owners) {
            totals[*owner] += score.logprob;
        }
    }
    let kept = |total| Kept { answer: Answer::Rolling(total), cut: false };
    Ok(Some(totals.into_iter().map(kept).collect()))
}

fn generate(args: &RunArgs, engine: &mut Engine<'_>, task: &Task, items: &[Item]) -> anyhow::Result<Vec<Kept>> {
    let how = task.generation.as_ref().context("the task has no `generation`")?;
    let sampling = SamplerOptions { temperature: how.temperature, ..SamplerOptions::default() };
    let how = Continue { max_tokens: how.max_tokens, until: how.until.clone(), sampling };
    let prompts: Vec<&str> = items.iter().map(|i| i.context.as_str()).collect();
    // A text's draws depend on the seed and its own number, not on its company.
    let seed = |i: usize| args.seed.wrapping_mul(1_000_003).wrapping_add(items[i].doc as u64);
    let texts = engine.generate(&prompts, &how, seed)?;
    let kept = |t: Continuation| Kept { cut: t.truncated > 0, answer: Answer::Text { text: t.text, ended: t.ended } };
    Ok(texts.into_iter().map(kept).collect())
}

fn write_results(args: &RunArgs, prepared: &[Prepared], absent: &[Absent], facts: &Facts) -> anyhow::Result<()> {
    let mut results = Vec::new();
    for p in prepared {
        let asked: Vec<&Item> = p.items[..p.wanted].iter().filter(|i| p.answers.known.contains_key(&i.doc)).collect();
        if asked.is_empty() {
            continue;
        }
        let values: Vec<_> = asked.iter().map(|i| item_values(&p.task, i, &p.answers.known[&i.doc].answer)).collect();
        let measured = report::measure(&p.task, &asked, &values, args.seed);
        let mut parts: Vec<String> = Vec::new();
        for part in asked.iter().filter_map(|i| i.part.as_ref()) {
            if !parts.contains(part) {
                parts.push(part.clone());
            }
        }
        let part = |part: String| {
            let own: Vec<usize> = (0..asked.len()).filter(|i| asked[*i].part.as_ref() == Some(&part)).collect();
            let items: Vec<&Item> = own.iter().map(|i| asked[*i]).collect();
            let values: Vec<_> = own.iter().map(|i| values[*i].clone()).collect();
            let first = report::measure(&p.task, &items, &values, args.seed).swap_remove(0);
            (part, own.len(), first)
        };
        let truncated = asked.iter().filter(|i| p.answers.known[&i.doc].cut).count();
        let result = TaskResult {
            task: p.task.clone(),
            shots: p.shots,
            original: p.items.len(),
            effective: asked.len(),
            truncated,
            key: p.key.clone(),
            place: p.place.clone(),
            measured,
            parts: parts.into_iter().map(part).collect(),
        };
        if truncated > 0 {
            eprintln!(
                "{}: {truncated} of {} contexts are longer than the window of {} tokens and lost their beginning \
                 (--max-length)",
                p.task.name, result.effective, facts.max_length
            );
        }
        if let Some(dir) = &args.log {
            log::write(dir, &p.task, &p.rows, &asked, &p.answers, &values)?;
        }
        results.push(result);
    }
    let json = report::to_json(&results, absent, facts);
    let pretty = |json| -> anyhow::Result<Vec<u8>> { Ok(serde_json::to_vec_pretty(json)?) };
    if let Some(dir) = &args.log {
        write_atomically(&dir.join("results.json"), &pretty(&json)?).context("--log")?;
    }
    match &args.json {
        Some(path) if path == Path::new("-") => crate::exit::outln!("{json}"),
        Some(path) => write_atomically(path, &pretty(&json)?).context("--json")?,
        None => {}
    }
    if args.json.as_deref() != Some(Path::new("-")) && !results.is_empty() {
        crate::exit::out!("{}", report::table(&results));
    }
    Ok(())
}
