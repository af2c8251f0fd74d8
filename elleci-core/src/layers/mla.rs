//! Multi-head latent attention with decoupled RoPE (SPEC §1.2).

use alloc::vec;
use alloc::vec::Vec;

use super::{Context, Scratch, copy_columns, project_backward};
use crate::config::ModelConfig;
use crate::ops::attention::{AttentionGrad, AttentionInput, AttentionShape, attention_backward, attention_forward};
use crate::ops::matmul::Out;
use crate::ops::norm::{QuantizedRows, rmsnorm_backward, rmsnorm_quantize};
use crate::ops::rope::RopeTable;
use crate::ops::rows::{self, rows_per_task};
use crate::par;
use crate::params::{MlaIds, Params};

/// What the backward needs of a forward.
#[derive(Debug)]
pub struct MlaSaved {
    /// Rotated queries `[tokens, heads * (d_nope + d_rope)]`
    q: Vec<f32>,
    /// Latent and rotated shared key `[tokens, kv_rank + d_rope]`
    ckr: Vec<f32>,
    pub(crate) latent: QuantizedRows,
    /// `[tokens, heads * (d_nope + d_v)]`
    kv: Vec<f32>,
    /// Output of the attention `[tokens, heads * d_v]`
    o: Vec<f32>,
    /// Log-sum-exp of every row `[batch, heads, seq]`
    lse: Vec<f32>,
    pub(crate) out: QuantizedRows,
}

impl MlaSaved {
    /// Room for `tokens` rows.
    pub fn new(c: &ModelConfig, tokens: usize) -> MlaSaved {
        let buffer = |width: usize| vec![0.0; tokens * width];
        MlaSaved {
            q: buffer(c.n_heads * c.d_qk()),
            ckr: buffer(c.kv_rank + c.d_rope),
            latent: QuantizedRows::new(tokens, c.kv_rank),
            kv: buffer(c.n_heads * (c.d_nope + c.d_v)),
            o: buffer(c.n_heads * c.d_v),
            lse: buffer(c.n_heads),
            out: QuantizedRows::new(tokens, c.n_heads * c.d_v),
        }
    }

    /// Bytes that [`MlaSaved::new`] allocates.
    pub fn planned_bytes(c: &ModelConfig, tokens: usize) -> usize {
        let floats = c.n_heads * (c.d_qk() + c.d_nope + 2 * c.d_v + 1) + c.kv_rank + c.d_rope;
        4 * tokens * floats
            + QuantizedRows::planned_bytes(tokens, c.kv_rank)
            + QuantizedRows::planned_bytes(tokens, c.n_heads * c.d_v)
    }
}

fn attention_shape(ctx: &Context) -> AttentionShape {
    let c = ctx.config;
    AttentionShape { batch: ctx.batch, seq: ctx.seq, heads: c.n_heads, d_nope: c.d_nope, d_rope: c.d_rope, d_v: c.d_v }
}

/// Applies `turn(row, position)` to the `d_rope` channels at `offset` of every group of `group` channels.
fn rotate(
    ctx: &Context,
    data: &mut [f32],
    row: usize,
    group: usize,
    offset: usize,
    turn: impl Fn(&RopeTable, &mut [f32], usize) + Sync + Send,
) {
    let n = rows_per_task(ctx.tokens());
    let d_rope = ctx.config.d_rope;
    let items: Vec<_> = data.chunks_mut(n * row).enumerate().collect();
    par::for_each(items, |(task, rows)| {
        for (i, r) in rows.chunks_exact_mut(row).enumerate() {
            let pos = (task * n + i) % ctx.seq;
            for head in r.chunks_exact_mut(group) {
                turn(ctx.rope, &mut head[offset..offset + d_rope], pos);
            }
        }
    });
}

/// `y` `[tokens, d_model]` from the norm's rows `n`.
pub fn forward(ctx: &Context, ids: &MlaIds, n: &QuantizedRows, saved: &mut MlaSaved, y: &mut [f32]) {
    let c = ctx.config;
    let (rank, qk, latent_row) = (c.kv_rank, c.d_qk(), c.kv_rank + c.d_rope);
    ctx.project(ids.q, n, &mut saved.q);
    ctx.project(ids.kv_down, n, &mut saved.ckr);
    let ckr = &saved.ckr;
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&ckr[t * latent_row..t * latent_row + rank]),
        &ctx.params[ids.kv_norm],
        c.norm_eps,
        &mut saved.latent,
        None,
    );
    ctx.project(ids.kv_up, &saved.latent, &mut saved.kv);
    rotate(ctx, &mut saved.q, c.n_heads * qk, qk, c.d_nope, RopeTable::rotate);
    rotate(ctx, &mut saved.ckr, latent_row, latent_row, rank, RopeTable::rotate);
    let input = AttentionInput { q: &saved.q, kv: &saved.kv, ckr: &saved.ckr, rank };
    attention_forward(&attention_shape(ctx), input, &mut saved.o, &mut saved.lse);
    let (o, width) = (&saved.o, c.n_heads * c.d_v);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| row.copy_from_slice(&o[t * width..(t + 1) * width]),
        &ctx.params[ids.out_norm],
        c.norm_eps,
        &mut saved.out,
        None,
    );
    ctx.project(ids.out, &saved.out, y);
}

/// Adds the parameter gradients and writes the gradient of the norm's output into `scratch.normed`.
pub fn backward(
    ctx: &Context,
    ids: &MlaIds,
    n: &QuantizedRows,
    saved: &MlaSaved,
    dy: &[f32],
    scratch: &mut Scratch,
    grads: &mut Params,
) {
    let c = ctx.config;
    let (tokens, rank, qk) = (ctx.tokens(), c.kv_rank, c.d_qk());
    let (q_row, kv_row, o_row, latent_row) =
        (c.n_heads * qk, c.n_heads * (c.d_nope + c.d_v), c.n_heads * c.d_v, c.kv_rank + c.d_rope);
    let Scratch { normed: dn, a, b, c: cc, e, grad, .. } = scratch;

    // out projection and its norm
    let dout = &mut e[..tokens * o_row];
    project_backward(ctx, ids.out, &saved.out, dy, (dout, Out::Store), grads, grad);
    let d_o = &mut cc[..tokens * o_row];
    rmsnorm_backward(
        &saved.o,
        &ctx.params[ids.out_norm],
        &saved.out.rstd,
        dout,
        d_o,
        &mut grads[ids.out_norm],
        Out::Store,
    );

    // attention and rotation
    let (dq, dkv, dkr_heads) =
        (&mut a[..tokens * q_row], &mut b[..tokens * kv_row], &mut e[..tokens * c.n_heads * c.d_rope]);
    let input = AttentionInput { q: &saved.q, kv: &saved.kv, ckr: &saved.ckr, rank };
    let towards = AttentionGrad { dq, dkv, dkr_heads };
    attention_backward(&attention_shape(ctx), input, &saved.o, &saved.lse, d_o, towards);
    rotate(ctx, dq, q_row, qk, c.d_nope, RopeTable::unrotate);
    let dckr = &mut cc[..tokens * latent_row];
    sum_heads(ctx, dkr_heads, dckr);
    rotate(ctx, dckr, latent_row, latent_row, rank, RopeTable::unrotate);

    // latent: its rows stand beside the shared key, so the norm's backward runs on a contiguous copy
    let dlatent_normed = &mut e[..tokens * rank];
    project_backward(ctx, ids.kv_up, &saved.latent, dkv, (dlatent_normed, Out::Store), grads, grad);
    let mut latent = vec![0.0f32; tokens * rank];
    copy_columns(&saved.ckr, latent_row, 0, &mut latent, rank, 0, rank);
    let mut dlatent = vec![0.0f32; tokens * rank];
    let gain = &ctx.params[ids.kv_norm];
    rmsnorm_backward(
        &latent,
        gain,
        &saved.latent.rstd,
        dlatent_normed,
        &mut dlatent,
        &mut grads[ids.kv_norm],
        Out::Store,
    );
    copy_columns(&dlatent, rank, 0, dckr, latent_row, 0, rank);

    // projections of the norm
    project_backward(ctx, ids.q, n, dq, (dn, Out::Store), grads, grad);
    project_backward(ctx, ids.kv_down, n, dckr, (dn, Out::Add), grads, grad);
}

/// Sums every head's share `[batch, heads, seq, d_rope]` into the last channels of `dckr` rows, head by head.
fn sum_heads(ctx: &Context, shares: &[f32], dckr: &mut [f32]) {
    let c = ctx.config;
    let (t, dr, row) = (ctx.seq, c.d_rope, c.kv_rank + c.d_rope);
    let items = shares.chunks_exact(c.n_heads * t * dr).zip(dckr.chunks_exact_mut(t * row)).collect();
    par::for_each(items, |(shares, dckr): (&[f32], &mut [f32])| {
        for (i, dckr) in dckr.chunks_exact_mut(row).enumerate() {
            let total = &mut dckr[c.kv_rank..];
            total.fill(0.0);
            for head in shares.chunks_exact(t * dr) {
                rows::add_scaled(total, 1.0, &head[i * dr..(i + 1) * dr]);
            }
        }
    });
}
