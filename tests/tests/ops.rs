//! Every operation of the core against LibTorch: outputs and all gradients, over random shapes.

use std::collections::BTreeMap;

use elleci_core::ops::attention::{
    AttentionGrad, AttentionInput, AttentionShape, attention_backward, attention_forward,
};
use elleci_core::ops::conv::{ConvShape, conv_silu_backward, conv_silu_forward};
use elleci_core::ops::loss::{HeadInput, chunk_tokens, head_loss, head_loss_grad};
use elleci_core::ops::matmul::Out;
use elleci_core::ops::norm::{QuantizedRows, rmsnorm, rmsnorm_backward, rmsnorm_backward_product, rmsnorm_quantize};
use elleci_core::ops::rope::RopeTable;
use elleci_core::ops::ssd::{SsdScratch, SsdShape, ssd_backward, ssd_forward};
use elleci_tests::arbitrary::cases;
use elleci_tests::compare::{Noise, Reference, Tally, check_all, to_f64};
use elleci_tests::ops::{self, Ssd};
use elleci_tests::vjp::{Inputs, Leaves, vjp};
use proptest::prelude::*;
use tch::{Kind, Tensor};

const EPS: f32 = 1e-5;

fn hold<const N: usize>(
    references: &BTreeMap<String, Reference>,
    found: [(&str, Vec<f32>); N],
) -> Result<(), TestCaseError> {
    let found = found.into_iter().map(|(name, values)| (name.to_string(), values)).collect();
    check_all(references, &found, &mut Tally::default()).map_err(TestCaseError::fail)
}

/// Sizes around the blocks that kernels work in, and anything else.
fn size(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..max, 1 => prop::sample::select(vec![15usize, 16, 17, 63, 64, 65])]
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn rms_norm(tokens in size(40), width in 2usize..200, seed: u64) {
        let mut noise = Noise::new(seed);
        let inputs = Inputs::default()
            .normal("x", &[tokens, width], 2.0, &mut noise)
            .normal("g", &[width], 1.0, &mut noise)
            .normal("dy", &[tokens, width], 1.0, &mut noise);
        let references = vjp(&inputs, |i| ops::rms_norm(&i["x"], &i["g"], f64::from(EPS)));
        let (x, g, dy) = (inputs.data("x"), inputs.data("g"), inputs.data("dy"));
        let (mut y, mut rstd, mut dx, mut dg) =
            (vec![0.0; x.len()], vec![0.0; tokens], vec![0.0; x.len()], vec![0.0; width]);
        rmsnorm(x, g, EPS, &mut y, &mut rstd);
        rmsnorm_backward(x, g, &rstd, dy, &mut dx, &mut dg, Out::Store);
        hold(&references, [("y", y), ("dx", dx.clone()), ("dg", dg)])?;
        // Added to what stands there: one more rounding of a sum of at most twice the size.
        let mut added = dx.clone();
        rmsnorm_backward(x, g, &rstd, dy, &mut added, &mut vec![0.0; width], Out::Add);
        for (added, dx) in added.iter().zip(&dx) {
            prop_assert!((added - 2.0 * dx).abs() <= 8.0 * f32::EPSILON * dx.abs().max(1e-3), "{added} {dx}");
        }
    }

    /// `RmsNorm(y * silu(z))` and `RmsNorm(relu(gate)^2 * up)`: the norms whose input never stands in memory.
    #[test]
    fn gated_norms(tokens in size(30), width in 3usize..100, squared: bool, seed: u64) {
        let mut noise = Noise::new(seed);
        let inputs = Inputs::default()
            .normal("a", &[tokens, width], 1.5, &mut noise)
            .normal("b", &[tokens, width], 1.5, &mut noise)
            .normal("g", &[width], 1.0, &mut noise)
            .normal("dy", &[tokens, width], 1.0, &mut noise);
        let product = |i: &Leaves| if squared { i["a"].relu().square() * &i["b"] } else { &i["b"] * i["a"].silu() };
        let references = vjp(&inputs, |i| ops::rms_norm(&product(i), &i["g"], f64::from(EPS)));
        let (a, b, g, dy) = (inputs.data("a"), inputs.data("b"), inputs.data("g"), inputs.data("dy"));
        let f = |a: f32| if squared { a.max(0.0).powi(2) } else { silu(a) };
        let slope = |a: f32| {
            let s = 1.0 / (1.0 + (-a).exp());
            if squared { 2.0 * a.max(0.0) } else { s * (1.0 + a * (1.0 - s)) }
        };
        let fill = |t: usize, row: &mut [f32]| {
            for (i, x) in row.iter_mut().enumerate() {
                *x = f(a[t * width + i]) * b[t * width + i];
            }
        };
        let mut rows = QuantizedRows::new(tokens, width);
        let mut y = vec![0.0; tokens * width];
        rmsnorm_quantize(fill, g, EPS, &mut rows, Some(&mut y));
        let (mut da, mut db, mut dg) = (vec![0.0; y.len()], vec![0.0; y.len()], vec![0.0; width]);
        let split = |t: usize, dx: &[f32], da: &mut [f32], db: &mut [f32]| {
            for (i, dx) in dx.iter().enumerate() {
                da[i] = dx * slope(a[t * width + i]) * b[t * width + i];
                db[i] = dx * f(a[t * width + i]);
            }
        };
        rmsnorm_backward_product(fill, g, &rows.rstd, dy, split, (&mut da, width), (&mut db, width), &mut dg);
        hold(&references, [("y", y), ("da", da), ("db", db), ("dg", dg)])?;
    }

    /// Codes and scales of the quantiser behind a norm.
    #[test]
    fn norm_and_quantiser(tokens in size(30), width in 1usize..300, seed: u64) {
        let mut noise = Noise::new(seed);
        let (x, g) = (noise.normals(tokens * width, 3.0), noise.normals(width, 1.0));
        let mut rows = QuantizedRows::new(tokens, width);
        let mut y = vec![0.0; x.len()];
        let fill = |t: usize, row: &mut [f32]| row.copy_from_slice(&x[t * width..(t + 1) * width]);
        rmsnorm_quantize(fill, &g, EPS, &mut rows, Some(&mut y));
        let double = |v: &[f32], shape: &[i64]| Tensor::from_slice(v).view(shape).to_kind(Kind::Double);
        let n = ops::rms_norm(&double(&x, &[tokens as i64, -1]), &double(&g, &[-1]), f64::from(EPS));
        let (value, step) = ops::activation_steps(&n);
        for (value, code) in to_f64(&value).into_iter().zip(&rows.codes) {
            // The core's value before rounding: norm (a mean of up to 300 squares in 16 partial sums, a root and three
            // products), division and product: under 40 roundings of at most 2^-24 each, of a value of at most 127.
            let past_tie = (value.clamp(-128.0, 127.0) - f64::from(*code)).abs() - 0.5;
            prop_assert!(past_tie <= 127.0 * 40.0 * 2f64.powi(-24), "{value} -> {code}");
        }
        for (step, scale) in to_f64(&step).into_iter().zip(&rows.scales) {
            prop_assert!((step - f64::from(*scale)).abs() <= 40.0 * 2f64.powi(-24) * step, "{step} {scale}");
        }
    }

    #[test]
    fn rotary_embedding(batch in 1usize..4, time in 1usize..200, heads in 1usize..5, half in 1usize..33, seed: u64) {
        let mut noise = Noise::new(seed);
        let d = 2 * half;
        let shape = [batch, time, heads, d];
        let inputs = Inputs::default().normal("x", &shape, 1.0, &mut noise).normal("dy", &shape, 1.0, &mut noise);
        let references = vjp(&inputs, |i| ops::rope(&i["x"], 10_000.0));
        let table = RopeTable::new(d, 10_000.0, time);
        let turn = |data: &[f32], turn: fn(&RopeTable, &mut [f32], usize)| {
            let mut out = data.to_vec();
            for (row, x) in out.chunks_exact_mut(d).enumerate() {
                turn(&table, x, row / heads % time);
            }
            out
        };
        let y = turn(inputs.data("x"), RopeTable::rotate);
        let dx = turn(inputs.data("dy"), RopeTable::unrotate);
        hold(&references, [("y", y), ("dx", dx)])?;
    }

    #[test]
    fn causal_attention(
        batch in 1usize..4, time in size(90), heads in 1usize..4, nope in 1usize..20, half_rope in 1usize..9, value in 1usize..20,
        rank in 1usize..5, seed: u64,
    ) {
        let mut noise = Noise::new(seed);
        let d_rope = 2 * half_rope;
        let (qk, kvw, latent) = (nope + d_rope, nope + value, rank + d_rope);
        let inputs = Inputs::default()
            .normal("q", &[batch, time, heads, qk], 1.5, &mut noise)
            .normal("kv", &[batch, time, heads, kvw], 1.0, &mut noise)
            .normal("ckr", &[batch, time, latent], 1.0, &mut noise)
            .normal("dy", &[batch, time, heads, value], 1.0, &mut noise);
        let [n, v, r, c, h, b, t] = [nope, value, d_rope, rank, heads, batch, time].map(|n| n as i64);
        let references = vjp(&inputs, |i| {
            let k_rope = i["ckr"].narrow(-1, c, r).unsqueeze(2).expand([b, t, h, r], false);
            let k = Tensor::cat(&[i["kv"].narrow(-1, 0, n), k_rope], -1);
            ops::attention(&i["q"], &k, &i["kv"].narrow(-1, n, v))
        });
        let shape = AttentionShape { batch, seq: time, heads, d_nope: nope, d_rope, d_v: value };
        let input = AttentionInput { q: inputs.data("q"), kv: inputs.data("kv"), ckr: inputs.data("ckr"), rank };
        let rows = batch * time;
        let (mut y, mut lse) = (vec![0.0; rows * heads * value], vec![0.0; rows * heads]);
        attention_forward(&shape, input, &mut y, &mut lse);
        let (mut dq, mut dkv) = (vec![0.0; rows * heads * qk], vec![0.0; rows * heads * kvw]);
        let mut shares = vec![0.0; rows * heads * d_rope];
        let grad = AttentionGrad { dq: &mut dq, dkv: &mut dkv, dkr_heads: &mut shares };
        attention_backward(&shape, input, &y, &lse, inputs.data("dy"), grad);
        // The shared key's gradient is the sum of the heads' shares, [batch, heads, time, d_rope].
        let mut dckr = vec![0.0; rows * latent];
        for (i, share) in shares.chunks_exact(d_rope).enumerate() {
            let row = i / (heads * time) * time + i % time;
            for (total, share) in dckr[row * latent + rank..(row + 1) * latent].iter_mut().zip(share) {
                *total += share;
            }
        }
        hold(&references, [("y", y), ("dq", dq), ("dkv", dkv), ("dckr", dckr)])?;
    }

    #[test]
    fn convolution_and_silu(batch in 1usize..4, time in size(40), channels in size(150), taps in 1usize..6, seed: u64) {
        let mut noise = Noise::new(seed);
        let inputs = Inputs::default()
            .normal("x", &[batch, time, channels], 1.0, &mut noise)
            .normal("w", &[channels, taps], 0.7, &mut noise)
            .normal("b", &[channels], 0.5, &mut noise)
            .normal("dy", &[batch, time, channels], 1.0, &mut noise);
        let references = vjp(&inputs, |i| ops::causal_conv(&i["x"], &i["w"], &i["b"]).silu());
        let shape = ConvShape { batch, seq: time, channels, taps };
        let (x, w, b) = (inputs.data("x"), inputs.data("w"), inputs.data("b"));
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let (mut dw, mut db) = (vec![0.0; w.len()], vec![0.0; b.len()]);
        conv_silu_forward(shape, x, w, b, &mut y);
        conv_silu_backward(shape, x, w, b, inputs.data("dy"), &mut dx, &mut dw, &mut db);
        hold(&references, [("y", y), ("dx", dx), ("dw", dw), ("db", db)])?;
    }

    #[test]
    fn state_space_dual(
        batch in 1usize..4, time in prop_oneof![1usize..40, 60usize..70, 120usize..135], heads in 1usize..4, head_dim in size(20),
        d_state in size(20), seed: u64,
    ) {
        let mut noise = Noise::new(seed);
        let shape = SsdShape { batch, seq: time, heads, head_dim, d_state };
        let (rows, width) = (batch * time, shape.width());
        // Step sizes after the softplus: from nearly none to a decay that forgets at once.
        let dt = (0..rows * heads).map(|_| (noise.normal(2.0) - 3.0).exp().min(4.0)).collect();
        let a = (0..heads).map(|_| -noise.normal(1.0).exp()).collect();
        let inputs = Inputs::default()
            .normal("xbc", &[batch, time, width], 1.0, &mut noise)
            .with("dt", &[batch, time, heads], dt)
            .with("a", &[heads], a)
            .normal("d", &[heads], 1.0, &mut noise)
            .normal("dy", &[batch, time, heads, head_dim], 1.0, &mut noise);
        let [inner, n, b, t, h, p] = [heads * head_dim, d_state, batch, time, heads, head_dim].map(|n| n as i64);
        let references = vjp(&inputs, |i| {
            let x = i["xbc"].narrow(-1, 0, inner).reshape([b, t, h, p]);
            let (bm, cm) = (i["xbc"].narrow(-1, inner, n), i["xbc"].narrow(-1, inner + n, n));
            let scan = ops::ssd(&Ssd { x: &x, dt: &i["dt"], a: &i["a"], b: &bm, c: &cm }, i.scan);
            scan + i["d"].unsqueeze(-1) * &x
        });
        let (xbc, dt, a, d) = (inputs.data("xbc"), inputs.data("dt"), inputs.data("a"), inputs.data("d"));
        let (mut y, mut states) = (vec![0.0; rows * shape.d_inner()], vec![0.0; shape.states_len()]);
        let mut scratch = SsdScratch::new();
        ssd_forward(shape, xbc, dt, a, d, &mut y, &mut states, &mut scratch);
        let (mut dxbc, mut ddt) = (vec![0.0; xbc.len()], vec![0.0; dt.len()]);
        let (mut da, mut dd) = (vec![0.0; heads], vec![0.0; heads]);
        let dy = inputs.data("dy");
        ssd_backward(shape, xbc, dt, a, d, &states, dy, &mut dxbc, &mut ddt, &mut da, &mut dd, &mut scratch);
        hold(&references, [("y", y), ("dxbc", dxbc), ("ddt", ddt), ("da", da), ("dd", dd)])?;
    }

    #[test]
    fn head_and_weighted_cross_entropy(tokens in size(70), width in 1usize..40, vocab in 2usize..300, scale in 0.01f32..2.0, seed: u64) {
        let mut noise = Noise::new(seed);
        // Every fifth position is ignored and its target is beyond the vocabulary; one weight is negative.
        let ignored = |i: usize| i % 5 == 3;
        let targets: Vec<u32> = (0..tokens).map(|i| if ignored(i) { u32::MAX } else { noise.below(vocab) as u32 }).collect();
        let weights: Vec<f32> = (0..tokens).map(|i| if ignored(i) { 0.0 } else { 1.0 + noise.normal(1.0) }).collect();
        let inputs = Inputs::default()
            .normal("x", &[tokens, width], 1.0, &mut noise)
            .normal("head", &[vocab, width], 1.0, &mut noise)
            .with("_w", &[tokens], weights)
            .with("dy", &[1], vec![scale]);
        let long: Vec<i64> = targets.iter().map(|&t| i64::from(t).min(vocab as i64 - 1)).collect();
        let references = vjp(&inputs, |i| {
            let logits = ops::linear(&i["x"], &i["head"]);
            ops::weighted_cross_entropy(&logits, &Tensor::from_slice(&long), &i["_w"]).unsqueeze(0)
        });
        let (x, head) = (inputs.data("x"), inputs.data("head"));
        let input = HeadInput { normed: x, head, targets: &targets, weights: inputs.data("_w") };
        let mut logits = vec![0.0; chunk_tokens(tokens, vocab) * vocab];
        let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; head.len()]);
        let loss = head_loss_grad(input, scale, &mut logits, &mut dx, &mut dhead);
        prop_assert_eq!(head_loss(input, &mut logits), loss);
        hold(&references, [("y", vec![loss as f32]), ("dx", dx), ("dhead", dhead)])?;
    }
}
