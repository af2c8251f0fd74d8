//! `elleci-eval`: numbers for a model that can be compared with others'.
//!
//! Tasks are data ([`task`]); [`item`] makes questions of their rows, [`engine`] asks the model, [`metrics`] makes values of the
//! answers, and [`report`] shows them.

mod asking;
pub mod cache;
pub mod cli;
pub mod compare;
pub mod data;
pub mod engine;
pub mod item;
mod list;
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

use anyhow::{Context, ensure};
use elleci_core::simd::Isa;
use serde_json::json;

use self::asking::answer_all;
use self::cache::{Answers, Cache};
use self::cli::{Cli, Command, RunArgs, Suite};
use self::engine::Engine;
use self::item::Item;
use self::metrics::item_values;
use self::report::{Absent, Facts, TaskResult, Why};
use self::task::{Kind, Task};
use self::template::Row;
use crate::data::files::write_atomically;
use crate::exit::{Interrupted, usage};
use crate::run::model::OpenModel;
use crate::train::device::Device;

/// Part of the name that answers are kept under: another number wherever the same question gets other bits.
const ANSWERS: u32 = 4;

/// Runs what the command line asks for.
///
/// # Errors
/// Whatever the verb reports.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        None => evaluate(&cli.run),
        Some(Command::List(args)) => list::run(args),
        Some(Command::Compare(args)) => compare::run(args),
    }
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
    crate::exit::errln!("{}", device.announcement);
    device.install(|| {
        // Side by side: much of opening a model is its tokenizer, which one thread reads.
        let (open, questions) = rayon::join(|| OpenModel::chosen(args.model.as_deref()), || questions(args, tasks));
        let (open, (questions, mut absent)) = (open?, questions?);
        crate::exit::errln!("{}", open.announcement());
        let max_length = args.max_length.map_or(open.config().max_seq_len, |n| n as usize);
        if let Some(n) = args.stride.filter(|n| *n > max_length as u64) {
            return Err(usage(format!("--stride: {n} tokens are more than the window of {max_length} (--max-length)")));
        }
        let mut engine = Engine::new(&open, max_length)?;
        let model_hash = format!("{:016x}-{}", open.packed().fingerprint(), &open.need_tokenizer()?.sha256()[..16]);
        let mut prepared = prepare_all(args, questions, &model_hash, max_length)?;
        report_absent(&absent);
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
        let (thousands, seconds) = (crate::report::format::thousands, start.elapsed().as_secs_f64());
        let rate = (engine.asked as f64 / seconds) as u64;
        let shared = match engine.fed {
            fed if fed < engine.asked => format!(" ({} computed: beginnings are shared)", thousands(fed)),
            _ => String::new(),
        };
        crate::exit::errln!(
            "{} tokens in {seconds:.1} s, {} a second{shared}",
            thousands(engine.asked),
            thousands(rate)
        );
        if !finished {
            let kept =
                if args.no_cache { "nothing was kept (--no-cache)" } else { "answers are kept: run again to go on" };
            return Err(Interrupted(format!("stopped; {kept}")).into());
        }
        let explicit = |a: &&Absent| a.why == Why::Failed || !args.tasks.is_empty();
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

/// A task with its data.
struct Questions {
    task: Task,
    shots: usize,
    rows: Vec<Row>,
    items: Vec<Item>,
    place: String,
}

/// Data and questions of every task. A task that cannot run is told of, and the others go on.
fn questions(args: &RunArgs, tasks: Vec<Task>) -> anyhow::Result<(Vec<Questions>, Vec<Absent>)> {
    let (mut found, mut absent) = (Vec::new(), Vec::new());
    if let Some(dir) = args.data.as_ref().filter(|d| !d.is_dir()) {
        return Err(usage(format!("--data: {} is no directory", dir.display())));
    }
    for task in tasks {
        let shots = args.shots.map_or(task.shots, |n| if task.kind == Kind::Rolling { 0 } else { n as usize });
        let rows = data::load(&task, args.data.as_deref(), shots);
        let ready = rows.and_then(|rows| Ok((item::items(&task, &rows, shots)?, rows)));
        match ready {
            Ok((items, rows)) => found.push(Questions { task, shots, rows: rows.rows, items, place: rows.place }),
            Err(error) => {
                let why = match error.downcast_ref::<data::Missing>() {
                    Some(data::Missing::Split(_)) => Why::NoData,
                    Some(data::Missing::Examples(_)) => Why::NoExamples,
                    None => Why::Failed,
                };
                absent.push(Absent { name: task.name.clone(), reason: format!("{error:#}"), why });
            }
        }
    }
    Ok((found, absent))
}

/// The texts of `--text` as tasks of one question each, the first of them number `first`.
fn texts(args: &RunArgs, max_length: usize, first: usize) -> anyhow::Result<Vec<Questions>> {
    let stride = args.stride.map_or((max_length / 2).max(1), |n| n as usize);
    let text = |(number, path): (usize, &std::path::PathBuf)| {
        let text = std::fs::read(path).with_context(|| format!("--text: {}: cannot read", path.display()))?;
        let text = String::from_utf8(text).with_context(|| format!("--text: {}: not UTF-8", path.display()))?;
        ensure!(!text.is_empty(), "--text: {}: the file is empty, and there is nothing to score", path.display());
        let task = suite::text_task(path, number, max_length + 1 - stride);
        let row: Row = [("text".to_string(), json!(text))].into_iter().collect();
        let rows = data::Rows { rows: vec![row], place: path.display().to_string(), ..data::Rows::default() };
        let items = item::items(&task, &rows, 0).with_context(|| format!("--text: {}", path.display()))?;
        Ok(Questions { task, shots: 0, rows: rows.rows, items, place: rows.place })
    };
    (first..).zip(&args.text).map(text).collect()
}

/// Looks up what is known of the answers.
fn prepare_all(
    args: &RunArgs,
    mut questions: Vec<Questions>,
    model_hash: &str,
    max_length: usize,
) -> anyhow::Result<Vec<Prepared>> {
    let dir = args.cache.clone().or_else(Cache::default_dir).filter(|_| !args.no_cache);
    if dir.is_none() && !args.no_cache {
        crate::exit::errln!(
            "warning: there is no place for a cache (HOME is not set); answers are not kept. See --cache"
        );
    }
    let cache = Cache::new(dir);
    questions.extend(texts(args, max_length, questions.len())?);
    questions.into_iter().map(|q| prepare(args, &cache, model_hash, max_length, q)).collect()
}

fn prepare(
    args: &RunArgs,
    cache: &Cache,
    model_hash: &str,
    max_length: usize,
    Questions { task, shots, rows, items, place }: Questions,
) -> anyhow::Result<Prepared> {
    // Only a generated text depends on the seed. Kernels of different instruction sets add in different orders.
    let seed = if task.kind == Kind::Generate { args.seed } else { 0 };
    let kernel = Isa::detect().name();
    let mut asked = serde_json::to_vec(&json!([task, shots, max_length, seed, model_hash, kernel, ANSWERS]))?;
    serde_json::to_writer(&mut asked, &items)?;
    let key = blake3::hash(&asked).to_hex().to_string();
    let answers = cache.open(model_hash, &task.name, &key)?;
    let wanted = args.limit.map_or(items.len(), |n| items.len().min(n as usize));
    Ok(Prepared { task, shots, rows, items, wanted, place, key, answers })
}

/// Names the tasks that do not run: one line for all that only lack data and were not asked for by name, and one each for those that
/// only lack examples. The variants of a task are told once.
fn report_absent(absent: &[Absent]) {
    for a in absent.iter().filter(|a| a.why == Why::Failed) {
        crate::exit::errln!("{}: cannot run: {}", a.name, a.reason);
    }
    let of = |why: Why| -> Vec<(&str, &str)> {
        let own = absent.iter().filter(|a| a.why == why);
        let mut named: Vec<_> = own.map(|a| (a.name.split("_prompt-").next().unwrap_or(&a.name), &*a.reason)).collect();
        named.dedup_by_key(|a| a.0);
        named
    };
    for (name, reason) in of(Why::NoExamples) {
        crate::exit::errln!("{name}: left out: {reason}");
    }
    match of(Why::NoData).as_slice() {
        [] => {}
        [(name, reason)] => crate::exit::errln!("{name}: {reason}"),
        several @ [(name, reason), ..] => {
            let names: Vec<&str> = several.iter().map(|a| a.0).collect();
            crate::exit::errln!(
                "{} tasks have no data and are left out: {}\n  {name}: {reason}\n  `elleci-data fetch --eval --out DIR` \
                 gets them all, then `--data DIR`",
                names.len(),
                names.join(", "),
            );
        }
    }
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
            stride: (p.task.kind == Kind::Rolling).then(|| (facts.max_length + 1).saturating_sub(p.task.overlap)),
            key: p.key.clone(),
            place: p.place.clone(),
            measured,
            parts: parts.into_iter().map(part).collect(),
        };
        if truncated > 0 {
            crate::exit::errln!(
                "{}: {truncated} of {} contexts are longer than the window of {} tokens and lost their beginning \
                 (--max-length)",
                p.task.name,
                result.effective,
                facts.max_length
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
