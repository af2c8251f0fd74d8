//! Layers of configuration: built-in preset < `--config` file < `--set key=value` < dedicated flags.
//!
//! Every layer is checked against the keys that exist, so that a typing error is found in the layer that made it.

use std::path::Path;

use anyhow::Context;
use elleci_core::config::PRESETS;
use serde::Deserialize;
use toml::{Table, Value};

use super::config::RunConfig;
use crate::exit::usage;

const TEXTS: [(&str, &str); 4] = [
    ("nano", include_str!("../../presets/nano.toml")),
    ("mini", include_str!("../../presets/mini.toml")),
    ("small-160m", include_str!("../../presets/small-160m.toml")),
    ("elleci-1.5b", include_str!("../../presets/elleci-1.5b.toml")),
];

/// One layer above the preset.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What messages call it: a file, `--set`, a flag.
    pub origin: String,
    /// Its keys.
    pub table: Table,
    /// Whether a section of free keys (the sources) replaces the one below as a whole, as a file's does; one that `--set`
    /// makes changes the key it names.
    replaces: bool,
}

impl Layer {
    /// A TOML file.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] when it cannot be read or is not TOML.
    pub fn file(path: &Path) -> anyhow::Result<Layer> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| usage(format!("--config {origin}: {e}")))?;
        let table = text.parse::<Table>().map_err(|e| usage(format!("{origin}: not valid TOML: {e}")))?;
        Ok(Layer { origin, table, replaces: true })
    }

    /// `--set key=value`. The value is read as TOML, and as a string where it is none.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] without `=`, or with an empty key.
    pub fn assignment(text: &str) -> anyhow::Result<Layer> {
        let (key, value) = text
            .split_once('=')
            .filter(|(key, _)| !key.trim().is_empty())
            .ok_or_else(|| usage(format!("--set {text}: write key=value, e.g. --set training.steps=200")))?;
        Ok(Layer::key(format!("--set {text}"), key.trim(), parse_value(value.trim())))
    }

    /// One dotted key with its value.
    pub fn key(origin: String, key: &str, value: Value) -> Layer {
        let mut parts = key.rsplit('.');
        let mut table = Table::new();
        table.insert(parts.next().unwrap_or_default().into(), value);
        for part in parts {
            let mut outer = Table::new();
            outer.insert(part.into(), Value::Table(table));
            table = outer;
        }
        Layer { origin, table, replaces: false }
    }
}

fn parse_value(text: &str) -> Value {
    match format!("v = {text}").parse::<Table>() {
        Ok(mut table) if table.len() == 1 => table.remove("v").unwrap_or_else(|| Value::String(text.into())),
        _ => Value::String(text.into()),
    }
}

/// The effective configuration. `preset` (the flag) wins over a `preset` key in the layers; without both it is `nano`.
///
/// # Errors
/// [`crate::exit::Usage`], naming layer, key, value and remedy.
pub fn load(preset: Option<&str>, layers: &[Layer]) -> anyhow::Result<RunConfig> {
    let named = layers.iter().rev().find_map(|l| l.table.get("preset").map(|v| (l.origin.as_str(), v)));
    let preset = match (preset, named) {
        (Some(name), _) => name,
        (None, Some((_, Value::String(name)))) => name,
        (None, Some((origin, v))) => return Err(usage(format!("{origin}: `preset` is {v}; it must be a string"))),
        (None, None) => "nano",
    };
    let base = preset_table(preset)?;
    over(base, &format!("preset {preset}"), preset, layers)
}

/// As [`load`], from the configuration of a run that goes on instead of a preset.
///
/// # Errors
/// As [`load`].
pub fn load_over(saved: &RunConfig, layers: &[Layer]) -> anyhow::Result<RunConfig> {
    let base = Table::try_from(saved).context("the saved configuration")?;
    over(base, "the configuration of the run", &saved.preset, layers)
}

fn over(base: Table, base_origin: &str, preset: &str, layers: &[Layer]) -> anyhow::Result<RunConfig> {
    let mut merged = base.clone();
    for layer in layers {
        known_keys(&layer.table, &base, "", &layer.origin)?;
        merge(&mut merged, layer);
    }
    merged.insert("preset".into(), preset.into());
    let origin = |key: &str| origin_of(key, layers).unwrap_or(base_origin).to_string();
    let config: RunConfig = serde_path_to_error::deserialize(Value::Table(merged)).map_err(|e| {
        // What follows in toml's own words is the place in a text that nobody has written.
        let inner = e.inner().to_string();
        let problem = inner.lines().next().unwrap_or_default().replace("u64", "a whole number from 0 on");
        usage(format!("{}: `{}`: {}", origin(&e.path().to_string()), e.path(), problem.replace("f64", "a number")))
    })?;
    config.validate(origin)?;
    Ok(config)
}

/// Reads an effective configuration back.
///
/// # Errors
/// When the text is not one.
pub fn parse(text: &str) -> anyhow::Result<RunConfig> {
    RunConfig::deserialize(text.parse::<Table>().context("not valid TOML")?).context("not a run configuration")
}

fn preset_table(name: &str) -> anyhow::Result<Table> {
    let Some((_, text)) = TEXTS.iter().find(|(n, _)| *n == name) else {
        let hint = nearest(name, PRESETS.into_iter()).map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
        return Err(usage(format!("unknown preset `{name}`{hint}; the presets are {}", PRESETS.join(", "))));
    };
    text.parse::<Table>().with_context(|| format!("built-in preset {name}"))
}

/// Tables whose keys are names that the user gives.
fn free_keys(path: &str) -> bool {
    path == "data.sources"
}

fn known_keys(table: &Table, schema: &Table, path: &str, origin: &str) -> anyhow::Result<()> {
    for (key, value) in table {
        let full = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let Some(known) = schema.get(key) else {
            let hint = match nearest(key, schema.keys().map(String::as_str)) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!("known here: {}", schema.keys().cloned().collect::<Vec<_>>().join(", ")),
            };
            return Err(usage(format!("{origin}: unknown key `{full}`; {hint}")));
        };
        match (value, known) {
            (Value::Table(_), Value::Table(_)) if free_keys(&full) => {}
            (Value::Table(inner), Value::Table(schema)) => known_keys(inner, schema, &full, origin)?,
            (_, Value::Table(_)) => {
                return Err(usage(format!("{origin}: `{full}` is {value}; it is a section of keys")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Sections merge key by key; every other value, a list of phases too, replaces what was there. For the set of sources
/// see [`Layer::replaces`].
fn merge(into: &mut Table, layer: &Layer) {
    merge_at(into, &layer.table, "", layer.replaces);
}

fn merge_at(into: &mut Table, from: &Table, path: &str, replaces: bool) {
    for (key, value) in from {
        let full = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (into.get_mut(key), value) {
            (Some(Value::Table(old)), Value::Table(new)) if !(replaces && free_keys(&full)) => {
                merge_at(old, new, &full, replaces);
            }
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// The last layer that sets `key` or a part of it (`a.b[0].c` counts as `a.b`).
fn origin_of<'a>(key: &str, layers: &'a [Layer]) -> Option<&'a str> {
    let key = key.split('[').next().unwrap_or(key);
    let sets = |table: &Table| {
        let mut at = table;
        for part in key.split('.') {
            match at.get(part) {
                Some(Value::Table(inner)) => at = inner,
                Some(_) => return true,
                None => return false,
            }
        }
        true
    };
    layers.iter().rev().find(|l| sets(&l.table)).map(|l| l.origin.as_str())
}

/// The candidate that a typing error most likely meant.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::damerau_levenshtein(word, c), c))
        .min()
        .filter(|&(distance, c)| distance <= c.len().max(word.len()) / 3 + 1)
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Usage;
    use crate::train::plan::Plan;
    use elleci_core::config::ModelConfig;

    fn set(assignments: &[&str]) -> anyhow::Result<RunConfig> {
        let layers: Vec<Layer> = assignments.iter().map(|a| Layer::assignment(a).unwrap()).collect();
        load(None, &layers)
    }

    fn refusal(assignments: &[&str]) -> String {
        let error = set(assignments).expect_err("must be refused");
        error.downcast_ref::<Usage>().expect("a usage error").0.clone()
    }

    #[test]
    fn set_changes_one_source_and_a_file_all_of_them() {
        let paths =
            |c: RunConfig| c.data.sources.into_iter().map(|(k, v)| (k, v.display().to_string())).collect::<Vec<_>>();
        let one = paths(set(&["data.sources.english=/a", "data.sources.italian=/b"]).unwrap());
        let named = |k: &str, v: &str| (k.to_string(), v.to_string());
        assert_eq!(one, [named("english", "/a"), named("instructions", ""), named("italian", "/b")]);
        let text = "[data.sources]\nmine = '/m'\n[[data.phases]]\nuntil = 1.0\nweights = { mine = 1.0 }";
        let file = Layer { origin: "run.toml".into(), table: text.parse().unwrap(), replaces: true };
        assert_eq!(paths(load(None, &[file]).unwrap()), [named("mine", "/m")]);
    }

    #[test]
    fn presets_hold_the_shapes_of_their_names() {
        for name in PRESETS {
            let config = load(Some(name), &[]).unwrap();
            assert_eq!(config.model, ModelConfig::preset(name).unwrap(), "{name}");
            assert_eq!(config.preset, name);
        }
    }

    /// The table of the reference run.
    #[test]
    fn the_reference_run() {
        let c = load(Some("elleci-1.5b"), &[]).unwrap();
        assert_eq!((c.training.steps, c.training.batch, c.training.accumulation), (50_000, 16, 4));
        let plan = Plan::new(&c, &["cosmopedia", "instructions_it", "wikipedia_it"].map(str::to_string));
        let lengths = [0, 14_999, 15_000, 34_999, 35_000, 49_999].map(|s| plan.at(s).shape.seq_len);
        assert_eq!(lengths, [256, 256, 512, 512, 1024, 1024]);
        assert_eq!(plan.at(44_999).weights, [0.55, 0.10, 0.35]);
        assert_eq!(plan.at(45_000).weights, [0.20, 0.55, 0.25]);
        assert!(!plan.at(39_999).averages && plan.at(40_000).averages);
        assert_eq!((plan.at(2_499).rates.lr, plan.at(39_999).rates.lr), (1.5e-3, 1.5e-3));
        assert!(plan.at(2_498).rates.lr < 1.5e-3 && plan.at(40_001).rates.lr < 1.5e-3);
        assert_eq!((plan.at(39_999).rates.weight_decay, plan.at(40_000).rates.weight_decay), (0.1, 0.0));
        // 64 sequences a step: 15,000 * 256 + 20,000 * 512 + 15,000 * 1024 tokens each.
        assert_eq!(plan.total_tokens(), 64 * (15_000 * 256 + 20_000 * 512 + 15_000 * 1024));
    }

    #[test]
    fn later_layers_win_and_lists_replace() {
        let c = set(&[
            "training.steps=7",
            "training.steps=9",
            "model.d_model=128",
            "training.checkpointing=none",
            "training.sequence=[{until=1.0,length=64}]",
        ])
        .unwrap();
        assert_eq!((c.training.steps, c.model.d_model, c.model.n_layers), (9, 128, 4));
        assert_eq!(c.training.sequence.len(), 1);
    }

    #[test]
    fn the_effective_configuration_reads_back() {
        let c = set(&["optimizer.peak_lr=0.0007", "training.seed=5"]).unwrap();
        assert_eq!(parse(&toml::to_string(&c).unwrap()).unwrap(), c);
    }

    #[test]
    fn refusals_name_layer_key_value_and_remedy() {
        for (assignment, parts) in [
            ("training.stpes=5", &["unknown key `training.stpes`", "`steps`"][..]),
            ("trainin.steps=5", &["unknown key `trainin`", "`training`"]),
            ("training.steps=many", &["--set training.steps=many", "`training.steps`", "many"]),
            ("training.steps=0", &["`training.steps` is 0", "at least 1"]),
            ("training=3", &["`training` is 3", "section"]),
            ("optimizer.states=4bit", &["optimizer.states", "8bit"]),
            ("training.checkpointing=all", &["training.checkpointing", "`all`", "none"]),
            ("training.sequence=[{until=1.0,length=4096}]", &["training.sequence[0].length", "4096", "max_seq_len"]),
            ("training.tokens_per_step=1000", &["training.tokens_per_step", "multiple"]),
            ("training.batch=9000000000000000000", &["`training.batch`", "accumulation"]),
            ("training.accumulation=9000000000000000000", &["`training.accumulation`", "65536"]),
            ("training.steps=9000000000000000000", &["`training.steps`", "33554432"]),
            ("training.tokens_per_step=4611686018427387904", &["`training.tokens_per_step`", "274877906944"]),
            ("model.n_layers=4097", &["n_layers", "4097", "4096"]),
            ("data.phases=[{until=1.0,weights={nowhere=1.0}}]", &["data.phases[0].weights.nowhere", "data.sources"]),
            ("data.phases=[{until=0.5,weights={}}]", &["data.phases", "1"]),
            ("model.d_rope=31", &["d_rope", "31", "even"]),
            ("model.vocab_size=-4", &["model.vocab_size"]),
            ("swa.start=2.0", &["swa.start", "2", "share"]),
            ("preset=huge", &["huge", "nano"]),
        ] {
            let message = refusal(&[assignment]);
            for part in parts {
                assert!(message.contains(part), "{assignment}: `{part}` is not in: {message}");
            }
        }
        assert!(Layer::assignment("steps").unwrap_err().to_string().contains("key=value"));
    }
}
