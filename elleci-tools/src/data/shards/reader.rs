//! Reading a shard set: everything is checked when it is opened, documents are read on demand.

use super::{
    FORMAT, FileEntry, INDEX_FILE, Index, MAX_VOCAB, ShardEntry, Split, SplitIndex, TOKEN_BYTES_FILE, VERSION,
};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// How much [`ShardSet::open`] checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Reads every file once: checksums, document offsets, token ids. About the speed of the disk.
    Full,
    /// Names, versions and sizes only; what is read later is still checked document by document.
    Sizes,
}

/// An open shard set. Reading takes `&self`: several readers may share one.
#[derive(Debug)]
pub struct ShardSet {
    dir: PathBuf,
    index: Index,
    index_xxh3: u64,
    token_bytes: Vec<u16>,
    train: Vec<Shard>,
    val: Vec<Shard>,
}

#[derive(Debug)]
struct Shard {
    entry: ShardEntry,
    /// Documents in the shards before this one.
    first_document: u64,
    bin: File,
    idx: File,
    mask: Option<File>,
}

impl ShardSet {
    /// Opens the shard set at `dir` and verifies it in full.
    ///
    /// # Errors
    /// See [`ShardSet::open_with`].
    pub fn open(dir: &Path) -> Result<ShardSet> {
        ShardSet::open_with(dir, Verify::Full)
    }

    /// Opens the shard set at `dir`.
    ///
    /// # Errors
    /// A missing, truncated, altered or contradictory file; the message names the file, the field and the remedy.
    pub fn open_with(dir: &Path, verify: Verify) -> Result<ShardSet> {
        let (index, index_xxh3) = read_index(dir)?;
        let token_bytes = read_token_bytes(dir, &index)?;
        let open_split = |split: Split| -> Result<Vec<Shard>> {
            let entries = index.split(split);
            let shards = open_shards(dir, entries)?;
            check_totals(dir, split, entries)?;
            if verify == Verify::Full {
                for shard in &shards {
                    shard.verify(dir, &index)?;
                }
            }
            Ok(shards)
        };
        let train = open_split(Split::Train)?;
        let val = open_split(Split::Val)?;
        Ok(ShardSet { dir: dir.to_path_buf(), index_xxh3, token_bytes, train, val, index })
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where the set lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A number that changes with any byte of the set (a hash of the index, which holds the hashes of the rest).
    pub fn fingerprint(&self) -> u64 {
        self.index_xxh3
    }

    /// Bytes of text that each token stands for, `[vocab_size]`.
    pub fn token_bytes(&self) -> &[u16] {
        &self.token_bytes
    }

    /// Reads a document into `tokens` (which ends with `<|endoftext|>`) and `mask` (of the same length: whether the
    /// token is a target).
    ///
    /// # Errors
    /// No such document, a failed read, or contents that contradict the index.
    pub fn document(&self, split: Split, document: u64, tokens: &mut Vec<u16>, mask: &mut Vec<bool>) -> Result<()> {
        let shards = match split {
            Split::Train => &self.train,
            Split::Val => &self.val,
        };
        let after = shards.partition_point(|s| s.first_document <= document);
        let shard = after.checked_sub(1).map(|i| &shards[i]);
        let Some(shard) = shard.filter(|s| document - s.first_document < s.entry.documents) else {
            bail!("{}: no document {document} in split {}", self.dir.display(), split.name());
        };
        shard
            .read(document - shard.first_document, &self.index, tokens, mask)
            .with_context(|| format!("{}: document {document}", self.dir.join(&shard.entry.bin.file).display()))
    }
}

pub(super) fn read_index(dir: &Path) -> Result<(Index, u64)> {
    let path = dir.join(INDEX_FILE);
    let shown = path.display();
    if !dir.is_dir() {
        bail!("{}: no such directory; `elleci-data prepare` makes shard sets", dir.display());
    }
    let json = fs::read(&path).with_context(|| {
        format!("{shown}: cannot read; is {} a directory made by `elleci-data prepare`?", dir.display())
    })?;
    // The version first: a later format may have other fields.
    let value: serde_json::Value = serde_json::from_slice(&json)
        .with_context(|| format!("{shown}: not valid JSON (truncated?); prepare again"))?;
    let format = value.get("format").and_then(|v| v.as_str()).unwrap_or("missing");
    ensure!(format == FORMAT, "{shown}: `format` is {format}; expected {FORMAT}");
    let version = value.get("version").and_then(serde_json::Value::as_u64);
    ensure!(
        version == Some(u64::from(VERSION)),
        "{shown}: `version` is {}; this build reads version {VERSION}; prepare the corpus again",
        version.map_or("missing".to_string(), |v| v.to_string())
    );
    let index: Index =
        serde_json::from_value(value).with_context(|| format!("{shown}: not a valid index; prepare again"))?;
    ensure!(
        index.vocab_size > 0 && index.vocab_size <= MAX_VOCAB,
        "{shown}: `vocab_size` is {}; it must be 1 to {MAX_VOCAB}",
        index.vocab_size
    );
    ensure!(
        (index.end_of_text as usize) < index.vocab_size,
        "{shown}: `end_of_text` is {}; it must be below `vocab_size` {}",
        index.end_of_text,
        index.vocab_size
    );
    ensure!(
        index.tokenizer_sha256.len() == 64 && index.tokenizer_sha256.bytes().all(|b| b.is_ascii_hexdigit()),
        "{shown}: `tokenizer_sha256` is not a SHA-256 in hexadecimal"
    );
    Ok((index, xxhash_rust::xxh3::xxh3_64(&json)))
}

fn read_token_bytes(dir: &Path, index: &Index) -> Result<Vec<u16>> {
    let entry = &index.token_bytes;
    ensure!(
        entry.file == TOKEN_BYTES_FILE,
        "{}: `token_bytes.file` is {}; expected {TOKEN_BYTES_FILE}",
        dir.join(INDEX_FILE).display(),
        entry.file
    );
    check_size(dir, entry, 2 * index.vocab_size as u64, "vocab_size")?;
    let mut table = Vec::with_capacity(index.vocab_size);
    verify_file(dir, entry, |chunk| {
        table.extend(chunk.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
        Ok(())
    })?;
    Ok(table)
}

fn open_shards(dir: &Path, split: &SplitIndex) -> Result<Vec<Shard>> {
    let mut shards = Vec::with_capacity(split.shards.len());
    let mut first_document = 0u64;
    for entry in &split.shards {
        let sizes = entry.tokens.checked_mul(2).zip(entry.documents.checked_add(1).and_then(|d| d.checked_mul(8)));
        let (Some((bin_size, idx_size)), Some(next)) = (sizes, first_document.checked_add(entry.documents)) else {
            bail!("{}: `tokens` or `documents` of {} is impossible", dir.join(INDEX_FILE).display(), entry.bin.file);
        };
        check_size(dir, &entry.bin, bin_size, "tokens")?;
        check_size(dir, &entry.idx, idx_size, "documents")?;
        if let Some(mask) = &entry.mask {
            check_size(dir, mask, entry.tokens.div_ceil(8), "tokens")?;
        }
        shards.push(Shard {
            first_document,
            bin: open_file(dir, &entry.bin)?,
            idx: open_file(dir, &entry.idx)?,
            mask: entry.mask.as_ref().map(|m| open_file(dir, m)).transpose()?,
            entry: entry.clone(),
        });
        first_document = next;
    }
    Ok(shards)
}

fn check_totals(dir: &Path, split: Split, index: &SplitIndex) -> Result<()> {
    let sum = |f: fn(&ShardEntry) -> u64| index.shards.iter().map(f).fold(0u64, u64::saturating_add);
    for (field, total, sum) in
        [("tokens", index.tokens, sum(|s| s.tokens)), ("documents", index.documents, sum(|s| s.documents))]
    {
        let name = split.name();
        let shown = dir.join(INDEX_FILE);
        ensure!(total == sum, "{}: `{name}.{field}` is {total} but its shards sum to {sum}", shown.display());
    }
    Ok(())
}

/// The size that the index states must be the one that follows from `field`, and the one on disk.
fn check_size(dir: &Path, entry: &FileEntry, expected: u64, field: &str) -> Result<()> {
    let index = dir.join(INDEX_FILE);
    let plain = Path::new(&entry.file).file_name().is_some_and(|n| n == entry.file.as_str());
    ensure!(plain, "{}: `file` {} is not a plain file name", index.display(), entry.file);
    ensure!(
        entry.size == expected,
        "{}: `size` of {} is {}, but its `{field}` needs {expected}",
        index.display(),
        entry.file,
        entry.size
    );
    let path = dir.join(&entry.file);
    let size = fs::metadata(&path).with_context(|| format!("{}: cannot read; prepare again", path.display()))?.len();
    ensure!(
        size == entry.size,
        "{}: {size} bytes, but index.json says {} (truncated or overwritten?); prepare again",
        path.display(),
        entry.size
    );
    Ok(())
}

fn open_file(dir: &Path, entry: &FileEntry) -> Result<File> {
    let path = dir.join(&entry.file);
    File::open(&path).with_context(|| format!("{}: cannot open", path.display()))
}

/// Streams a file through `visit` in chunks of a multiple of 8 bytes (but the last), then compares its checksum.
fn verify_file(dir: &Path, entry: &FileEntry, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let path = dir.join(&entry.file);
    let mut file = open_file(dir, entry)?;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0u8; 1 << 18];
    let mut fault = None;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..]).with_context(|| format!("{}: cannot read", path.display()))? {
                0 => break,
                n => filled += n,
            }
        }
        hash.update(&buffer[..filled]);
        if fault.is_none() {
            fault = visit(&buffer[..filled]).err();
        }
        if filled < buffer.len() {
            break;
        }
    }
    let found = format!("{:016x}", hash.digest());
    // A wrong checksum explains whatever else is wrong with the contents.
    ensure!(
        found == entry.xxh3,
        "{}: checksum `xxh3` is {found}, but index.json says {} (the file was altered or damaged); prepare again",
        path.display(),
        entry.xxh3
    );
    fault.map_or(Ok(()), |e| Err(e.context(path.display().to_string())))
}

impl Shard {
    fn verify(&self, dir: &Path, index: &Index) -> Result<()> {
        let vocab = index.vocab_size;
        verify_file(dir, &self.entry.bin, |chunk| {
            let max = chunk.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).max().unwrap_or(0);
            ensure!((max as usize) < vocab, "token {max} is not below `vocab_size` {vocab}");
            Ok(())
        })?;
        let mut previous = None;
        verify_file(dir, &self.entry.idx, |chunk| {
            for b in chunk.as_chunks::<8>().0 {
                let offset = u64::from_le_bytes(*b);
                let ordered = previous.map_or(offset == 0, |p| offset > p);
                ensure!(ordered, "document offset {offset} after {previous:?}: offsets must grow from 0");
                previous = Some(offset);
            }
            Ok(())
        })?;
        let (last, tokens) = (previous.unwrap_or(0), self.entry.tokens);
        let idx = dir.join(&self.entry.idx.file);
        ensure!(last == tokens, "{}: the last offset is {last}, but there are {tokens} tokens", idx.display());
        if let Some(mask) = &self.entry.mask {
            verify_file(dir, mask, |_| Ok(()))?;
        }
        Ok(())
    }

    fn read(&self, document: u64, index: &Index, tokens: &mut Vec<u16>, mask: &mut Vec<bool>) -> Result<()> {
        let mut ends = [0u8; 16];
        read_exact_at(&self.idx, &mut ends, document * 8).context("cannot read its offsets")?;
        let [start, end] = [0, 8].map(|i| u64::from_le_bytes(std::array::from_fn(|j| ends[i + j])));
        ensure!(
            start < end && end <= self.entry.tokens,
            "offsets {start}..{end} do not fit {} tokens",
            self.entry.tokens
        );
        let len = (end - start) as usize;
        let mut raw = vec![0u8; 2 * len];
        read_exact_at(&self.bin, &mut raw, 2 * start).context("cannot read its tokens")?;
        tokens.clear();
        tokens.extend(raw.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)));
        if let Some(bad) = tokens.iter().find(|t| **t as usize >= index.vocab_size) {
            bail!("token {bad} is not below `vocab_size` {}", index.vocab_size);
        }
        ensure!(
            tokens.last().is_some_and(|t| u32::from(*t) == index.end_of_text),
            "does not end with `end_of_text` {}",
            index.end_of_text
        );
        mask.clear();
        match &self.mask {
            None => mask.resize(len, true),
            Some(file) => {
                let first = start / 8;
                let mut bits = vec![0u8; (end.div_ceil(8) - first) as usize];
                read_exact_at(file, &mut bits, first).context("cannot read its mask")?;
                mask.extend((start - first * 8..end - first * 8).map(|i| bits[(i / 8) as usize] >> (i % 8) & 1 == 1));
            }
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}
