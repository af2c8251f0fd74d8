//! The recurrence for inference, where a sequence comes in runs of any length.
//!
//! The state of a sequence is many times what a step adds to it, so that it is written once in [`BLOCK`] steps. Until then every step
//! reads it, and adds what the steps since have left behind ([`Recent`]):
//! ```text
//! y_t = d x_t + sum_j (C_t . B_j) u_j + p (S C_t)          at the end of a block  S = p S + sum_j u_j (x) B_j
//! ```
//! with p the product of the decays since S was written, and u_j = dt_j x_j times those since step j. Blocks begin at multiples of [`BLOCK`] steps
//! of the sequence, wherever calls begin, and the order of all additions is the same in every call: so are the bits.
//!
//! What a group of heads does is in [`kernel`].

mod kernel;

use alloc::vec;
use alloc::vec::Vec;

use ndarray::{ArrayViewMut2, Axis};
use pulp::{Simd, WithSimd};

use self::kernel::{Run, Steps};
use super::SsdShape;
use super::chunked::row_mut;
use crate::ops::activation::exp;
use crate::ops::lanes::{dispatch, dot};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::vectorize;

/// Steps that the state takes at once: their dt x are as many registers of AVX2 as can be spared. With more of them, what is read beside
/// the state would grow as much as its writing shrinks.
pub const BLOCK: usize = 8;

/// The steps since the state was written, fewer than a block has.
#[derive(Debug, Default)]
pub struct Recent {
    steps: usize,
    /// B, `[BLOCK, d_state]`
    b: Vec<f32>,
    /// What is left of the state, and of dt x of every step: `[1 + BLOCK, d_inner]`
    left: Vec<f32>,
}

impl PartialEq for Recent {
    fn eq(&self, other: &Recent) -> bool {
        self.steps == other.steps && self.values() == other.values()
    }
}

impl Clone for Recent {
    fn clone(&self) -> Recent {
        let mut copy = Recent { steps: 0, b: vec![0.0; self.b.len()], left: vec![0.0; self.left.len()] };
        copy.clone_from(self);
        copy
    }

    fn clone_from(&mut self, other: &Recent) {
        self.b.resize(other.b.len(), 0.0);
        self.left.resize(other.left.len(), 0.0);
        let to = self.fill(other.steps);
        to.into_iter().zip(other.values()).for_each(|(to, from)| to.copy_from_slice(from));
    }
}

impl Recent {
    /// No steps yet, and memory for as many as there can be.
    ///
    /// # Errors
    /// The bytes that are not to be had.
    pub fn new(d_inner: usize, d_state: usize) -> Result<Recent, usize> {
        let zeros = |len: usize| -> Result<Vec<f32>, usize> {
            let mut values = Vec::new();
            values.try_reserve_exact(len).map_err(|_| len.saturating_mul(4))?;
            values.resize(len, 0.0);
            Ok(values)
        };
        let b = zeros(BLOCK.saturating_mul(d_state))?;
        Ok(Recent { steps: 0, b, left: zeros((1 + BLOCK).saturating_mul(d_inner))? })
    }

    /// Lengths of the values that mean something.
    fn lens(&self) -> [usize; 2] {
        match self.steps {
            0 => [0, 0],
            n => [n * self.b.len() / BLOCK, (1 + n) * self.left.len() / (1 + BLOCK)],
        }
    }

    /// All values.
    pub fn values(&self) -> [&[f32]; 2] {
        let [b, left] = self.lens();
        [&self.b[..b], &self.left[..left]]
    }

    /// Those after so many steps of a sequence, to be written.
    pub fn fill(&mut self, steps: usize) -> [&mut [f32]; 2] {
        self.steps = steps % BLOCK;
        let [b, left] = self.lens();
        [&mut self.b[..b], &mut self.left[..left]]
    }

    /// Whether the state is written within the next `steps` steps.
    pub fn is_over_within(&self, steps: usize) -> bool {
        self.steps + steps >= BLOCK
    }

    /// Bytes of memory, however many steps there are.
    pub fn bytes(&self) -> usize {
        4 * (self.b.len() + self.left.len())
    }
}

/// The state that steps begin with (see [`SsdShape::state_len`]); zeros start a sequence.
#[derive(Debug)]
pub enum ScanState<'a> {
    /// That of the last block that has ended takes its place.
    Kept(&'a mut [f32]),
    /// It stays as it is: no block ends ([`Recent::is_over_within`]), or nothing will follow these steps.
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

/// Advances a sequence by `shape.seq` tokens: `y` `[seq, d_inner]` is written. The bits do not depend on how steps are dealt to calls.
/// `room` is working memory, kept for the next call.
///
/// # Panics
/// When a slice does not have the size that the shape gives it, or there are several sequences.
#[expect(clippy::too_many_arguments, reason = "the tensors of the op, each once")]
pub fn ssd_steps(
    shape: SsdShape,
    xbc: &[f32],
    dt: &[f32],
    a: &[f32],
    d: &[f32],
    state: ScanState<'_>,
    recent: &mut Recent,
    y: &mut [f32],
    room: &mut Vec<Vec<f32>>,
) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(shape.batch, 1, "ssd steps: one sequence");
    assert_eq!(state.values().len(), shape.state_len(), "ssd steps: state");
    let (d_inner, seq, group) = (shape.d_inner(), shape.seq, shape.group_heads() * shape.head_dim);
    if d_inner == 0 || seq == 0 {
        return;
    }
    assert_eq!(
        (recent.b.len(), recent.left.len()),
        (BLOCK * shape.d_state, (1 + BLOCK) * d_inner),
        "ssd steps: recent"
    );
    let Recent { steps, b, left } = recent;
    let begin = *steps;

    let own = || xbc.chunks_exact(shape.width()).map(|x| x[d_inner..].split_at(shape.d_state));
    let before = b.chunks_exact(shape.d_state.max(1)).take(begin);
    let bs: Vec<&[f32]> = before.chain(own().map(|(b, _)| b)).collect();
    let cs: Vec<&[f32]> = own().map(|(_, c)| c).collect();
    let mut products = vec![0.0; seq * BLOCK];
    dispatch(Products { begin, bs: &bs, cs: &cs, products: &mut products });

    // A task is a group of heads: its state is one run of memory, so that no two threads ask for lines of the same page.
    let (mut y, mut left_rows) = (mat_mut(y, seq, d_inner), mat_mut(left, 1 + BLOCK, d_inner));
    let columns = y.axis_chunks_iter_mut(Axis(1), group).zip(left_rows.axis_chunks_iter_mut(Axis(1), group));
    let items: Vec<_> = state.parts(shape.d_state * group).into_iter().zip(columns).enumerate().collect();
    par::for_each_kept(items, room, |scratch, (task, (state, (mut y, left)))| {
        let group = Group {
            shape,
            first_head: task * shape.group_heads(),
            begin,
            xbc,
            dt,
            a,
            d,
            bs: &bs,
            cs: &cs,
            products: &products,
        };
        group.advance(state, left, &mut y, scratch);
    });

    let end = (begin + seq) % BLOCK;
    // The block that they end in goes on.
    let first = if begin + seq < BLOCK { begin } else { 0 };
    for ((own, _), row) in own().skip(seq - (end - first)).zip(b.chunks_exact_mut(shape.d_state.max(1)).skip(first)) {
        row.copy_from_slice(own);
    }
    *steps = end;
}

/// Tells idle threads that [`ssd_steps`] with this `state` of one sequence comes next.
pub fn ssd_steps_expect(shape: SsdShape, state: &[f32]) {
    let task = shape.d_state * shape.group_heads() * shape.head_dim;
    par::expect(state.len().div_ceil(task.max(1)), |i| state.as_ptr().wrapping_add(i * task).cast());
}

/// `C . B` of every step with those of its block that are not after it.
struct Products<'a> {
    /// Steps that the first block has before these
    begin: usize,
    /// From the first block's beginning on
    bs: &'a [&'a [f32]],
    cs: &'a [&'a [f32]],
    /// `[steps, BLOCK]`
    products: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (t, (c, products)) in self.cs.iter().zip(self.products.chunks_exact_mut(BLOCK)).enumerate() {
            let step = self.begin + t;
            for (b, product) in self.bs[step - step % BLOCK..=step].iter().zip(products) {
                *product = dot(simd, c, b);
            }
        }
    }
}

/// A group of heads.
struct Group<'a> {
    shape: SsdShape,
    first_head: usize,
    /// Steps that the first block has before these
    begin: usize,
    /// `[seq, width]` and `[seq, heads]`
    xbc: &'a [f32],
    dt: &'a [f32],
    a: &'a [f32],
    d: &'a [f32],
    bs: &'a [&'a [f32]],
    cs: &'a [&'a [f32]],
    products: &'a [f32],
}

impl Group<'_> {
    /// All steps. `left` `[1 + steps, channels]`, `y` `[seq, channels]`.
    fn advance(
        &self,
        state: ScanState<'_>,
        mut left: ArrayViewMut2<f32>,
        y: &mut ArrayViewMut2<f32>,
        scratch: &mut Vec<f32>,
    ) {
        let (shape, channels) = (self.shape, y.ncols());
        let left: Vec<&mut [f32]> =
            left.axis_iter_mut(Axis(0)).map(|row| row.into_slice().expect("rows are whole")).collect();
        let len = shape.seq * channels;
        scratch.resize(scratch.len().max(3 * len), 0.0);
        let (decay, rest) = scratch[..3 * len].split_at_mut(len);
        let (u, out) = rest.split_at_mut(len);
        vectorize(
            #[inline(always)]
            || {
                let rows = self.xbc.chunks_exact(shape.width()).zip(self.dt.chunks_exact(shape.heads));
                let steps = decay.chunks_exact_mut(channels).zip(u.chunks_exact_mut(channels));
                for (((decay, u), y), (x, dt)) in steps.zip(out.chunks_exact_mut(channels)).zip(rows) {
                    let x = &x[self.first_head * shape.head_dim..][..channels];
                    let heads = decay.chunks_mut(shape.head_dim).zip(u.chunks_mut(shape.head_dim));
                    let outputs = y.chunks_mut(shape.head_dim).zip(x.chunks(shape.head_dim));
                    for (h, ((decay, u), (y, x))) in heads.zip(outputs).enumerate() {
                        let h = self.first_head + h;
                        let (dt, d) = (dt[h], self.d[h]);
                        decay.fill(exp(dt * self.a[h]));
                        for ((u, y), x) in u.iter_mut().zip(y).zip(x) {
                            *u = dt * x;
                            *y = d * x;
                        }
                    }
                }
            },
        );
        dispatch(Steps {
            state,
            left,
            run: Run {
                is_far: shape.state_len() >= kernel::FAR,
                begin: self.begin,
                decay,
                u,
                bs: self.bs,
                cs: self.cs,
                products: self.products,
                y: out,
            },
        });
        for (t, out) in out.chunks_exact(channels).enumerate() {
            row_mut(y, t).copy_from_slice(out);
        }
    }
}
