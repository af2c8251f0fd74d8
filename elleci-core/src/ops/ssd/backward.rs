//! The chunked form, backward: see `chunked.rs` for the formulas.

use alloc::vec::Vec;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

use super::chunked::*;
use super::kernels::{ColumnsDot, DyRow, Inside, RowDots};
use super::product::{PANEL, Product};
use super::{CHUNK, SsdScratch, SsdShape};
use crate::ops::lanes::dispatch;
use crate::ops::matmul::{Out, mat, mat_mut};
use crate::par;
use crate::simd::vectorize;

/// Given `dy`: writes `dxbc` (of x, B and C) and `ddt` `[tokens, heads]` (with respect to dt after softplus), ADDS to
/// `da` and `dd` `[heads]`. `states` are those that [`ssd_forward`](super::ssd_forward) saved from the same inputs.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
#[expect(clippy::too_many_arguments, reason = "the tensors of the op, each once")]
pub fn ssd_backward(
    shape: SsdShape,
    xbc: &[f32],
    dt: &[f32],
    a: &[f32],
    d: &[f32],
    states: &[f32],
    dy: &[f32],
    dxbc: &mut [f32],
    ddt: &mut [f32],
    da: &mut [f32],
    dd: &mut [f32],
    scratch: &mut SsdScratch,
) {
    shape.check(xbc, dt, a, d, dy);
    shape.check(dxbc, ddt, da, dd, dy);
    assert_eq!(states.len(), shape.states_len(), "ssd: states");
    if shape.tokens() == 0 || shape.d_inner() == 0 {
        return dxbc.fill(0.0);
    }
    let inputs = Inputs { shape, xbc, dt, a, d };
    let scratch = scratch.get(scratch_len(&shape, Pass::Backward));
    let mut dxbc = mat_mut(dxbc, shape.tokens(), shape.width());
    let (dx, mut dbc) = dxbc.view_mut().split_at(Axis(1), shape.d_inner());
    let saved = (shape.chunks() - 1) * shape.d_state * shape.head_dim;
    let mut rest = states;
    let mut items = Vec::new();
    let columns = task_columns(&shape, dx, shape.head_dim).into_iter();
    let columns = columns.zip(task_columns(&shape, mat_mut(ddt, shape.tokens(), shape.heads), 1));
    let parts = scratch.chunks_exact_mut(task_scratch_len(&shape, Pass::Backward));
    for (((batch, head, heads), (dx, ddt)), mut scratch) in tasks(&shape).zip(columns).zip(parts) {
        let (states, later) = rest.split_at(heads * saved);
        rest = later;
        let sums = Sums {
            dbc: take(&mut scratch, shape.seq * 2 * shape.d_state),
            da: take(&mut scratch, shape.task_heads()),
            dd: take(&mut scratch, shape.task_heads()),
        };
        items.push(Task { batch, head, heads, states, dy, dx, ddt, sums, scratch });
    }
    par::for_each(items.iter_mut().collect(), |task: &mut Task| task.run(&inputs));

    // Sums over tasks, in task order.
    dbc.fill(0.0);
    for task in &items {
        let rows = s![task.batch * shape.seq..(task.batch + 1) * shape.seq, ..];
        let mut dbc = dbc.slice_mut(rows);
        dbc += &mat(task.sums.dbc, shape.seq, 2 * shape.d_state);
        for h in 0..task.heads {
            da[task.head + h] += task.sums.da[h];
            dd[task.head + h] += task.sums.dd[h];
        }
    }
}

/// What a task shares with others: its part of the sums.
struct Sums<'a> {
    dbc: &'a mut [f32], // [seq, 2 * d_state]
    da: &'a mut [f32],
    dd: &'a mut [f32],
}

struct Task<'a> {
    batch: usize,
    head: usize,
    heads: usize,
    states: &'a [f32],
    dy: &'a [f32],
    dx: ArrayViewMut2<'a, f32>,  // [seq, heads * head_dim]
    ddt: ArrayViewMut2<'a, f32>, // [seq, heads]
    sums: Sums<'a>,
    scratch: &'a mut [f32],
}

impl Task<'_> {
    fn run(&mut self, inputs: &Inputs) {
        let shape = inputs.shape;
        self.sums.dbc.fill(0.0);
        self.sums.da.fill(0.0);
        self.sums.dd.fill(0.0);
        let mut states = self.states;
        for group in (0..self.heads).step_by(shape.group_heads()) {
            let span = |chunk| inputs.span(self.batch, chunk, self.head, group, self.heads);
            let channels = inputs.channels(span(0));
            let (now, later) = states.split_at((shape.chunks() - 1) * shape.d_state * channels);
            states = later;
            let mut group = Group::new(inputs, self.scratch, channels);
            for chunk in (0..shape.chunks()).rev() {
                let entry = saved_entry(now, chunk, shape.d_state, channels);
                let (dx, ddt) = (self.dx.view_mut(), self.ddt.view_mut());
                group.chunk(inputs, span(chunk), entry, self.dy, dx, ddt, &mut self.sums);
            }
        }
    }
}

/// Working memory of a group of heads in the backward pass.
struct Group<'a> {
    decays: Decays<'a>,
    /// `<E_i, (C H)_i>`, `<x_j, (B R)_j>` and `sum_i dM_ij G_ij L_ij`, `[heads, CHUNK]` each.
    read: &'a mut [f32],
    write: &'a mut [f32],
    inside: &'a mut [f32],
    /// The gradients of the exponents that lie inside the chunk, of one head.
    rectangles: &'a mut [f32],
    /// `[CHUNK, CHUNK]` each.
    g: &'a mut [f32],
    m: &'a mut [f32],
    dm: &'a mut [f32],
    dg: &'a mut [f32],
    /// `[CHUNK, channels]` each: `e o dY`, `w dt o X`, and `C H` or `B R`.
    e_dy: &'a mut [f32],
    weighted: &'a mut [f32],
    product: &'a mut [f32],
    /// The gradient of the state that leaves the chunk `[d_state, channels]`.
    r: &'a mut [f32],
    /// For products.
    panel: &'a mut [f32],
}

impl<'a> Group<'a> {
    fn new(inputs: &Inputs, mut scratch: &'a mut [f32], channels: usize) -> Group<'a> {
        let (heads, n_dim) = (inputs.shape.group_heads(), inputs.shape.d_state);
        let decays = Decays::new(&mut scratch, heads);
        let mut part = |n| take(&mut scratch, n);
        let group = Group {
            decays,
            read: part(heads * CHUNK),
            write: part(heads * CHUNK),
            inside: part(heads * CHUNK),
            rectangles: part(CHUNK),
            g: part(CHUNK * CHUNK),
            m: part(CHUNK * CHUNK),
            dm: part(CHUNK * CHUNK),
            dg: part(CHUNK * CHUNK),
            e_dy: part(CHUNK * channels),
            weighted: part(CHUNK * channels),
            product: part(CHUNK * channels),
            r: part(n_dim * channels),
            panel: part(PANEL),
        };
        // Parts of these are read before they are written, by whole vectors in a short chunk: finite, then ignored.
        group.m.fill(0.0);
        group.g.fill(0.0);
        group.dm.fill(0.0);
        group
    }

    /// One chunk: `entry` is the state that enters it, `dx` and `ddt` are the task's. Leaves in `r` the gradient of
    /// the entry state.
    #[expect(clippy::too_many_arguments, reason = "a chunk reads and writes a slice of every tensor of the op")]
    fn chunk(
        &mut self,
        inputs: &Inputs,
        span: Span,
        entry: Option<ArrayView2<f32>>,
        dy: &[f32],
        mut dx: ArrayViewMut2<f32>,
        mut ddt: ArrayViewMut2<f32>,
        sums: &mut Sums,
    ) {
        let shape = inputs.shape;
        let (n_dim, p_dim, channels, len) = (shape.d_state, shape.head_dim, inputs.channels(span), span.len);
        let last = span.step + len == shape.seq;
        let (b, c) = (inputs.b(span), inputs.c(span));
        let dy = &dy[span.token * shape.d_inner() + span.head * p_dim..];
        let rows = span.step..span.step + len;
        let mut dx = dx.slice_mut(s![rows.clone(), span.task_head * p_dim..span.task_head * p_dim + channels]);
        let mut ddt = ddt.slice_mut(s![rows.clone(), span.task_head..span.task_head + span.heads]);
        let dbc = mat_mut(&mut sums.dbc[rows.start * 2 * n_dim..rows.end * 2 * n_dim], len, 2 * n_dim);
        let (mut db, mut dc) = dbc.split_at(Axis(1), n_dim);

        // Across chunks: what the state that leaves and the state that enters have to do with this chunk.
        if !last {
            let (r, br) = (mat(self.r, n_dim, channels), mat_mut(&mut self.product[..len * channels], len, channels));
            let a = inputs.b_left(span, false);
            dispatch(Product { a, b: r, c: br, out: Out::Store, panel: self.panel });
        }
        vectorize(
            #[inline(always)]
            || {
                self.decays.fill(inputs, span);
                scale_x(inputs, span, &self.decays, self.weighted);
            },
        );
        for i in 0..len {
            self.dy_row(inputs, span, i, &dy[i * shape.d_inner()..], last, row_mut(&mut dx, i), sums.dd);
        }
        if !last {
            let (a, r) = (dense(self.weighted, len, channels, channels), mat(self.r, n_dim, channels));
            dispatch(Product { a, b: r.reversed_axes(), c: db.view_mut(), out: Out::Add, panel: self.panel });
        }
        if let Some(entry) = entry {
            let a = dense(self.e_dy, len, channels, channels);
            dispatch(Product { a, b: entry.reversed_axes(), c: dc.view_mut(), out: Out::Add, panel: self.panel });
            let product = &mut self.product[..len * channels];
            let (a, ch) = (inputs.c_left(span, false), mat_mut(product, len, channels));
            dispatch(Product { a, b: entry, c: ch, out: Out::Store, panel: self.panel });
            dispatch(RowDots { a: self.e_dy, b: product, len, p_dim, channels, out: self.read });
        } else {
            self.read.fill(0.0);
        }

        // Inside the chunk, head by head.
        let (a, g) = (inputs.c_left(span, false), view_mut(self.g, len, len, CHUNK));
        dispatch(Product { a, b: b.reversed_axes(), c: g, out: Out::Store, panel: self.panel });
        self.dg.fill(0.0);
        for h in 0..span.heads {
            let (x, dm) = (inputs.x_head(span, h).reversed_axes(), view_mut(self.dm, len, len, CHUNK));
            let a = dense(&dy[h * p_dim..], len, p_dim, shape.d_inner());
            dispatch(Product { a, b: x, c: dm, out: Out::Store, panel: self.panel });
            let dy = view(&dy[h * p_dim..], len, p_dim, shape.d_inner());
            self.inside_chunk(span, h);
            let whole = entry.filter(|_| !last).map_or(0.0, |entry| self.whole_decay(span, h, entry, p_dim));
            self.exponents(inputs, span, h, whole, &mut ddt, sums.da);
            let dx = dx.slice_mut(s![.., h * p_dim..(h + 1) * p_dim]);
            let a = triangle(self.m, len, true);
            dispatch(Product { a, b: dy, c: dx, out: Out::Add, panel: self.panel });
        }
        let (dg, dgt) = (triangle(self.dg, len, false), triangle(self.dg, len, true));
        dispatch(Product { a: dg, b, c: dc, out: Out::Add, panel: self.panel });
        dispatch(Product { a: dgt, b: c, c: db, out: Out::Add, panel: self.panel });

        if entry.is_some() {
            if !last {
                vectorize(
                    #[inline(always)]
                    || {
                        for row in self.r.chunks_exact_mut(channels) {
                            for (h, row) in row.chunks_exact_mut(p_dim).enumerate() {
                                let decay = self.decays.whole(span, h);
                                row.iter_mut().for_each(|r| *r *= decay);
                            }
                        }
                    },
                );
            }
            let out = if last { Out::Store } else { Out::Add };
            let e_dy = mat(&self.e_dy[..len * channels], len, channels);
            let (a, r) = (inputs.c_left(span, true), mat_mut(self.r, n_dim, channels));
            dispatch(Product { a, b: e_dy, c: r, out, panel: self.panel });
        }
    }

    /// All that reads a row of `dy` element by element: `e_dy`, the start of `dx`, `dd`, and `<x, B R>` from `product`.
    #[expect(clippy::too_many_arguments, reason = "a row of every tensor of the op")]
    fn dy_row(
        &mut self,
        inputs: &Inputs,
        span: Span,
        i: usize,
        dy: &[f32],
        last: bool,
        dx: &mut [f32],
        dd: &mut [f32],
    ) {
        let row = i * dx.len()..(i + 1) * dx.len();
        dispatch(DyRow {
            i,
            p_dim: inputs.shape.head_dim,
            entry: self.decays.entry,
            exit: self.decays.exit,
            dt: self.decays.dt,
            d: &inputs.d[span.head..][..span.heads],
            x: inputs.x_row(span, i),
            dy: &dy[..dx.len()],
            br: (!last).then(|| &self.product[row.clone()]),
            e_dy: &mut self.e_dy[row.clone()],
            dx,
            write: self.write,
            dd: &mut dd[span.task_head..],
        });
    }

    /// From `g` and `dm`: `m`, the head's part of `dg`, `inside`, and the exponents' gradients inside the chunk.
    fn inside_chunk(&mut self, span: Span, h: usize) {
        let row = h * CHUNK..(h + 1) * CHUNK;
        dispatch(Inside {
            len: span.len,
            cum: &self.decays.cum[row.clone()],
            dt: &self.decays.dt[row.clone()],
            g: self.g,
            dm: self.dm,
            m: self.m,
            dg: self.dg,
            inside: &mut self.inside[row],
            rectangles: self.rectangles,
        });
    }

    /// `exp(cum_last) <R, H>` of a head.
    fn whole_decay(&self, span: Span, h: usize, entry: ArrayView2<f32>, p_dim: usize) -> f32 {
        let (channels, entry) = (span.heads * p_dim, entry.to_slice().expect("saved states are contiguous"));
        self.decays.whole(span, h) * dispatch(ColumnsDot { a: self.r, b: entry, channels, first: h * p_dim, p_dim })
    }

    /// The gradient of every exponent of a head, and from it `ddt` and `da`.
    fn exponents(
        &mut self,
        inputs: &Inputs,
        span: Span,
        h: usize,
        whole: f32,
        ddt: &mut ArrayViewMut2<f32>,
        da: &mut [f32],
    ) {
        let row = h * CHUNK..h * CHUNK + span.len;
        let (dt, exit) = (&self.decays.dt[row.clone()], &self.decays.exit[row.clone()]);
        let (read, write, inside) = (&self.read[row.clone()], &self.write[row.clone()], &self.inside[row]);
        let mut later = 0.0;
        for i in (0..span.len).rev() {
            later += read[i];
            self.rectangles[i] += later;
        }
        let (mut earlier, mut sum) = (whole, 0.0);
        for i in 0..span.len {
            let exponent = self.rectangles[i] + earlier;
            let direct = exit[i] * write[i];
            earlier += direct * dt[i];
            ddt[[i, h]] = inside[i] + direct + inputs.a[span.head + h] * exponent;
            sum += dt[i] * exponent;
        }
        da[span.task_head + h] += sum;
    }
}
