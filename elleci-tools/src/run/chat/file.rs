//! A dialogue as a file: its turns, its tokens, the sampler and the session, all exactly as they were.
//!
//! Layout: magic, version (u32), length of the JSON part (u32), the JSON part, the sampler's state, the session's state, and
//! the BLAKE3 hash of everything before it. Integers are little-endian.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use elleci_core::inference::Session;
use elleci_core::sampler::Sampler;
use serde::{Deserialize, Serialize};

use super::dialogue::{Dialogue, Exchange};
use crate::checkpoint::write_atomic;

const MAGIC: &[u8; 8] = b"ELLECHAT";
const VERSION: u32 = 1;
const HASH_BYTES: usize = 32;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    tokenizer_sha256: String,
    system: Option<String>,
    exchanges: Vec<Exchange>,
    tokens: Vec<u32>,
}

/// Writes a dialogue, whole or not at all.
///
/// # Errors
/// Whatever the file system reports.
pub fn save(dialogue: &Dialogue<'_>, path: &Path) -> anyhow::Result<()> {
    if path.is_file() {
        let mut begins = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAGIC.len() as u64).read_to_end(&mut begins));
        read.with_context(|| path.display().to_string())?;
        let ours = begins.is_empty() || begins == MAGIC;
        ensure!(ours, "{} is there already and is no dialogue: name another file", path.display());
    }
    let head = Head {
        tokenizer_sha256: dialogue.tokenizer_sha256().to_string(),
        system: dialogue.system.clone(),
        exchanges: dialogue.exchanges.clone(),
        tokens: dialogue.tokens.clone(),
    };
    let head = serde_json::to_vec(&head)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32::try_from(head.len()).context("the dialogue is too long to be saved")?.to_le_bytes());
    bytes.extend(head);
    bytes.extend(dialogue.sampler.to_bytes());
    bytes.extend(dialogue.session.to_bytes());
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    write_atomic(path, |temporary| Ok(fs::write(temporary, &bytes)?))
}

/// Goes on with a saved dialogue; the one before is forgotten. Nothing has changed when it fails.
///
/// # Errors
/// A file that is missing, is none of ours, is damaged, or was written with another model.
pub fn load(dialogue: &mut Dialogue<'_>, path: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let (head, sampler, session) = parse(&bytes, dialogue).with_context(|| path.display().to_string())?;
    dialogue.restore((head.system, head.exchanges, head.tokens), sampler, session);
    Ok(())
}

fn parse(bytes: &[u8], dialogue: &Dialogue<'_>) -> anyhow::Result<(Head, Sampler, Session)> {
    ensure!(bytes.starts_with(MAGIC), "not a saved dialogue; /save writes one");
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let Some(version) = word(8) else { bail!("truncated") };
    ensure!(version == VERSION, "version {version} is not known to this program, which reads {VERSION}");
    let (body, hash) = bytes.split_last_chunk::<HASH_BYTES>().context("truncated")?;
    ensure!(blake3::hash(body).as_bytes() == hash, "damaged or truncated: it does not have the hash that it carries");
    let rest = body.get(16..).context("truncated")?;
    let length = word(12).unwrap_or(0) as usize;
    let (head, rest) = rest.split_at_checked(length).context("truncated")?;
    let (sampler, session) = rest.split_at_checked(Sampler::STATE_BYTES).context("truncated")?;
    let head: Head = serde_json::from_slice(head)?;
    ensure!(
        head.tokenizer_sha256 == dialogue.tokenizer_sha256(),
        "it was written with another model: the tokenizers differ"
    );
    let session = Session::from_bytes(dialogue.open.packed(), session).context("it does not fit this model")?;
    let taken = session.tokens();
    ensure!(head.tokens.starts_with(taken), "its session has taken other tokens than its turns");
    let inside = head.exchanges.iter().all(|e| e.start <= head.tokens.len());
    ensure!(inside && head.exchanges.is_sorted_by_key(|e| e.start), "its turns are out of order");
    Ok((head, Sampler::from_bytes(sampler)?, session))
}
