//! The gated feed-forward: `Ternary(RmsNorm(relu(gate)² ⊙ up; sub_norm); down)` (SPEC §1.4).

use alloc::vec;
use alloc::vec::Vec;

use super::{Context, Scratch, project_backward};
use crate::config::ModelConfig;
use crate::ops::matmul::Out;
use crate::ops::norm::{QuantizedRows, rmsnorm_backward_product, rmsnorm_quantize};
use crate::params::{FfnIds, Params};

/// What the backward needs of a forward.
#[derive(Debug)]
pub struct FfnSaved {
    /// `[tokens, ffn_hidden]`
    gate: Vec<f32>,
    /// `[tokens, ffn_hidden]`
    up: Vec<f32>,
    pub(crate) hidden: QuantizedRows,
}

impl FfnSaved {
    /// Room for `tokens` rows.
    pub fn new(c: &ModelConfig, tokens: usize) -> FfnSaved {
        let buffer = || vec![0.0; tokens * c.ffn_hidden];
        FfnSaved { gate: buffer(), up: buffer(), hidden: QuantizedRows::new(tokens, c.ffn_hidden) }
    }

    /// Bytes that [`FfnSaved::new`] allocates.
    pub fn planned_bytes(c: &ModelConfig, tokens: usize) -> usize {
        2 * 4 * tokens * c.ffn_hidden + QuantizedRows::planned_bytes(tokens, c.ffn_hidden)
    }
}

/// `relu(gate)² ⊙ up`
#[inline(always)]
pub(crate) fn activate(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        let r = if g > 0.0 { g } else { 0.0 };
        *o = r * r * u;
    }
}

/// `y` `[tokens, d_model]` from the norm's rows `n`.
pub fn forward(ctx: &Context, ids: &FfnIds, n: &QuantizedRows, saved: &mut FfnSaved, y: &mut [f32]) {
    let (f, eps) = (ctx.config.ffn_hidden, ctx.config.norm_eps);
    ctx.project(ids.gate, n, &mut saved.gate);
    ctx.project(ids.up, n, &mut saved.up);
    let (gate, up) = (&saved.gate, &saved.up);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| activate(&gate[t * f..(t + 1) * f], &up[t * f..(t + 1) * f], row),
        &ctx.params[ids.sub_norm],
        eps,
        &mut saved.hidden,
        None,
    );
    ctx.project(ids.down, &saved.hidden, y);
}

/// Adds the parameter gradients and writes the gradient of the norm's output into `scratch.normed`.
pub fn backward(
    ctx: &Context,
    ids: &FfnIds,
    n: &QuantizedRows,
    saved: &FfnSaved,
    dy: &[f32],
    scratch: &mut Scratch,
    grads: &mut Params,
) {
    let (f, tokens) = (ctx.config.ffn_hidden, ctx.tokens());
    let Scratch { normed, a, b, c, grad, .. } = scratch;
    let (dgate, dup, dhidden) = (&mut a[..tokens * f], &mut b[..tokens * f], &mut c[..tokens * f]);
    project_backward(ctx, ids.down, &saved.hidden, dy, (dhidden, Out::Store), grads, grad);
    rmsnorm_backward_product(
        #[inline(always)]
        |t, row| activate(&saved.gate[t * f..(t + 1) * f], &saved.up[t * f..(t + 1) * f], row),
        &ctx.params[ids.sub_norm],
        &saved.hidden.rstd,
        dhidden,
        #[inline(always)]
        |t, dx, dgate, dup| {
            let (gate, up) = (&saved.gate[t * f..(t + 1) * f], &saved.up[t * f..(t + 1) * f]);
            // Of one length all, or the loop is not vectorised.
            let (dx, dgate, dup) = (&dx[..f], &mut dgate[..f], &mut dup[..f]);
            for i in 0..f {
                let r = if gate[i] > 0.0 { gate[i] } else { 0.0 };
                dgate[i] = dx[i] * 2.0 * r * up[i];
                dup[i] = dx[i] * r * r;
            }
        },
        (dgate, f),
        (dup, f),
        &mut grads[ids.sub_norm],
    );
    project_backward(ctx, ids.gate, n, dgate, (normed, Out::Store), grads, grad);
    project_backward(ctx, ids.up, n, dup, (normed, Out::Add), grads, grad);
}
