//! The operations of the specification as tensor equations, one function each. Everything works in the element type
//! of its inputs: float64 gives the truth that the core is held against, float32 what PyTorch itself would give.
//!
//! Shapes are `[batch, time, channels]`; weights are `[out, in]`.

use tch::{Device, IndexOp, Kind, Tensor};

/// How the state-space recurrence is evaluated. Both give the same function; they round differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// One step at a time, as it is defined.
    Sequential,
    /// The matrix form over chunks of this length.
    Chunked(i64),
}

/// `g * x / sqrt(mean(x^2) + eps)` over the last axis.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Tensor {
    let mean = x.square().mean_dim(-1, true, None);
    x * (mean + eps).rsqrt() * gain
}

/// The quantity that is rounded, `x * 127 / amax` over the last axis, and one step of it, `amax / 127` `[.., 1]`.
pub fn activation_steps(x: &Tensor) -> (Tensor, Tensor) {
    let amax = x.abs().amax(-1, true).clamp_min(1e-5);
    (x * (127.0 / &amax), amax / 127.0)
}

/// The int8 codes of `x`, as floats, by the definition: round half to even, clamp.
pub fn activation_codes(x: &Tensor) -> Tensor {
    activation_steps(x).0.round().clamp(-128.0, 127.0)
}

/// `codes * amax / 127` forward, the identity backward.
pub fn quantise_activation(x: &Tensor, codes: &Tensor) -> Tensor {
    let step = activation_steps(&x.detach()).1;
    x + (codes * step - x).detach()
}

/// The absmean scale of a ternary weight.
pub fn gamma(w: &Tensor) -> Tensor {
    w.abs().mean(None).clamp_min(1e-5)
}

/// The ternary codes of `w`, as floats, by the definition.
pub fn weight_codes(w: &Tensor) -> Tensor {
    (w / gamma(w)).round().clamp(-1.0, 1.0)
}

/// `gamma * codes` forward, the identity backward.
pub fn quantise_weight(w: &Tensor, codes: &Tensor) -> Tensor {
    w + (codes * gamma(&w.detach()) - w).detach()
}

/// `x · wᵀ`.
pub fn linear(x: &Tensor, w: &Tensor) -> Tensor {
    x.linear(w, None::<&Tensor>)
}

/// Cosines and sines `[time, d / 2]` of the angles `pos * base^(-2j/d)`.
pub fn rope_tables(time: i64, d: i64, base: f64, kind: Kind) -> (Tensor, Tensor) {
    let j = Tensor::arange_start_step(0, d, 2, (kind, Device::Cpu));
    let inverse = (j * (-base.ln() / d as f64)).exp();
    let angles = Tensor::arange(time, (kind, Device::Cpu)).unsqueeze(-1) * inverse.unsqueeze(0);
    (angles.cos(), angles.sin())
}

/// Rotates the half-split pairs `(j, j + d/2)` of the last axis of `[batch, time, heads, d]`.
pub fn rope(x: &Tensor, base: f64) -> Tensor {
    let (time, d) = (x.size()[1], x.size()[3]);
    let (cos, sin) = rope_tables(time, d, base, x.kind());
    let (cos, sin) = (cos.unsqueeze(0).unsqueeze(2), sin.unsqueeze(0).unsqueeze(2));
    let halves = x.chunk(2, -1);
    let (a, b) = (&halves[0], &halves[1]);
    Tensor::cat(&[a * &cos - b * &sin, b * &cos + a * &sin], -1)
}

/// Causal softmax attention; `q`, `k` `[batch, time, heads, d]`, `v` `[batch, time, heads, d_v]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (time, d) = (q.size()[1], q.size()[3]);
    let scores = q.transpose(1, 2).matmul(&k.transpose(1, 2).transpose(2, 3)) / (d as f64).sqrt();
    let future = Tensor::ones([time, time], (Kind::Bool, Device::Cpu)).triu(1);
    let weights = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, None);
    weights.matmul(&v.transpose(1, 2)).transpose(1, 2)
}

/// Causal convolution per channel; `x` `[batch, time, channels]`, `weight` `[channels, taps]` with the oldest tap first.
pub fn causal_conv(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    let (channels, taps) = weight.size2().expect("the taps are a matrix");
    let padded = x.transpose(1, 2).constant_pad_nd([taps - 1, 0]);
    padded.conv1d(&weight.unsqueeze(1), Some(bias), [1], [0], [1], channels).transpose(1, 2)
}

/// Inputs of the state-space recurrence.
#[derive(Debug)]
pub struct Ssd<'a> {
    /// `[batch, time, heads, head_dim]`
    pub x: &'a Tensor,
    /// Step sizes after the softplus, `[batch, time, heads]`.
    pub dt: &'a Tensor,
    /// Decay rates, negative, `[heads]`.
    pub a: &'a Tensor,
    /// `[batch, time, state]`
    pub b: &'a Tensor,
    /// `[batch, time, state]`
    pub c: &'a Tensor,
}

/// `S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_tᵀ`, `y_t = S_t C_t`; `[batch, time, heads, head_dim]`.
pub fn ssd(inputs: &Ssd<'_>, scan: Scan) -> Tensor {
    match scan {
        Scan::Sequential => ssd_sequential(inputs),
        Scan::Chunked(chunk) => ssd_chunked(inputs, chunk),
    }
}

fn ssd_sequential(s: &Ssd<'_>) -> Tensor {
    let [batch, time, heads, width] = s.x.size()[..] else { panic!("x is [batch, time, heads, head_dim]") };
    let n = s.b.size()[2];
    let mut state = Tensor::zeros([batch, heads, width, n], (s.x.kind(), Device::Cpu));
    let mut ys = Vec::new();
    for t in 0..time {
        let dt = s.dt.i((.., t));
        let decay = (&dt * s.a).exp().unsqueeze(-1).unsqueeze(-1);
        let input = (dt.unsqueeze(-1) * s.x.i((.., t))).unsqueeze(-1);
        state = state * decay + input * s.b.i((.., t)).unsqueeze(1).unsqueeze(1);
        let y = (&state * s.c.i((.., t)).unsqueeze(1).unsqueeze(1)).sum_dim_intlist([-1].as_slice(), false, None);
        ys.push(y);
    }
    Tensor::stack(&ys, 1)
}

fn ssd_chunked(s: &Ssd<'_>, chunk: i64) -> Tensor {
    let [batch, time, heads, width] = s.x.size()[..] else { panic!("x is [batch, time, heads, head_dim]") };
    let n = s.b.size()[2];
    let pad = (chunk - time % chunk) % chunk;
    let chunks = (time + pad) / chunk;
    let none: Option<i64> = None;
    let x = (s.x * s.dt.unsqueeze(-1)).constant_pad_nd([0, 0, 0, 0, 0, pad]).view([batch, chunks, chunk, heads, width]);
    let decays = s.dt.constant_pad_nd([0, 0, 0, pad]) * s.a;
    let cum = decays.view([batch, chunks, chunk, heads]).permute([0, 3, 1, 2]).cumsum(-1, None); // [B, H, K, C]
    let b = s.b.constant_pad_nd([0, 0, 0, pad]).view([batch, chunks, chunk, n]);
    let c = s.c.constant_pad_nd([0, 0, 0, pad]).view([batch, chunks, chunk, n]);
    let future = Tensor::ones([chunk, chunk], (Kind::Bool, Device::Cpu)).triu(1);
    let between = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).masked_fill(&future, f64::NEG_INFINITY).exp();
    let scores = Tensor::einsum("bkln,bksn->bkls", &[&c, &b], none);
    let inside = Tensor::einsum("bkls,bhkls,bkshp->bklhp", &[&scores, &between, &x], none);
    let last = cum.narrow(-1, chunk - 1, 1);
    let states = Tensor::einsum("bksn,bhks,bkshp->bkhpn", &[&b, &(&last - &cum).exp(), &x], none);
    let total = last.exp(); // [B, H, K, 1]
    let mut state = Tensor::zeros([batch, heads, width, n], (x.kind(), Device::Cpu));
    let mut before = Vec::new();
    for k in 0..chunks {
        before.push(state.shallow_clone());
        state = state * total.i((.., .., k)).unsqueeze(-1) + states.i((.., k));
    }
    let before = Tensor::stack(&before, 1);
    let carried = Tensor::einsum("bkln,bkhpn,bhkl->bklhp", &[&c, &before, &cum.exp()], none);
    (inside + carried).reshape([batch, chunks * chunk, heads, width]).narrow(1, 0, time)
}

/// `sum(w_t * (logsumexp(logits_t) - logits_t[target_t]))`; `logits` `[tokens, vocab]`, `targets` int64 `[tokens]`,
/// `weights` `[tokens]`. A position of weight 0 is ignored, whatever its target.
pub fn weighted_cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Tensor {
    let chosen = logits.gather(-1, &targets.unsqueeze(-1), false).squeeze_dim(-1);
    (weights * (logits.logsumexp([-1].as_slice(), false) - chosen)).sum(None)
}

/// The integer product `codes · weightsᵀ` in int64, which rounds nothing.
pub fn integer_product(codes: &Tensor, weights: &Tensor) -> Tensor {
    codes.to_kind(Kind::Int64).matmul(&weights.to_kind(Kind::Int64).transpose(0, 1))
}
