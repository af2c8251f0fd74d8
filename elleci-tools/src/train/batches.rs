//! What a step reads: micro-batches drawn from a mixture of sources, and the held-out text of each.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use elleci_core::model::Batch;
use elleci_core::optim::schedule::StepShape;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::config::RunConfig;
use crate::checkpoint::TokenizerId;
use crate::data::mixture::{Cursor, Example, Mixture, SourceSpec};
use crate::exit::usage;

/// Sequences that go through the model together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// Sequences.
    pub rows: usize,
    /// Tokens in each.
    pub seq: usize,
    /// `[rows, seq]`
    pub tokens: Vec<u32>,
    /// `[rows, seq]`
    pub targets: Vec<u32>,
    /// `[rows, seq]`; 0 = ignored.
    pub weights: Vec<f32>,
}

impl MicroBatch {
    fn with_capacity(rows: usize, seq: usize) -> MicroBatch {
        let n = rows * seq;
        let (tokens, targets) = (Vec::with_capacity(n), Vec::with_capacity(n));
        MicroBatch { rows: 0, seq, tokens, targets, weights: Vec::with_capacity(n) }
    }

    fn push(&mut self, example: &Example) {
        self.rows += 1;
        self.tokens.extend_from_slice(&example.tokens[..self.seq]);
        self.targets.extend_from_slice(&example.tokens[1..]);
        self.weights.extend_from_slice(&example.target_weights);
    }

    /// Fills up to `rows` with rows that do not count.
    fn pad(&mut self, rows: usize) {
        let n = rows * self.seq;
        self.rows = rows;
        self.tokens.resize(n, 0);
        self.targets.resize(n, 0);
        self.weights.resize(n, 0.0);
    }

    /// The model's view of it.
    pub fn view(&self) -> Batch<'_> {
        let (tokens, targets, weights) = (&self.tokens, &self.targets, &self.weights);
        Batch { batch: self.rows, seq: self.seq, tokens, targets, weights }
    }

    /// Sum of the weights of all positions, in float64.
    pub fn weight(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }
}

/// The data of one optimizer step.
pub struct StepData {
    /// In the order in which their gradients are added.
    pub micro: Vec<MicroBatch>,
    /// Sum of all weights: what the loss and the gradient are divided by.
    pub weight: f64,
    /// Tokens of the step, masked ones included.
    pub tokens: u64,
}

/// Where steps come from.
pub trait Feed {
    /// The data of the next step; `weights` are the shares of tokens by source.
    ///
    /// # Errors
    /// When a shard cannot be read.
    fn next(&mut self, shape: StepShape, weights: &[f64]) -> anyhow::Result<StepData>;

    /// Where it stands, for a checkpoint.
    ///
    /// # Errors
    /// When there is no JSON form.
    fn cursor(&self) -> anyhow::Result<serde_json::Value>;

    /// Goes back to where a checkpoint stood.
    ///
    /// # Errors
    /// When the cursor belongs to other data.
    fn restore(&mut self, cursor: &serde_json::Value) -> anyhow::Result<()>;

    /// The tokenizer that made it.
    fn tokenizer(&self) -> TokenizerId;

    /// Names of the sources, in the order of the weights.
    fn sources(&self) -> Vec<String>;

    /// Micro-batches of the held-out text of a source, each with the bytes of text that its targets stand for.
    fn held_out(
        &self,
        source: usize,
        rows: usize,
        seq: usize,
    ) -> Box<dyn Iterator<Item = anyhow::Result<(MicroBatch, u64)>> + '_>;
}

/// Prepared shards.
pub struct ShardFeed {
    mixture: Mixture,
}

impl ShardFeed {
    /// Opens and verifies the shard sets of a configuration.
    ///
    /// # Errors
    /// A missing or faulty shard set, or a vocabulary that is not the model's.
    pub fn open(config: &RunConfig) -> anyhow::Result<ShardFeed> {
        let specs: Vec<_> = source_dirs(config)?.into_iter().map(|(name, path)| SourceSpec { name, path }).collect();
        let mixture = Mixture::open(&specs, config.training.seed)?;
        let (found, expected) = (mixture.vocab_size(), config.model.vocab_size);
        ensure!(
            found == expected,
            "the data has a vocabulary of {found} tokens and `model.vocab_size` is {expected}; prepare the data with \
             this model's tokenizer, or set model.vocab_size={found}"
        );
        Ok(ShardFeed { mixture })
    }

    /// Where `tokenizer.json` of the data is, if it is anywhere.
    pub fn tokenizer_file(&self, config: &RunConfig) -> Option<PathBuf> {
        let given = &config.data.tokenizer;
        if !given.as_os_str().is_empty() {
            return Some(given.clone());
        }
        let set = self.mixture.set(0).dir();
        let near = [Some(config.data.dir.as_path()), Some(set), set.parent()];
        near.into_iter().flatten().map(|d| d.join("tokenizer.json")).find(|p| p.is_file())
    }
}

/// Folder of every source that some phase uses.
fn source_dirs(config: &RunConfig) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let data = &config.data;
    let used = |name: &str| data.phases.iter().any(|p| p.weights.get(name).is_some_and(|w| *w > 0.0));
    let resolve = |(name, path): (&String, &PathBuf)| {
        let given = !path.as_os_str().is_empty();
        if !given && data.dir.as_os_str().is_empty() {
            return Err(usage(format!(
                "no data for source `{name}`: give --data DIR (with {name}/ in it, as `elleci-data prepare` writes it), or \
                 set data.sources.{name}"
            )));
        }
        let dir = if given { path.clone() } else { data.dir.join(name) };
        check_dir(name, &dir)?;
        Ok((name.clone(), dir))
    };
    data.sources.iter().filter(|(name, _)| used(name)).map(resolve).collect()
}

fn check_dir(name: &str, dir: &Path) -> anyhow::Result<()> {
    ensure!(
        dir.is_dir(),
        "the data of source `{name}` is not there: {} is no directory; `elleci-data prepare` makes it",
        dir.display()
    );
    Ok(())
}

/// Shares of tokens of every phase, in the order of `sources`.
pub fn phase_weights(config: &RunConfig, sources: &[String]) -> Vec<Vec<f64>> {
    let of = |weights: &std::collections::BTreeMap<String, f64>| {
        sources.iter().map(|s| weights.get(s).copied().unwrap_or(0.0)).collect()
    };
    config.data.phases.iter().map(|p| of(&p.weights)).collect()
}

impl Feed for ShardFeed {
    fn next(&mut self, shape: StepShape, weights: &[f64]) -> anyhow::Result<StepData> {
        let mut micro = Vec::with_capacity(shape.micro_batches);
        for i in 0..shape.micro_batches {
            let mut batch = MicroBatch::with_capacity(shape.rows(i), shape.seq_len);
            for _ in 0..shape.rows(i) {
                batch.push(&self.mixture.next(weights, shape.seq_len)?.1);
            }
            micro.push(batch);
        }
        let weight = micro.iter().map(MicroBatch::weight).sum();
        Ok(StepData { micro, weight, tokens: shape.tokens() as u64 })
    }

    fn cursor(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::to_value(self.mixture.cursor())?)
    }

    fn restore(&mut self, cursor: &serde_json::Value) -> anyhow::Result<()> {
        let cursor: Cursor = serde_json::from_value(cursor.clone()).context("the data cursor of the checkpoint")?;
        self.mixture.restore(&cursor)
    }

    fn tokenizer(&self) -> TokenizerId {
        TokenizerId { hash: self.mixture.tokenizer_sha256().to_string(), vocab_size: self.mixture.vocab_size() }
    }

    fn sources(&self) -> Vec<String> {
        self.mixture.names().map(str::to_string).collect()
    }

    fn held_out(
        &self,
        source: usize,
        rows: usize,
        seq: usize,
    ) -> Box<dyn Iterator<Item = anyhow::Result<(MicroBatch, u64)>> + '_> {
        let mut examples = self.mixture.validation(source, seq);
        Box::new(std::iter::from_fn(move || {
            let (mut batch, mut bytes) = (MicroBatch::with_capacity(rows, seq), 0);
            for held_out in examples.by_ref().take(rows) {
                match held_out {
                    Ok(held_out) => {
                        batch.push(&held_out.example);
                        bytes += held_out.bytes;
                    }
                    Err(e) => return Some(Err(e)),
                }
            }
            (batch.rows > 0).then(|| {
                batch.pad(rows);
                Ok((batch, bytes))
            })
        }))
    }
}

/// Uniformly random tokens: times a step where there is no data yet.
pub struct RandomFeed {
    rng: ChaCha8Rng,
    vocab_size: usize,
    sources: Vec<String>,
}

impl RandomFeed {
    /// Tokens below `model.vocab_size`.
    pub fn new(config: &RunConfig) -> RandomFeed {
        let rng = ChaCha8Rng::seed_from_u64(config.training.seed);
        RandomFeed { rng, vocab_size: config.model.vocab_size, sources: config.data.sources.keys().cloned().collect() }
    }
}

impl Feed for RandomFeed {
    fn next(&mut self, shape: StepShape, _weights: &[f64]) -> anyhow::Result<StepData> {
        let mut micro = Vec::new();
        for i in 0..shape.micro_batches {
            let mut batch = MicroBatch::with_capacity(shape.rows(i), shape.seq_len);
            for _ in 0..shape.rows(i) {
                let tokens = (0..=shape.seq_len).map(|_| self.rng.next_u32() % self.vocab_size as u32).collect();
                batch.push(&Example { tokens, target_weights: vec![1.0; shape.seq_len] });
            }
            micro.push(batch);
        }
        Ok(StepData { weight: shape.tokens() as f64, micro, tokens: shape.tokens() as u64 })
    }

    fn cursor(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }

    fn restore(&mut self, _cursor: &serde_json::Value) -> anyhow::Result<()> {
        Ok(())
    }

    fn tokenizer(&self) -> TokenizerId {
        TokenizerId { hash: String::new(), vocab_size: self.vocab_size }
    }

    fn sources(&self) -> Vec<String> {
        self.sources.clone()
    }

    fn held_out(
        &self,
        _: usize,
        _: usize,
        _: usize,
    ) -> Box<dyn Iterator<Item = anyhow::Result<(MicroBatch, u64)>> + '_> {
        Box::new(std::iter::empty())
    }
}
