//! Norms, convolution, step sizes, embedding and loss.

use elleci_core::ops::activation::{sigmoid, silu, silu_grad, softplus};
use elleci_core::ops::conv::{ConvShape as CoreConv, conv_silu_backward, conv_silu_forward};
use elleci_core::ops::matmul::Out;
use elleci_core::ops::norm::{QuantizedRows, rmsnorm_backward, rmsnorm_quantize};
use elleci_cuda::arena::Dtype;
use elleci_cuda::ops::loss::{self, Occurrences, Targets};
use elleci_cuda::ops::mamba::{self, ConvShape, Filters};
use elleci_cuda::ops::norm::{self, Source};
use elleci_cuda::ops::{Columns, Rows, padded};

use super::F32;
use crate::machine::{Bench, Numbers, close, read, read_bytes};

const EPS: f32 = 1e-5;

/// The row that a source stands for, and the gradients of its operands from that of the row.
fn made(kind: usize, a: f32, b: f32) -> f32 {
    match kind {
        0 => a,
        1 => a * silu(b),
        _ => a.max(0.0) * a.max(0.0) * b,
    }
}

fn through(kind: usize, a: f32, b: f32, dx: f32) -> (f32, f32) {
    match kind {
        0 => (dx, 0.0),
        1 => (dx * silu(b), dx * a * silu_grad(b)),
        _ => (dx * 2.0 * a.max(0.0) * b, dx * a.max(0.0) * a.max(0.0)),
    }
}

#[test]
fn norms_with_all_sources_forward_and_backward() {
    let mut numbers = Numbers::new(5);
    for kind in 0..3 {
        for (rows, width) in [(1, 1), (5, 70), (9, 300)] {
            let stride = width + 3;
            let (a, b) = (numbers.vec(rows * width, 1.5), numbers.vec(rows * stride, 1.5));
            let gain: Vec<f32> = numbers.vec(width, 0.2).iter().map(|g| 1.0 + g).collect();
            let dn = numbers.vec(rows * width, 1.0);
            let mut bench = Bench::new();
            let (a_buf, b_buf, gain_buf, dn_buf) =
                (bench.floats(&a), bench.floats(&b), bench.floats(&gain), bench.floats(&dn));
            let (codes, scales, rstd, normed) = (
                bench.empty(Dtype::I8, rows * padded(width)),
                bench.room(rows),
                bench.room(rows),
                bench.room(rows * width),
            );
            let base = numbers.vec(rows * width, 1.0);
            let da = bench.floats(&base);
            let db = bench.room(rows * stride);
            let dgain = bench.floats(&vec![1.0; width]);
            let partials = bench.room(norm::partials_len(rows, width));
            let mut device = bench.start(19);
            let (x, y) = (Columns::all(a_buf, width), Columns { buf: b_buf, from: 2, stride });
            let source = [Source::Plain(x), Source::Gated(x, y), Source::Squared(x, y)][kind];
            let out = Rows { codes, scales, rstd };
            norm::quantize(&mut device, source, gain_buf, EPS, out, Some(normed)).unwrap();

            let b_at = |i: usize| b[i / width * stride + 2 + i % width];
            let row: Vec<f32> = (0..rows * width).map(|i| made(kind, a[i], b_at(i))).collect();
            let mut want = QuantizedRows::new(rows, width);
            let mut want_normed = vec![0.0; rows * width];
            let fill = |t: usize, r: &mut [f32]| r.copy_from_slice(&row[t * width..(t + 1) * width]);
            rmsnorm_quantize(fill, &gain, EPS, &mut want, Some(&mut want_normed));
            close("rstd", &read(&mut device, rstd), &want.rstd, F32);
            close("scales", &read(&mut device, scales), &want.scales, F32);
            let got_normed = read(&mut device, normed);
            close("normed", &got_normed, &want_normed, F32);
            // The codes are exactly those of the device's own float rows; the core's differ where rounding decides.
            let codes = read_bytes(&mut device, codes);
            for r in 0..rows {
                let mut exact = vec![0i8; width];
                elleci_core::ternary::quantize_row_reference(&got_normed[r * width..(r + 1) * width], &mut exact);
                let own: Vec<i8> = codes[r * padded(width)..][..padded(width)].iter().map(|c| *c as i8).collect();
                assert_eq!(own[..width], exact);
                assert!(own[width..].iter().all(|c| *c == 0), "padding");
            }

            let to = (Columns::all(da, width), (kind > 0).then_some(Columns { buf: db, from: 2, stride }));
            norm::backward(&mut device, source, gain_buf, rstd, dn_buf, to, kind == 0, partials, dgain).unwrap();
            let (mut dx, mut want_dgain) = (vec![0.0; rows * width], vec![1.0; width]);
            rmsnorm_backward(&row, &gain, &want.rstd, &dn, &mut dx, &mut want_dgain, Out::Store);
            let want_da: Vec<f32> = (0..rows * width)
                .map(|i| through(kind, a[i], b_at(i), dx[i]).0 + if kind == 0 { base[i] } else { 0.0 })
                .collect();
            // One row of one channel has no gradient but rounding: the bound is for a sum, not for its cancellation.
            if width > 1 {
                close("da", &read(&mut device, da), &want_da, F32);
            }
            close("dgain", &read(&mut device, dgain), &want_dgain, F32);
            if kind > 0 && width > 1 {
                for r in 0..rows {
                    let bytes = read_bytes(&mut device, db.part(r * stride + 2, width));
                    let got: Vec<f32> = bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
                    let at = |i: usize| r * width + i;
                    let want: Vec<f32> =
                        (0..width).map(|i| through(kind, a[at(i)], b_at(at(i)), dx[at(i)]).1).collect();
                    close("db", &got, &want, 4.0 * F32);
                }
            }
        }
    }
}

#[test]
fn convolution_and_step_sizes_where_the_projections_left_them() {
    let mut numbers = Numbers::new(6);
    let (batch, seq) = (2, 37);
    let s = ConvShape { tokens: batch * seq, seq, inner: 20, d_state: 7, heads: 5, taps: 4 };
    let (channels, width) = (s.channels(), s.bcdt_width());
    let (zx, bcdt) = (numbers.vec(s.tokens * 2 * s.inner, 1.0), numbers.vec(s.tokens * width, 1.0));
    let (weight, bias) = (numbers.vec(channels * s.taps, 0.5), numbers.vec(channels, 0.5));
    let (dout, dt_bias, ddt) =
        (numbers.vec(s.tokens * channels, 1.0), numbers.vec(s.heads, 1.0), numbers.vec(s.tokens * s.heads, 1.0));
    let mut bench = Bench::new();
    let bufs = (bench.floats(&zx), bench.floats(&bcdt));
    let filters = Filters { weight: bench.floats(&weight), bias: bench.floats(&bias) };
    let dfilters = Filters { weight: bench.floats(&vec![0.0; weight.len()]), bias: bench.floats(&vec![0.0; channels]) };
    let (out, dout_buf) = (bench.room(s.tokens * channels), bench.floats(&dout));
    let (dzx, dbcdt) = (bench.floats(&vec![9.0; zx.len()]), bench.room(bcdt.len()));
    let partials = bench.room(s.conv_partials_len());
    let steps = bench.room(s.step_partials_len());
    let (dt_bias_buf, dt, ddt_buf) = (bench.floats(&dt_bias), bench.room(s.tokens * s.heads), bench.floats(&ddt));
    let dbias = bench.floats(&vec![0.0; s.heads]);
    let mut device = bench.start(23);

    let mut input = Vec::new();
    for t in 0..s.tokens {
        input.extend(&zx[t * 2 * s.inner + s.inner..(t + 1) * 2 * s.inner]);
        input.extend(&bcdt[t * width..t * width + 2 * s.d_state]);
    }
    let core = CoreConv { batch, seq, channels, taps: s.taps };
    let mut want = vec![0.0; s.tokens * channels];
    conv_silu_forward(core, &input, &weight, &bias, &mut want);
    mamba::conv_silu(&mut device, s, bufs.0, bufs.1, filters, out).unwrap();
    close("conv", &read(&mut device, out), &want, F32);

    let (mut dinput, mut dweight, mut dconv_bias) =
        (vec![0.0; input.len()], vec![0.0; weight.len()], vec![0.0; channels]);
    conv_silu_backward(core, &input, &weight, &bias, &dout, &mut dinput, &mut dweight, &mut dconv_bias);
    mamba::step_sizes(&mut device, s, bufs.1, dt_bias_buf, dt).unwrap();
    mamba::step_sizes_backward(&mut device, s, bufs.1, dt_bias_buf, ddt_buf, dbcdt, steps, dbias).unwrap();
    mamba::conv_backward(&mut device, s, bufs.0, bufs.1, filters, dout_buf, (dzx, dbcdt), partials, dfilters).unwrap();
    close("taps", &read(&mut device, dfilters.weight), &dweight, F32);
    close("bias", &read(&mut device, dfilters.bias), &dconv_bias, F32);
    let (got_dzx, got_dbcdt) = (read(&mut device, dzx), read(&mut device, dbcdt));
    let raw = |t: usize, h: usize| bcdt[t * width + 2 * s.d_state + h] + dt_bias[h];
    let (mut want_dzx, mut want_dbcdt, mut want_dt, mut want_dbias) =
        (vec![9.0; zx.len()], vec![], vec![], vec![0.0; s.heads]);
    for t in 0..s.tokens {
        let row = &dinput[t * channels..(t + 1) * channels];
        want_dzx[t * 2 * s.inner + s.inner..(t + 1) * 2 * s.inner].copy_from_slice(&row[..s.inner]);
        want_dbcdt.extend(&row[s.inner..]);
        for h in 0..s.heads {
            want_dt.push(softplus(raw(t, h)));
            let d = ddt[t * s.heads + h] * sigmoid(raw(t, h));
            want_dbcdt.push(d);
            want_dbias[h] += d;
        }
    }
    close("dzx", &got_dzx, &want_dzx, F32);
    close("dbcdt", &got_dbcdt, &want_dbcdt, F32);
    close("dt", &read(&mut device, dt), &want_dt, F32);
    close("dt_bias", &read(&mut device, dbias), &want_dbias, F32);
}

#[test]
fn embedding_rows_and_their_gradients() {
    let mut numbers = Numbers::new(8);
    let (vocab, d, n) = (11, 33, 40);
    let tokens: Vec<u32> = (0..n).map(|_| numbers.below(vocab)).collect();
    let (table, dh) = (numbers.vec(vocab as usize * d, 1.0), numbers.vec(n as usize * d, 1.0));
    let (positions, starts, count) = Occurrences::of(&tokens);
    let mut bench = Bench::new();
    let (tokens_buf, table_buf, dh_buf) = (bench.words(&tokens), bench.floats(&table), bench.floats(&dh));
    let at =
        Occurrences { positions: bench.words(&positions), starts: bench.words(&starts), count: bench.words(&count) };
    let (h, grad) = (bench.room(n as usize * d), bench.floats(&vec![0.5; table.len()]));
    let mut device = bench.start(29);
    loss::embed(&mut device, tokens_buf, table_buf, d, h).unwrap();
    loss::embed_backward(&mut device, tokens_buf, at, dh_buf, d, grad).unwrap();
    let (mut want_h, mut want) = (Vec::<f32>::new(), vec![0.5f32; table.len()]);
    for (p, t) in tokens.iter().enumerate() {
        want_h.extend(&table[*t as usize * d..(*t as usize + 1) * d]);
        for i in 0..d {
            want[*t as usize * d + i] += dh[p * d + i];
        }
    }
    assert_eq!(read(&mut device, h), want_h);
    // The same additions in the same order.
    assert_eq!(read(&mut device, grad), want);
}

#[test]
fn cross_entropy_and_its_gradient() {
    let mut numbers = Numbers::new(9);
    for (rows, vocab) in [(4, 3), (7, 700)] {
        let logits = numbers.vec(rows * vocab, 8.0);
        let targets: Vec<u32> = (0..rows).map(|_| numbers.below(vocab as u32)).collect();
        let weights: Vec<f32> = (0..rows).map(|i| [1.0, 0.0, -0.5][i % 3]).collect();
        let scale = 0.125f32;
        let mut bench = Bench::new();
        let (logits_buf, losses, total) =
            (bench.floats(&logits), bench.empty(Dtype::F64, rows), bench.empty(Dtype::F64, 1));
        let t =
            Targets { targets: bench.words(&targets), weights: bench.floats(&weights), scale: bench.floats(&[scale]) };
        let step = bench.bytes(Dtype::F64, 1, 3.0f64.to_le_bytes().to_vec());
        let mut device = bench.start(31);
        for grad in [false, true] {
            loss::cross_entropy(&mut device, logits_buf, vocab, t, grad, losses).unwrap();
            loss::sum(&mut device, losses, total, grad.then_some(step)).unwrap();
            let (mut want, mut want_loss) = (Vec::new(), 0.0f64);
            for r in 0..rows {
                let row: Vec<f64> = logits[r * vocab..(r + 1) * vocab].iter().map(|v| *v as f64).collect();
                let max = row.iter().fold(f64::MIN, |m, v| m.max(*v));
                let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
                want_loss += weights[r] as f64 * (sum.ln() + max - row[targets[r] as usize]);
                want.extend(row.iter().enumerate().map(|(i, v)| {
                    let hit = if i == targets[r] as usize { 1.0 } else { 0.0 };
                    (weights[r] as f64 * scale as f64 * ((v - max).exp() / sum - hit)) as f32
                }));
            }
            let got = f64::from_le_bytes(read_bytes(&mut device, total).try_into().unwrap());
            // The sum of exponentials is float32: relative 2e-6, and so absolute in its logarithm.
            assert!((got - want_loss).abs() <= 2e-6 * rows as f64, "{got} {want_loss}");
            let of_step = f64::from_le_bytes(read_bytes(&mut device, step).try_into().unwrap());
            assert_eq!(of_step, if grad { 3.0 + got } else { 3.0 }, "only a step with gradients counts");
            let expected = if grad { want } else { logits.clone() };
            close("logits", &read(&mut device, logits_buf), &expected, F32);
        }
    }
}
