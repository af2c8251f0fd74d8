//! What the trainer reads: fixed-length sequences from several shard sets, mixed by shares of tokens.
//!
//! A source is an endless stream: the documents of an epoch in an order that the seed chooses, one after the other,
//! each ended by `<|endoftext|>`; then the next epoch in another order. A sequence is `seq + 1` tokens of ONE source:
//! it predicts `seq` tokens and repeats the last one of the sequence before as its first input (before the first
//! document that is `<|endoftext|>`). So every token of every document is predicted exactly once an epoch, and
//! nothing is truncated or padded.
//!
//! Which source comes next follows from the weights alone. Every source earns its share of each sequence as credit
//! and pays a sequence when it is drawn. Among those that are owed enough, the one whose credit would first exceed the
//! bound is drawn (R. Tijdeman, "The chairman assignment problem", 1980): drawing merely the largest credit can fall
//! more than one sequence behind with many sources, this cannot while the weights stay the same.

use super::permutation::{Permutation, mix64};
use super::shards::{ShardSet, Split, Verify};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A named shard set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// The name in logs, weights and checkpoints.
    pub name: String,
    /// The directory of the shard set.
    pub path: PathBuf,
}

/// One training sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// `[seq + 1]`: position `t` of the input is `tokens[t]`, its target `tokens[t + 1]`.
    pub tokens: Vec<u32>,
    /// `[seq]`: the weight of predicting `tokens[t + 1]`; 0 on prompt tokens of dialogues.
    pub target_weights: Vec<f32>,
}

/// A held-out sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidationExample {
    /// The sequence; the last one of a source is filled up with `<|endoftext|>` of weight 0.
    pub example: Example,
    /// Bytes of UTF-8 text that the targets of weight 1 stand for: bits per byte = nats / (bytes · ln 2).
    pub bytes: u64,
}

/// Where every source stands; part of a training checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The seed of the document orders.
    pub seed: u64,
    /// In the order of the sources.
    pub sources: Vec<SourceCursor>,
}

/// Where one source stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCursor {
    /// The source's name.
    pub name: String,
    /// [`ShardSet::fingerprint`] of its shard set.
    pub fingerprint: u64,
    /// Complete passes over its documents.
    pub epoch: u64,
    /// Position in the epoch's order of the document that the next target is in.
    pub document: u64,
    /// The next target's position in that document.
    pub offset: u64,
    /// Targets drawn so far, in all epochs.
    pub tokens: u64,
    /// What the source is owed, in tokens times 2^-30.
    pub credit: i64,
}

/// Shares are held in units of 2^-30: credits are exact integers, and checkpoints need no exact decimal floats.
const ONE: i64 = 1 << 30;
/// Keeps `seq * ONE` and the sums of credits far from overflow.
const MAX_SEQ: usize = 1 << 24;

/// Several sources, drawn from in proportion.
pub struct Mixture {
    seed: u64,
    sources: Vec<Source>,
}

struct Source {
    set: ShardSet,
    at: SourceCursor,
    order: Permutation,
    /// The tokens of the document at the cursor; empty until it is read.
    tokens: Vec<u16>,
    mask: Vec<bool>,
}

impl Mixture {
    /// Opens the shard sets and verifies them in full.
    ///
    /// # Errors
    /// No source, two of one name, a faulty or empty shard set, or sets made by different tokenizers.
    pub fn open(sources: &[SourceSpec], seed: u64) -> Result<Mixture> {
        Mixture::open_with(sources, seed, Verify::Full)
    }

    /// As [`Mixture::open`], with a choice of how much to verify.
    ///
    /// # Errors
    /// As [`Mixture::open`].
    pub fn open_with(sources: &[SourceSpec], seed: u64, verify: Verify) -> Result<Mixture> {
        ensure!(!sources.is_empty(), "no data source is configured; a run needs at least one shard set");
        let mut opened: Vec<Source> = Vec::with_capacity(sources.len());
        for spec in sources {
            ensure!(!opened.iter().any(|s| s.at.name == spec.name), "two data sources are called `{}`", spec.name);
            let set =
                ShardSet::open_with(&spec.path, verify).with_context(|| format!("data source `{}`", spec.name))?;
            ensure!(
                set.index().train.tokens > 0,
                "data source `{}`: {}: no training tokens; was the corpus empty or all of it held out?",
                spec.name,
                spec.path.display()
            );
            if let Some(first) = opened.first() {
                same_tokenizer(first, &spec.name, &set)?;
            }
            let documents = set.index().train.documents;
            let at = SourceCursor {
                name: spec.name.clone(),
                fingerprint: set.fingerprint(),
                epoch: 0,
                document: 0,
                offset: 0,
                tokens: 0,
                credit: 0,
            };
            let order = epoch_order(documents, seed, opened.len(), 0);
            opened.push(Source { set, at, order, tokens: Vec::new(), mask: Vec::new() });
        }
        Ok(Mixture { seed, sources: opened })
    }

    /// The sources' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|s| s.at.name.as_str())
    }

    /// The shard set of a source.
    pub fn set(&self, source: usize) -> &ShardSet {
        &self.sources[source].set
    }

    /// All token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.sources[0].set.index().vocab_size
    }

    /// SHA-256 of the tokenizer of all sources, in hexadecimal.
    pub fn tokenizer_sha256(&self) -> &str {
        &self.sources[0].set.index().tokenizer_sha256
    }

    /// Draws the next sequence. `weights` are the sources' shares of tokens, in their order (any scale).
    ///
    /// Returns the source's number and the sequence.
    ///
    /// # Errors
    /// Weights that do not fit the sources or are all 0, a `seq` of 0 or above 2^24, or a failed read.
    pub fn next(&mut self, weights: &[f64], seq: usize) -> Result<(usize, Example)> {
        ensure!(seq > 0 && seq <= MAX_SEQ, "sequence length {seq}: it must be 1 to {MAX_SEQ}");
        let shares = shares(weights, &self.names().collect::<Vec<_>>())?;
        let credits: Vec<i64> = self.sources.iter().map(|s| s.at.credit).collect();
        let chosen = choose(&credits, &shares, seq as i64);
        let seed = self.seed;
        let example = self.sources[chosen].draw(chosen, seed, seq)?;
        // Only now: a failed read leaves every cursor as it was.
        for (s, share) in self.sources.iter_mut().zip(&shares) {
            s.at.credit += share * seq as i64;
        }
        self.sources[chosen].at.credit -= ONE * seq as i64;
        Ok((chosen, example))
    }

    /// Where every source stands now.
    pub fn cursor(&self) -> Cursor {
        Cursor { seed: self.seed, sources: self.sources.iter().map(|s| s.at.clone()).collect() }
    }

    /// Goes to where `cursor` was taken: what follows is what followed then.
    ///
    /// # Errors
    /// The cursor belongs to other sources or to other contents of them.
    pub fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        let names = |c: &[SourceCursor]| c.iter().map(|s| s.name.clone()).collect::<Vec<_>>().join(", ");
        let own = self.cursor().sources;
        ensure!(
            names(&cursor.sources) == names(&own),
            "the checkpoint's data cursor is for the sources {}, but the run has {}",
            names(&cursor.sources),
            names(&own)
        );
        for (s, at) in self.sources.iter().zip(&cursor.sources) {
            ensure!(
                at.fingerprint == s.at.fingerprint,
                "data source `{}`: {} is not the shard set that the checkpoint was reading; restore it or start anew",
                at.name,
                s.set.dir().display()
            );
            ensure!(
                at.credit.unsigned_abs() <= (ONE as u64) * MAX_SEQ as u64,
                "data source `{}`: the checkpoint's cursor has an impossible `credit` {}",
                at.name,
                at.credit
            );
            let documents = s.set.index().train.documents;
            ensure!(
                at.document < documents,
                "data source `{}`: the checkpoint's cursor is at `document` {} of {documents}",
                at.name,
                at.document
            );
        }
        let before = self.cursor();
        self.apply(cursor);
        for i in 0..self.sources.len() {
            let s = &mut self.sources[i];
            if let Err(e) = s.load().and_then(|()| s.check_offset()) {
                self.apply(&before);
                return Err(e);
            }
        }
        Ok(())
    }

    fn apply(&mut self, cursor: &Cursor) {
        self.seed = cursor.seed;
        for (i, (s, at)) in self.sources.iter_mut().zip(&cursor.sources).enumerate() {
            s.at = at.clone();
            s.order = epoch_order(s.set.index().train.documents, cursor.seed, i, at.epoch);
            s.tokens.clear();
        }
    }

    /// The held-out split of a source in sequences of `seq` targets, in the order of its shards.
    ///
    /// Ends after the first error.
    pub fn validation(&self, source: usize, seq: usize) -> Validation<'_> {
        let set = &self.sources[source].set;
        let end = set.index().end_of_text as u16;
        Validation { set, seq: seq.max(1), document: 0, last: end, tokens: Vec::new(), mask: Vec::new(), offset: 0 }
    }
}

fn same_tokenizer(first: &Source, name: &str, set: &ShardSet) -> Result<()> {
    let (a, b) = (first.set.index(), set.index());
    ensure!(
        a.tokenizer_sha256 == b.tokenizer_sha256,
        "data sources `{}` and `{name}` were prepared with different tokenizers (`tokenizer_sha256` {:.12}… and \
         {:.12}…); prepare both with the same one",
        first.at.name,
        a.tokenizer_sha256,
        b.tokenizer_sha256
    );
    ensure!(
        a.vocab_size == b.vocab_size && a.end_of_text == b.end_of_text,
        "data sources `{}` and `{name}`: `vocab_size` is {} and {}; prepare both alike",
        first.at.name,
        a.vocab_size,
        b.vocab_size
    );
    Ok(())
}

fn epoch_order(documents: u64, seed: u64, source: usize, epoch: u64) -> Permutation {
    Permutation::new(documents, mix64(mix64(mix64(seed) ^ source as u64) ^ epoch))
}

/// Weights as integers that sum to [`ONE`] exactly; the rounding error goes to the largest.
fn shares(weights: &[f64], names: &[&str]) -> Result<Vec<i64>> {
    ensure!(
        weights.len() == names.len(),
        "{} weights for {} data sources ({})",
        weights.len(),
        names.len(),
        names.join(", ")
    );
    for (w, name) in weights.iter().zip(names) {
        ensure!(w.is_finite() && *w >= 0.0, "the weight of data source `{name}` is {w}; it must be 0 or more");
    }
    let sum: f64 = weights.iter().sum();
    ensure!(sum > 0.0 && sum.is_finite(), "the weights of all data sources are 0; at least one must be more");
    let mut shares: Vec<i64> = weights.iter().map(|w| (w / sum * ONE as f64).round() as i64).collect();
    let error = ONE - shares.iter().sum::<i64>();
    if let Some(largest) = shares.iter_mut().max_by_key(|s| **s) {
        *largest += error;
    }
    Ok(shares)
}

/// The source to draw `seq` tokens from.
fn choose(credits: &[i64], shares: &[i64], seq: i64) -> usize {
    // With n sources, credits stay within one sequence minus `slack` when a source is only drawn if it is owed
    // `slack`, and the earliest deadline goes first.
    let used = shares.iter().filter(|s| **s > 0).count() as i64;
    let slack = if used > 1 { ONE * seq / (2 * used - 2) } else { 0 };
    let limit = ONE * seq - slack;
    let owed = |i: usize| credits[i] + shares[i] * seq;
    let candidates = || (0..credits.len()).filter(|i| shares[*i] > 0);
    // Sequences until the credit passes the limit, as the fraction (limit - owed) / share, rounded up.
    let deadline = |i: &usize| {
        let (left, share) = (limit - owed(*i), shares[*i] * seq);
        left.div_euclid(share) + i64::from(left.rem_euclid(share) != 0)
    };
    let urgent = candidates().filter(|i| owed(*i) >= slack).min_by_key(deadline);
    // Nobody is owed enough only right after the weights or the length changed.
    urgent.or_else(|| candidates().max_by_key(|i| (owed(*i), std::cmp::Reverse(*i)))).unwrap_or(0)
}

impl Source {
    /// Makes the document at the cursor present.
    fn load(&mut self) -> Result<()> {
        if self.tokens.is_empty() {
            let document = self.order.at(self.at.document);
            self.set
                .document(Split::Train, document, &mut self.tokens, &mut self.mask)
                .with_context(|| format!("data source `{}`", self.at.name))?;
        }
        Ok(())
    }

    fn check_offset(&self) -> Result<()> {
        let (offset, len) = (self.at.offset, self.tokens.len());
        if offset >= len as u64 {
            bail!("data source `{}`: the checkpoint's cursor is at `offset` {offset} of {len} tokens", self.at.name);
        }
        Ok(())
    }

    fn draw(&mut self, number: usize, seed: u64, seq: usize) -> Result<Example> {
        let before = self.at.clone();
        let result = self.try_draw(number, seed, seq);
        if result.is_err() {
            self.order = epoch_order(self.set.index().train.documents, seed, number, before.epoch);
            self.at = before;
            self.tokens.clear();
        }
        result
    }

    fn try_draw(&mut self, number: usize, seed: u64, seq: usize) -> Result<Example> {
        self.load()?;
        let mut tokens = Vec::with_capacity(seq + 1);
        let mut target_weights = Vec::with_capacity(seq);
        // The input before a document's first token is the end of the one before it.
        tokens.push(match self.at.offset {
            0 => self.set.index().end_of_text,
            offset => u32::from(self.tokens[offset as usize - 1]),
        });
        while target_weights.len() < seq {
            self.load()?;
            let start = self.at.offset as usize;
            let end = self.tokens.len().min(start + seq - target_weights.len());
            tokens.extend(self.tokens[start..end].iter().map(|t| u32::from(*t)));
            target_weights.extend(self.mask[start..end].iter().map(|m| f32::from(u8::from(*m))));
            self.at.offset = end as u64;
            self.at.tokens += (end - start) as u64;
            if end == self.tokens.len() {
                self.advance(number, seed);
            }
        }
        Ok(Example { tokens, target_weights })
    }

    fn advance(&mut self, number: usize, seed: u64) {
        let documents = self.set.index().train.documents;
        self.at.offset = 0;
        self.at.document += 1;
        self.tokens.clear();
        if self.at.document == documents {
            self.at.document = 0;
            self.at.epoch += 1;
            self.order = epoch_order(documents, seed, number, self.at.epoch);
        }
    }
}

/// Iterates over a held-out split; see [`Mixture::validation`].
pub struct Validation<'a> {
    set: &'a ShardSet,
    seq: usize,
    /// The next document to read.
    document: u64,
    last: u16,
    tokens: Vec<u16>,
    mask: Vec<bool>,
    offset: usize,
}

impl Validation<'_> {
    fn read(&mut self) -> Result<Option<ValidationExample>> {
        let mut tokens = vec![u32::from(self.last)];
        let mut target_weights = Vec::with_capacity(self.seq);
        let mut bytes = 0;
        while target_weights.len() < self.seq {
            if self.offset == self.tokens.len() {
                if self.document == self.set.index().val.documents {
                    break;
                }
                self.set.document(Split::Val, self.document, &mut self.tokens, &mut self.mask)?;
                self.document += 1;
                self.offset = 0;
            }
            let token = self.tokens[self.offset];
            let is_target = self.mask[self.offset];
            tokens.push(u32::from(token));
            target_weights.push(f32::from(u8::from(is_target)));
            bytes += if is_target { u64::from(self.set.token_bytes()[token as usize]) } else { 0 };
            self.last = token;
            self.offset += 1;
        }
        if target_weights.is_empty() {
            return Ok(None);
        }
        tokens.resize(self.seq + 1, self.set.index().end_of_text);
        target_weights.resize(self.seq, 0.0);
        Ok(Some(ValidationExample { example: Example { tokens, target_weights }, bytes }))
    }
}

impl Iterator for Validation<'_> {
    type Item = Result<ValidationExample>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.read();
        if result.is_err() {
            self.document = self.set.index().val.documents;
            self.tokens.clear();
            self.offset = 0;
        }
        result.transpose()
    }
}

#[cfg(test)]
mod tests;
