//! The prelude, and the rkyv structures of the header. rkyv has no schema evolution: a change here is a new [`VERSION`].

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::{ALIGNMENT, ArchiveError, VERSION, checksum};
use crate::config::ModelConfig;

/// First bytes of an archive. The first is no text and the last reveals a transfer that "corrects" line ends.
const MAGIC: [u8; 8] = *b"\x93ELLECI\n";
pub(super) const PRELUDE_BYTES: usize = 64;

/// The fixed start of the file; integers are little-endian.
///
/// | bytes | |
/// |---|---|
/// | 0..8 | magic |
/// | 8..12 | format version |
/// | 12..16 | zero |
/// | 16..24 | bytes of the header, without padding |
/// | 24..32 | bytes of the file |
/// | 32..40 | XXH3-64 of the header with its padding |
/// | 40..56 | zero |
/// | 56..64 | XXH3-64 of bytes 0..56 |
#[derive(Clone, Copy, Debug)]
pub(super) struct Prelude {
    pub header_bytes: usize,
    pub file_bytes: u64,
    pub header_checksum: u64,
}

impl Prelude {
    /// Where the first section begins.
    pub fn sections_start(&self) -> usize {
        (PRELUDE_BYTES + self.header_bytes).next_multiple_of(ALIGNMENT)
    }

    pub fn to_bytes(self) -> [u8; PRELUDE_BYTES] {
        let mut bytes = [0; PRELUDE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&(self.header_bytes as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.file_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.header_checksum.to_le_bytes());
        let sum = checksum(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads and checks the start of `file`; afterwards the file has exactly `file_bytes` bytes and room for the header.
    pub fn read(file: &[u8]) -> Result<Prelude, ArchiveError> {
        let magic = file.get(..8).unwrap_or(file);
        if magic.is_empty() || !MAGIC.starts_with(magic) {
            return Err(ArchiveError::NotAnArchive);
        }
        let found = file.len() as u64;
        let Some(bytes) = file.first_chunk::<PRELUDE_BYTES>() else {
            return Err(ArchiveError::Truncated { expected: PRELUDE_BYTES as u64, found });
        };
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[at + i]));
        let version = word(8) as u32;
        if version != VERSION {
            return Err(ArchiveError::Version(version));
        }
        if checksum(&bytes[..56]) != word(56) {
            return Err(ArchiveError::Damaged("prelude".to_string()));
        }
        if bytes[12..16].iter().chain(&bytes[40..56]).any(|b| *b != 0) {
            return Err(ArchiveError::Reserved);
        }
        let expected = word(24);
        if found < expected {
            return Err(ArchiveError::Truncated { expected, found });
        }
        if found > expected {
            return Err(ArchiveError::TrailingBytes { expected, found });
        }
        let header_bytes = usize::try_from(word(16)).ok().filter(|n| {
            let end = n.checked_add(PRELUDE_BYTES).and_then(|n| n.checked_next_multiple_of(ALIGNMENT));
            end.is_some_and(|end| end <= file.len())
        });
        let header_bytes = header_bytes.ok_or(ArchiveError::Header)?;
        Ok(Prelude { header_bytes, file_bytes: expected, header_checksum: word(32) })
    }
}

#[derive(rkyv::Archive, rkyv::Serialize)]
pub(super) struct Header {
    pub config: Config,
    pub tensors: Vec<Tensor>,
    pub tokenizer: Option<Vec<u8>>,
}

#[derive(rkyv::Archive, rkyv::Serialize, Clone, Debug)]
pub(super) struct Tensor {
    pub name: String,
    pub shape: Vec<u32>,
    pub format: u8,
    pub gamma: f32,
    pub offset: u64,
    pub bytes: u64,
    pub checksum: u64,
}

/// [`ModelConfig`], with sizes as the file has them.
#[derive(rkyv::Archive, rkyv::Serialize)]
pub(super) struct Config {
    layer_pattern: String,
    tie_embeddings: bool,
    norm_eps: f32,
    rope_base: f32,
    vocab_size: u32,
    d_model: u32,
    n_layers: u32,
    max_seq_len: u32,
    n_heads: u32,
    kv_rank: u32,
    d_nope: u32,
    d_rope: u32,
    d_v: u32,
    d_inner: u32,
    head_dim: u32,
    d_state: u32,
    d_conv: u32,
    ffn_hidden: u32,
}

impl Config {
    /// Of a validated config, whose sizes fit 32 bits.
    pub fn new(c: &ModelConfig) -> Config {
        Config {
            layer_pattern: c.layer_pattern.clone(),
            tie_embeddings: c.tie_embeddings,
            norm_eps: c.norm_eps,
            rope_base: c.rope_base,
            vocab_size: c.vocab_size as u32,
            d_model: c.d_model as u32,
            n_layers: c.n_layers as u32,
            max_seq_len: c.max_seq_len as u32,
            n_heads: c.n_heads as u32,
            kv_rank: c.kv_rank as u32,
            d_nope: c.d_nope as u32,
            d_rope: c.d_rope as u32,
            d_v: c.d_v as u32,
            d_inner: c.d_inner as u32,
            head_dim: c.head_dim as u32,
            d_state: c.d_state as u32,
            d_conv: c.d_conv as u32,
            ffn_hidden: c.ffn_hidden as u32,
        }
    }
}

impl ArchivedConfig {
    /// Not yet validated.
    pub fn to_config(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: self.vocab_size.to_native() as usize,
            d_model: self.d_model.to_native() as usize,
            n_layers: self.n_layers.to_native() as usize,
            layer_pattern: self.layer_pattern.to_string(),
            max_seq_len: self.max_seq_len.to_native() as usize,
            norm_eps: self.norm_eps.to_native(),
            n_heads: self.n_heads.to_native() as usize,
            kv_rank: self.kv_rank.to_native() as usize,
            d_nope: self.d_nope.to_native() as usize,
            d_rope: self.d_rope.to_native() as usize,
            d_v: self.d_v.to_native() as usize,
            rope_base: self.rope_base.to_native(),
            d_inner: self.d_inner.to_native() as usize,
            head_dim: self.head_dim.to_native() as usize,
            d_state: self.d_state.to_native() as usize,
            d_conv: self.d_conv.to_native() as usize,
            ffn_hidden: self.ffn_hidden.to_native() as usize,
            tie_embeddings: self.tie_embeddings,
        }
    }
}
