//! A tiny model with random weights and a tokenizer of its own, for whole-binary tests.

use std::sync::OnceLock;

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::{ParamKind, Params};
use elleci_tools::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID, Tokenizer, TrainOptions, train_tokenizer};

/// Rows of the embedding; the tokenizer has fewer tokens.
pub const VOCAB: usize = 352;

/// Its shape.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        d_model: 32,
        n_layers: 4,
        max_seq_len: 64,
        n_heads: 2,
        kv_rank: 8,
        d_nope: 8,
        d_rope: 4,
        d_v: 8,
        d_inner: 64,
        head_dim: 16,
        d_state: 8,
        ffn_hidden: 48,
        ..ModelConfig::preset("nano").unwrap()
    }
}

/// Its tokenizer.
pub fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let texts = (0..200).map(|i| format!("La città è più {} che bella: perché no? {i}", "grande ".repeat(i % 5)));
        let words = vec!["user".into(), "assistant".into(), "system".into()];
        train_tokenizer(texts, &TrainOptions { tokens: 330, vocab_size: VOCAB, words }).unwrap()
    })
}

/// Random weights with a head whose logits differ by units, so that greedy choices do not hang on roundings. `ends` scales
/// the logits of the tokens that end a text: 0 keeps them away, a large number makes them win as soon as they are positive.
pub fn params(ends: f32) -> Params {
    let mut params = initialise(&config(), 11);
    let layout = params.layout().clone();
    for p in layout.params() {
        if p.kind == ParamKind::Embedding {
            params.data_mut()[p.range.clone()].iter_mut().for_each(|w| *w *= 40.0);
        }
        // Fresh blocks add little to the embedding: without this only the last token would decide about the next one.
        if p.name.ends_with(".out.weight") || p.name.ends_with("ffn.down.weight") {
            params.data_mut()[p.range.clone()].iter_mut().for_each(|w| *w *= 10.0);
        }
    }
    let head = layout.params()[layout.lm_head().0].range.clone();
    for token in [END_OF_TEXT_ID, IM_END_ID] {
        let start = head.start + token as usize * 32;
        params.data_mut()[start..start + 32].iter_mut().for_each(|w| *w *= ends);
    }
    params
}
