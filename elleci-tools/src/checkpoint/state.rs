//! `state.json`: where a run stands, apart from its tensors.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::tensors::Digest;
use crate::exit::usage;
use crate::train::config::RunConfig;

/// Raised when the meaning of a field changes.
pub const FORMAT: u32 = 1;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Index into `data.phases` of the next step.
    pub phase: usize,
    /// Tokens read by all steps.
    pub tokens: u64,
    /// Steps skipped because loss or gradient norm was not finite.
    pub skipped: u64,
    /// Updates that the optimizer has made (its bias correction counts them).
    pub updates: u64,
    /// Weights that the running mean has taken in.
    pub averaged: u64,
    /// Where randomness comes from.
    pub rng: RngState,
    /// Cursor of every source.
    pub data: serde_json::Value,
    /// The tokenizer that made the shards.
    pub tokenizer: TokenizerId,
    /// Seconds of training so far.
    pub seconds: f64,
    /// The effective configuration.
    pub config: RunConfig,
    /// Size and hash of the other files of the checkpoint.
    pub files: BTreeMap<String, Digest>,
}

/// Where randomness comes from. Every draw is a function of seed, use and step (initialisation: seed and parameter;
/// samples: seed and step; order of documents: seed and epoch), so no generator has a position of its own to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    /// The generator.
    pub algorithm: String,
    /// Its seed.
    pub seed: u64,
}

impl RngState {
    /// The generator that all uses share.
    pub fn new(seed: u64) -> RngState {
        RngState { algorithm: "chacha8".into(), seed }
    }
}

/// Which tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerId {
    /// Hash of `tokenizer.json`.
    pub hash: String,
    /// Number of ids.
    pub vocab_size: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<S> {
    /// Of the JSON text of `state`, without blanks.
    blake3: String,
    state: S,
}

fn seal(state: &str) -> String {
    blake3::hash(state.as_bytes()).to_hex().to_string()
}

/// JSON text without the blanks between its parts: what the compact writer gives where the pretty one gave `text`.
fn compact(text: &str) -> String {
    let (mut out, mut quoted, mut escaped) = (String::with_capacity(text.len()), false, false);
    for c in text.chars() {
        if quoted {
            quoted = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if matches!(c, ' ' | '\t' | '\n' | '\r') {
            continue;
        } else {
            quoted = c == '"';
        }
        out.push(c);
    }
    out
}

/// Whether the text of a `state.json` has this hash. The text decides, and not the [`State`] that is read from it: what an earlier
/// version wrote has fewer fields, and the others by default.
fn is_sealed(text: &str, blake3: &str) -> bool {
    let text = compact(text);
    let state = text.strip_prefix(&format!("{{\"blake3\":\"{blake3}\",\"state\":"));
    state.and_then(|t| t.strip_suffix('}')).is_some_and(|state| seal(state) == blake3)
}

impl State {
    /// The text of `state.json`.
    ///
    /// # Errors
    /// When a value has no JSON form.
    pub fn to_json(&self) -> anyhow::Result<String> {
        let blake3 = seal(&serde_json::to_string(self)?);
        Ok(serde_json::to_string_pretty(&Sealed { blake3, state: self })? + "\n")
    }

    /// Reads and checks the text of `state.json`.
    ///
    /// # Errors
    /// Text that is not one, is damaged, or is of a later format.
    pub fn from_json(text: &str) -> anyhow::Result<State> {
        let Sealed { blake3, state } = serde_json::from_str::<Sealed<State>>(text).context("not a training state")?;
        ensure!(state.format == FORMAT, "format {} is not known to this version, which reads {FORMAT}", state.format);
        ensure!(is_sealed(text, &blake3), "damaged: its contents do not have the hash that it carries");
        Ok(state)
    }

    /// Whether a run of `config` may go on from here.
    ///
    /// What only decides how long, how often, where or with which memory is free to change: `training.steps` and the intervals,
    /// `keep_last`, `threads`, `device`, `checkpointing`, `[cuda]`, paths. Everything else would make it another run.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] with the first key that differs.
    pub fn accepts(&self, config: &RunConfig) -> anyhow::Result<()> {
        let (mut ours, mut theirs) = (serde_json::to_value(&self.config)?, serde_json::to_value(config)?);
        for value in [&mut ours, &mut theirs] {
            for key in ["steps", "eval_interval", "eval_tokens", "sample_interval", "save_interval"] {
                value["training"][key].take();
            }
            for key in ["keep_last", "threads", "device", "prompts"] {
                value["training"][key].take();
            }
            for key in ["dir", "tokenizer"] {
                value["data"][key].take();
            }
            // How and where a step is computed; its form on a CPU stays, as its bits do.
            value["training"]["checkpointing"].take();
            value["cuda"].take();
            value["preset"].take();
            for path in value["data"]["sources"].as_object_mut().into_iter().flat_map(|m| m.values_mut()) {
                path.take();
            }
        }
        match difference(&ours, &theirs, String::new()) {
            None => Ok(()),
            Some((key, old, new)) => Err(usage(format!(
                "cannot resume: the checkpoint was trained with `{key}` = {old}, and this run has {new}; \
                 restore the value, or start another run with --out"
            ))),
        }
    }

    /// Whether shards of `tokenizer` are the ones trained on so far.
    ///
    /// # Errors
    /// When they are not.
    pub fn accepts_tokenizer(&self, tokenizer: &TokenizerId) -> anyhow::Result<()> {
        if self.tokenizer.vocab_size != tokenizer.vocab_size {
            bail!(
                "cannot resume: the checkpoint was trained with a vocabulary of {} tokens, the data has {}",
                self.tokenizer.vocab_size,
                tokenizer.vocab_size
            );
        }
        ensure!(
            self.tokenizer.hash == tokenizer.hash,
            "cannot resume: the checkpoint was trained with another tokenizer (hash {}, the data has {}); \
             give --data the shards of the first run",
            self.tokenizer.hash,
            tokenizer.hash
        );
        Ok(())
    }
}

/// The first key at which two values differ, with both sides.
fn difference(a: &serde_json::Value, b: &serde_json::Value, path: String) -> Option<(String, String, String)> {
    use serde_json::Value::{Array, Object};
    let join = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (a, b) {
        (Object(x), Object(y)) => {
            let keys = x.keys().chain(y.keys().filter(|k| !x.contains_key(*k)));
            keys.into_iter().find_map(|k| difference(&a[k.as_str()], &b[k.as_str()], join(k)))
        }
        (Array(x), Array(y)) if x.len() == y.len() => {
            (0..x.len()).find_map(|i| difference(&x[i], &y[i], format!("{path}[{i}]")))
        }
        _ if a == b => None,
        _ => Some((path, a.to_string(), b.to_string())),
    }
}

#[cfg(test)]
impl State {
    /// A state to test with.
    pub fn sample(step: u64) -> State {
        State {
            format: FORMAT,
            step,
            phase: 1,
            tokens: step * 2048,
            skipped: 2,
            updates: step,
            averaged: 3,
            rng: RngState::new(0),
            data: serde_json::json!({ "italian": { "position": 12 } }),
            tokenizer: TokenizerId { hash: "abc".into(), vocab_size: 4096 },
            seconds: 0.1 + 0.2,
            config: crate::train::layers::load(None, &[]).unwrap(),
            files: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::layers::{Layer, load};

    #[test]
    fn round_trip_and_damage() {
        let state = State::sample(1000);
        let text = state.to_json().unwrap();
        assert_eq!(State::from_json(&text).unwrap(), state);
        let other = text.replace("\"step\": 1000", "\"step\": 1001");
        assert_ne!(other, text);
        assert!(format!("{:#}", State::from_json(&other).unwrap_err()).contains("damaged"));
        assert!(State::from_json(&text[..text.len() / 2]).is_err());
    }

    /// A state from before `cuda.gemm`, `cuda.ternary` and `cuda.stream`, and one with text that looks like JSON in a string.
    #[test]
    fn an_earlier_version_is_no_damage() {
        let text = include_str!("state-before-gemm.json");
        assert!(!text.contains("gemm"), "it must lack a field that this version writes");
        let state = State::from_json(text).unwrap();
        assert_eq!((state.step, state.config.training.batch), (10_000, 4));
        assert_eq!(
            State::from_json(&state.to_json().unwrap()).unwrap(),
            state,
            "and this version writes it in its own way"
        );
        for (from, to) in [("10240000", "10240001"), ("\"grammar\": \"\"", "\"grammar\": \" \""), ("0.0025", "0.0035")]
        {
            let damaged = text.replacen(from, to, 1);
            assert!(damaged != text && State::from_json(&damaged).is_err(), "{from}");
        }
        let mut quoted = State::sample(1);
        quoted.config.training.prompts = vec!["\\\" { \"a\" : 1 }, ".into(), "\\".into(), " \t\"".into()];
        assert_eq!(State::from_json(&quoted.to_json().unwrap()).unwrap(), quoted);
    }

    #[test]
    fn what_may_change_and_what_may_not() {
        let state = State::sample(1);
        let with = |a: &str| state.accepts(&load(None, &[Layer::assignment(a).unwrap()]).unwrap());
        let free = ["training.steps=900", "training.threads=1", "data.dir=elsewhere", "training.save_interval=7"];
        for free in
            free.into_iter().chain(["training.device=cuda:1", "cuda.masters=bf16", "training.checkpointing=auto"])
        {
            with(free).unwrap_or_else(|e| panic!("{free}: {e}"));
        }
        for (fixed, key) in [
            ("model.d_model=128", "`model.d_model` = 256"),
            ("optimizer.peak_lr=0.1", "`optimizer.peak_lr`"),
            ("training.batch=4", "`training.batch`"),
            ("training.seed=1", "`training.seed`"),
            ("optimizer.betas=[0.9,0.99]", "`optimizer.betas[1]`"),
            ("training.sequence=[{until=1.0,length=128}]", "`training.sequence`"),
        ] {
            let message = with(fixed).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        let other = TokenizerId { hash: "abd".into(), ..state.tokenizer.clone() };
        assert!(state.accepts_tokenizer(&other).unwrap_err().to_string().contains("another tokenizer"));
        let larger = TokenizerId { vocab_size: 8192, ..state.tokenizer.clone() };
        assert!(state.accepts_tokenizer(&larger).unwrap_err().to_string().contains("4096"));
    }
}
