//! The blocks of the model: forward, backward and one-token step of every layer, side by side.
//!
//! A forward writes what its backward needs into a `*Saved` struct that the workspace owns; everything else lives in
//! shared [`Scratch`] buffers. The backward adds parameter gradients and adds its input's gradient to `dh`, the
//! gradient of the residual stream.

pub mod ffn;
pub mod mamba;
pub mod mla;

use alloc::vec;
use alloc::vec::Vec;

use crate::config::{LayerKind, ModelConfig};
use crate::ops::matmul::Out;
use crate::ops::norm::QuantizedRows;
use crate::ops::rope::RopeTable;
use crate::ops::rows::rows_per_task;
use crate::ops::ssd::SsdScratch;
use crate::par;
use crate::params::{Id, ParamKind, ParamLayout, Params};
use crate::ternary::{Activations, GradPrecision, GradScratch, TernaryMatrix};

/// What every layer reads: the model, and the shape of the batch.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Shapes.
    pub config: &'a ModelConfig,
    /// Latent weights.
    pub params: &'a Params,
    /// Ternary forms by parameter index; `None` for parameters that are not ternary.
    pub ternary: &'a [Option<TernaryMatrix>],
    /// Rotations of positions `0..seq`.
    pub rope: &'a RopeTable,
    /// Sequences.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
}

impl<'a> Context<'a> {
    /// Rows of every activation.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// The ternary form of a projection.
    pub fn projection(&self, id: Id) -> &'a TernaryMatrix {
        self.ternary[id.0].as_ref().expect("the layout marks this parameter ternary")
    }

    /// `y` `[tokens, out]` = the projection of quantised rows.
    pub fn project(&self, id: Id, rows: &QuantizedRows, y: &mut [f32]) {
        self.projection(id).forward(&rows.codes, &rows.scales, rows.scales.len(), y);
    }
}

/// Both gradients of a projection that read `rows`: `dx` `[tokens, in]` `(=|+=)`, and its weight's, added to `grads`.
pub(crate) fn project_backward(
    ctx: &Context,
    id: Id,
    rows: &QuantizedRows,
    dy: &[f32],
    dx: (&mut [f32], Out),
    grads: &mut Params,
    scratch: &mut GradScratch,
) {
    let x = Activations { codes: &rows.codes, scales: &rows.scales };
    ctx.projection(id).gradients(dy, x, dx, &mut grads[id], scratch);
}

/// Buffers that live for one operation, shared by all layers.
#[derive(Debug)]
pub struct Scratch {
    /// `[tokens, d_model]`: output of a norm, or the gradient of one
    pub(crate) normed: Vec<f32>,
    pub(crate) a: Vec<f32>,
    pub(crate) b: Vec<f32>,
    pub(crate) c: Vec<f32>,
    pub(crate) e: Vec<f32>,
    pub(crate) grad: GradScratch,
    pub(crate) ssd: SsdScratch,
}

impl Scratch {
    /// Elements of `[normed, a, b, c, e]` a token.
    fn widths(c: &ModelConfig) -> [usize; 5] {
        let max = |widths: &[usize]| widths.iter().copied().max().unwrap_or(0);
        let (qk, kv, v) = (c.n_heads * c.d_qk(), c.n_heads * (c.d_nope + c.d_v), c.n_heads * c.d_v);
        let (latent, bcdt, conv) = (c.kv_rank + c.d_rope, 2 * c.d_state + c.mamba_heads(), c.conv_channels());
        [
            c.d_model,
            max(&[2 * c.d_inner, qk, c.ffn_hidden, c.d_model]),
            max(&[conv, bcdt, kv, c.ffn_hidden, c.d_model]),
            max(&[conv, bcdt, v, latent, c.ffn_hidden, c.d_model]),
            max(&[conv, v, c.n_heads * c.d_rope, c.kv_rank]),
        ]
    }

    /// Buffers for `batch` sequences of `seq` tokens.
    pub fn new(c: &ModelConfig, batch: usize, seq: usize, precision: GradPrecision) -> Scratch {
        let [normed, a, b, cc, e] = Scratch::widths(c).map(|w| vec![0.0; w * batch * seq]);
        Scratch { normed, a, b, c: cc, e, grad: GradScratch::new(precision), ssd: SsdScratch::default() }
    }

    /// Bytes of [`Scratch::new`] once a backward has grown what grows on use.
    pub fn planned_bytes(c: &ModelConfig, batch: usize, seq: usize, precision: GradPrecision) -> usize {
        let tokens = batch * seq;
        let fixed = Scratch::widths(c).iter().sum::<usize>() * tokens;
        let has_mamba = c.layer_kinds().contains(&LayerKind::Mamba);
        let ssd = mamba::ssd_shape(c, batch, seq);
        let ssd = if has_mamba { ssd.forward_scratch_len().max(ssd.backward_scratch_len()) } else { 0 };
        let layout = ParamLayout::new(c);
        let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
        let shapes = ternary.map(|p| (p.shape[0], p.shape[1]));
        4 * (fixed + ssd) + GradScratch::planned_bytes(precision, tokens, shapes)
    }
}

/// `sum = a + b`, elementwise.
pub(crate) fn add(a: &[f32], b: &[f32], sum: &mut [f32]) {
    let n = rows_per_task(sum.len() / 64) * 64;
    let items = a.chunks(n).zip(b.chunks(n)).zip(sum.chunks_mut(n)).collect();
    par::for_each(items, |((a, b), sum): ((&[f32], &[f32]), &mut [f32])| {
        for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
            *s = a + b;
        }
    });
}

/// Copies columns `from..from + width` of `src` rows (`[rows, src_width]`) to columns `to..` of `dst` (`[rows, dst_width]`).
pub(crate) fn copy_columns(
    src: &[f32],
    src_width: usize,
    from: usize,
    dst: &mut [f32],
    dst_width: usize,
    to: usize,
    width: usize,
) {
    let n = rows_per_task(src.len() / src_width);
    let items = src.chunks(n * src_width).zip(dst.chunks_mut(n * dst_width)).collect();
    par::for_each(items, |(src, dst): (&[f32], &mut [f32])| {
        for (s, d) in src.chunks_exact(src_width).zip(dst.chunks_exact_mut(dst_width)) {
            d[to..to + width].copy_from_slice(&s[from..from + width]);
        }
    });
}
