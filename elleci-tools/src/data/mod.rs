//! From text to training sequences: corpora, the tokenizer, token shards and their mixture.

pub mod files;
pub mod mixture;
pub mod permutation;
pub mod shards;
pub mod tokenizer;
