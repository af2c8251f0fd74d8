//! The chunked form, forward: see `chunked.rs` for the formulas.

use alloc::vec::Vec;
use ndarray::{ArrayView2, ArrayViewMut2, s};

use pulp::{Simd, WithSimd};

use super::chunked::*;
use super::product::{PANEL, Product};
use super::{CHUNK, SsdScratch, SsdShape};
use crate::ops::lanes::{dispatch, exp_nonpositive, vectors, vectors_mut};
use crate::ops::matmul::{Out, mat, mat_mut};
use crate::par;
use crate::simd::vectorize;

/// Writes `y`, and saves in `states` (of `shape.states_len()`) what [`ssd_backward`](super::ssd_backward) needs. Sequences start from a
/// zero state.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
#[expect(clippy::too_many_arguments, reason = "the tensors of the op, each once")]
pub fn ssd_forward(
    shape: SsdShape,
    xbc: &[f32],
    dt: &[f32],
    a: &[f32],
    d: &[f32],
    y: &mut [f32],
    states: &mut [f32],
    scratch: &mut SsdScratch,
) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(states.len(), shape.states_len(), "ssd: states");
    let saved = shape.chunks().saturating_sub(1) * shape.d_state * shape.head_dim;
    let mut rest = states;
    let states = tasks(&shape).map(|(_, _, heads)| take(&mut rest, heads * saved)).collect();
    forward(Inputs { shape, xbc, dt, a, d }, y, states, scratch);
}

/// `states`: a slot for every chunk entry but the first, task by task.
fn forward(inputs: Inputs, y: &mut [f32], states: Vec<&mut [f32]>, scratch: &mut SsdScratch) {
    let shape = inputs.shape;
    if shape.tokens() == 0 || shape.d_inner() == 0 {
        return;
    }
    let scratch = scratch.get(scratch_len(&shape, Pass::Forward));
    let y = task_columns(&shape, mat_mut(y, shape.tokens(), shape.d_inner()), shape.head_dim);
    let scratch = scratch.chunks_exact_mut(task_scratch_len(&shape, Pass::Forward));
    let items: Vec<_> = tasks(&shape).zip(y).zip(states.into_iter().zip(scratch)).collect();
    par::for_each(items, |(((batch, head, heads), mut y), (mut states, scratch))| {
        for group in (0..heads).step_by(shape.group_heads()) {
            let span = |chunk| inputs.span(batch, chunk, head, group, heads);
            forward_group(&inputs, span, &mut y, &mut states, scratch);
        }
    });
}

fn forward_group(
    inputs: &Inputs,
    span: impl Fn(usize) -> Span,
    y: &mut ArrayViewMut2<f32>,
    states: &mut &mut [f32],
    mut scratch: &mut [f32],
) {
    let shape = inputs.shape;
    let (p_dim, channels) = (shape.head_dim, inputs.channels(span(0)));
    let mut decays = Decays::new(&mut scratch, shape.group_heads());
    let (g, m) = (take(&mut scratch, CHUNK * CHUNK), take(&mut scratch, CHUNK * CHUNK));
    let weighted = take(&mut scratch, CHUNK * channels);
    let panel = take(&mut scratch, PANEL);
    m.fill(0.0);
    g.fill(0.0);
    let first = span(0).task_head * p_dim;
    let columns = s![.., first..first + channels];
    let saved = take(states, (shape.chunks() - 1) * shape.d_state * channels);
    let mut y = y.slice_mut(columns);
    for chunk in 0..shape.chunks() {
        let span = span(chunk);
        let mut y = y.slice_mut(s![span.step..span.step + span.len, ..]);
        let entry = saved_entry(saved, chunk, shape.d_state, channels);
        let carried = entry.is_some();
        if let Some(entry) = entry {
            let a = inputs.c_left(span, false);
            dispatch(Product { a, b: entry, c: y.view_mut(), out: Out::Store, panel });
        }
        vectorize(
            #[inline(always)]
            || {
                decays.fill(inputs, span);
                read_out(inputs, span, &decays, carried, &mut y);
                scale_x(inputs, span, &decays, weighted);
            },
        );
        let (a, g_view) = (inputs.c_left(span, false), view_mut(g, span.len, span.len, CHUNK));
        dispatch(Product { a, b: inputs.b(span).reversed_axes(), c: g_view, out: Out::Store, panel });
        for h in 0..span.heads {
            let row = h * CHUNK..(h + 1) * CHUNK;
            dispatch(Mix { len: span.len, cum: &decays.cum[row.clone()], dt: &decays.dt[row], g, m });
            let y = y.slice_mut(s![.., h * p_dim..(h + 1) * p_dim]);
            let a = triangle(m, span.len, false);
            dispatch(Product { a, b: inputs.x_head(span, h), c: y, out: Out::Add, panel });
        }
        let weighted = mat(&weighted[..span.len * channels], span.len, channels);
        advance(inputs, span, &decays, saved, weighted, panel);
    }
}

/// `next = exp(cum_last) entry + B^T weighted`, unless the chunk is the last.
fn advance(
    inputs: &Inputs,
    span: Span,
    decays: &Decays,
    saved: &mut [f32],
    weighted: ArrayView2<f32>,
    panel: &mut [f32],
) {
    let (n_dim, p_dim) = (inputs.shape.d_state, inputs.shape.head_dim);
    let (channels, chunk) = (inputs.channels(span), span.step / CHUNK);
    if chunk + 1 == inputs.shape.chunks() {
        return;
    }
    let (before, after) = saved.split_at_mut(chunk * n_dim * channels);
    let next = &mut after[..n_dim * channels];
    let out = if chunk == 0 { Out::Store } else { Out::Add };
    if chunk > 0 {
        let entry = &before[(chunk - 1) * n_dim * channels..];
        vectorize(
            #[inline(always)]
            || {
                let rows = next.chunks_exact_mut(channels).zip(entry.chunks_exact(channels));
                for (next, entry) in rows {
                    let heads = next.chunks_exact_mut(p_dim).zip(entry.chunks_exact(p_dim));
                    for (h, (next, entry)) in heads.enumerate() {
                        let decay = decays.whole(span, h);
                        next.iter_mut().zip(entry).for_each(|(next, entry)| *next = decay * entry);
                    }
                }
            },
        );
    }
    let next = mat_mut(next, n_dim, channels);
    dispatch(Product { a: inputs.b_left(span, true), b: weighted, c: next, out, panel });
}

/// `y = e o y + d x`, where y is `C H` if the entry state is `carried`, and nothing yet if that is zero.
#[inline(always)]
fn read_out(inputs: &Inputs, span: Span, decays: &Decays, carried: bool, y: &mut ArrayViewMut2<f32>) {
    let p_dim = inputs.shape.head_dim;
    for i in 0..span.len {
        let heads = row_mut(y, i).chunks_exact_mut(p_dim).zip(inputs.x_row(span, i).chunks_exact(p_dim));
        for (h, (y, x)) in heads.enumerate() {
            let (e, d) = (decays.entry[h * CHUNK + i], inputs.d[span.head + h]);
            if carried {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = e * *y + d * x);
            } else {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = d * x);
            }
        }
    }
}

/// `m = G o L o dt` of a head `[len, len]`, rows CHUNK apart; m stays zero above the diagonal.
struct Mix<'a> {
    len: usize,
    cum: &'a [f32],
    dt: &'a [f32],
    g: &'a [f32],
    m: &'a mut [f32],
}

impl WithSimd for Mix<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (all_cum, dt) = (vectors::<S>(self.cum), vectors::<S>(self.dt));
        for i in 0..self.len {
            let row = i * CHUNK..i * CHUNK + triangle_row(i);
            let (g, m) = (vectors::<S>(&self.g[row.clone()]), vectors_mut::<S>(&mut self.m[row]));
            let (cum, dt) = (&all_cum[..m.len()], &dt[..m.len()]);
            let here = simd.splat_f32s(self.cum[i]);
            for v in 0..m.len() {
                let decay = exp_nonpositive(simd, simd.sub_f32s(here, cum[v]));
                let decay = simd.mul_f32s(decay, triangle_mask::<S>(i, v, false));
                m[v] = simd.mul_f32s(simd.mul_f32s(g[v], decay), dt[v]);
            }
        }
    }
}
