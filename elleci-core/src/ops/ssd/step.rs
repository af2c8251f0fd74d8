//! The recurrence step by step: for inference. The chunked form (`chunked.rs`) does fewer operations, but how it rounds depends on where the
//! chunks begin, and it is no faster on prompts (docs/LOG.md).
//!
//! A single step takes [`ROWS`] rows of the state at a time, so that what all rows share is loaded once for them. Many steps take
//! columns of the state, as wide as a cache line, through all of them before the next: these stay in the first-level cache, and what a
//! block of [`STEPS`] steps needs of a vector of channels stays in registers. The order of all additions is that of the steps one by one.

use alloc::vec;
use alloc::vec::Vec;
use core::array::from_fn;

use ndarray::{ArrayViewMut2, Axis};
use pulp::{Simd, WithSimd};

use super::SsdShape;
use super::chunked::row_mut;
use crate::ops::activation::exp;
use crate::ops::lanes::dispatch;
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{prefetch_later, prefetch_run, vectorize};

/// Steps from which on it pays to take columns of the state out (`cargo bench --bench ssd`); fewer go one by one.
const MANY: usize = 8;
/// Steps that a vector of channels takes together.
const STEPS: usize = 4;
/// Channels whose state is taken out together: a cache line, which would be read again for every vector in it otherwise.
const COLUMNS: usize = 16;
/// Rows of the state that take a single step together.
const ROWS: usize = 4;

/// Advances every sequence of a batch by `shape.seq` tokens, one step after the other: `state` (see [`SsdShape::state_len`]) is
/// updated in place and `y` `[tokens, d_inner]` is written. A zero state starts a sequence. The bits do not depend on how steps are
/// dealt to calls.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
pub fn ssd_steps(shape: SsdShape, xbc: &[f32], dt: &[f32], a: &[f32], d: &[f32], state: &mut [f32], y: &mut [f32]) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(state.len(), shape.batch * shape.state_len(), "ssd steps: state");
    let (d_inner, group) = (shape.d_inner(), shape.group_heads() * shape.head_dim);
    if d_inner == 0 || shape.tokens() == 0 {
        return;
    }
    for (i, y) in y.chunks_exact_mut(shape.seq * d_inner).enumerate() {
        let state = &mut state[i * shape.state_len()..][..shape.state_len()];
        let xbc = &xbc[i * shape.seq * shape.width()..][..shape.seq * shape.width()];
        let dt = &dt[i * shape.seq * shape.heads..][..shape.seq * shape.heads];
        let mut y = mat_mut(y, shape.seq, d_inner);
        // A task is a group of heads: its state is one run of memory, so that no two threads ask for lines of the same page.
        let outputs = y.axis_chunks_iter_mut(Axis(1), group);
        let items: Vec<_> = state.chunks_mut((shape.d_state * group).max(1)).zip(outputs).enumerate().collect();
        par::for_each(items, |(task, (state, mut y))| {
            let group = Group { shape, first_head: task * shape.group_heads(), xbc, dt, a, d };
            group.advance(state, &mut y);
        });
    }
}

/// Tells idle threads that [`ssd_steps`] with this `state` of one sequence comes next.
pub fn ssd_steps_expect(shape: SsdShape, state: &[f32]) {
    let task = shape.d_state * shape.group_heads() * shape.head_dim;
    par::expect(state.len().div_ceil(task.max(1)), |i| state.as_ptr().wrapping_add(i * task).cast());
}

/// A group of heads of one sequence.
struct Group<'a> {
    shape: SsdShape,
    first_head: usize,
    /// Of the sequence: `[seq, width]` and `[seq, heads]`
    xbc: &'a [f32],
    dt: &'a [f32],
    a: &'a [f32],
    d: &'a [f32],
}

impl Group<'_> {
    /// All steps. `y` `[seq, channels]`.
    fn advance(&self, state: &mut [f32], y: &mut ArrayViewMut2<f32>) {
        let (shape, channels) = (self.shape, y.ncols());
        let mut scratch = vec![0.0; 3 * shape.seq * channels];
        let (decay, rest) = scratch.split_at_mut(shape.seq * channels);
        let (u, out) = rest.split_at_mut(shape.seq * channels);
        let rows = || self.xbc.chunks_exact(shape.width()).zip(self.dt.chunks_exact(shape.heads));
        vectorize(
            #[inline(always)]
            || {
                let steps = decay.chunks_exact_mut(channels).zip(u.chunks_exact_mut(channels));
                for (((decay, u), y), (x, dt)) in steps.zip(out.chunks_exact_mut(channels)).zip(rows()) {
                    let x = &x[self.first_head * shape.head_dim..][..channels];
                    let heads = decay.chunks_mut(shape.head_dim).zip(u.chunks_mut(shape.head_dim));
                    let outputs = y.chunks_mut(shape.head_dim).zip(x.chunks(shape.head_dim));
                    for (h, ((decay, u), (y, x))) in heads.zip(outputs).enumerate() {
                        let h = self.first_head + h;
                        decay.fill(exp(dt[h] * self.a[h]));
                        for ((u, y), x) in u.iter_mut().zip(y).zip(x) {
                            *u = dt[h] * x;
                            *y = self.d[h] * x;
                        }
                    }
                }
            },
        );
        let bc: Vec<[&[f32]; 2]> = rows()
            .map(|(x, _)| {
                let (b, c) = x[shape.d_inner()..].split_at(shape.d_state);
                [b, &c[..shape.d_state]]
            })
            .collect();
        if bc.len() < MANY {
            let steps = decay.chunks_exact(channels).zip(u.chunks_exact(channels)).zip(out.chunks_exact_mut(channels));
            for ([b, c], ((decay, u), y)) in bc.iter().zip(steps) {
                dispatch(Step { state: &mut *state, decay, u, b, c, y });
            }
        } else {
            dispatch(Run { state, decay, u, bc: &bc, y: out });
        }
        for (t, out) in out.chunks_exact(channels).enumerate() {
            row_mut(y, t).copy_from_slice(out);
        }
    }
}

/// `s = decay ⊙ s + b[n] u` and `y += c[n] s` for every row n of the state.
struct Step<'a> {
    /// `[d_state, channels]`
    state: &'a mut [f32],
    /// `[channels]`
    decay: &'a [f32],
    u: &'a [f32],
    /// `[d_state]` each
    b: &'a [f32],
    c: &'a [f32],
    /// `[channels]`
    y: &'a mut [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (rows, together) = (self.b.len(), self.b.len() / ROWS * ROWS);
        for row in (0..together).step_by(ROWS) {
            self.rows::<S, ROWS>(simd, row);
        }
        for row in together..rows {
            self.rows::<S, 1>(simd, row);
        }
    }
}

impl Step<'_> {
    /// Rows `first .. first + R`.
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        let channels = self.decay.len();
        let mut rest = &mut self.state[first * channels..(first + R) * channels];
        let rows: [(&mut [S::f32s], &mut [f32]); R] = from_fn(|_| {
            let (row, later) = core::mem::take(&mut rest).split_at_mut(channels);
            rest = later;
            S::as_mut_simd_f32s(row)
        });
        let (ys, y_tail) = S::as_mut_simd_f32s(self.y);
        let (decay, decay_tail) = S::as_simd_f32s(self.decay);
        let (u, u_tail) = S::as_simd_f32s(self.u);
        let (mut b, mut c) = ([simd.splat_f32s(0.0); R], [simd.splat_f32s(0.0); R]);
        for r in 0..R {
            b[r] = simd.splat_f32s(self.b[first + r]);
            c[r] = simd.splat_f32s(self.c[first + r]);
        }
        for v in 0..channels / S::F32_LANES {
            let (decay, u, mut y) = (decay[v], u[v], ys[v]);
            for r in 0..R {
                if (v * S::F32_LANES).is_multiple_of(16) {
                    prefetch_run(rows[r].0.as_ptr().wrapping_add(v).cast());
                }
                let s = simd.mul_add_e_f32s(decay, rows[r].0[v], simd.mul_f32s(b[r], u));
                rows[r].0[v] = s;
                y = simd.mul_add_e_f32s(c[r], s, y);
            }
            ys[v] = y;
        }
        for (i, y) in y_tail.iter_mut().enumerate() {
            for r in 0..R {
                let s = &mut rows[r].1[i];
                *s = decay_tail[i] * *s + self.b[first + r] * u_tail[i];
                *y += self.c[first + r] * *s;
            }
        }
    }
}

/// [`Step`] for several steps, one after the other.
struct Run<'a> {
    /// `[d_state, channels]`
    state: &'a mut [f32],
    /// `[steps, channels]`
    decay: &'a [f32],
    u: &'a [f32],
    /// b and c of every step, `[d_state]` each
    bc: &'a [[&'a [f32]; 2]],
    /// `[steps, channels]`
    y: &'a mut [f32],
}

impl WithSimd for Run<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let channels = self.decay.len() / self.bc.len();
        let vectors = channels / S::F32_LANES;
        let (d_state, together) = (self.bc[0][0].len(), (COLUMNS / S::F32_LANES).max(1));
        let mut columns = vec![simd.splat_f32s(0.0); together * d_state];
        for v in (0..vectors).step_by(together) {
            let together = together.min(vectors - v);
            for (n, row) in self.state.chunks_exact(channels).enumerate() {
                let row = &S::as_simd_f32s(row).0[v..v + together];
                prefetch_later(row.as_ptr_range().end.cast());
                row.iter().enumerate().for_each(|(j, s)| columns[j * d_state + n] = *s);
            }
            for (j, column) in columns.chunks_exact_mut(d_state.max(1)).take(together).enumerate() {
                let mut first = 0;
                while first < self.bc.len() {
                    match self.bc.len() - first {
                        1 => self.steps::<S, 1>(simd, first, v + j, column),
                        2 => self.steps::<S, 2>(simd, first, v + j, column),
                        3 => self.steps::<S, 3>(simd, first, v + j, column),
                        _ => self.steps::<S, STEPS>(simd, first, v + j, column),
                    }
                    first += STEPS;
                }
            }
            for (n, row) in self.state.chunks_exact_mut(channels).enumerate() {
                let row = &mut S::as_mut_simd_f32s(row).0[v..v + together];
                row.iter_mut().enumerate().for_each(|(j, s)| *s = columns[j * d_state + n]);
            }
        }
        for i in vectors * S::F32_LANES..channels {
            for (t, [b, c]) in self.bc.iter().enumerate() {
                let (decay, u, y) =
                    (self.decay[t * channels + i], self.u[t * channels + i], &mut self.y[t * channels + i]);
                for ((row, b), c) in self.state.chunks_exact_mut(channels).zip(*b).zip(*c) {
                    row[i] = decay * row[i] + b * u;
                    *y += c * row[i];
                }
            }
        }
    }
}

impl Run<'_> {
    /// Steps `first .. first + T` of one column.
    #[inline(always)]
    fn steps<S: Simd, const T: usize>(&mut self, simd: S, first: usize, v: usize, column: &mut [S::f32s]) {
        let channels = self.decay.len() / self.bc.len();
        let at = |t: usize| (first + t) * channels..(first + t + 1) * channels;
        let zero = simd.splat_f32s(0.0);
        let (mut decay, mut u, mut y) = ([zero; T], [zero; T], [zero; T]);
        for t in 0..T {
            decay[t] = S::as_simd_f32s(&self.decay[at(t)]).0[v];
            u[t] = S::as_simd_f32s(&self.u[at(t)]).0[v];
            y[t] = S::as_simd_f32s(&self.y[at(t)]).0[v];
        }
        let d_state = column.len();
        let (b, c): ([&[f32]; T], [&[f32]; T]) =
            (from_fn(|t| &self.bc[first + t][0][..d_state]), from_fn(|t| &self.bc[first + t][1][..d_state]));
        for n in 0..d_state {
            let mut s = column[n];
            for t in 0..T {
                s = simd.mul_add_e_f32s(decay[t], s, simd.mul_f32s(simd.splat_f32s(b[t][n]), u[t]));
                y[t] = simd.mul_add_e_f32s(simd.splat_f32s(c[t][n]), s, y[t]);
            }
            column[n] = s;
        }
        for t in 0..T {
            S::as_mut_simd_f32s(&mut self.y[at(t)]).0[v] = y[t];
        }
    }
}
