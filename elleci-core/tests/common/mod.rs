//! What several of the integration tests use.

use elleci_core::config::ModelConfig;

/// A small model with sizes that fit no block of any kernel.
pub fn odd_config() -> ModelConfig {
    ModelConfig {
        vocab_size: 301,
        d_model: 72,
        n_layers: 5,
        layer_pattern: "SSA".into(),
        max_seq_len: 160,
        n_heads: 3,
        kv_rank: 40,
        d_nope: 10,
        d_rope: 6,
        d_v: 14,
        d_inner: 120,
        head_dim: 24,
        d_state: 20,
        d_conv: 3,
        ffn_hidden: 100,
        ..ModelConfig::preset("nano").unwrap()
    }
}
