//! `elleci-eval compare`: two runs, item by item.
//!
//! Items are paired by task and number, and must have been asked the same. The difference of two runs on the same items is known
//! much better than either value: its interval comes from a bootstrap that draws items, with both answers to each.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::cli::CompareArgs;
use super::metrics::{ItemValue, aggregate, bootstrap};
use super::report::layout;
use super::task::{Aggregate, Task};

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
    /// Two-sided: how often a difference at least as far from zero would be drawn if there were none.
    pub p: f64,
}

/// Compares paired values.
pub fn difference(how: Aggregate, pairs: &[(ItemValue, ItemValue)], resamples: usize, seed: u64) -> Difference {
    let all: Vec<usize> = (0..pairs.len()).collect();
    let first = |items: &[usize]| aggregate(how, &items.iter().map(|i| pairs[*i].0).collect::<Vec<_>>());
    let second = |items: &[usize]| aggregate(how, &items.iter().map(|i| pairs[*i].1).collect::<Vec<_>>());
    let (a, b) = (first(&all), second(&all));
    let mut draws = bootstrap(pairs.len(), seed, resamples, |picked| second(picked) - first(picked));
    draws.sort_by(f64::total_cmp);
    let quantile = |q: f64| draws[((q * draws.len() as f64) as usize).min(draws.len() - 1)];
    let share = |hit: &dyn Fn(f64) -> bool| draws.iter().filter(|d| hit(**d)).count() as f64 / draws.len() as f64;
    // Draws of exactly zero count on both sides: equal runs have p = 1.
    let p = (2.0 * share(&|d| d <= 0.0).min(share(&|d| d >= 0.0))).min(1.0);
    Difference { n: pairs.len(), a, b, interval: [quantile(0.025), quantile(0.975)], p }
}

#[derive(Deserialize)]
struct Results {
    configs: BTreeMap<String, Task>,
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

/// Runs the verb.
///
/// # Errors
/// Directories that hold no runs, or runs that have nothing in common.
pub fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let (a, b) = (Run::open(&args.a)?, Run::open(&args.b)?);
    let settings = |run: &Run| run.results.config.pointer("/model_args/max_length").cloned();
    if settings(&a) != settings(&b) {
        eprintln!("warning: the windows of the two runs have different lengths");
    }
    let mut rows = vec![["task", "metric", "n", "a", "b", "b − a", "95 % interval", "p"].map(String::from).to_vec()];
    let mut objects = Vec::new();
    for (name, task) in &a.results.configs {
        if !b.results.configs.contains_key(name) {
            eprintln!("{name}: only in {}", args.a.display());
            continue;
        }
        let (left, right) = (a.samples(name)?, b.samples(name)?);
        let mut both = Vec::new();
        for (id, item) in &left {
            let Some(other) = right.get(id) else { continue };
            ensure!(
                item.get("prompt_hash") == other.get("prompt_hash"),
                "{name}: item {id} was not asked the same in both runs (other data, examples or definition)"
            );
            both.push((item, other));
        }
        if both.len() < left.len().max(right.len()) {
            eprintln!("{name}: {} items are in both runs, of {} and {}", both.len(), left.len(), right.len());
        }
        for metric in &task.metrics {
            let value = |item| item_value(item, metric.name());
            let pairs: Option<Vec<_>> = both.iter().map(|(l, r)| Some((value(l)?, value(r)?))).collect();
            let pairs = pairs.with_context(|| format!("{name}: an item lacks `{}`", metric.name()))?;
            if pairs.is_empty() {
                continue;
            }
            let d = difference(metric.aggregate(), &pairs, args.resamples as usize, args.seed);
            rows.push(vec![
                name.clone(),
                metric.name().into(),
                d.n.to_string(),
                format!("{:.4}", d.a),
                format!("{:.4}", d.b),
                format!("{:+.4}", d.b - d.a),
                format!("{:+.4} … {:+.4}", d.interval[0], d.interval[1]),
                format!("{:.3}", d.p),
            ]);
            objects.push(json!({
                "task": name, "metric": metric.name(), "n": d.n, "a": d.a, "b": d.b, "difference": d.b - d.a,
                "interval": d.interval, "p": d.p,
            }));
        }
    }
    b.results.configs.keys().filter(|name| !a.results.configs.contains_key(*name)).for_each(|name| {
        eprintln!("{name}: only in {}", args.b.display());
    });
    ensure!(!objects.is_empty(), "the two runs have no items in common");
    if args.json {
        let names = [&a, &b].map(|r| r.results.model_name.clone());
        crate::exit::outln!("{}", json!({ "models": names, "resamples": args.resamples, "differences": objects }));
    } else {
        crate::exit::out!("{}", layout(&rows));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_runs_do_not_differ_and_unequal_ones_do() {
        let same: Vec<(ItemValue, ItemValue)> =
            (0..50).map(|i| ([f64::from(i % 2), 0.0], [f64::from(i % 2), 0.0])).collect();
        let d = difference(Aggregate::Mean, &same, 500, 1);
        assert_eq!((d.a, d.b, d.interval, d.p), (0.5, 0.5, [0.0, 0.0], 1.0));
        // Every third item gained, none lost: the interval is around 1/3 and does not reach zero.
        let better: Vec<(ItemValue, ItemValue)> =
            (0..300).map(|i| ([0.0, 0.0], [f64::from(u8::from(i % 3 == 0)), 0.0])).collect();
        let d = difference(Aggregate::Mean, &better, 500, 1);
        // sqrt(1/3 · 2/3 / 300) = 0.0272: 95 % lie within two of them, and all of 500 draws within five.
        assert!((d.b - d.a - 1.0 / 3.0).abs() < 1e-12 && d.p == 0.0);
        assert!((0.24..0.33).contains(&d.interval[0]) && (0.33..0.43).contains(&d.interval[1]), "{:?}", d.interval);
        assert_eq!(d, difference(Aggregate::Mean, &better, 500, 1), "the draws are seeded");
    }
}
