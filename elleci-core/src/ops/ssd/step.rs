//! One step of the recurrence, for decoding.

use alloc::vec::Vec;
use ndarray::Axis;

use super::SsdShape;
use crate::ops::activation::exp;
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{prefetch, vectorize};

/// Channels of one task: its row of the state, its decays and sums stay in the L1 cache.
const BLOCK: usize = 512;
/// Rows of the state that are asked for before they are needed: each lies on pages of its own.
const AHEAD: usize = 2;

/// Advances every sequence of a batch by one token (`shape.seq` must be 1): `state` `[batch, d_state, d_inner]` is
/// updated in place and `y` `[batch, d_inner]` is written. A zero state starts a sequence.
///
/// # Panics
/// When a slice does not have the size that the shape gives it.
pub fn ssd_step(shape: SsdShape, xbc: &[f32], dt: &[f32], a: &[f32], d: &[f32], state: &mut [f32], y: &mut [f32]) {
    shape.check(xbc, dt, a, d, y);
    assert_eq!(shape.seq, 1, "ssd step: one token a sequence");
    assert_eq!(state.len(), shape.batch * shape.state_len(), "ssd step: state");
    let (d_inner, n_dim) = (shape.d_inner(), shape.d_state);
    if d_inner == 0 {
        return;
    }
    for (i, y) in y.chunks_exact_mut(d_inner).enumerate() {
        let mut state = mat_mut(&mut state[i * shape.state_len()..][..shape.state_len()], n_dim, d_inner);
        let row = &xbc[i * shape.width()..][..shape.width()];
        let (x, bc) = row.split_at(d_inner);
        let (b, c) = bc.split_at(n_dim);
        let dt = &dt[i * shape.heads..][..shape.heads];
        let items: Vec<_> = state.axis_chunks_iter_mut(Axis(1), BLOCK).zip(y.chunks_mut(BLOCK)).enumerate().collect();
        par::for_each(items, |(block, (mut state, y))| {
            let first = block * BLOCK;
            let (mut decay, mut u) = ([0.0; BLOCK], [0.0; BLOCK]);
            let (decay, u) = (&mut decay[..y.len()], &mut u[..y.len()]);
            vectorize(
                #[inline(always)]
                || {
                    for i in 0..y.len() {
                        let head = (first + i) / shape.head_dim;
                        decay[i] = dt[head] * a[head];
                        u[i] = dt[head] * x[first + i];
                        y[i] = d[head] * x[first + i];
                    }
                    decay.iter_mut().for_each(|v| *v = exp(*v));
                    for n in 0..n_dim {
                        if n + AHEAD < n_dim {
                            prefetch(state.row(n + AHEAD).to_slice().expect("columns are contiguous"));
                        }
                        let row = state.row_mut(n).into_slice().expect("columns are contiguous");
                        for (((s, y), decay), u) in row.iter_mut().zip(&mut *y).zip(&*decay).zip(&*u) {
                            *s = decay * *s + b[n] * u;
                            *y += c[n] * *s;
                        }
                    }
                },
            );
        });
    }
}
