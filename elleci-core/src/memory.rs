//! What a training run takes: bytes by use, and arithmetic by kind, both from shapes alone.

use crate::config::{LayerKind, ModelConfig};
use crate::model::{Checkpointing, Workspace};
use crate::ops::head::HeadPrecision;
use crate::optim::{StatePrecision, state_bytes};
use crate::params::{ParamKind, ParamLayout};
use crate::ternary::{GradPrecision, TernaryMatrix};

/// Bytes of a training step on the CPU backend, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Latent float32 weights.
    pub weights: usize,
    /// Ternary forms derived from them.
    pub ternary: usize,
    /// Float32 gradients.
    pub gradients: usize,
    /// Optimiser states.
    pub optimizer: usize,
    /// Activations kept for the backward.
    pub activations: usize,
    /// Buffers shared by all layers, logits of a chunk, operands of the gradients' products.
    pub scratch: usize,
    /// Running mean of the weights, while it is kept.
    pub average: usize,
}

impl MemoryPlan {
    /// All of it.
    pub fn total(&self) -> usize {
        self.weights + self.ternary + self.gradients + self.optimizer + self.activations + self.scratch + self.average
    }
}

/// How a step is run, as far as memory is concerned.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Which activations are kept.
    pub checkpointing: Checkpointing,
    /// Precision of the optimiser states.
    pub states: StatePrecision,
    /// Precision of the gradients that enter the projections' products.
    pub gradients: GradPrecision,
    /// Precision of the head in a step.
    pub head: HeadPrecision,
    /// Whether a running mean of the weights is kept.
    pub average: bool,
}

/// The plan of a training step of a validated config.
pub fn plan(c: &ModelConfig, o: PlanOptions) -> MemoryPlan {
    let layout = ParamLayout::new(c);
    let floats = 4 * layout.len();
    let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
    let (activations, scratch) = Workspace::planned_bytes(c, o.batch, o.seq, o.checkpointing, o.gradients, o.head);
    MemoryPlan {
        weights: floats,
        ternary: ternary.map(|p| TernaryMatrix::planned_bytes(p.shape[0], p.shape[1])).sum(),
        gradients: floats,
        optimizer: state_bytes(&layout, o.states),
        activations,
        scratch,
        average: if o.average { floats } else { 0 },
    }
}

/// Multiply-adds a token, by what executes them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Forward of the ternary projections: int8 x ternary.
    pub int8_macs: f64,
    /// Everything else: head, `bcdt`, attention, scan, and all of the backward. In float32, or the backward of the ternary
    /// projections ([`GradPrecision`]) and the head ([`HeadPrecision`]) in int16.
    pub float_macs: f64,
}

impl Work {
    /// Operations (2 a multiply-add).
    pub fn flops(&self) -> f64 {
        2.0 * (self.int8_macs + self.float_macs)
    }
}

/// Multiply-adds of the forward and backward, a token of a sequence of `seq`. Recomputation is not counted (it is no
/// useful work); neither is what is linear in the width: norms, gates, exponentials.
pub fn work_per_token(c: &ModelConfig, seq: usize) -> Work {
    let layout = ParamLayout::new(c);
    let ternary = layout.ternary_elems() as f64;
    let dense: usize = layout.params().iter().filter(|p| p.kind == ParamKind::Matrix).map(|p| p.len()).sum();
    let head = (c.vocab_size * c.d_model) as f64;
    let mla = c.layer_kinds().iter().filter(|k| **k == LayerKind::Mla).count() as f64;
    let mamba = c.n_layers as f64 - mla;
    // A row sees (seq + 1) / 2 keys on average: scores and values in the forward; in the backward the scores again,
    // dP, dV, dQ and dK.
    let keys = (seq + 1) as f64 / 2.0;
    let (qk, v) = (c.d_qk() as f64, c.d_v as f64);
    let attention = c.n_heads as f64 * keys * ((qk + v) + (3.0 * qk + 2.0 * v));
    // The recurrence itself: state update and read, and three such products each in the backward.
    let scan = 3.0 * 2.0 * (c.d_inner * c.d_state) as f64;
    Work {
        int8_macs: ternary,
        float_macs: 2.0 * ternary + 3.0 * (dense as f64 + head) + mla * attention + mamba * scan,
    }
}
