//! Writing a shard set in bounded memory.

use super::{
    FORMAT, FileEntry, INDEX_FILE, Index, MAX_VOCAB, ShardEntry, Split, SplitIndex, TOKEN_BYTES_FILE, VERSION, target,
};
use crate::data::files::{parent_of, sync_dir};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// What a [`ShardWriter`] needs to know before the first document.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// SHA-256 of the tokenizer's file, in hexadecimal.
    pub tokenizer_sha256: String,
    /// Bytes of text of every token id, `[vocab_size]`.
    pub token_bytes: Vec<u16>,
    /// The id that ends every document.
    pub end_of_text: u32,
    /// A shard is closed once it holds this many tokens (a document is never split).
    pub shard_tokens: u64,
    /// Whether an existing shard set of the same name is replaced (when the new one is complete).
    pub overwrite: bool,
}

impl ShardOptions {
    /// 64 Mi tokens: 128 MiB a file, and 8 MiB of memory for the mask of the open one.
    pub const DEFAULT_SHARD_TOKENS: u64 = 1 << 26;
}

/// Writes a shard set; see the module documentation for the layout.
///
/// Nothing appears at the final path until [`ShardWriter::finish`] succeeds. A writer that is dropped before that
/// removes what it wrote.
pub struct ShardWriter {
    target: PathBuf,
    staging: PathBuf,
    // Held so that a second writer for the same target fails instead of mixing its files with ours.
    _lock: File,
    options: ShardOptions,
    train: SplitWriter,
    val: SplitWriter,
    finished: bool,
}

struct SplitWriter {
    split: Split,
    index: SplitIndex,
    open: Option<OpenShard>,
}

struct OpenShard {
    bin: HashedFile,
    idx: HashedFile,
    mask: Vec<u8>,
    tokens: u64,
    masked_out: u64,
    documents: u64,
}

impl ShardWriter {
    /// Starts a shard set that will be the directory `target`.
    ///
    /// # Errors
    /// `target` exists (and is not to be overwritten, or is not a shard set and nothing else), another writer is at work on
    /// it, the vocabulary does not fit 16 bits, or the file system refuses.
    pub fn create(target: &Path, options: ShardOptions) -> Result<ShardWriter> {
        let vocab = options.token_bytes.len();
        ensure!(vocab > 0 && vocab <= MAX_VOCAB, "vocab_size is {vocab}; shards hold 1 to {MAX_VOCAB} token ids");
        ensure!((options.end_of_text as usize) < vocab, "end_of_text {} is not below {vocab}", options.end_of_text);
        ensure!(options.shard_tokens > 0, "shard_tokens is 0; it must be at least 1");
        target::check(target, options.overwrite)?;
        let name = target.file_name().with_context(|| format!("{}: not a directory name", target.display()))?;
        let parent = parent_of(target);
        fs::create_dir_all(&parent).with_context(|| format!("{}: cannot create", parent.display()))?;
        let hidden = |suffix: &str| parent.join(format!(".{}.{suffix}", name.to_string_lossy()));
        let (lock_path, staging) = (hidden("lock"), hidden("partial"));
        let lock = File::create(&lock_path).with_context(|| format!("{}: cannot create", lock_path.display()))?;
        if lock.try_lock().is_err() {
            bail!(
                "{}: another process is writing this shard set; wait for it or choose another directory",
                target.display()
            );
        }
        if staging.exists() {
            // Left behind by a process that was killed: we hold the lock, so nobody writes there.
            fs::remove_dir_all(&staging).with_context(|| format!("{}: cannot remove", staging.display()))?;
        }
        let old = replaced(&staging);
        if old.exists() {
            // Of a process that was killed while it replaced a set: before the new one had its name, or after.
            target::own_files(&old)?;
            if !target.exists() {
                fs::rename(&old, target).with_context(|| format!("{}: cannot rename", old.display()))?;
            }
        }
        fs::create_dir(&staging).with_context(|| format!("{}: cannot create", staging.display()))?;
        let split = |split| SplitWriter { split, index: SplitIndex::default(), open: None };
        Ok(ShardWriter {
            target: target.to_path_buf(),
            staging,
            _lock: lock,
            options,
            train: split(Split::Train),
            val: split(Split::Val),
            finished: false,
        })
    }

    /// Appends a document. `tokens` ends with `<|endoftext|>`; `mask`, of the same length, tells which tokens are
    /// training targets (all of them if `None`).
    ///
    /// # Errors
    /// A token outside of the vocabulary, a missing end, a mask of another length, or a failed write.
    pub fn push(&mut self, split: Split, tokens: &[u32], mask: Option<&[bool]>) -> Result<()> {
        ensure!(
            tokens.last() == Some(&self.options.end_of_text),
            "a document must end with token {} (<|endoftext|>)",
            self.options.end_of_text
        );
        if let Some(mask) = mask {
            ensure!(mask.len() == tokens.len(), "mask of {} for {} tokens", mask.len(), tokens.len());
        }
        let writer = match split {
            Split::Train => &mut self.train,
            Split::Val => &mut self.val,
        };
        writer.push(&self.staging, &self.options.token_bytes, tokens, mask)?;
        if writer.open.as_ref().is_some_and(|s| s.tokens >= self.options.shard_tokens) {
            writer.close()?;
        }
        Ok(())
    }

    /// Totals so far.
    pub fn totals(&self, split: Split) -> &SplitIndex {
        match split {
            Split::Train => &self.train.index,
            Split::Val => &self.val.index,
        }
    }

    /// Completes the set and gives it its name.
    ///
    /// # Errors
    /// A failed write, sync or rename; the target is then as it was.
    pub fn finish(mut self) -> Result<Index> {
        self.train.close()?;
        self.val.close()?;
        let mut table = HashedFile::create(&self.staging, TOKEN_BYTES_FILE)?;
        for bytes in &self.options.token_bytes {
            table.write(&bytes.to_le_bytes())?;
        }
        let index = Index {
            format: FORMAT.to_string(),
            version: VERSION,
            tokenizer_sha256: self.options.tokenizer_sha256.clone(),
            vocab_size: self.options.token_bytes.len(),
            end_of_text: self.options.end_of_text,
            token_bytes: table.close()?,
            train: std::mem::take(&mut self.train.index),
            val: std::mem::take(&mut self.val.index),
        };
        let mut file = HashedFile::create(&self.staging, INDEX_FILE)?;
        let mut json = serde_json::to_vec_pretty(&index)?;
        json.push(b'\n');
        file.write(&json)?;
        file.close()?;
        sync_dir(&self.staging)?;
        self.move_into_place()?;
        self.finished = true;
        Ok(index)
    }

    fn move_into_place(&self) -> Result<()> {
        target::check(&self.target, self.options.overwrite)?;
        let old = replaced(&self.staging);
        if old.exists() {
            target::remove(&old)?;
        }
        let replaces = self.target.exists();
        if replaces {
            fs::rename(&self.target, &old).with_context(|| format!("{}: cannot rename", self.target.display()))?;
        }
        if let Err(error) = fs::rename(&self.staging, &self.target) {
            if replaces {
                // As it was; the error is what matters.
                let _ = fs::rename(&old, &self.target);
            }
            let at = format!("{}: cannot rename to {}", self.staging.display(), self.target.display());
            return Err(error).context(at);
        }
        sync_dir(&parent_of(&self.target))?;
        if replaces {
            target::remove(&old)?;
        }
        Ok(())
    }
}

/// Where the old set lies while the new one takes its name.
fn replaced(staging: &Path) -> PathBuf {
    staging.with_extension("replaced")
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: a leftover is removed by the next writer.
            let _ = fs::remove_dir_all(&self.staging);
        }
        let _ = fs::remove_file(self.staging.with_extension("lock"));
    }
}

impl SplitWriter {
    fn push(&mut self, dir: &Path, token_bytes: &[u16], tokens: &[u32], mask: Option<&[bool]>) -> Result<()> {
        if self.open.is_none() {
            let base = format!("{}-{:05}", self.split.name(), self.index.shards.len());
            let mut shard = OpenShard {
                bin: HashedFile::create(dir, &format!("{base}.bin"))?,
                idx: HashedFile::create(dir, &format!("{base}.idx"))?,
                mask: Vec::new(),
                tokens: 0,
                masked_out: 0,
                documents: 0,
            };
            shard.idx.write(&0u64.to_le_bytes())?;
            self.open = Some(shard);
        }
        let Some(shard) = self.open.as_mut() else { unreachable!("opened above") };
        let mut encoded = Vec::with_capacity(2 * tokens.len());
        for (i, &token) in tokens.iter().enumerate() {
            let Some(&bytes) = token_bytes.get(token as usize) else {
                bail!("token {token} is not below vocab_size {}", token_bytes.len());
            };
            encoded.extend_from_slice(&(token as u16).to_le_bytes());
            let is_target = mask.is_none_or(|m| m[i]);
            if shard.tokens % 8 == 0 {
                shard.mask.push(0);
            }
            self.index.bytes += u64::from(bytes);
            if is_target {
                shard.mask[(shard.tokens / 8) as usize] |= 1 << (shard.tokens % 8);
                self.index.target_tokens += 1;
                self.index.target_bytes += u64::from(bytes);
            } else {
                shard.masked_out += 1;
            }
            shard.tokens += 1;
        }
        shard.bin.write(&encoded)?;
        shard.idx.write(&shard.tokens.to_le_bytes())?;
        shard.documents += 1;
        self.index.tokens += tokens.len() as u64;
        self.index.documents += 1;
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some(shard) = self.open.take() else { return Ok(()) };
        let mask = if shard.masked_out > 0 {
            let name = shard.bin.name.replace(".bin", ".mask");
            let mut file = HashedFile::create(parent_of(&shard.bin.path).as_path(), &name)?;
            file.write(&shard.mask)?;
            Some(file.close()?)
        } else {
            None
        };
        self.index.shards.push(ShardEntry {
            tokens: shard.tokens,
            documents: shard.documents,
            bin: shard.bin.close()?,
            idx: shard.idx.close()?,
            mask,
        });
        Ok(())
    }
}

/// A file being written, with its size and checksum.
struct HashedFile {
    path: PathBuf,
    name: String,
    out: BufWriter<File>,
    hash: Xxh3,
    size: u64,
}

impl HashedFile {
    fn create(dir: &Path, name: &str) -> Result<HashedFile> {
        let path = dir.join(name);
        let file = File::create_new(&path).with_context(|| format!("{}: cannot create", path.display()))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(HashedFile { path, name: name.to_string(), out, hash: Xxh3::new(), size: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).with_context(|| format!("{}: cannot write", self.path.display()))?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Flushes to the disk.
    fn close(mut self) -> Result<FileEntry> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().sync_all())
            .with_context(|| format!("{}: cannot write", self.path.display()))?;
        Ok(FileEntry { file: self.name, size: self.size, xxh3: format!("{:016x}", self.hash.digest()) })
    }
}
