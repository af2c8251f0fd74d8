//! The chunked (matrix) form of the recurrence: its formulas, and what `forward.rs` and `backward.rs` share.
//!
//! Inside a chunk, with `cum_i = sum_{k<=i} dt_k a`, `L_ij = exp(cum_i - cum_j)` for i >= j and 0 above the diagonal,
//! `e_i = exp(cum_i)`, `w_j = exp(cum_last - cum_j)`, and H the state that enters the chunk, a head computes
//! ```text
//! G = C B^T (once for all heads)      M_ij = G_ij L_ij dt_j
//! Y  = M X + e o (C H) + d X
//! H' = exp(cum_last) H + B^T (w dt o X)
//! ```
//! and with R the gradient of H', the chunks taken from the last to the first,
//! ```text
//! E  = e o dY                         dM = tril(dY X^T)
//! dX = M^T dY + w dt o (B R) + d dY   dG = sum over heads of dM o L o dt
//! dB = dG^T C + (w dt o X) R^T        dC = dG B + E H^T          R' = exp(cum_last) R + C^T E
//! ```
//! The gradient of step t's exponent `dt_t a` gathers every term whose decay spans t, added up directly:
//! ```text
//! sum_{i>=t>j} dM_ij M_ij  +  sum_{i>=t} <E_i, (C H)_i>  +  sum_{j<t} w_j dt_j <x_j, (B R)_j>  +  exp(cum_last) <R, H>
//! ```
//! The usual form, a reverse cumulative sum of row sums minus column sums, is the same in exact arithmetic, but its
//! differences cancel. L comes from differences of the exponents, never from ratios: those overflow.
//!
//! A task is some heads of one sequence, all chunks in order. It takes its heads in groups of about 512 channels, so
//! that the state of a group stays in cache. The parts of dB and dC from tasks that share a sequence are added in
//! task order at the end.

use alloc::vec::Vec;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, ShapeBuilder};

use pulp::Simd;

use super::product::{Left, PANEL, Part};
use super::{CHUNK, SsdShape};
use crate::ops::activation::exp;
use crate::ops::lanes::TRIANGLE;
use crate::ops::matmul::mat;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward,
}

/// Elements of scratch of one task.
pub(super) fn task_scratch_len(shape: &SsdShape, pass: Pass) -> usize {
    let heads = shape.group_heads();
    let channels = heads * shape.head_dim;
    match pass {
        Pass::Forward => PANEL + 4 * heads * CHUNK + 2 * CHUNK * CHUNK + CHUNK * channels,
        Pass::Backward => {
            let group = PANEL + 7 * heads * CHUNK + CHUNK + 4 * CHUNK * CHUNK + (3 * CHUNK + shape.d_state) * channels;
            group + shape.seq * 2 * shape.d_state + 2 * shape.task_heads()
        }
    }
}

pub(super) fn scratch_len(shape: &SsdShape, pass: Pass) -> usize {
    shape.batch * shape.heads.div_ceil(shape.task_heads()) * task_scratch_len(shape, pass)
}

/// `[rows, depth]` with rows `stride` apart as the left side of a product.
pub(super) fn dense(data: &[f32], rows: usize, depth: usize, stride: usize) -> Left<'_> {
    Left { data, rows, depth, stride, transposed: false, part: Part::All }
}

/// A lower triangular `[len, len]`, rows [`CHUNK`] apart, or its transpose, as the left side of a product.
pub(super) fn triangle(data: &[f32], len: usize, transposed: bool) -> Left<'_> {
    let part = if transposed { Part::Upper } else { Part::Lower };
    Left { data, rows: len, depth: len, stride: CHUNK, transposed, part }
}

/// Cuts `n` elements off the front of a buffer.
pub(super) fn take<'a>(buffer: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = core::mem::take(buffer).split_at_mut(n);
    *buffer = tail;
    head
}

/// The inputs, shared by all tasks.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) shape: SsdShape,
    pub(super) xbc: &'a [f32],
    pub(super) dt: &'a [f32],
    pub(super) a: &'a [f32],
    pub(super) d: &'a [f32],
}

/// Some heads and one chunk of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// First token of the chunk, in the whole buffer and in its sequence.
    pub(super) token: usize,
    pub(super) step: usize,
    /// Steps of the chunk.
    pub(super) len: usize,
    /// First head, in all heads and among those of the task.
    pub(super) head: usize,
    pub(super) task_head: usize,
    pub(super) heads: usize,
}

impl<'a> Inputs<'a> {
    pub(super) fn channels(&self, span: Span) -> usize {
        span.heads * self.shape.head_dim
    }

    /// x of the span's heads at its step i.
    #[inline(always)]
    pub(super) fn x_row(&self, span: Span, i: usize) -> &'a [f32] {
        let at = (span.token + i) * self.shape.width() + span.head * self.shape.head_dim;
        &self.xbc[at..][..span.heads * self.shape.head_dim]
    }

    /// x of one head of the span `[len, head_dim]`.
    pub(super) fn x_head(&self, span: Span, h: usize) -> ArrayView2<'a, f32> {
        self.columns(span, (span.head + h) * self.shape.head_dim, self.shape.head_dim)
    }

    pub(super) fn b(&self, span: Span) -> ArrayView2<'a, f32> {
        self.columns(span, self.shape.d_inner(), self.shape.d_state)
    }

    pub(super) fn c(&self, span: Span) -> ArrayView2<'a, f32> {
        self.columns(span, self.shape.d_inner() + self.shape.d_state, self.shape.d_state)
    }

    /// B `[len, d_state]`, or transposed, as the left side of a product.
    pub(super) fn b_left(&self, span: Span, transposed: bool) -> Left<'a> {
        self.left(span, self.shape.d_inner(), transposed)
    }

    /// As [`Inputs::b_left`], for C.
    pub(super) fn c_left(&self, span: Span, transposed: bool) -> Left<'a> {
        self.left(span, self.shape.d_inner() + self.shape.d_state, transposed)
    }

    fn left(&self, span: Span, first: usize, transposed: bool) -> Left<'a> {
        let (stride, n_dim) = (self.shape.width(), self.shape.d_state);
        let (rows, depth) = if transposed { (n_dim, span.len) } else { (span.len, n_dim) };
        Left { data: &self.xbc[span.token * stride + first..], rows, depth, stride, transposed, part: Part::All }
    }

    pub(super) fn columns(&self, span: Span, first: usize, cols: usize) -> ArrayView2<'a, f32> {
        let width = self.shape.width();
        view(&self.xbc[span.token * width + first..], span.len, cols, width)
    }

    /// The chunks of one group of heads; `batch` and the task's first head come with the task.
    pub(super) fn span(
        &self,
        batch: usize,
        chunk: usize,
        first_head: usize,
        task_head: usize,
        task_heads: usize,
    ) -> Span {
        let step = chunk * CHUNK;
        Span {
            token: batch * self.shape.seq + step,
            step,
            len: CHUNK.min(self.shape.seq - step),
            head: first_head + task_head,
            task_head,
            heads: self.shape.group_heads().min(task_heads - task_head),
        }
    }
}

/// `[rows, cols]` with rows `stride` apart.
pub(super) fn view(data: &[f32], rows: usize, cols: usize, stride: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, cols).strides((stride, 1)), data).expect("the slice holds the strided rows")
}

pub(super) fn view_mut(data: &mut [f32], rows: usize, cols: usize, stride: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, cols).strides((stride, 1)), data).expect("the slice holds the strided rows")
}

#[inline(always)]
pub(super) fn row_mut<'a>(view: &'a mut ArrayViewMut2<f32>, row: usize) -> &'a mut [f32] {
    view.row_mut(row).into_slice().expect("columns are contiguous")
}

/// The decays of a span, each `[heads, CHUNK]`.
pub(super) struct Decays<'a> {
    pub(super) dt: &'a mut [f32],
    /// Running sums of the exponents.
    pub(super) cum: &'a mut [f32],
    /// From the chunk's entry to each step.
    pub(super) entry: &'a mut [f32],
    /// From each step to the chunk's end.
    pub(super) exit: &'a mut [f32],
}

impl<'a> Decays<'a> {
    pub(super) fn new(scratch: &mut &'a mut [f32], heads: usize) -> Decays<'a> {
        let mut part = || take(scratch, heads * CHUNK);
        Decays { dt: part(), cum: part(), entry: part(), exit: part() }
    }

    #[inline(always)]
    pub(super) fn fill(&mut self, inputs: &Inputs, span: Span) {
        for h in 0..span.heads {
            let row = h * CHUNK..h * CHUNK + span.len;
            let cum = &mut self.cum[row.clone()];
            let mut sum = 0.0;
            for (i, (cum, dt)) in cum.iter_mut().zip(&mut self.dt[row.clone()]).enumerate() {
                *dt = inputs.dt[(span.token + i) * inputs.shape.heads + span.head + h];
                sum += *dt * inputs.a[span.head + h];
                *cum = sum;
            }
            for ((cum, entry), exit) in cum.iter().zip(&mut self.entry[row.clone()]).zip(&mut self.exit[row]) {
                *entry = exp(*cum);
                *exit = exp(sum - cum);
            }
            // Loops over whole vectors read on.
            let rest = h * CHUNK + span.len..(h + 1) * CHUNK;
            self.cum[rest.clone()].fill(0.0);
            self.dt[rest].fill(0.0);
        }
    }

    /// `exp(cum_last)`: the decay over the whole chunk.
    #[inline(always)]
    pub(super) fn whole(&self, span: Span, h: usize) -> f32 {
        self.entry[h * CHUNK + span.len - 1]
    }
}

/// `out = (exit dt) o x`: what a step's x still weighs at the chunk's end.
#[inline(always)]
pub(super) fn scale_x(inputs: &Inputs, span: Span, decays: &Decays, out: &mut [f32]) {
    let p_dim = inputs.shape.head_dim;
    for (i, out) in out.chunks_exact_mut(inputs.channels(span)).take(span.len).enumerate() {
        let heads = out.chunks_exact_mut(p_dim).zip(inputs.x_row(span, i).chunks_exact(p_dim));
        for (h, (out, x)) in heads.enumerate() {
            let scale = decays.exit[h * CHUNK + i] * decays.dt[h * CHUNK + i];
            out.iter_mut().zip(x).for_each(|(out, x)| *out = scale * x);
        }
    }
}

/// Columns of row i of the lower triangle, up to whole vectors of any length.
#[inline(always)]
pub(super) fn triangle_row(i: usize) -> usize {
    (i + 16) & !15
}

/// The lanes of vector v in row i of the lower triangle: 1 up to the diagonal (without it if `strict`), 0 after.
#[inline(always)]
pub(super) fn triangle_mask<S: Simd>(i: usize, v: usize, strict: bool) -> S::f32s {
    let (group, first) = (i & !15, v * S::F32_LANES);
    // Before the diagonal's group of 16 every lane counts: the table's start.
    let at = if first < group { 0 } else { 15 + strict as usize + first - i };
    S::as_simd_f32s(&TRIANGLE[at..at + S::F32_LANES]).0[0]
}

/// (sequence, first head, heads) of every task, in order.
pub(super) fn tasks(shape: &SsdShape) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (heads, step) = (shape.heads, shape.task_heads());
    (0..shape.batch)
        .flat_map(move |batch| (0..heads).step_by(step).map(move |head| (batch, head, step.min(heads - head))))
}

/// Splits `[tokens, heads * cols]` into the columns of every task.
pub(super) fn task_columns<'a>(
    shape: &SsdShape,
    data: ArrayViewMut2<'a, f32>,
    cols: usize,
) -> Vec<ArrayViewMut2<'a, f32>> {
    let mut parts = Vec::new();
    let mut rest = data;
    for _ in 0..shape.batch {
        let (mut sequence, later) = rest.split_at(Axis(0), shape.seq);
        rest = later;
        for (_, _, heads) in tasks(shape).take_while(|(batch, _, _)| *batch == 0) {
            let (now, next) = sequence.split_at(Axis(1), heads * cols);
            parts.push(now);
            sequence = next;
        }
    }
    parts
}

/// The saved state `[d_state, channels]` that enters a chunk; none for the first.
pub(super) fn saved_entry(slots: &[f32], chunk: usize, n_dim: usize, channels: usize) -> Option<ArrayView2<'_, f32>> {
    let slot = n_dim * channels;
    (chunk > 0).then(|| mat(&slots[(chunk - 1) * slot..chunk * slot], n_dim, channels))
}
