//! Reading corpora: files of several formats and schemas as a stream of [`Document`]s.

mod find;
mod json;
mod oasst;
mod parquet;
mod schema;
mod text;

pub use find::{Found, find_inputs};
pub(crate) use parquet::value as parquet_value;
pub use schema::{Row, Schema};

use super::chatml::Turn;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A document of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// Running text: every token is a training target.
    Text(String),
    /// Turns of a dialogue: what the assistant says is a target.
    Dialogue(Vec<Turn>),
}

impl Document {
    /// Bytes of text in it.
    pub fn bytes(&self) -> usize {
        match self {
            Document::Text(text) => text.len(),
            Document::Dialogue(turns) => turns.iter().map(|t| t.content.len()).sum(),
        }
    }
}

/// How a plain text file is cut into documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TextSplit {
    /// One document a file.
    #[default]
    File,
    /// Documents are separated by a line that holds only `---`.
    Rule,
    /// Documents are separated by blank lines: one paragraph each.
    Blank,
}

/// How to read.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// The schema of all rows; told by the columns of each file if `None`.
    pub schema: Option<Schema>,
    /// For plain text.
    pub text_split: TextSplit,
    /// Rows of OpenAssistant in other languages are left out, if not empty.
    pub languages: Vec<String>,
}

/// What was passed over, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rejected {
    /// Number and first occurrence (`file:row`) by reason.
    pub reasons: BTreeMap<String, Rejection>,
}

/// One entry of [`Rejected`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Rejection {
    /// How often.
    pub count: u64,
    /// Where first: `file:row`, rows counted from 1.
    pub first: String,
}

impl Rejected {
    /// Counts one more.
    pub fn add(&mut self, reason: &str, place: impl FnOnce() -> String) {
        match self.reasons.get_mut(reason) {
            Some(r) => r.count += 1,
            None => {
                self.reasons.insert(reason.to_string(), Rejection { count: 1, first: place() });
            }
        }
    }

    /// Adds up all reasons.
    pub fn total(&self) -> u64 {
        self.reasons.values().map(|r| r.count).sum()
    }
}

/// A row that became no document.
pub type RowResult = std::result::Result<Document, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Parquet,
    Json,
    Text,
}

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Where it is.
    pub path: PathBuf,
    /// Its size on disk, in bytes.
    pub size: u64,
    format: Format,
}

/// Reads one file row by row. `visit` gets the row's number (from 1) and what it became, and returns whether to go on;
/// `position` follows the bytes read from disk.
///
/// # Errors
/// The file cannot be read or decompressed, or its columns match no schema; and whatever `visit` returns.
pub fn read(
    input: &Input,
    options: &ReadOptions,
    position: &Arc<AtomicU64>,
    visit: &mut dyn FnMut(u64, RowResult) -> Result<bool>,
) -> Result<()> {
    let result = match input.format {
        Format::Parquet => parquet::read(input, options, position, visit),
        Format::Json => json::read(open(input, position)?, options, visit),
        Format::Text => text::read(open(input, position)?, options.text_split, visit),
    };
    result.with_context(|| input.path.display().to_string())
}

/// What some programs put before text to tell that it is UTF-8; no part of the text.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Opens a file, decompressing by its extension and passing over a byte order mark.
fn open(input: &Input, position: &Arc<AtomicU64>) -> Result<Box<dyn BufRead>> {
    let context = || format!("{}: cannot open", input.path.display());
    let file = Counted { inner: File::open(&input.path).with_context(context)?, position: position.clone() };
    let extension = input.path.extension().map(|e| e.to_ascii_lowercase());
    let content: Box<dyn BufRead> = match extension.as_ref().and_then(|e| e.to_str()) {
        Some("gz") => Box::new(BufReader::with_capacity(1 << 17, flate2::read::MultiGzDecoder::new(file))),
        Some("zst") => {
            Box::new(BufReader::with_capacity(1 << 17, zstd::stream::read::Decoder::new(file).with_context(context)?))
        }
        _ => Box::new(BufReader::with_capacity(1 << 17, file)),
    };
    without_mark(content).with_context(|| format!("{}: cannot read (truncated or damaged?)", input.path.display()))
}

fn without_mark(mut input: Box<dyn BufRead>) -> std::io::Result<Box<dyn BufRead>> {
    let mut head = Vec::new();
    // Byte by byte: a pipe may give no more at once.
    while let Some(&byte) = input.fill_buf()?.first() {
        if BYTE_ORDER_MARK.get(head.len()) != Some(&byte) {
            break;
        }
        head.push(byte);
        input.consume(1);
    }
    if head.is_empty() || head == BYTE_ORDER_MARK {
        return Ok(input);
    }
    Ok(Box::new(Cursor::new(head).chain(input)))
}

/// Counts the bytes that pass.
struct Counted<R> {
    inner: R,
    position: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.position.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
