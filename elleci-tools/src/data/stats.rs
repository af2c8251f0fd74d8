//! What is in a shard set.

use super::shards::{ShardSet, Split, SplitIndex};
use super::tokenizer::{SPECIALS, Tokenizer};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::fmt::Write;

/// The figures of a shard set.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// All ids are below this.
    pub vocab_size: usize,
    /// What is trained on.
    pub train: SplitStats,
    /// What is held out.
    pub val: SplitStats,
    /// The first training document, decoded; `None` without a tokenizer.
    pub example: Option<Vec<Segment>>,
}

/// The figures of one split.
#[derive(Clone, Debug, Serialize)]
pub struct SplitStats {
    /// Shards.
    pub shards: usize,
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Bytes of text a token; 0 if there are none.
    pub bytes_per_token: f64,
    /// The share of tokens that are training targets.
    pub target_share: f64,
}

/// A run of tokens that are all targets, or all not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Segment {
    /// Whether its tokens are training targets.
    pub target: bool,
    /// Its text, special tokens spelled out.
    pub text: String,
}

/// Tokens of the example that are decoded.
const EXAMPLE_TOKENS: usize = 400;

impl SplitStats {
    fn new(split: &SplitIndex) -> SplitStats {
        let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        SplitStats {
            shards: split.shards.len(),
            documents: split.documents,
            tokens: split.tokens,
            bytes: split.bytes,
            bytes_per_token: ratio(split.bytes, split.tokens),
            target_share: ratio(split.target_tokens, split.tokens),
        }
    }
}

/// Gathers the figures of `set`; decodes an example if its tokenizer is given.
///
/// # Errors
/// The tokenizer is another one than made the set, or a document cannot be read.
pub fn stats(set: &ShardSet, tokenizer: Option<&Tokenizer>) -> Result<Stats> {
    let index = set.index();
    let example = match tokenizer {
        Some(tokenizer) => {
            ensure!(
                tokenizer.sha256() == index.tokenizer_sha256,
                "{}: `tokenizer_sha256` is {:.12}…, but the tokenizer given is {:.12}…; pass the one that prepared the set",
                set.dir().display(),
                index.tokenizer_sha256,
                tokenizer.sha256()
            );
            Some(example(set, tokenizer)?)
        }
        None => None,
    };
    Ok(Stats {
        tokenizer_sha256: index.tokenizer_sha256.clone(),
        vocab_size: index.vocab_size,
        train: SplitStats::new(&index.train),
        val: SplitStats::new(&index.val),
        example,
    })
}

fn example(set: &ShardSet, tokenizer: &Tokenizer) -> Result<Vec<Segment>> {
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    let split = if set.index().train.documents > 0 { Split::Train } else { Split::Val };
    set.document(split, 0, &mut tokens, &mut mask)?;
    tokens.truncate(EXAMPLE_TOKENS);
    let mut segments = Vec::new();
    let mut start = 0;
    for run in mask[..tokens.len()].chunk_by(|a, b| a == b) {
        let bytes: Vec<u8> = tokens[start..start + run.len()]
            .iter()
            .flat_map(|t| match SPECIALS.get(usize::from(*t)) {
                Some(special) => special.as_bytes().to_vec(),
                None => tokenizer.decode_bytes(&[u32::from(*t)]),
            })
            .collect();
        segments.push(Segment { target: run[0], text: String::from_utf8_lossy(&bytes).into_owned() });
        start += run.len();
    }
    Ok(segments)
}

/// The figures as a table.
pub fn table(stats: &Stats) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(out, "tokenizer   sha256 {}", stats.tokenizer_sha256);
    let _ = writeln!(out, "vocabulary  {} ids\n", stats.vocab_size);
    let head = ["split", "shards", "documents", "tokens", "bytes", "bytes/token", "targets"];
    let _ = writeln!(
        out,
        "{:<6} {:>6} {:>11} {:>14} {:>15} {:>11} {:>8}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6]
    );
    for (name, s) in [("train", &stats.train), ("val", &stats.val)] {
        let _ = writeln!(
            out,
            "{name:<6} {:>6} {:>11} {:>14} {:>15} {:>11.3} {:>7.1}%",
            s.shards,
            s.documents,
            s.tokens,
            s.bytes,
            s.bytes_per_token,
            100.0 * s.target_share
        );
    }
    if let Some(example) = &stats.example {
        let _ = writeln!(out, "\nThe first document (⟦targets⟧, the rest is prompt):");
        for segment in example {
            let (open, close) = if segment.target { ("⟦", "⟧") } else { ("", "") };
            let _ = write!(out, "{open}{}{close}", segment.text);
        }
        out.push('\n');
    }
    out
}
