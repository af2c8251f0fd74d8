//! `elleci-eval compare`: two runs, item by item.
//!
//! Items are paired by task and number, and must have been asked the same. The difference of two runs on the same items is known
//! much better than either value: its interval comes from a bootstrap that draws items, with both answers to each. The variants of a group ask
//! about the same items, so the difference of its means draws an item with all of its variants.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::cli::CompareArgs;
use super::metrics::{ItemValue, aggregate, bootstrap};
use super::report::layout;
use super::task::{Aggregate, Metric, Task};

/// The difference of two runs in a metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Items that both runs answered.
    pub n: usize,
    /// Value of the first run on them.
    pub a: f64,
    /// Value of the second.
    pub b: f64,
    /// The interval that holds 95 % of the bootstrap's differences b − a.
    pub interval: [f64; 2],
    /// Two-sided: 2·(k + 1) / (n + 1), at most 1, where k of n draws reach or cross zero on the rarer side. Never 0: n draws cannot tell
    /// a smaller probability from none (Davison and Hinkley 1997).
    pub p: f64,
}

/// What two runs gave for an item.
type Pair = (ItemValue, ItemValue);

/// Compares paired values of `variants`, each of the same items in the same order: the means over the variants of what [`aggregate`] makes of
/// each. One variant is a task by itself.
pub fn difference(how: Aggregate, variants: &[Vec<Pair>], resamples: usize, seed: u64) -> Difference {
    let items = variants.iter().map(Vec::len).min().unwrap_or(0);
    let all: Vec<usize> = (0..items).collect();
    let mean = |items: &[usize], of: fn(&Pair) -> ItemValue| {
        let value = |pairs: &Vec<Pair>| aggregate(how, &items.iter().map(|i| of(&pairs[*i])).collect::<Vec<_>>());
        variants.iter().map(value).sum::<f64>() / variants.len() as f64
    };
    let first = |items: &[usize]| mean(items, |p| p.0);
    let second = |items: &[usize]| mean(items, |p| p.1);
    let (a, b) = (first(&all), second(&all));
    let mut draws = bootstrap(items, seed, resamples, |picked| second(picked) - first(picked));
    draws.sort_by(f64::total_cmp);
    let quantile = |q: f64| draws[((q * draws.len() as f64) as usize).min(draws.len() - 1)];
    let count = |hit: fn(&f64) -> bool| draws.iter().filter(|d| hit(d)).count();
    // Draws of exactly zero count on both sides: equal runs have p = 1.
    let rarer = count(|d| *d <= 0.0).min(count(|d| *d >= 0.0));
    let p = (2.0 * (rarer + 1) as f64 / (draws.len() + 1) as f64).min(1.0);
    Difference { n: items * variants.len(), a, b, interval: [quantile(0.025), quantile(0.975)], p }
}

#[derive(Deserialize)]
struct Results {
    configs: BTreeMap<String, Task>,
    /// The variants of a group; of other tasks none.
    #[serde(default)]
    group_subtasks: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    model_name: String,
    #[serde(default)]
    config: Value,
}

struct Run {
    results: Results,
    dir: std::path::PathBuf,
}

impl Run {
    fn open(dir: &Path) -> anyhow::Result<Run> {
        let path = dir.join("results.json");
        let at = || path.display().to_string();
        let text = fs::read(&path).with_context(|| format!("{}: cannot read; `elleci-eval --log` writes it", at()))?;
        let results = serde_json::from_slice(&text).with_context(|| format!("{}: no results of elleci-eval", at()))?;
        Ok(Run { results, dir: dir.to_path_buf() })
    }

    /// Items of a task by number.
    fn samples(&self, task: &str) -> anyhow::Result<BTreeMap<u64, Map<String, Value>>> {
        let path = self.dir.join(format!("samples_{task}.jsonl"));
        let text = fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let mut items = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let at = || format!("{}: line {number}", path.display());
            let item: Map<String, Value> = serde_json::from_str(line).with_context(at)?;
            let id = item.get("doc_id").and_then(Value::as_u64).context("no `doc_id`").with_context(at)?;
            items.insert(id, item);
        }
        Ok(items)
    }
}

fn item_value(item: &Map<String, Value>, metric: &str) -> Option<ItemValue> {
    match item.get(metric)? {
        Value::Array(pair) => Some([pair.first()?.as_f64()?, pair.get(1)?.as_f64()?]),
        one => Some([one.as_f64()?, 0.0]),
    }
}

/// A task that both runs have: its items that both answered.
struct Common<'a> {
    task: &'a Task,
    /// By number, of the first run and of the second
    items: BTreeMap<u64, [Map<String, Value>; 2]>,
}

impl<'a> Common<'a> {
    fn open(a: &Run, b: &Run, name: &str, task: &'a Task) -> anyhow::Result<Common<'a>> {
        let (left, mut right) = (a.samples(name)?, b.samples(name)?);
        let (n, m) = (left.len(), right.len());
        let mut items = BTreeMap::new();
        for (id, item) in left {
            let Some(other) = right.remove(&id) else { continue };
            ensure!(
                item.get("prompt_hash") == other.get("prompt_hash"),
                "{name}: item {id} was not asked the same in both runs (other data, examples or definition)"
            );
            items.insert(id, [item, other]);
        }
        if items.len() < n.max(m) {
            crate::exit::errln!("{name}: {} items are in both runs, of {n} and {m}", items.len());
        }
        Ok(Common { task, items })
    }

    /// The values of the items that `wanted` likes.
    fn pairs(&self, metric: Metric, wanted: impl Fn(u64, &Map<String, Value>) -> bool) -> anyhow::Result<Vec<Pair>> {
        let value = |item: &Map<String, Value>| {
            let missing = || format!("{}: an item lacks `{}`", self.task.name, metric.name());
            item_value(item, metric.name()).with_context(missing)
        };
        let own = self.items.iter().filter(|(id, both)| wanted(**id, &both[0]));
        own.map(|(_, [l, r])| Ok((value(l)?, value(r)?))).collect()
    }

    /// The part that an item belongs to.
    fn part<'i>(&self, item: &'i Map<String, Value>) -> Option<&'i str> {
        item.get("doc")?.get(self.task.part_column.as_ref()?)?.as_str()
    }

    /// The parts, in the order of their first items.
    fn parts(&self) -> Vec<&str> {
        let mut parts = Vec::new();
        for part in self.items.values().filter_map(|both| self.part(&both[0])) {
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
        parts
    }
}

/// The differences found so far, for people and for programs.
struct Found {
    resamples: usize,
    seed: u64,
    rows: Vec<Vec<String>>,
    objects: Vec<Value>,
}

impl Found {
    /// Compares, shown as `label`; `named` is what the object begins with.
    fn add(&mut self, label: String, named: Value, metric: Metric, variants: &[Vec<Pair>]) {
        if variants.iter().all(Vec::is_empty) {
            return;
        }
        let d = difference(metric.aggregate(), variants, self.resamples, self.seed);
        self.rows.push(vec![
            label,
            metric.name().into(),
            d.n.to_string(),
            format!("{:.4}", d.a),
            format!("{:.4}", d.b),
            format!("{:+.4}", d.b - d.a),
            format!("{:+.4} … {:+.4}", d.interval[0], d.interval[1]),
            format!("{:.4}", d.p),
        ]);
        let mut object = json!({
            "metric": metric.name(), "n": d.n, "a": d.a, "b": d.b, "difference": d.b - d.a, "interval": d.interval, "p": d.p,
        });
        if let (Value::Object(object), Value::Object(named)) = (&mut object, named) {
            object.extend(named);
        }
        self.objects.push(object);
    }
}

/// Runs the verb.
///
/// # Errors
/// Directories that hold no runs, or runs that have nothing in common.
pub fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let (a, b) = (Run::open(&args.a)?, Run::open(&args.b)?);
    let settings = |run: &Run| run.results.config.pointer("/model_args/max_length").cloned();
    if settings(&a) != settings(&b) {
        crate::exit::errln!("warning: the windows of the two runs have different lengths");
    }
    let heads = ["task", "metric", "n", "a", "b", "b − a", "95 % interval", "p"].map(String::from).to_vec();
    let resamples = args.resamples as usize;
    let mut found = Found { resamples, seed: args.seed, rows: vec![heads], objects: Vec::new() };
    let mut tasks = BTreeMap::new();
    for (name, task) in &a.results.configs {
        let Some(other) = b.results.configs.get(name) else {
            crate::exit::errln!("{name}: only in {}", args.a.display());
            continue;
        };
        if task.overlap != other.overlap {
            crate::exit::errln!("warning: {name}: the windows of the two runs have different strides");
        }
        let common = Common::open(&a, &b, name, task)?;
        for metric in &task.metrics {
            found.add(name.clone(), json!({ "task": name }), *metric, &[common.pairs(*metric, |_, _| true)?]);
        }
        for part in common.parts() {
            let pairs = common.pairs(task.metrics[0], |_, item| common.part(item) == Some(part))?;
            found.add(format!("- {part}"), json!({ "task": name, "part": part }), task.metrics[0], &[pairs]);
        }
        tasks.insert(name, common);
    }
    b.results.configs.keys().filter(|name| !a.results.configs.contains_key(*name)).for_each(|name| {
        crate::exit::errln!("{name}: only in {}", args.b.display());
    });
    for (name, members) in &a.results.group_subtasks {
        let variants: Vec<&Common<'_>> = members.iter().filter_map(|m| tasks.get(m)).collect();
        let [first, ..] = variants.as_slice() else { continue };
        let in_all = |id: u64| variants.iter().all(|v| v.items.contains_key(&id));
        for metric in &first.task.metrics {
            let pairs: anyhow::Result<Vec<_>> = variants.iter().map(|v| v.pairs(*metric, |id, _| in_all(id))).collect();
            let named = json!({ "task": name, "variants": variants.len() });
            found.add(format!("{name} (mean)"), named, *metric, &pairs?);
        }
    }
    ensure!(!found.objects.is_empty(), "the two runs have no items in common");
    if args.json {
        let names = [&a, &b].map(|r| r.results.model_name.clone());
        let all = json!({ "models": names, "resamples": args.resamples, "differences": found.objects });
        crate::exit::outln!("{all}");
    } else {
        crate::exit::out!("{}", layout(&found.rows));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_runs_do_not_differ_and_unequal_ones_do() {
        let same: Vec<Pair> = (0..50).map(|i| ([f64::from(i % 2), 0.0], [f64::from(i % 2), 0.0])).collect();
        let d = difference(Aggregate::Mean, &[same], 500, 1);
        assert_eq!((d.a, d.b, d.interval, d.p), (0.5, 0.5, [0.0, 0.0], 1.0));
        // Every third item gained, none lost: the interval is around 1/3 and does not reach zero.
        let better: Vec<Pair> = (0..300).map(|i| ([0.0, 0.0], [f64::from(u8::from(i % 3 == 0)), 0.0])).collect();
        let better = [better];
        let d = difference(Aggregate::Mean, &better, 500, 1);
        // sqrt(1/3 · 2/3 / 300) = 0.0272: 95 % lie within two of them, and all of 500 draws within five.
        // None of them reaches zero.
        assert!((d.b - d.a - 1.0 / 3.0).abs() < 1e-12 && d.p == 2.0 / 501.0);
        assert!((0.24..0.33).contains(&d.interval[0]) && (0.33..0.43).contains(&d.interval[1]), "{:?}", d.interval);
        assert_eq!(d, difference(Aggregate::Mean, &better, 500, 1), "the draws are seeded");
    }

    #[test]
    fn variants_of_an_item_are_drawn_together() {
        // Two variants with opposite differences: their mean has none in whatever draw.
        let one =
            |sign: f64| -> Vec<Pair> { (0..32).map(|i| ([0.5, 0.0], [0.5 + sign * f64::from(i % 2), 0.0])).collect() };
        let d = difference(Aggregate::Mean, &[one(1.0), one(-1.0)], 200, 3);
        assert_eq!((d.n, d.a, d.b, d.interval, d.p), (64, 0.5, 0.5, [0.0, 0.0], 1.0));
        // The same variant twice is that variant, with its interval.
        let (once, twice) = ([one(1.0)], [one(1.0), one(1.0)]);
        let (once, twice) = [&once[..], &twice].map(|v| difference(Aggregate::Mean, v, 200, 3)).into();
        assert_eq!(Difference { n: 2 * once.n, ..once }, twice);
    }
}
