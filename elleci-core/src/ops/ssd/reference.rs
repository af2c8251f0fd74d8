//! The recurrence as it is defined, in float64, one head and one step at a time.
//!
//! ```text
//! S_t = exp(dt_t a) S_{t-1} + dt_t x_t (x) B_t        [head_dim, d_state] a head, S before the sequence is 0
//! y_t = S_t C_t + d x_t
//! ```

use super::SsdShape;
use alloc::vec;
use alloc::vec::Vec;

/// One (sequence, head) of the op: where its numbers lie in the buffers.
struct Head<'a> {
    shape: SsdShape,
    batch: usize,
    head: usize,
    xbc: &'a [f64],
    dt: &'a [f64],
    a: f64,
}

impl Head<'_> {
    fn token(&self, t: usize) -> usize {
        self.batch * self.shape.seq + t
    }
    /// Index in `xbc` and `dxbc` of x, B and C.
    fn x_at(&self, t: usize, p: usize) -> usize {
        self.token(t) * self.shape.width() + self.head * self.shape.head_dim + p
    }
    fn b_at(&self, t: usize, n: usize) -> usize {
        self.token(t) * self.shape.width() + self.shape.d_inner() + n
    }
    fn c_at(&self, t: usize, n: usize) -> usize {
        self.b_at(t, n) + self.shape.d_state
    }
    /// Index in `y` and `dy`.
    fn y_at(&self, t: usize, p: usize) -> usize {
        self.token(t) * self.shape.d_inner() + self.head * self.shape.head_dim + p
    }
    /// Index in `dt` and `ddt`.
    fn dt_at(&self, t: usize) -> usize {
        self.token(t) * self.shape.heads + self.head
    }
    fn decay(&self, t: usize) -> f64 {
        libm::exp(self.dt[self.dt_at(t)] * self.a)
    }

    /// `[seq + 1][head_dim * d_state]`: the state before step t, and after the last step.
    fn states(&self) -> Vec<Vec<f64>> {
        let (p_dim, n_dim) = (self.shape.head_dim, self.shape.d_state);
        let mut states = vec![vec![0.0; p_dim * n_dim]];
        for t in 0..self.shape.seq {
            let mut state = states[t].clone();
            for p in 0..p_dim {
                for n in 0..n_dim {
                    let input = self.dt[self.dt_at(t)] * self.xbc[self.x_at(t, p)] * self.xbc[self.b_at(t, n)];
                    state[p * n_dim + n] = self.decay(t) * state[p * n_dim + n] + input;
                }
            }
            states.push(state);
        }
        states
    }
}

fn heads<'a>(shape: SsdShape, xbc: &'a [f64], dt: &'a [f64], a: &'a [f64]) -> impl Iterator<Item = Head<'a>> {
    (0..shape.batch)
        .flat_map(move |batch| (0..shape.heads).map(move |head| Head { shape, batch, head, xbc, dt, a: a[head] }))
}

/// See [`super::ssd_forward`]: returns `y`.
pub fn forward(shape: SsdShape, xbc: &[f64], dt: &[f64], a: &[f64], d: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; shape.tokens() * shape.d_inner()];
    for h in heads(shape, xbc, dt, a) {
        let states = h.states();
        for t in 0..shape.seq {
            for p in 0..shape.head_dim {
                let row = &states[t + 1][p * shape.d_state..];
                let read: f64 = (0..shape.d_state).map(|n| row[n] * xbc[h.c_at(t, n)]).sum();
                y[h.y_at(t, p)] = read + d[h.head] * xbc[h.x_at(t, p)];
            }
        }
    }
    y
}

/// What [`backward`] returns.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Of `xbc` `[tokens, d_inner + 2 d_state]`.
    pub dxbc: Vec<f64>,
    /// Of `dt` `[tokens, heads]`.
    pub ddt: Vec<f64>,
    /// Of the exponent `dt * a` `[tokens, heads]`; `ddt` contains `a` times it.
    pub dexponent: Vec<f64>,
    /// Of `a` `[heads]`.
    pub da: Vec<f64>,
    /// Of `d` `[heads]`.
    pub dd: Vec<f64>,
}

/// See [`super::ssd_backward`].
pub fn backward(shape: SsdShape, xbc: &[f64], dt: &[f64], a: &[f64], d: &[f64], dy: &[f64]) -> Gradients {
    let per_head = shape.tokens() * shape.heads;
    let mut g = Gradients {
        dxbc: vec![0.0; xbc.len()],
        ddt: vec![0.0; per_head],
        dexponent: vec![0.0; per_head],
        da: vec![0.0; shape.heads],
        dd: vec![0.0; shape.heads],
    };
    for h in heads(shape, xbc, dt, a) {
        let states = h.states();
        // The gradient of S_t: what y_t reads plus what S_{t+1} inherits.
        let mut dstate = vec![0.0; shape.head_dim * shape.d_state];
        for t in (0..shape.seq).rev() {
            let step = dt[h.dt_at(t)];
            for p in 0..shape.head_dim {
                let (x, dy) = (xbc[h.x_at(t, p)], dy[h.y_at(t, p)]);
                g.dd[h.head] += dy * x;
                g.dxbc[h.x_at(t, p)] += d[h.head] * dy;
                for n in 0..shape.d_state {
                    let i = p * shape.d_state + n;
                    let (b, c) = (xbc[h.b_at(t, n)], xbc[h.c_at(t, n)]);
                    dstate[i] += dy * c;
                    g.dxbc[h.c_at(t, n)] += dy * states[t + 1][i];
                    g.dxbc[h.x_at(t, p)] += dstate[i] * step * b;
                    g.dxbc[h.b_at(t, n)] += dstate[i] * step * x;
                    g.ddt[h.dt_at(t)] += dstate[i] * x * b;
                    dstate[i] *= h.decay(t);
                    g.dexponent[h.dt_at(t)] += dstate[i] * states[t][i];
                }
            }
            g.ddt[h.dt_at(t)] += h.a * g.dexponent[h.dt_at(t)];
            g.da[h.head] += step * g.dexponent[h.dt_at(t)];
        }
    }
    g
}
