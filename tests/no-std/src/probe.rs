// What both builds compute: the C program from a library without `std`, `elleci-core/examples/probe.rs` with it.
// Training and decoding of a small hybrid model with odd sizes, so that every part of the core is linked and run.

use alloc::vec;
use alloc::vec::Vec;

use elleci_core::archive::{Archive, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::init::initialise;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::optim::{AdamW, AdamWConfig, StatePrecision, StepRates};
use elleci_core::params::Params;

/// What the two builds are compared by.
#[repr(C)]
pub struct Probe {
    /// FNV-1a of every ternary code of the initial weights: integers, equal everywhere.
    pub codes: u64,
    /// Mean cross-entropy before and after four steps of AdamW, and the largest logit of a decoded sequence: floats,
    /// whose sums the two builds take in different orders (`gemm` and SIMD against `matrixmultiply` and scalars).
    pub before: f64,
    pub after: f64,
    pub decoded: f64,
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        d_model: 40,
        n_layers: 3,
        layer_pattern: "SAS".into(),
        max_seq_len: 32,
        norm_eps: 1e-5,
        n_heads: 3,
        kv_rank: 20,
        d_nope: 6,
        d_rope: 4,
        d_v: 10,
        rope_base: 10_000.0,
        d_inner: 48,
        head_dim: 16,
        d_state: 12,
        d_conv: 4,
        ffn_hidden: 88,
        tie_embeddings: false,
    }
}

fn codes_hash(model: &Model) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (i, p) in model.layout().params().iter().enumerate() {
        let Some(matrix) = model.ternary(elleci_core::params::Id(i)) else { continue };
        for row in 0..p.shape[0] {
            for col in 0..p.shape[1] {
                hash = (hash ^ (matrix.code(row, col) + 1) as u64).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
    }
    hash
}

/// Trains, decodes and reports.
pub fn run() -> Probe {
    let config = config();
    let mut model = Model::new(config.clone(), initialise(&config, 3)).expect("the config is valid");
    let codes = codes_hash(&model);
    let (rows, seq) = (2, 29);
    let tokens: Vec<u32> = (0..rows * seq + 1).map(|i| (i * i % 61) as u32).collect();
    let weights = vec![1.0; rows * seq];
    let batch = Batch { batch: rows, seq, tokens: &tokens[..rows * seq], targets: &tokens[1..], weights: &weights };
    let mean = 1.0 / (rows * seq) as f64;
    let mut ws = Workspace::new(&config, rows, seq, Checkpointing::EveryLayer);
    let mut adamw = AdamW::new(model.layout().clone(), AdamWConfig::default(), StatePrecision::F32);
    let before = model.loss(&mut ws, &batch).expect("the batch fits") * mean;
    for _ in 0..4 {
        let mut grads = Params::zeros(model.layout().clone());
        model.loss_and_grad(&mut ws, &batch, mean as f32, &mut grads).expect("the batch fits");
        let rates = StepRates { lr_of: &|_| 3e-3, weight_decay: 0.1, grad_scale: 1.0 };
        model.update(|params| adamw.step(params, &grads, &rates));
    }
    let after = model.loss(&mut ws, &batch).expect("the batch fits") * mean;
    let bytes = to_bytes(&config, model.params(), None, PackOptions::default()).expect("the config is valid");
    let archive = Archive::open(bytes).expect("it was just made");
    let mut session = Session::new(archive.model()).expect("it is small");
    let mut decoded = f64::NEG_INFINITY;
    for &token in &tokens[..seq] {
        let logits = session.extend(archive.model(), &[token]).expect("the token is in the vocabulary");
        decoded = logits.iter().fold(decoded, |m, &x| m.max(f64::from(x)));
    }
    Probe { codes, before, after, decoded }
}
