//! The buffers by what uses them.

use crate::arena::Buf;
use crate::ops::loss::Occurrences;
use crate::ops::optim::{self, Scalars};
use crate::ops::product::{Ternary, Workspace};
use crate::ops::{Rows, ssd};

/// Buffers of one parameter.
#[derive(Clone, Copy, Debug)]
pub struct ParamBufs {
    /// Weights, gradients, states, mean
    pub optim: optim::Tensor,
    /// The ternary form, where it has one
    pub ternary: Option<Ternary>,
}

/// What a Mamba mixer keeps for its backward.
#[derive(Clone, Copy, Debug)]
pub struct MambaSaved {
    /// Gate and x `[tokens, 2 inner]`
    pub zx: Buf,
    /// B, C and raw step sizes `[tokens, 2 d_state + heads]`
    pub bcdt: Buf,
    /// After the convolution `[tokens, inner + 2 d_state]`
    pub xbc: Buf,
    /// Step sizes `[tokens, heads]`
    pub dt: Buf,
    /// Output of the scan `[tokens, inner]`
    pub y: Buf,
    /// States at the chunks' entries, and decays
    pub scan: ssd::Saved,
    /// Quantised gated rows
    pub gated: Rows,
}

/// What an MLA mixer keeps for its backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names of elleci_core::layers::mla")]
pub struct MlaSaved {
    pub q: Buf,
    pub ckr: Buf,
    pub latent: Rows,
    pub kv: Buf,
    pub o: Buf,
    pub lse: Buf,
    pub out: Rows,
}

/// What a layer keeps for its backward; a slot serves every k-th layer under checkpointing.
#[derive(Clone, Copy, Debug)]
pub struct LayerSaved {
    /// Residual stream after the mixer `[tokens, d_model]`
    pub mid: Buf,
    /// Residual stream after the layer, where it is not the start of the next segment
    pub out: Option<Buf>,
    /// Rows of the mixer's norm
    pub mixer_norm: Rows,
    /// A Mamba layer's
    pub mamba: Option<MambaSaved>,
    /// An MLA layer's
    pub mla: Option<MlaSaved>,
    /// Rows of the feed-forward's norm
    pub ffn_norm: Rows,
    /// `[tokens, ffn_hidden]`
    pub gate: Buf,
    /// `[tokens, ffn_hidden]`
    pub up: Buf,
    /// Rows of the product of both
    pub hidden: Rows,
}

/// Scratch of a feed-forward, most of it for its backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what LayerSaved names")]
pub struct FfnScratch {
    /// Of the quantised product of both; then of the gate, element by element in its place
    pub dgate: Buf,
    pub dup: Buf,
    pub workspace: Workspace,
    pub partials: Buf,
}

/// Scratch of a Mamba mixer, most of it for its backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what MambaSaved names")]
pub struct MambaScratch {
    /// Of the quantised gated rows; then of the scan's output, element by element in its place
    pub dy: Buf,
    pub workspace: Workspace,
    pub dzx: Buf,
    pub dbcdt: Buf,
    pub dxbc: Buf,
    pub ddt: Buf,
    pub scan: ssd::Scratch,
    pub partials: Buf,
    pub renormed: Buf,
    pub rstd: Buf,
}

/// Scratch of an MLA mixer, most of it for its backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what MlaSaved names")]
pub struct MlaScratch {
    /// Of the quantised output; then of the output itself, element by element in its place
    pub d_o: Buf,
    pub workspace: Workspace,
    pub delta: Buf,
    pub dq: Buf,
    pub dkv: Buf,
    pub dkr_heads: Buf,
    pub dckr: Buf,
    pub dlatent: Buf,
    pub partials: Buf,
}

/// Scratch of the head.
#[derive(Clone, Copy, Debug)]
pub struct HeadScratch {
    /// `[chunk, vocab]`
    pub logits: Buf,
    /// Tokens of a chunk
    pub chunk: usize,
    /// Gradient of the final norm's output
    pub dnormed: Buf,
    /// Operands of its products
    pub workspace: Workspace,
    /// Of the final norm's backward
    pub partials: Buf,
}

/// The batch and the scalars of a step.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[tokens]`
    pub tokens: Buf,
    /// `[tokens]`
    pub targets: Buf,
    /// `[tokens]`
    pub weights: Buf,
    /// Factor of the gradients
    pub scale: Buf,
    /// Positions by token
    pub occurrences: Occurrences,
}

/// Tables of the kernels that walk over all tensors.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the arguments of ops::optim and ops::ternary")]
pub struct Tables {
    pub optim: Buf,
    pub scalars: Scalars,
    pub squares: Buf,
    pub norm: Buf,
    pub quantizer: Buf,
    pub ternary_partials: Buf,
}
