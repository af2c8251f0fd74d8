//! One evaluation of the core, with everything that it is compared by.

use std::collections::BTreeMap;

use crate::arbitrary::BatchData;
use crate::compare::{Evaluation, Noise, ROUNDOFF, Reference, references};
use crate::oracle::{CodeReport, Codes, Oracle};
use elleci_core::config::ModelConfig;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::params::{ParamKind, ParamLayout, Params};

/// Logits, loss, gradients and integer codes of one batch.
#[derive(Debug)]
pub struct CoreRun {
    /// `logits`, `loss` and every gradient by name, as the oracle names them.
    pub named: BTreeMap<String, Vec<f32>>,
    /// `sum(w * CE)`
    pub loss: f64,
    /// Gradients of `scale * loss`.
    pub grads: Params,
    /// The integers behind every ternary product.
    pub codes: Codes,
}

/// Views a batch as the core takes it.
pub fn as_batch(data: &BatchData) -> Batch<'_> {
    Batch { batch: data.batch, seq: data.seq, tokens: &data.tokens, targets: &data.targets, weights: &data.weights }
}

/// Runs the core on a batch, without checkpointing.
pub fn run(model: &Model, data: &BatchData, scale: f32) -> CoreRun {
    let (config, layout) = (model.config(), model.layout().clone());
    let mut ws = Workspace::new(config, data.batch, data.seq, Checkpointing::None);
    let mut logits = vec![0.0; data.tokens.len() * config.vocab_size];
    model.logits(&mut ws, &as_batch(data), &mut logits).expect("the batch fits");
    let mut grads = Params::zeros(layout.clone());
    let loss = model.loss_and_grad(&mut ws, &as_batch(data), scale, &mut grads).expect("the batch fits");
    let mut named = BTreeMap::from([("logits".to_string(), logits), ("loss".to_string(), vec![loss as f32])]);
    for p in layout.params() {
        named.insert(p.name.clone(), grads.data()[p.range.clone()].to_vec());
    }
    CoreRun { named, loss, grads, codes: codes(model, &ws) }
}

fn codes(model: &Model, ws: &Workspace) -> Codes {
    let layout = model.layout();
    let rows = ws.quantized_rows(layout);
    let activations = rows.into_iter().map(|(id, rows)| (layout.param(id).name.clone(), rows.codes.clone())).collect();
    let weights = layout.params().iter().enumerate().filter_map(|(i, p)| {
        let matrix = model.ternary(elleci_core::params::Id(i))?;
        let code = |at: usize| matrix.code(at / p.shape[1], at % p.shape[1]);
        Some((p.name.clone(), (0..p.len()).map(code).collect()))
    });
    Codes { activations, weights: weights.collect() }
}

/// The oracle's values for the same batch and scale, with `codes` given, and their rounding noise.
pub fn oracle_references(
    config: &ModelConfig,
    params: &Params,
    data: &BatchData,
    scale: f32,
    codes: Option<&Codes>,
) -> (BTreeMap<String, Reference>, CodeReport) {
    let batch = data.to_oracle(config.vocab_size);
    let mut report = CodeReport::default();
    let references = references(|evaluation| {
        let (kind, scan) = evaluation.mode();
        let mut oracle = Oracle::new(config, params, kind, scan, codes);
        if let Evaluation::Perturbed(seed) = evaluation {
            oracle.perturb(ROUNDOFF, seed);
        }
        let run = oracle.run(&batch, f64::from(scale));
        if evaluation == Evaluation::Truth {
            report = oracle.code_report();
        }
        run.into_named()
    });
    (references, report)
}

/// Weights away from the initial ones: gains, biases and rates that differ from one and zero, and matrices large enough
/// for every path to carry signal.
pub fn trained_like(config: &ModelConfig, noise: &mut Noise) -> Params {
    let layout = ParamLayout::new(config);
    let mut params = Params::zeros(layout.clone());
    for p in layout.params() {
        for x in &mut params.data_mut()[p.range.clone()] {
            *x = match p.kind {
                ParamKind::Norm | ParamKind::Skip => 1.0 + noise.normal(0.1),
                ParamKind::DtBias => -3.0 + noise.normal(1.0),
                ParamKind::ALog => 1.0 + noise.normal(0.7),
                ParamKind::ConvWeight => noise.normal(0.4),
                ParamKind::ConvBias => noise.normal(0.1),
                ParamKind::Embedding => noise.normal(0.5),
                ParamKind::Matrix | ParamKind::Ternary => noise.normal(0.1),
            };
        }
    }
    params
}
