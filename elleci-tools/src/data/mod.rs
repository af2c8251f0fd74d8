//! From text to training sequences: corpora, the tokenizer, token shards and their mixture.

pub mod chatml;
pub mod cli;
pub mod fetch;
pub mod files;
pub mod mixture;
pub mod permutation;
pub mod prepare;
pub mod shards;
pub mod sources;
pub mod stats;
pub mod tokenizer;
