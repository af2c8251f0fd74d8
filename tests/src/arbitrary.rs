//! Models and batches for the parity tests: small, and odd on purpose.

use elleci_core::config::ModelConfig;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};

use crate::compare::Noise;
use crate::oracle::{OracleBatch, oracle_batch};

/// The same cases in every run, so that a check which passed keeps passing; `PROPTEST_RNG_SEED` and `PROPTEST_CASES` look
/// further.
pub fn cases(n: u32) -> Config {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = n;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(0xe11_ec1);
    }
    config
}

/// Sizes that fit no vector, chunk or block (kv_rank 40 and ffn 352 among them), and some that do.
///
/// What a norm reads is at least 3 wide. A norm of one channel returns its sign, so that the gradient through it is only
/// what rounding leaves, and tokens become equal, so that attention's gradients cancel: see [`narrowest`] for those.
pub fn model_config() -> impl Strategy<Value = ModelConfig> {
    let outer = (2usize..90, 3usize..80, 1usize..5, "[SA]{1,3}", any::<bool>());
    let mla = (1usize..5, prop_oneof![Just(40), 3usize..70], 1usize..20, 1usize..9, 1usize..24);
    let mamba = (1usize..4, 1usize..24, 1usize..40, 1usize..6);
    let ffn = prop_oneof![Just(352usize), 3usize..120];
    (outer, mla, mamba, ffn).prop_map(|(outer, mla, mamba, ffn_hidden)| {
        let (vocab_size, d_model, n_layers, layer_pattern, tie_embeddings) = outer;
        let (n_heads, kv_rank, d_nope, half_rope, d_v) = mla;
        let (heads, head_dim, d_state, d_conv) = mamba;
        let d_v = if n_heads * d_v < 3 { 3 } else { d_v };
        let head_dim = if heads * head_dim < 3 { 3 } else { head_dim };
        ModelConfig {
            vocab_size,
            d_model,
            n_layers,
            layer_pattern,
            max_seq_len: 256,
            norm_eps: 1e-5,
            n_heads,
            kv_rank,
            d_nope,
            d_rope: 2 * half_rope,
            d_v,
            rope_base: 10_000.0,
            d_inner: heads * head_dim,
            head_dim,
            d_state,
            d_conv,
            ffn_hidden,
            tie_embeddings,
        }
    })
}

/// Everything one wide that can be.
pub fn narrowest(layer_pattern: &str) -> ModelConfig {
    ModelConfig {
        vocab_size: 2,
        d_model: 1,
        n_layers: layer_pattern.len(),
        layer_pattern: layer_pattern.into(),
        max_seq_len: 16,
        norm_eps: 1e-5,
        n_heads: 1,
        kv_rank: 1,
        d_nope: 1,
        d_rope: 2,
        d_v: 1,
        rope_base: 10_000.0,
        d_inner: 1,
        head_dim: 1,
        d_state: 1,
        d_conv: 1,
        ffn_hidden: 1,
        tie_embeddings: false,
    }
}

/// A batch in the core's form.
#[derive(Clone, Debug)]
pub struct BatchData {
    /// Sequences.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// `[batch, seq]`
    pub tokens: Vec<u32>,
    /// `[batch, seq]`
    pub targets: Vec<u32>,
    /// `[batch, seq]`; about a fifth are 0 (ignored), some are negative (as preference tuning has them)
    pub weights: Vec<f32>,
}

impl BatchData {
    /// A random batch; at least one weight is not 0.
    pub fn random(batch: usize, seq: usize, vocab: usize, noise: &mut Noise) -> BatchData {
        let n = batch * seq;
        let tokens = (0..n).map(|_| noise.below(vocab) as u32).collect();
        let targets = (0..n).map(|_| noise.below(vocab) as u32).collect();
        let mut weights: Vec<f32> = (0..n)
            .map(|_| match noise.below(10) {
                0 | 1 => 0.0,
                2 => noise.uniform() as f32,
                _ => 1.0,
            })
            .collect();
        weights[noise.below(n)] = 1.0;
        BatchData { batch, seq, tokens, targets, weights }
    }

    /// The same batch as tensors.
    pub fn to_oracle(&self, vocab: usize) -> OracleBatch {
        oracle_batch(self.batch, &self.tokens, &self.targets, &self.weights, vocab)
    }
}
