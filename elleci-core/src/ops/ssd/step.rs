//! The recurrence step by step: for decoding, and for runs too short for the chunked form.
//!
//! The chunked form multiplies with the whole state at a run's beginning and at its end, however short the run. Here a row of the state is
//! read once and taken through up to [`STEPS`] steps before it is written; a single step takes [`ROWS`] rows at a time instead, so that what
//! all rows share is loaded once for them. The order of all additions is that of the steps one by one.

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
use crate::simd::{prefetch_run, vectorize};

/// Steps that a row of the state takes while it is in registers.
const STEPS: usize = 4;
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
            let mut scratch = vec![0.0; 3 * STEPS.min(shape.seq) * y.ncols()];
            for first in (0..shape.seq).step_by(STEPS) {
                match shape.seq - first {
                    1 => group.advance::<1>(first, state, &mut y, &mut scratch),
                    2 => group.advance::<2>(first, state, &mut y, &mut scratch),
                    3 => group.advance::<3>(first, state, &mut y, &mut scratch),
                    _ => group.advance::<STEPS>(first, state, &mut y, &mut scratch),
                }
            }
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
    /// Steps `first .. first + T`. `y` `[seq, channels]`, `scratch` at least three times `[T, channels]`.
    fn advance<const T: usize>(
        &self,
        first: usize,
        state: &mut [f32],
        y: &mut ArrayViewMut2<f32>,
        scratch: &mut [f32],
    ) {
        let (shape, channels) = (self.shape, y.ncols());
        let (decay, rest) = scratch.split_at_mut(T * channels);
        let (u, rest) = rest.split_at_mut(T * channels);
        let out = &mut rest[..T * channels];
        let row = |t: usize| &self.xbc[(first + t) * shape.width()..][..shape.width()];
        vectorize(
            #[inline(always)]
            || {
                let steps = decay.chunks_exact_mut(channels).zip(u.chunks_exact_mut(channels));
                for (t, ((decay, u), y)) in steps.zip(out.chunks_exact_mut(channels)).enumerate() {
                    let x = &row(t)[self.first_head * shape.head_dim..][..channels];
                    let dt = &self.dt[(first + t) * shape.heads..][..shape.heads];
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
        let bc = |t: usize, at: usize| &row(t)[shape.d_inner() + at * shape.d_state..][..shape.d_state];
        let (b, c) = (from_fn(|t| bc(t, 0)), from_fn(|t| bc(t, 1)));
        dispatch(Advance::<T> { state, decay, u, b, c, y: out });
        for (t, out) in out.chunks_exact(channels).enumerate() {
            row_mut(y, first + t).copy_from_slice(out);
        }
    }
}

/// `s = decay[t] ⊙ s + b[t][n] u[t]` and `y[t] += c[t][n] s` for every row n of the state, for the steps t one after the other.
struct Advance<'a, const T: usize> {
    /// `[d_state, channels]`
    state: &'a mut [f32],
    /// `[T, channels]`
    decay: &'a [f32],
    u: &'a [f32],
    /// `[d_state]` each
    b: [&'a [f32]; T],
    c: [&'a [f32]; T],
    /// `[T, channels]`
    y: &'a mut [f32],
}

impl<const T: usize> WithSimd for Advance<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let rows = self.b[0].len();
        let together = if T == 1 { rows / ROWS * ROWS } else { 0 };
        for row in (0..together).step_by(ROWS) {
            self.rows::<S, ROWS>(simd, row);
        }
        for row in together..rows {
            self.rows::<S, 1>(simd, row);
        }
    }
}

impl<const T: usize> Advance<'_, T> {
    /// Rows `first .. first + R`.
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        let channels = self.decay.len() / T;
        let mut rest = &mut self.state[first * channels..(first + R) * channels];
        let rows: [(&mut [S::f32s], &mut [f32]); R] = from_fn(|_| {
            let (row, later) = core::mem::take(&mut rest).split_at_mut(channels);
            rest = later;
            S::as_mut_simd_f32s(row)
        });
        let mut rest = &mut self.y[..];
        let ys: [(&mut [S::f32s], &mut [f32]); T] = from_fn(|_| {
            let (row, later) = core::mem::take(&mut rest).split_at_mut(channels);
            rest = later;
            S::as_mut_simd_f32s(row)
        });
        let decay: [(&[S::f32s], &[f32]); T] =
            from_fn(|t| S::as_simd_f32s(&self.decay[t * channels..(t + 1) * channels]));
        let u: [(&[S::f32s], &[f32]); T] = from_fn(|t| S::as_simd_f32s(&self.u[t * channels..(t + 1) * channels]));
        let (mut b, mut c) = ([[simd.splat_f32s(0.0); R]; T], [[simd.splat_f32s(0.0); R]; T]);
        for t in 0..T {
            for r in 0..R {
                b[t][r] = simd.splat_f32s(self.b[t][first + r]);
                c[t][r] = simd.splat_f32s(self.c[t][first + r]);
            }
        }
        let vectors = channels / S::F32_LANES;
        for v in 0..vectors {
            let mut s = [simd.splat_f32s(0.0); R];
            for r in 0..R {
                s[r] = rows[r].0[v];
                if (v * S::F32_LANES).is_multiple_of(16) {
                    prefetch_run(rows[r].0.as_ptr().wrapping_add(v).cast());
                }
            }
            for t in 0..T {
                let (decay, u, mut y) = (decay[t].0[v], u[t].0[v], ys[t].0[v]);
                for r in 0..R {
                    s[r] = simd.mul_add_e_f32s(decay, s[r], simd.mul_f32s(b[t][r], u));
                    y = simd.mul_add_e_f32s(c[t][r], s[r], y);
                }
                ys[t].0[v] = y;
            }
            for r in 0..R {
                rows[r].0[v] = s[r];
            }
        }
        for i in 0..channels - vectors * S::F32_LANES {
            for t in 0..T {
                for r in 0..R {
                    let s = &mut rows[r].1[i];
                    *s = decay[t].1[i] * *s + self.b[t][first + r] * u[t].1[i];
                    ys[t].1[i] += self.c[t][first + r] * *s;
                }
            }
        }
    }
}
