//! Attention and rotation.

use elleci_core::ops::attention::{
    AttentionGrad, AttentionInput, AttentionShape, attention_backward, attention_forward,
};
use elleci_core::ops::rope::RopeTable;
use elleci_cuda::ops::Products;
use elleci_cuda::ops::attention::{self, Heads, Input, Output, Rotated, Towards};

use super::{BF16, F32};
use crate::machine::{Bench, Numbers, close, read};

fn check(products: Products, bound: f64, h: Heads) {
    let mut numbers = Numbers::new(h.seq as u64);
    let t = h.tokens();
    let (qk, kv_row) = (h.d_nope + h.d_rope, h.d_nope + h.d_v);
    let q = numbers.vec(t * h.heads * qk, 1.5);
    let kv = numbers.vec(t * h.heads * kv_row, 1.5);
    let ckr = numbers.vec(t * (h.kv_rank + h.d_rope), 1.5);
    let d_o = numbers.vec(t * h.heads * h.d_v, 1.0);
    let mut bench = Bench::new();
    let input = Input { q: bench.floats(&q), kv: bench.floats(&kv), ckr: bench.floats(&ckr) };
    let (o, lse) = (bench.room(d_o.len()), bench.room(t * h.heads));
    let out = Output { lse, o, d_o: bench.floats(&d_o), delta: bench.room(t * h.heads) };
    let towards =
        Towards { dq: bench.room(q.len()), dkv: bench.room(kv.len()), dkr_heads: bench.room(t * h.heads * h.d_rope) };
    let dckr = bench.floats(&vec![0.0; ckr.len()]);
    let mut device = bench.start(37);
    attention::forward(&mut device, products, h, input, o, lse).unwrap();
    attention::backward(&mut device, products, h, input, out, towards).unwrap();
    attention::sum_heads(&mut device, h, towards.dkr_heads, dckr).unwrap();

    let shape =
        AttentionShape { batch: h.batch, seq: h.seq, heads: h.heads, d_nope: h.d_nope, d_rope: h.d_rope, d_v: h.d_v };
    let core = AttentionInput { q: &q, kv: &kv, ckr: &ckr, rank: h.kv_rank };
    let (mut want_o, mut want_lse) = (vec![0.0; d_o.len()], vec![0.0; t * h.heads]);
    attention_forward(&shape, core, &mut want_o, &mut want_lse);
    let (mut dq, mut dkv, mut dkr) = (vec![0.0; q.len()], vec![0.0; kv.len()], vec![0.0; t * h.heads * h.d_rope]);
    let grad = AttentionGrad { dq: &mut dq, dkv: &mut dkv, dkr_heads: &mut dkr };
    attention_backward(&shape, core, &want_o, &want_lse, &d_o, grad);
    close("o", &read(&mut device, o), &want_o, bound);
    close("lse", &read(&mut device, lse), &want_lse, bound);
    close("dq", &read(&mut device, towards.dq), &dq, bound);
    close("dkv", &read(&mut device, towards.dkv), &dkv, bound);
    // The core keeps the shares as [batch, heads, seq, d_rope].
    let (mut want, width) = (vec![0.0; ckr.len()], h.kv_rank + h.d_rope);
    for (i, share) in dkr.chunks_exact(h.d_rope).enumerate() {
        let token = i / (h.heads * h.seq) * h.seq + i % h.seq;
        for (j, v) in share.iter().enumerate() {
            want[token * width + h.kv_rank + j] += v;
        }
    }
    close("dckr", &read(&mut device, dckr), &want, bound);
}

#[test]
fn attention_in_float32() {
    check(Products::F32, 2.0 * F32, Heads { batch: 2, seq: 70, heads: 2, d_nope: 5, d_rope: 4, d_v: 7, kv_rank: 3 });
    check(Products::F32, 2.0 * F32, Heads { batch: 1, seq: 1, heads: 1, d_nope: 1, d_rope: 2, d_v: 1, kv_rank: 1 });
}

#[test]
fn attention_on_tensor_cores() {
    let wide = Heads { batch: 1, seq: 80, heads: 1, d_nope: 64, d_rope: 64, d_v: 128, kv_rank: 2 };
    check(Products::Bf16, BF16, wide);
}

#[test]
fn rotation_equals_the_cores_bits() {
    let mut numbers = Numbers::new(10);
    let h = Heads { batch: 2, seq: 9, heads: 3, d_nope: 2, d_rope: 6, d_v: 4, kv_rank: 5 };
    let data = numbers.vec(h.tokens() * h.heads * 8, 1.0);
    let table = RopeTable::new(h.d_rope, 10_000.0, h.seq);
    let (mut cos, mut sin, mut want) = (Vec::new(), Vec::new(), data.clone());
    for pos in 0..h.seq {
        let mut row = [1.0f32, 1.0, 1.0, 0.0, 0.0, 0.0];
        table.rotate(&mut row, pos);
        cos.extend(&row[..3]);
        sin.extend(&row[3..]);
    }
    for (t, row) in want.chunks_exact_mut(h.heads * 8).enumerate() {
        row.chunks_exact_mut(8).for_each(|head| table.rotate(&mut head[2..], t % h.seq));
    }
    let mut bench = Bench::new();
    let (buf, table_buf) = (bench.floats(&data), bench.floats(&[cos, sin].concat()));
    let mut device = bench.start(41);
    let at = Rotated { groups: h.heads, group: 8, offset: 2 };
    attention::rotate(&mut device, h, buf, at, table_buf, false).unwrap();
    assert_eq!(read(&mut device, buf), want);
    attention::rotate(&mut device, h, buf, at, table_buf, true).unwrap();
    close("and back", &read(&mut device, buf), &data, F32);
}
