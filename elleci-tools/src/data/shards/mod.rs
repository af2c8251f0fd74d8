//! Token shards: what `elleci-data prepare` writes and the trainer reads.
//!
//! A shard set is a directory. All integers are little-endian; there is no header in the binary files, everything
//! about them stands in `index.json`.
//!
//! | file | contents |
//! |---|---|
//! | `index.json` | an [`Index`]: format version, tokenizer, totals, and size and checksum of every other file |
//! | `token-bytes.bin` | `u16[vocab_size]`: the bytes of UTF-8 text that each token stands for (0 for special tokens) |
//! | `train-00000.bin`, … | `u16[tokens]`: documents one after the other, each ended by `<|endoftext|>` |
//! | `train-00000.idx`, … | `u64[documents + 1]`: where each document starts, in tokens; the last is the end |
//! | `train-00000.mask`, … | a bit a token, lowest bit first: 1 where the token is a training target. Absent if all are |
//! | `val-00000.*`, … | the same for the held-out split |
//!
//! A set is written under a temporary name in the same parent directory and renamed when it is complete and on disk,
//! so a directory that bears its final name is whole.

mod reader;
mod target;
mod writer;

pub use reader::{ShardSet, Verify};
pub use writer::{ShardOptions, ShardWriter};

use serde::{Deserialize, Serialize};

/// The `format` field of every index.
pub const FORMAT: &str = "elleci-shards";
/// The version that this code writes, and the only one that it reads.
pub const VERSION: u32 = 1;
/// Token ids are stored as `u16`.
pub const MAX_VOCAB: usize = 1 << 16;
/// The file that describes the others.
pub const INDEX_FILE: &str = "index.json";
/// The table of bytes per token.
pub const TOKEN_BYTES_FILE: &str = "token-bytes.bin";

/// Which part of a corpus a document belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Trained on.
    Train,
    /// Held out.
    Val,
}

impl Split {
    /// The split's name in file names and in the index.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
        }
    }
}

/// `index.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// SHA-256 of the `tokenizer.json` that made the tokens, in hexadecimal.
    pub tokenizer_sha256: String,
    /// Every token id is below this; the rows of the embedding of a model that trains on the set.
    pub vocab_size: usize,
    /// The id of `<|endoftext|>`, which ends every document.
    pub end_of_text: u32,
    /// [`TOKEN_BYTES_FILE`].
    pub token_bytes: FileEntry,
    /// What is trained on.
    pub train: SplitIndex,
    /// What is held out.
    pub val: SplitIndex,
}

impl Index {
    /// The entry of a split.
    pub fn split(&self, split: Split) -> &SplitIndex {
        match split {
            Split::Train => &self.train,
            Split::Val => &self.val,
        }
    }
}

/// Totals and shards of one split.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitIndex {
    /// Documents.
    pub documents: u64,
    /// Tokens, `<|endoftext|>` included.
    pub tokens: u64,
    /// Tokens that are training targets (all of them where there is no mask).
    pub target_tokens: u64,
    /// Bytes of UTF-8 text that all tokens stand for.
    pub bytes: u64,
    /// Bytes of UTF-8 text that the targets stand for.
    pub target_bytes: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Tokens in `bin`.
    pub tokens: u64,
    /// Documents in it.
    pub documents: u64,
    /// The tokens.
    pub bin: FileEntry,
    /// Where documents start.
    pub idx: FileEntry,
    /// Which tokens are targets; all, where this is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<FileEntry>,
}

/// A file of the set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the directory of the index.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// XXH3-64 of its contents, 16 hexadecimal digits.
    pub xxh3: String,
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;
