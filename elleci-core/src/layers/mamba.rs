//! The Mamba-2 mixer (state-space dual; SPEC §1.3).

use alloc::vec;
use alloc::vec::Vec;

use super::{Context, Scratch, copy_columns, project_backward};
use crate::config::ModelConfig;
use crate::ops::activation::{exp, sigmoid, silu, silu_grad, softplus};
use crate::ops::conv::{ConvShape, conv_silu_backward, conv_silu_forward};
use crate::ops::matmul::{Out, mat, mat_mut, matmul};
use crate::ops::norm::{QuantizedRows, rmsnorm, rmsnorm_backward_product, rmsnorm_quantize};
use crate::ops::ssd::{SsdShape, ssd_backward, ssd_forward};
use crate::params::{MambaIds, Params};

/// What the backward needs of a forward.
#[derive(Debug)]
pub struct MambaSaved {
    /// The gate `[tokens, d_inner]`
    z: Vec<f32>,
    /// Input of the convolution `[tokens, d_inner + 2 d_state]`: x, B, C
    conv_input: Vec<f32>,
    /// Output of the convolution and silu, same shape
    xbc: Vec<f32>,
    /// Step sizes before the bias and softplus `[tokens, heads]`
    dt_raw: Vec<f32>,
    /// Step sizes `[tokens, heads]`
    dt: Vec<f32>,
    /// Output of the scan `[tokens, d_inner]`
    y: Vec<f32>,
    /// States at the entry of every chunk
    states: Vec<f32>,
    pub(crate) gated: QuantizedRows,
}

fn conv_shape(ctx: &Context) -> ConvShape {
    let c = ctx.config;
    ConvShape { batch: ctx.batch, seq: ctx.seq, channels: c.conv_channels(), taps: c.d_conv }
}

/// The scan's sizes for a batch.
pub fn ssd_shape(c: &ModelConfig, batch: usize, seq: usize) -> SsdShape {
    SsdShape { batch, seq, heads: c.mamba_heads(), head_dim: c.head_dim, d_state: c.d_state }
}

impl MambaSaved {
    /// Room for `batch` sequences of `seq` tokens.
    pub fn new(c: &ModelConfig, batch: usize, seq: usize) -> MambaSaved {
        let tokens = batch * seq;
        let buffer = |width: usize| vec![0.0; tokens * width];
        MambaSaved {
            z: buffer(c.d_inner),
            conv_input: buffer(c.conv_channels()),
            xbc: buffer(c.conv_channels()),
            dt_raw: buffer(c.mamba_heads()),
            dt: buffer(c.mamba_heads()),
            y: buffer(c.d_inner),
            states: vec![0.0; ssd_shape(c, batch, seq).states_len()],
            gated: QuantizedRows::new(tokens, c.d_inner),
        }
    }

    /// Bytes that [`MambaSaved::new`] allocates.
    pub fn planned_bytes(c: &ModelConfig, batch: usize, seq: usize) -> usize {
        let tokens = batch * seq;
        4 * tokens * (2 * c.d_inner + 2 * c.conv_channels() + 2 * c.mamba_heads())
            + 4 * ssd_shape(c, batch, seq).states_len()
            + QuantizedRows::planned_bytes(tokens, c.d_inner)
    }
}

/// `a = -exp(a_log)`, one decay rate a head.
pub fn decay_rates(a_log: &[f32]) -> Vec<f32> {
    a_log.iter().map(|&a| -exp(a)).collect()
}

/// `y` `[tokens, d_model]` from the norm's rows: `n` quantised and `normed` `[tokens, d_model]` float (the `bcdt`
/// projection reads the norm itself).
pub fn forward(
    ctx: &Context,
    ids: &MambaIds,
    n: &QuantizedRows,
    normed: &[f32],
    saved: &mut MambaSaved,
    scratch: (&mut [f32], &mut [f32], &mut crate::ops::ssd::SsdScratch),
    y: &mut [f32],
) {
    let c = ctx.config;
    let (tokens, di, heads, channels) = (ctx.tokens(), c.d_inner, c.mamba_heads(), c.conv_channels());
    let bc = 2 * c.d_state;
    let (zx, bcdt, ssd) = scratch;
    let (zx, bcdt) = (&mut zx[..tokens * 2 * di], &mut bcdt[..tokens * (bc + heads)]);
    ctx.project(ids.input, n, zx);
    matmul(
        mat(normed, tokens, c.d_model),
        mat(&ctx.params[ids.bcdt], bc + heads, c.d_model).reversed_axes(),
        mat_mut(bcdt, tokens, bc + heads),
        Out::Store,
    );
    copy_columns(zx, 2 * di, 0, &mut saved.z, di, 0, di);
    copy_columns(zx, 2 * di, di, &mut saved.conv_input, channels, 0, di);
    copy_columns(bcdt, bc + heads, 0, &mut saved.conv_input, channels, di, bc);
    copy_columns(bcdt, bc + heads, bc, &mut saved.dt_raw, heads, 0, heads);
    let bias = &ctx.params[ids.dt_bias];
    for (dt, raw) in saved.dt.chunks_exact_mut(heads).zip(saved.dt_raw.chunks_exact(heads)) {
        for h in 0..heads {
            dt[h] = softplus(raw[h] + bias[h]);
        }
    }
    let (weight, conv_bias) = (&ctx.params[ids.conv_weight], &ctx.params[ids.conv_bias]);
    conv_silu_forward(conv_shape(ctx), &saved.conv_input, weight, conv_bias, &mut saved.xbc);
    let a = decay_rates(&ctx.params[ids.a_log]);
    let shape = ssd_shape(c, ctx.batch, ctx.seq);
    ssd_forward(shape, &saved.xbc, &saved.dt, &a, &ctx.params[ids.d], &mut saved.y, &mut saved.states, ssd);
    let (scan, z) = (&saved.y, &saved.z);
    rmsnorm_quantize(
        #[inline(always)]
        |t, row| gate(&scan[t * di..(t + 1) * di], &z[t * di..(t + 1) * di], row),
        &ctx.params[ids.gate_norm],
        c.norm_eps,
        &mut saved.gated,
        None,
    );
    ctx.project(ids.out, &saved.gated, y);
}

/// `y ⊙ silu(z)`
#[inline(always)]
pub(crate) fn gate(y: &[f32], z: &[f32], out: &mut [f32]) {
    for ((o, &y), &z) in out.iter_mut().zip(y).zip(z) {
        *o = y * silu(z);
    }
}

/// Adds the parameter gradients and writes the gradient of the norm's output into `scratch.normed`. `x` is the norm's
/// input (the residual stream), `norm_gain` its gain.
#[expect(clippy::too_many_arguments, reason = "the two residents of the block and their shared buffers")]
pub fn backward(
    ctx: &Context,
    ids: &MambaIds,
    n: &QuantizedRows,
    (x, norm_gain): (&[f32], &[f32]),
    saved: &MambaSaved,
    dy: &[f32],
    scratch: &mut Scratch,
    grads: &mut Params,
) {
    let c = ctx.config;
    let (tokens, d, di, heads, channels) = (ctx.tokens(), c.d_model, c.d_inner, c.mamba_heads(), c.conv_channels());
    let bc = 2 * c.d_state;
    let dzx = &mut scratch.a[..tokens * 2 * di];

    // out projection, gate and its norm: dz goes straight to its half of dzx
    let dgated = &mut scratch.e[..tokens * di];
    let dscan = &mut scratch.c[..tokens * di];
    project_backward(ctx, ids.out, &saved.gated, dy, (dgated, Out::Store), grads, &mut scratch.grad);
    rmsnorm_backward_product(
        #[inline(always)]
        |t, row| gate(&saved.y[t * di..(t + 1) * di], &saved.z[t * di..(t + 1) * di], row),
        &ctx.params[ids.gate_norm],
        &saved.gated.rstd,
        dgated,
        #[inline(always)]
        |t, du, dscan, dz| {
            let (y, z) = (&saved.y[t * di..(t + 1) * di], &saved.z[t * di..(t + 1) * di]);
            let (dscan, dz) = (&mut dscan[..du.len()], &mut dz[..du.len()]);
            for i in 0..du.len() {
                dscan[i] = du[i] * silu(z[i]);
                dz[i] = du[i] * y[i] * silu_grad(z[i]);
            }
        },
        (dscan, di),
        (dzx, 2 * di),
        &mut grads[ids.gate_norm],
    );

    // scan
    let a = decay_rates(&ctx.params[ids.a_log]);
    let dxbc = &mut scratch.b[..tokens * channels];
    let mut ddt = vec![0.0f32; tokens * heads];
    let (mut da, mut dd) = (vec![0.0f32; heads], vec![0.0f32; heads]);
    let shape = ssd_shape(c, ctx.batch, ctx.seq);
    ssd_backward(
        shape,
        &saved.xbc,
        &saved.dt,
        &a,
        &ctx.params[ids.d],
        &saved.states,
        dscan,
        dxbc,
        &mut ddt,
        &mut da,
        &mut dd,
        &mut scratch.ssd,
    );
    for h in 0..heads {
        grads[ids.a_log][h] += da[h] * a[h];
        grads[ids.d][h] += dd[h];
    }
    let bias = &ctx.params[ids.dt_bias];
    let mut dbias = vec![0.0f32; heads];
    for (ddt, raw) in ddt.chunks_exact_mut(heads).zip(saved.dt_raw.chunks_exact(heads)) {
        for h in 0..heads {
            ddt[h] *= sigmoid(raw[h] + bias[h]);
            dbias[h] += ddt[h];
        }
    }
    for h in 0..heads {
        grads[ids.dt_bias][h] += dbias[h];
    }

    // convolution: its weight and bias are two parameters of one flat buffer, so their gradients go through locals
    let dconv = &mut scratch.e[..tokens * channels];
    let mut dweight = vec![0.0f32; channels * c.d_conv];
    let mut dconv_bias = vec![0.0f32; channels];
    conv_silu_backward(
        conv_shape(ctx),
        &saved.conv_input,
        &ctx.params[ids.conv_weight],
        &ctx.params[ids.conv_bias],
        dxbc,
        dconv,
        &mut dweight,
        &mut dconv_bias,
    );
    crate::ops::rows::add_scaled(&mut grads[ids.conv_weight], 1.0, &dweight);
    crate::ops::rows::add_scaled(&mut grads[ids.conv_bias], 1.0, &dconv_bias);

    // in and bcdt projections
    copy_columns(dconv, channels, 0, dzx, 2 * di, di, di);
    let dbcdt = &mut scratch.c[..tokens * (bc + heads)];
    copy_columns(dconv, channels, di, dbcdt, bc + heads, 0, bc);
    copy_columns(&ddt, heads, 0, dbcdt, bc + heads, bc, heads);
    let dn = &mut scratch.normed[..];
    project_backward(ctx, ids.input, n, dzx, (dn, Out::Store), grads, &mut scratch.grad);
    let dbcdt = mat(dbcdt, tokens, bc + heads);
    matmul(dbcdt, mat(&ctx.params[ids.bcdt], bc + heads, d), mat_mut(dn, tokens, d), Out::Add);
    let normed = &mut scratch.b[..tokens * d];
    let mut rstd = vec![0.0f32; tokens];
    rmsnorm(x, norm_gain, c.norm_eps, normed, &mut rstd);
    matmul(dbcdt.reversed_axes(), mat(normed, tokens, d), mat_mut(&mut grads[ids.bcdt], bc + heads, d), Out::Add);
}
