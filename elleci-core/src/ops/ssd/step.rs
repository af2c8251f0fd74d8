//! One step of the recurrence, for decoding.

use alloc::vec;
use alloc::vec::Vec;
use pulp::{Simd, WithSimd};

use super::SsdShape;
use crate::ops::activation::exp;
use crate::ops::lanes::dispatch;
use crate::par;
use crate::simd::{prefetch_run, vectorize};

/// Advances every sequence of a batch by one token (`shape.seq` must be 1): `state` (see [`SsdShape::state_len`]) is
/// updated in place and `y` `[batch, d_inner]` is written. A zero state starts a sequence.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
pub fn ssd_step(shape: SsdShape, xbc: &[f32], dt: &[f32], a: &[f32], d: &[f32], state: &mut [f32], y: &mut [f32]) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(shape.seq, 1, "ssd step: one token a sequence");
    assert_eq!(state.len(), shape.batch * shape.state_len(), "ssd step: state");
    let (d_inner, group) = (shape.d_inner(), shape.group_heads() * shape.head_dim);
    if d_inner == 0 {
        return;
    }
    for (i, y) in y.chunks_exact_mut(d_inner).enumerate() {
        let state = &mut state[i * shape.state_len()..][..shape.state_len()];
        let row = &xbc[i * shape.width()..][..shape.width()];
        let (x, bc) = row.split_at(d_inner);
        let (b, c) = bc.split_at(shape.d_state);
        let dt = &dt[i * shape.heads..][..shape.heads];
        // A task is a group of heads: its state is one run of memory, so that no two threads ask for lines of the same page.
        let items: Vec<_> =
            state.chunks_mut((shape.d_state * group).max(1)).zip(y.chunks_mut(group)).enumerate().collect();
        par::for_each(items, |(task, (state, y))| {
            let mut decay_u = vec![0.0; 2 * y.len()];
            let (decay, u) = decay_u.split_at_mut(y.len());
            vectorize(
                #[inline(always)]
                || {
                    let channels = decay.chunks_mut(shape.head_dim).zip(u.chunks_mut(shape.head_dim));
                    let outputs = y.chunks_mut(shape.head_dim).zip(x[task * group..].chunks(shape.head_dim));
                    for (h, ((decay, u), (y, x))) in channels.zip(outputs).enumerate() {
                        let h = task * shape.group_heads() + h;
                        decay.fill(exp(dt[h] * a[h]));
                        for ((u, y), x) in u.iter_mut().zip(y).zip(x) {
                            *u = dt[h] * x;
                            *y = d[h] * x;
                        }
                    }
                },
            );
            dispatch(Advance { state, decay, u, b, c, y });
        });
    }
}

/// Tells idle threads that [`ssd_step`] with this `state` of one sequence comes next.
pub fn ssd_step_expect(shape: SsdShape, state: &[f32]) {
    let task = shape.d_state * shape.group_heads() * shape.head_dim;
    par::expect(state.len().div_ceil(task.max(1)), |i| state.as_ptr().wrapping_add(i * task).cast());
}

/// `s = decay ⊙ s + b[n] u` and `y += c[n] s` for every row n of the state.
struct Advance<'a> {
    /// `[d_state, channels]`
    state: &'a mut [f32],
    decay: &'a [f32],
    u: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Advance<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Advance { state, decay, u, b, c, y } = self;
        let channels = y.len();
        let (y, y_tail) = S::as_mut_simd_f32s(y);
        let ((decay, decay_tail), (u, u_tail)) = (S::as_simd_f32s(decay), S::as_simd_f32s(u));
        for (row, (b, c)) in state.chunks_exact_mut(channels).zip(b.iter().zip(c)) {
            let (bn, cn) = (simd.splat_f32s(*b), simd.splat_f32s(*c));
            let (row, tail) = S::as_mut_simd_f32s(row);
            let vectors = row.iter_mut().zip(y.iter_mut()).zip(decay.iter().zip(u));
            for ((s, y), (decay, u)) in vectors {
                prefetch_run(core::ptr::from_ref(s).cast());
                *s = simd.mul_add_e_f32s(*decay, *s, simd.mul_f32s(bn, *u));
                *y = simd.mul_add_e_f32s(cn, *s, *y);
            }
            let channels = tail.iter_mut().zip(y_tail.iter_mut()).zip(decay_tail.iter().zip(u_tail));
            for ((s, y), (decay, u)) in channels {
                *s = decay * *s + b * u;
                *y += c * *s;
            }
        }
    }
}
