//! RmsNorm fused with the int8 quantiser, and its backward (SPEC §1.1).
//!
//! Every ternary projection reads the output of a norm, so norm and quantisation are one pass over a row. What the
//! backward needs is kept: the codes (one byte an element), their scale, and the reciprocal root mean square. The
//! input row itself is produced by a closure, so that `y ⊙ silu(z)` or `relu(gate)² ⊙ up` never stands in memory.

use alloc::vec;
use alloc::vec::Vec;

use super::matmul::Out;
use super::rows::{self, rows_per_task};
use crate::par;
use crate::simd::vectorize;
use crate::ternary::quantize_row;

/// The int8 rows that ternary projections read, with what the norm's backward needs.
#[derive(Clone, Debug, Default)]
pub struct QuantizedRows {
    /// `[tokens, width]`
    pub codes: Vec<i8>,
    /// `[tokens]`: a code times this is the value, `amax / 127`
    pub scales: Vec<f32>,
    /// `[tokens]`: `(mean(x²) + eps)^-1/2`
    pub rstd: Vec<f32>,
    /// Working memory: a row for each thread
    room: Vec<Vec<f32>>,
}

impl QuantizedRows {
    /// Room for `tokens` rows.
    pub fn new(tokens: usize, width: usize) -> QuantizedRows {
        let (codes, scales, rstd) = (vec![0; tokens * width], vec![0.0; tokens], vec![0.0; tokens]);
        QuantizedRows { codes, scales, rstd, room: Vec::new() }
    }

    /// Changes the size, keeping the allocation where it is large enough.
    pub fn resize(&mut self, tokens: usize, width: usize) {
        self.codes.resize(tokens * width, 0);
        self.scales.resize(tokens, 0.0);
        self.rstd.resize(tokens, 0.0);
    }

    /// Leaves some rows of those that there are, in their order: `rows` ascends.
    pub fn keep(&mut self, rows: impl ExactSizeIterator<Item = usize>) {
        let (width, kept) = (self.codes.len() / self.scales.len().max(1), rows.len());
        for (to, row) in rows.enumerate() {
            self.codes.copy_within(row * width..(row + 1) * width, to * width);
            (self.scales[to], self.rstd[to]) = (self.scales[row], self.rstd[row]);
        }
        self.resize(kept, width);
    }

    /// Bytes that [`QuantizedRows::new`] allocates.
    pub fn planned_bytes(tokens: usize, width: usize) -> usize {
        tokens * (width + 8)
    }
}

/// `g ⊙ x · (mean(x²) + eps)^-1/2` of one row; returns the reciprocal root mean square.
#[inline(always)]
pub fn rmsnorm_row(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let rstd = rstd(x, eps);
    for ((o, &x), &g) in out.iter_mut().zip(x).zip(gain) {
        *o = x * rstd * g;
    }
    rstd
}

#[inline(always)]
fn rstd(x: &[f32], eps: f32) -> f32 {
    1.0 / libm::sqrtf(rows::sum_squares(x) / x.len() as f32 + eps)
}

/// Norm without quantisation (the final norm): `out` `[tokens, width]`, `rstd` `[tokens]`.
pub fn rmsnorm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32], rstd: &mut [f32]) {
    let width = gain.len();
    let n = rows_per_task(rstd.len());
    let items = x.chunks(n * width).zip(out.chunks_mut(n * width)).zip(rstd.chunks_mut(n)).collect();
    par::for_each(items, |((x, out), rstd): ((&[f32], &mut [f32]), &mut [f32])| {
        vectorize(
            #[inline(always)]
            || {
                for ((x, out), r) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(rstd) {
                    *r = rmsnorm_row(x, gain, eps, out);
                }
            },
        );
    });
}

/// Norm and quantiser of rows that `fill(token, row)` produces. `normed`, when given, receives the float rows too.
pub fn rmsnorm_quantize(
    fill: impl Fn(usize, &mut [f32]) + Sync + Send,
    gain: &[f32],
    eps: f32,
    out: &mut QuantizedRows,
    normed: Option<&mut [f32]>,
) {
    let width = gain.len();
    let run = |own: &mut Vec<f32>, first: usize, out: Rows<'_>| {
        let Rows { codes, scales, rstd: rstds, mut normed } = out;
        if normed.is_none() {
            own.resize(width, 0.0);
        }
        vectorize(
            #[inline(always)]
            || {
                for (i, (codes, scale)) in codes.chunks_exact_mut(width).zip(scales.iter_mut()).enumerate() {
                    let row = match normed.as_mut() {
                        Some(rows) => &mut rows[i * width..(i + 1) * width],
                        None => &mut own[..],
                    };
                    fill(first + i, row);
                    let rstd = rstd(row, eps);
                    row.iter_mut().zip(gain).for_each(|(x, g)| *x = *x * rstd * g);
                    rstds[i] = rstd;
                    *scale = quantize_row(row, codes);
                }
            },
        );
    };
    let n = rows_per_task(out.scales.len());
    let QuantizedRows { codes, scales, rstd, room } = out;
    let mut rest = Rows { codes, scales, rstd, normed };
    // One task needs no list of them: a token goes through four norms a layer.
    if rest.scales.len() <= n {
        let mut own = room.pop().unwrap_or_default();
        run(&mut own, 0, rest);
        return room.push(own);
    }
    let mut items = Vec::with_capacity(rest.scales.len().div_ceil(n));
    while !rest.scales.is_empty() {
        let (own, later) = rest.split_at(n, width);
        items.push((items.len() * n, own));
        rest = later;
    }
    par::for_each_kept(items, room, |own, (first, rows)| run(own, first, rows));
}

/// Some rows of what a norm and quantiser write.
struct Rows<'a> {
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    rstd: &'a mut [f32],
    normed: Option<&'a mut [f32]>,
}

impl<'a> Rows<'a> {
    /// The first `n` rows, or as many as there are, and the others.
    fn split_at(self, n: usize, width: usize) -> (Rows<'a>, Rows<'a>) {
        let n = n.min(self.scales.len());
        let (codes, more_codes) = self.codes.split_at_mut(n * width);
        let (scales, more_scales) = self.scales.split_at_mut(n);
        let (rstd, more_rstd) = self.rstd.split_at_mut(n);
        let (normed, more_normed) = self.normed.map(|rows| rows.split_at_mut(n * width)).unzip();
        let more = Rows { codes: more_codes, scales: more_scales, rstd: more_rstd, normed: more_normed };
        (Rows { codes, scales, rstd, normed }, more)
    }
}

/// Backward of one row: `dx = r·(s − x̂·mean(s ⊙ x̂))` with `x̂ = x·r`, `s = g ⊙ dn`; `dgain += dn ⊙ x̂`.
#[inline(always)]
pub fn rmsnorm_backward_row(
    x: &[f32],
    gain: &[f32],
    rstd: f32,
    dn: &[f32],
    dx: &mut [f32],
    dgain: &mut [f32],
    out: Out,
) {
    let width = x.len();
    let (gain, dn, dx, dgain) = (&gain[..width], &dn[..width], &mut dx[..width], &mut dgain[..width]);
    for i in 0..width {
        dgain[i] += dn[i] * x[i] * rstd;
    }
    // Σ s·x̂ / width, and one more rstd from x̂
    let mean = rows::dot3(gain, dn, x) * rstd * rstd / width as f32;
    match out {
        Out::Store => {
            for i in 0..width {
                dx[i] = rstd * (gain[i] * dn[i] - x[i] * mean);
            }
        }
        Out::Add => {
            for i in 0..width {
                dx[i] += rstd * (gain[i] * dn[i] - x[i] * mean);
            }
        }
    }
}

/// Backward of the norm over rows: `dx` (stored or added), `dgain` added. `x` and `dx` are `[tokens, width]`.
pub fn rmsnorm_backward(
    x: &[f32],
    gain: &[f32],
    rstd: &[f32],
    dn: &[f32],
    dx: &mut [f32],
    dgain: &mut [f32],
    out: Out,
) {
    let width = gain.len();
    let n = rows_per_task(rstd.len());
    let mut partials = vec![0.0f32; rstd.len().div_ceil(n) * width];
    let items = x
        .chunks(n * width)
        .zip(dn.chunks(n * width))
        .zip(dx.chunks_mut(n * width))
        .zip(rstd.chunks(n))
        .zip(partials.chunks_mut(width))
        .collect();
    type Item<'a> = ((((&'a [f32], &'a [f32]), &'a mut [f32]), &'a [f32]), &'a mut [f32]);
    par::for_each(items, |((((x, dn), dx), rstd), partial): Item| {
        vectorize(
            #[inline(always)]
            || {
                for (i, &r) in rstd.iter().enumerate() {
                    let at = i * width..(i + 1) * width;
                    rmsnorm_backward_row(&x[at.clone()], gain, r, &dn[at.clone()], &mut dx[at], partial, out);
                }
            },
        );
    });
    rows::add_partials(dgain, &partials);
}

/// Backward of a norm whose input row is a product of two saved rows (`y ⊙ silu(z)`, `relu(gate)² ⊙ up`).
///
/// `fill(token, x)` recomputes the input row; `split(token, dx, left, right)` turns its gradient into the gradients of
/// the two factors, written to rows of `left` and `right`, each given with its row stride. `dgain` is added.
#[expect(clippy::too_many_arguments, reason = "two closures and their buffers; a struct would only rename them")]
pub fn rmsnorm_backward_product(
    fill: impl Fn(usize, &mut [f32]) + Sync + Send,
    gain: &[f32],
    rstd: &[f32],
    dn: &[f32],
    split: impl Fn(usize, &[f32], &mut [f32], &mut [f32]) + Sync + Send,
    left: (&mut [f32], usize),
    right: (&mut [f32], usize),
    dgain: &mut [f32],
) {
    let width = gain.len();
    let n = rows_per_task(rstd.len());
    let mut partials = vec![0.0f32; rstd.len().div_ceil(n) * width];
    let ((left, left_stride), (right, right_stride)) = (left, right);
    let items: Vec<_> = dn
        .chunks(n * width)
        .zip(rstd.chunks(n))
        .zip(left.chunks_mut(n * left_stride))
        .zip(right.chunks_mut(n * right_stride))
        .zip(partials.chunks_mut(width))
        .enumerate()
        .collect();
    par::for_each(items, |(task, ((((dn, rstd), left), right), partial))| {
        let mut x = vec![0.0f32; width];
        let mut dx = vec![0.0f32; width];
        vectorize(
            #[inline(always)]
            || {
                for (i, &r) in rstd.iter().enumerate() {
                    let t = task * n + i;
                    fill(t, &mut x);
                    rmsnorm_backward_row(&x, gain, r, &dn[i * width..(i + 1) * width], &mut dx, partial, Out::Store);
                    split(
                        t,
                        &dx,
                        &mut left[i * left_stride..(i + 1) * left_stride],
                        &mut right[i * right_stride..(i + 1) * right_stride],
                    );
                }
            },
        );
    });
    rows::add_partials(dgain, &partials);
}
