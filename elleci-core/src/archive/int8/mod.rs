//! Products of an int8 matrix with tokens, in integers.
//!
//! ```text
//! y[t, o] = (Σ_i r[t, i] · codes[o, i]) · step_t · scale_o      r[t] = rne(x[t] / step_t),   step_t = max_i |x[t, i]| / L_t
//! ```
//!
//! Activations have 16 bits, so that what they lose vanishes beside what the weights have lost to 8: a rounded activation is off
//! by `step_t / 2` at most, 1/65,534 of the token's largest, a weight by 1/254 of its row's. Floats
//! take up to twice the time (docs/LOG.md).
//!
//! **Range.** `L_t` is the first of 32,767, 16,383, 8,191, … with `128 · Σ_i |r[t, i]| < 2³¹`: whatever the codes are, every sum of some
//! of the products fits an int32. Up to 512 columns that is always 32,767.
//!
//! So all instruction sets give the same integers, in any order of the additions; what happens to them afterwards is a conversion and two
//! multiplications in float32. **What is not finite** reaches its token's step, and nothing of that token comes out finite.

#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod panels;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod vnni;

use alloc::vec;
use alloc::vec::Vec;

use ndarray::{ArrayViewMut2, Axis};

use crate::ops::matmul::mat_mut;
use crate::ops::rows::rne_bits;
use crate::par;
use crate::simd::{Isa, vectorize};
#[cfg(all(feature = "std", target_arch = "x86_64"))]
use crate::simd::{prefetch_later, prefetch_line};
#[cfg(all(feature = "std", target_arch = "x86_64"))]
use crate::ternary::int16::{avx2::Avx2, vnni::Vnni};

/// The largest code of an activation.
const LIMIT: u16 = i16::MAX as u16;
/// The largest sum of a token's magnitudes.
const LARGEST_SUM: u64 = i32::MAX as u64 / 128;
/// Smallest magnitude that counts as a token's largest: keeps what is divided by it finite.
const FLOOR: f32 = 1.0 / (1u128 << 100) as f32;
/// Activations of a token are padded to whole vectors of the widest kind.
const LANES: usize = 32;
/// Rows that meet a token's activations together.
const ROWS: usize = 4;
/// Tokens that one task rounds.
const QUANTIZE_TOKENS: usize = 16;

/// Rows of codes with their scales.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    /// `[rows, cols]`
    pub codes: &'a [i8],
    /// `[rows]`
    pub scales: &'a [f32],
    pub cols: usize,
}

/// Tokens as integers.
struct Activations {
    /// Pairs of codes, `[tokens, width / 2]`; zeros behind the columns
    words: Vec<i32>,
    /// Columns, rounded up to whole vectors
    width: usize,
    /// `[tokens]`
    steps: Vec<f32>,
}

impl Activations {
    fn new(x: &[f32], cols: usize) -> Activations {
        let (tokens, width) = (x.len() / cols, cols.next_multiple_of(LANES));
        let (mut words, mut steps) = (vec![0; tokens * width / 2], vec![0.0; tokens]);
        let codes: &mut [i16] = bytemuck::cast_slice_mut(&mut words);
        let items = x.chunks(QUANTIZE_TOKENS * cols).zip(codes.chunks_mut(QUANTIZE_TOKENS * width));
        par::for_each(items.zip(steps.chunks_mut(QUANTIZE_TOKENS)).collect(), |((x, codes), steps): Rounded| {
            vectorize(
                #[inline(always)]
                || {
                    for ((x, codes), step) in x.chunks_exact(cols).zip(codes.chunks_exact_mut(width)).zip(steps) {
                        *step = quantize(x, codes);
                    }
                },
            );
        });
        Activations { words, width, steps }
    }

    /// `[tokens, width]`
    fn codes(&self) -> &[i16] {
        bytemuck::cast_slice(&self.words)
    }

    /// How many tokens there are. The bounds that kernels' pointers rest on.
    ///
    /// # Panics
    /// When they are not whole vectors of `cols` and zeros.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    fn check(&self, cols: usize) -> usize {
        let tokens = self.steps.len();
        assert!(cols <= self.width && self.width.is_multiple_of(LANES), "{cols} columns");
        assert_eq!(self.codes().len(), tokens * self.width, "activations");
        tokens
    }

    /// The tokens from `first` on.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    #[inline(always)]
    fn tokens(&self, first: usize) -> Tokens {
        Tokens { codes: self.codes()[first * self.width..].as_ptr(), width: self.width }
    }
}

/// Some tokens of [`Activations`].
#[cfg(all(feature = "std", target_arch = "x86_64"))]
#[derive(Clone, Copy)]
struct Tokens {
    codes: *const i16,
    width: usize,
}

/// Called for every cache line of codes that is multiplied, in the order of the memory and not of the rows: asks for what comes soon,
/// and for what comes later. The address may be any.
#[inline(always)]
#[cfg(all(feature = "std", target_arch = "x86_64"))]
fn ask_for(at: *const i8) {
    let at: *const u8 = at.cast();
    prefetch_line(at.wrapping_add(4 << 10));
    prefetch_later(at.wrapping_add(16 << 10));
}

/// Some tokens, and what becomes of them.
type Rounded<'a> = ((&'a [f32], &'a mut [i16]), &'a mut [f32]);

/// Rounds a token; returns its step.
#[inline(always)]
fn quantize(x: &[f32], codes: &mut [i16]) -> f32 {
    // The bits of non-negative floats order like the floats, NaN above all.
    let amax = f32::from_bits(x.iter().fold(FLOOR.to_bits(), |amax, v| amax.max(v.abs().to_bits())));
    let mut limit = LIMIT;
    loop {
        let inverse = limit as f32 / amax;
        for (code, v) in codes.iter_mut().zip(x) {
            let v = v * inverse;
            // |v| <= limit · (1 + 2^-24)^2, which rounds to the limit. NaN is infinity times zero, or NaN before.
            *code = if v.is_nan() { 0 } else { rne_bits(v) as i16 };
        }
        // Parts that fit an int32.
        let part = |codes: &[i16]| codes.iter().map(|c| c.unsigned_abs() as u32).sum::<u32>() as u64;
        if limit == 1 || codes.chunks(1 << 16).map(part).sum::<u64>() <= LARGEST_SUM {
            return amax / limit as f32;
        }
        limit /= 2;
    }
}

/// Where the sums of a task go.
struct Outputs<'a> {
    /// `[tokens, rows of the task]`
    y: ArrayViewMut2<'a, f32>,
    /// Of these rows
    scales: &'a [f32],
    steps: &'a [f32],
}

impl<'a> Outputs<'a> {
    /// Those of the first `rows` rows, and the others.
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    fn split(self, rows: usize) -> (Outputs<'a>, Outputs<'a>) {
        let (y, rest) = self.y.split_at(Axis(1), rows);
        let (scales, others) = self.scales.split_at(rows);
        (Outputs { y, scales, ..self }, Outputs { y: rest, scales: others, ..self })
    }

    /// The sums of the rows `row ..` with a token.
    #[inline(always)]
    fn put<const N: usize>(&mut self, row: usize, token: usize, sums: [i32; N]) {
        let mut y = self.y.row_mut(token);
        let y = &mut y.as_slice_mut().expect("rows of the output are contiguous")[row..][..N];
        let (scales, step) = (&self.scales[row..][..N], self.steps[token]);
        // As one vector, before anything is written.
        let values: [f32; N] = core::array::from_fn(|r| sums[r] as f32 * step * scales[r]);
        y.copy_from_slice(&values);
    }
}

/// Runs `work` for tasks of `rows` rows each: with working memory that tasks hand on, their codes, and where the sums go.
fn tasks<S: Default + Send>(
    matrix: Matrix,
    steps: &[f32],
    rows: usize,
    y: &mut [f32],
    work: impl Fn(&mut S, &[i8], Outputs) + Send + Sync,
) {
    let mut y = mat_mut(y, steps.len(), matrix.scales.len());
    let views = y.axis_chunks_iter_mut(Axis(1), rows);
    let items = views.zip(matrix.scales.chunks(rows)).zip(matrix.codes.chunks(rows * matrix.cols)).collect();
    par::for_each_init(items, S::default, |kept, ((y, scales), codes): Task| {
        work(kept, codes, Outputs { y, scales, steps })
    });
}

/// Outputs, scales and codes.
type Task<'a> = ((ArrayViewMut2<'a, f32>, &'a [f32]), &'a [i8]);

/// `y` `[tokens, rows]` from `x` `[tokens, cols]`, in tasks of `rows` rows or more, a multiple of [`ROWS`]. `isa` is the ceiling.
///
/// # Panics
/// When a slice does not have its size, there are no columns, or more than a token's int32 sums allow.
pub(super) fn forward(isa: Isa, matrix: Matrix, rows: usize, x: &[f32], y: &mut [f32]) -> Isa {
    let cols = matrix.cols;
    assert!(cols as u64 <= LARGEST_SUM && matrix.codes.len() == matrix.scales.len() * cols, "codes");
    assert!(rows.is_multiple_of(ROWS) && x.len().is_multiple_of(cols), "rows");
    let x = Activations::new(x, cols);
    assert_eq!(y.len(), x.steps.len() * matrix.scales.len(), "outputs");
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        if isa >= Isa::Avx512Vnni
            && let Some(kernel) = Vnni::detect()
        {
            if panels::worth(x.steps.len(), cols) {
                let whole = rows.next_multiple_of(panels::ROWS);
                tasks(matrix, &x.steps, whole, y, |panel, codes, out| {
                    let count = codes.len() / cols / panels::ROWS * panels::ROWS;
                    let (codes, rest) = codes.split_at(count * cols);
                    let (out, rest_out) = out.split(count);
                    panels::rows(kernel, codes, cols, &x, panel, out);
                    vnni::rows(kernel, rest, cols, &x, rest_out);
                });
            } else {
                tasks(matrix, &x.steps, rows, y, |(), codes, out| vnni::rows(kernel, codes, cols, &x, out));
            }
            return isa.min(Isa::machine());
        }
        if isa >= Isa::Avx2
            && let Some(kernel) = Avx2::detect()
        {
            tasks(matrix, &x.steps, rows, y, |(), codes, out| avx2::rows(kernel, codes, cols, &x, out));
            return Isa::Avx2;
        }
    }
    let _ = isa;
    tasks(matrix, &x.steps, rows, y, |(), codes, out| {
        vectorize(
            #[inline(always)]
            || portable(codes, cols, &x, out),
        );
    });
    Isa::Portable
}

/// The definition: any number of rows.
#[inline(always)]
fn portable(codes: &[i8], cols: usize, x: &Activations, mut out: Outputs) {
    let mut wide = vec![0i16; cols];
    for (row, codes) in codes.chunks_exact(cols).enumerate() {
        wide.iter_mut().zip(codes).for_each(|(wide, code)| *wide = *code as i16);
        for (token, x) in x.codes().chunks_exact(x.width).enumerate() {
            let sum = wide.iter().zip(x).map(|(w, x)| *w as i32 * *x as i32).sum();
            out.put(row, token, [sum]);
        }
    }
}

#[cfg(test)]
mod tests;
