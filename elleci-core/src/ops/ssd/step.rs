//! The recurrence step by step: for inference. The chunked form (`chunked.rs`) does fewer operations, but how it rounds depends on where the
//! chunks begin, and it is no faster on prompts (docs/LOG.md).
//!
//! A single step of a state that is kept takes [`ROWS`] rows of the state at a time, so that what all rows share is loaded once for them. Others take
//! [`TOGETHER`] vectors of channels through all steps before the next, [`STEPS`] at a time: what these need beside the state stays in
//! registers, and between them the state of these channels in the first-level cache. The order of all additions is that of the steps one
//! by one.

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

/// Steps that vectors of channels take together, and how many of these: with the state and a step's b and c the sixteen registers of AVX2.
const STEPS: usize = 2;
const TOGETHER: usize = 2;
/// Rows of the state that take a single step together.
const ROWS: usize = 4;

/// The state that steps begin with (see [`SsdShape::state_len`]); zeros start a sequence.
#[derive(Debug)]
pub enum ScanState<'a> {
    /// That after the last step takes its place.
    Kept(&'a mut [f32]),
    /// That after the last step is of no use.
    Passed(&'a [f32]),
}

impl<'a> ScanState<'a> {
    /// What the steps begin with.
    pub fn values(&self) -> &[f32] {
        match self {
            ScanState::Kept(state) => state,
            ScanState::Passed(state) => state,
        }
    }

    /// Parts of `len` values, the last may be shorter.
    fn parts(self, len: usize) -> Vec<ScanState<'a>> {
        match self {
            ScanState::Kept(state) => state.chunks_mut(len.max(1)).map(ScanState::Kept).collect(),
            ScanState::Passed(state) => state.chunks(len.max(1)).map(ScanState::Passed).collect(),
        }
    }
}

/// Advances every sequence of a batch by `shape.seq` tokens, one step after the other: `y` `[tokens, d_inner]` is written. The bits do not
/// depend on how steps are dealt to calls.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
pub fn ssd_steps(shape: SsdShape, xbc: &[f32], dt: &[f32], a: &[f32], d: &[f32], state: ScanState<'_>, y: &mut [f32]) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(state.values().len(), shape.batch * shape.state_len(), "ssd steps: state");
    let (d_inner, group) = (shape.d_inner(), shape.group_heads() * shape.head_dim);
    if d_inner == 0 || shape.tokens() == 0 {
        return;
    }
    let states = state.parts(shape.state_len());
    for ((i, y), state) in y.chunks_exact_mut(shape.seq * d_inner).enumerate().zip(states) {
        let xbc = &xbc[i * shape.seq * shape.width()..][..shape.seq * shape.width()];
        let dt = &dt[i * shape.seq * shape.heads..][..shape.seq * shape.heads];
        let mut y = mat_mut(y, shape.seq, d_inner);
        // A task is a group of heads: its state is one run of memory, so that no two threads ask for lines of the same page.
        let outputs = y.axis_chunks_iter_mut(Axis(1), group);
        let items: Vec<_> = state.parts(shape.d_state * group).into_iter().zip(outputs).enumerate().collect();
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
    fn advance(&self, state: ScanState<'_>, y: &mut ArrayViewMut2<f32>) {
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
        match (state, bc.as_slice()) {
            (ScanState::Kept(state), [[b, c]]) => dispatch(Step { state, decay, u, b, c, y: out }),
            (state, bc) => dispatch(Run { state, decay, u, bc, y: out }),
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

/// [`Step`] for several steps, one after the other, or for a state that is not kept.
struct Run<'a> {
    /// `[d_state, channels]`
    state: ScanState<'a>,
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
        let (len, d_state) = (self.bc.len(), self.bc[0][0].len());
        let channels = self.decay.len() / len;
        let vectors = channels / S::F32_LANES;
        // What goes from a block of steps to the next.
        let mut columns = vec![simd.splat_f32s(0.0); TOGETHER * d_state];
        for v in (0..vectors).step_by(TOGETHER) {
            for first in (0..len).step_by(STEPS) {
                match (STEPS.min(len - first), TOGETHER.min(vectors - v)) {
                    (1, 1) => self.block::<S, 1, 1>(simd, first, v, &mut columns),
                    (1, _) => self.block::<S, 1, TOGETHER>(simd, first, v, &mut columns),
                    (_, 1) => self.block::<S, STEPS, 1>(simd, first, v, &mut columns),
                    (_, _) => self.block::<S, STEPS, TOGETHER>(simd, first, v, &mut columns),
                }
            }
        }
        for i in vectors * S::F32_LANES..channels {
            let mut column: Vec<f32> = self.state.values().iter().skip(i).step_by(channels).copied().collect();
            for (t, [b, c]) in self.bc.iter().enumerate() {
                let (decay, u, y) =
                    (self.decay[t * channels + i], self.u[t * channels + i], &mut self.y[t * channels + i]);
                for ((s, b), c) in column.iter_mut().zip(*b).zip(*c) {
                    *s = decay * *s + b * u;
                    *y += c * *s;
                }
            }
            if let ScanState::Kept(state) = &mut self.state {
                state.iter_mut().skip(i).step_by(channels).zip(column).for_each(|(to, s)| *to = s);
            }
        }
    }
}

impl Run<'_> {
    /// `T` steps of `J` vectors of channels.
    #[inline(always)]
    fn block<S: Simd, const T: usize, const J: usize>(
        &mut self,
        simd: S,
        first: usize,
        v: usize,
        columns: &mut [S::f32s],
    ) {
        let channels = self.decay.len() / self.bc.len();
        let d_state = self.bc[0][0].len();
        let block = Block::<S, T, J>::new(self, first, v);
        let ends = first + T == self.bc.len();
        let columns = &mut columns[..d_state * J];
        // A row's next vectors are the next that is read of the state, after those of all other rows.
        let ask = |row: &[S::f32s]| {
            for line in 0..(TOGETHER * size_of::<S::f32s>()).div_ceil(64) {
                prefetch_later(row.as_ptr_range().end.cast::<u8>().wrapping_add(64 * line));
            }
        };
        let vectors = |row| &S::as_simd_f32s(row).0[v..v + J];
        let vectors_mut = |row| &mut S::as_mut_simd_f32s(row).0[v..v + J];
        let y = match (first == 0, ends, &mut self.state) {
            (false, false, _) => block.sweep(simd, columns.chunks_exact_mut(J).map(InPlace)),
            (true, false, state) => {
                let rows = state.values().chunks_exact(channels).map(vectors);
                block.sweep(
                    simd,
                    rows.inspect(|row| ask(row)).zip(columns.chunks_exact_mut(J)).map(|(from, to)| Move { from, to }),
                )
            }
            (true, true, ScanState::Kept(state)) => {
                let rows = state.chunks_exact_mut(channels).map(vectors_mut);
                block.sweep(simd, rows.inspect(|row| ask(row)).map(InPlace))
            }
            (false, true, ScanState::Kept(state)) => {
                let rows = state.chunks_exact_mut(channels).map(vectors_mut);
                block.sweep(simd, columns.chunks_exact(J).zip(rows).map(|(from, to)| Move { from, to }))
            }
            (true, true, ScanState::Passed(state)) => {
                let rows = state.chunks_exact(channels).map(vectors);
                block.sweep(simd, rows.inspect(|row| ask(row)).map(ReadOnly))
            }
            (false, true, ScanState::Passed(_)) => block.sweep(simd, columns.chunks_exact(J).map(ReadOnly)),
        };
        for (t, y) in y.iter().enumerate() {
            S::as_mut_simd_f32s(&mut self.y[(first + t) * channels..][..channels]).0[v..v + J].copy_from_slice(y);
        }
    }
}

/// Some vectors of a row of the state: where they come from, and where they go.
trait StateRow<V> {
    fn get(&self, j: usize) -> V;
    fn put(&mut self, j: usize, value: V);
}

/// They go where they came from.
struct InPlace<'a, V>(&'a mut [V]);

/// They go elsewhere.
struct Move<'a, V> {
    from: &'a [V],
    to: &'a mut [V],
}

/// They are of no more use.
struct ReadOnly<'a, V>(&'a [V]);

impl<V: Copy> StateRow<V> for InPlace<'_, V> {
    #[inline(always)]
    fn get(&self, j: usize) -> V {
        self.0[j]
    }
    #[inline(always)]
    fn put(&mut self, j: usize, value: V) {
        self.0[j] = value;
    }
}

impl<V: Copy> StateRow<V> for Move<'_, V> {
    #[inline(always)]
    fn get(&self, j: usize) -> V {
        self.from[j]
    }
    #[inline(always)]
    fn put(&mut self, j: usize, value: V) {
        self.to[j] = value;
    }
}

impl<V: Copy> StateRow<V> for ReadOnly<'_, V> {
    #[inline(always)]
    fn get(&self, j: usize) -> V {
        self.0[j]
    }
    #[inline(always)]
    fn put(&mut self, _: usize, _: V) {}
}

/// What `T` steps of `J` vectors of channels have in common for all rows of the state.
struct Block<'a, S: Simd, const T: usize, const J: usize> {
    decay: [[S::f32s; J]; T],
    u: [[S::f32s; J]; T],
    y: [[S::f32s; J]; T],
    bc: &'a [[&'a [f32]; 2]],
}

impl<'a, S: Simd, const T: usize, const J: usize> Block<'a, S, T, J> {
    #[inline(always)]
    fn new(run: &Run<'a>, first: usize, v: usize) -> Self {
        let channels = run.decay.len() / run.bc.len();
        let pick = |rows: &[f32]| -> [[S::f32s; J]; T] {
            from_fn(
                #[inline(always)]
                |t| {
                    let row = S::as_simd_f32s(&rows[(first + t) * channels..][..channels]).0;
                    from_fn(
                        #[inline(always)]
                        |j| row[v + j],
                    )
                },
            )
        };
        Block { decay: pick(run.decay), u: pick(run.u), y: pick(run.y), bc: &run.bc[first..first + T] }
    }

    /// The outputs.
    #[inline(always)]
    fn sweep(self, simd: S, rows: impl Iterator<Item = impl StateRow<S::f32s>>) -> [[S::f32s; J]; T] {
        let Block { decay, u, mut y, bc } = self;
        let d_state = bc[0][0].len();
        let (b, c): ([&[f32]; T], [&[f32]; T]) = (from_fn(|t| &bc[t][0][..d_state]), from_fn(|t| &bc[t][1][..d_state]));
        for (n, mut row) in (0..d_state).zip(rows) {
            let mut s = [simd.splat_f32s(0.0); J];
            for j in 0..J {
                s[j] = row.get(j);
            }
            for t in 0..T {
                let (b, c) = (simd.splat_f32s(b[t][n]), simd.splat_f32s(c[t][n]));
                for j in 0..J {
                    s[j] = simd.mul_add_e_f32s(decay[t][j], s[j], simd.mul_f32s(b, u[t][j]));
                    y[t][j] = simd.mul_add_e_f32s(c, s[j], y[t][j]);
                }
            }
            for j in 0..J {
                row.put(j, s[j]);
            }
        }
        y
    }
}
