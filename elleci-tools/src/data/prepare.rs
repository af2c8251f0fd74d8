//! From corpora to a shard set: read, deduplicate, split, tokenise in parallel, write in order.
//!
//! One thread reads ahead by one chunk of documents; the pool tokenises the chunk before it; the caller's thread writes.
//! Chunks are cut by bytes of text and results written in the order of reading, so the set is the same at any number
//! of threads. Memory is two chunks, the open shard's mask, and - unless duplicates are kept - 16 bytes of hash a
//! document (at most 40 with the table's spare room: 1.6 GB for the 39 million of Cosmopedia V2).

use super::chatml;
use super::shards::{Index, ShardOptions, ShardWriter, Split};
use super::sources::{self, Document, Found, Input, ReadOptions, Rejected};
use super::tokenizer::{Cache, END_OF_TEXT_ID, Tokenizer};
use crate::exit::Interrupted;
use anyhow::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use xxhash_rust::xxh3::{Xxh3, Xxh3DefaultBuilder};

/// Text in a chunk: large enough that a barrier a chunk costs nothing, small enough to forget.
const CHUNK_BYTES: usize = 8 << 20;
/// Bytes of text in a task of the pool.
const TASK_BYTES: usize = 128 << 10;

/// What [`prepare`] does.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Files and directories.
    pub inputs: Vec<PathBuf>,
    /// The directory of the shard set.
    pub out: PathBuf,
    /// How to read the inputs.
    pub read: ReadOptions,
    /// The share of documents that is held out, 0 to 1 (exclusive).
    pub holdout: f64,
    /// Whether documents that occurred before are written again.
    pub keep_duplicates: bool,
    /// Stop after this many documents.
    pub limit: Option<u64>,
    /// See [`ShardOptions::shard_tokens`].
    pub shard_tokens: u64,
    /// See [`ShardOptions::overwrite`].
    pub overwrite: bool,
}

impl PrepareOptions {
    /// The usual values: schema by columns, 1 % held out, duplicates dropped.
    pub fn new(inputs: Vec<PathBuf>, out: PathBuf) -> PrepareOptions {
        PrepareOptions {
            inputs,
            out,
            read: ReadOptions::default(),
            holdout: 0.01,
            keep_duplicates: false,
            limit: None,
            shard_tokens: ShardOptions::DEFAULT_SHARD_TOKENS,
            overwrite: false,
        }
    }
}

/// What [`prepare`] did.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The set's index.
    pub index: Index,
    /// Files read.
    pub files: u64,
    /// Files in the input directories that are of no known kind.
    pub ignored_files: u64,
    /// Documents that occurred before.
    pub duplicates: u64,
    /// Rows that became no document.
    pub rejected: Rejected,
    /// See [`sources::Found::notes`].
    pub notes: Vec<String>,
}

/// How far [`prepare`] has come; shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read from disk.
    pub position: Arc<AtomicU64>,
    /// Bytes on disk.
    pub total: AtomicU64,
    /// Tokens written.
    pub tokens: AtomicU64,
    /// Set to stop early; nothing is left behind.
    pub stop: AtomicBool,
}

struct Chunk {
    documents: Vec<Document>,
}

/// Makes a shard set. Runs in the rayon pool that it is called from.
///
/// # Errors
/// Unreadable input, no usable document, a failed write, or [`Interrupted`] after [`Progress::stop`]. The target is then as it was.
pub fn prepare(tokenizer: &Tokenizer, options: &PrepareOptions, progress: &Progress) -> Result<Summary> {
    ensure!(
        (0.0..1.0).contains(&options.holdout),
        "the held-out share is {}; it must be at least 0 and below 1",
        options.holdout
    );
    let Found { inputs, ignored: ignored_files, notes } = sources::find_inputs(&options.inputs, &options.read)?;
    progress.total.store(inputs.iter().map(|i| i.size).sum(), Ordering::Relaxed);
    let shard_options = ShardOptions {
        tokenizer_sha256: tokenizer.sha256().to_string(),
        token_bytes: tokenizer.token_bytes(),
        end_of_text: END_OF_TEXT_ID,
        shard_tokens: options.shard_tokens,
        overwrite: options.overwrite,
    };
    let mut writer = ShardWriter::create(&options.out, shard_options)?;
    let mut sink = Sink {
        tokenizer,
        options,
        caches: Mutex::new(Vec::new()),
        seen: HashSet::default(),
        duplicates: 0,
        documents: 0,
    };
    let (send, receive) = mpsc::sync_channel(1);
    let rejected = std::thread::scope(|scope| -> Result<Rejected> {
        let reader = scope.spawn(|| read_all(&inputs, options, progress, send));
        for chunk in receive {
            if !sink.write(chunk, &mut writer, progress)? {
                break;
            }
        }
        reader.join().map_err(|_| anyhow!("the reading thread failed"))?
    })?;
    if progress.stop.load(Ordering::Relaxed) {
        return Err(Interrupted("interrupted; nothing was written".into()).into());
    }
    let (train, val) = (writer.totals(Split::Train).documents, writer.totals(Split::Val).documents);
    if train + val == 0 {
        bail!("no usable document in {} files; nothing was written{}", inputs.len(), describe(&rejected));
    }
    let duplicates = sink.duplicates;
    let index = writer.finish()?;
    Ok(Summary { index, files: inputs.len() as u64, ignored_files, duplicates, rejected, notes })
}

/// Rejected rows, a line each.
pub fn describe(rejected: &Rejected) -> String {
    let line =
        |(reason, r): (&String, &sources::Rejection)| format!("\n  {:>9} x {reason} (first: {})", r.count, r.first);
    rejected.reasons.iter().map(line).collect()
}

fn read_all(
    inputs: &[Input],
    options: &PrepareOptions,
    progress: &Progress,
    send: mpsc::SyncSender<Chunk>,
) -> Result<Rejected> {
    let mut rejected = Rejected::default();
    let (mut documents, mut bytes, mut wanted) = (Vec::new(), 0, true);
    for input in inputs {
        sources::read(input, &options.read, &progress.position, &mut |row, result| {
            match result {
                Err(reason) => rejected.add(&reason, || format!("{}:{row}", input.path.display())),
                Ok(document) => {
                    bytes += document.bytes();
                    documents.push(document);
                    if bytes >= CHUNK_BYTES {
                        bytes = 0;
                        let documents = std::mem::take(&mut documents);
                        // The receiver is gone when it has enough or has failed; it says which.
                        wanted = send.send(Chunk { documents }).is_ok();
                    }
                }
            }
            wanted &= !progress.stop.load(Ordering::Relaxed);
            Ok(wanted)
        })?;
        if !wanted {
            return Ok(rejected);
        }
    }
    let _ = send.send(Chunk { documents });
    Ok(rejected)
}

struct Sink<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a PrepareOptions,
    /// As many as threads have ever worked at once.
    caches: Mutex<Vec<Cache>>,
    seen: HashSet<u128, Xxh3DefaultBuilder>,
    duplicates: u64,
    documents: u64,
}

struct Encoded {
    tokens: Vec<u32>,
    mask: Option<Vec<bool>>,
    split: Split,
}

impl Sink<'_> {
    /// Returns whether more is wanted.
    fn write(&mut self, chunk: Chunk, writer: &mut ShardWriter, progress: &Progress) -> Result<bool> {
        if progress.stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let hashes: Vec<u128> = chunk.documents.par_iter().map(content_hash).collect();
        let mut fresh = Vec::with_capacity(hashes.len());
        for (document, hash) in chunk.documents.into_iter().zip(hashes) {
            if self.options.limit.is_some_and(|l| self.documents >= l) {
                break;
            }
            if !self.options.keep_duplicates && !self.seen.insert(hash) {
                self.duplicates += 1;
                continue;
            }
            self.documents += 1;
            fresh.push((document, split_of(hash, self.options.holdout)));
        }
        let encoded: Vec<Vec<Encoded>> = tasks(&fresh).into_par_iter().map(|task| self.encode(task)).collect();
        for document in encoded.iter().flatten() {
            writer
                .push(document.split, &document.tokens, document.mask.as_deref())
                .context("cannot write the shards")?;
        }
        let tokens = writer.totals(Split::Train).tokens + writer.totals(Split::Val).tokens;
        progress.tokens.store(tokens, Ordering::Relaxed);
        Ok(self.options.limit.is_none_or(|l| self.documents < l))
    }

    fn encode(&self, task: &[(Document, Split)]) -> Vec<Encoded> {
        // A poisoned lock holds caches that are merely incomplete.
        let lock = || self.caches.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut cache = lock().pop().unwrap_or_default();
        let encode = |(document, split): &(Document, Split)| {
            let (mut tokens, mut mask) = (Vec::with_capacity(document.bytes() / 3 + 8), Vec::new());
            match document {
                Document::Text(text) => {
                    self.tokenizer.encode_into(text, &mut cache, &mut tokens);
                    tokens.push(END_OF_TEXT_ID);
                }
                Document::Dialogue(turns) => chatml::encode(self.tokenizer, turns, &mut cache, &mut tokens, &mut mask),
            }
            Encoded { mask: (!mask.is_empty()).then_some(mask), tokens, split: *split }
        };
        let encoded = task.iter().map(encode).collect();
        lock().push(cache);
        encoded
    }
}

/// Cuts documents into runs of about [`TASK_BYTES`].
fn tasks(documents: &[(Document, Split)]) -> Vec<&[(Document, Split)]> {
    let mut tasks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, (document, _)) in documents.iter().enumerate() {
        bytes += document.bytes();
        if bytes >= TASK_BYTES || i + 1 == documents.len() {
            tasks.push(&documents[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    tasks
}

/// XXH3-128 of what is said and by whom.
fn content_hash(document: &Document) -> u128 {
    let mut hash = Xxh3::new();
    match document {
        Document::Text(text) => hash.update(text.as_bytes()),
        Document::Dialogue(turns) => {
            for turn in turns {
                // Lengths keep the turns apart.
                hash.update(turn.role.name().as_bytes());
                hash.update(&(turn.content.len() as u64).to_le_bytes());
                hash.update(turn.content.as_bytes());
            }
        }
    }
    hash.digest128()
}

/// By content alone: the same document is on the same side in every corpus, order and run.
fn split_of(hash: u128, holdout: f64) -> Split {
    // The upper 53 bits as a fraction: exact in f64.
    let fraction = (hash >> 75) as f64 / (1u64 << 53) as f64;
    if fraction < holdout { Split::Val } else { Split::Train }
}

#[cfg(test)]
mod tests;
