//! The straight-through gradients with the incoming gradient in int16.
//!
//! `dx = (γ·W₃)ᵀ · dy` and `dW = dyᵀ · (q·scale)` each have one operand of small integers. With the other one, `dy`,
//! rounded to int16 as well, the products are integers too, and `vpdpwssd` does them at twice the rate of float32:
//!
//! ```text
//! dx[t]    = (Σ_o r[t, o] · W₃[o]) · (γ · a_t)     r[t] = rne(dy[t] / a_t),        a_t = max_o |dy[t, o]| / 32767
//! dW[o]   += (Σ_t c[t, o] · q[t]) · b_o            c[t, o] = rne(e[t, o] / b_o),     b_o = max_t |e[t, o]| / 32767
//!                                                  e[t, o] = dy[t, o] · scale[t]
//! ```
//!
//! the second one a chunk of [`CHUNK`] tokens at a time, each with its own `b`. So every channel keeps its own scale, and
//! an activation's scale, which the integers `q` lack, is folded into `dy` before it is rounded.
//!
//! **Error.** A rounded value is off by at most half a step, `a_t / 2` or `b_o / 2`: 1/65,534 of the largest of its token
//! or channel. Hence `dx[t, i]` by at most `γ · a_t / 2` times the number of weights of column i that are not zero, and
//! `dW[o, i]` by at most `b_o / 2 · Σ|q[, i]|` a chunk. The rest is float32 rounding: of the scales, of a conversion and
//! a product, and of an addition a chunk.
//!
//! **Range.** `|Σ r·W₃| <= 32,767 · depth` would stay in an int32 for 65,536 outputs; the depth is cut at [`DEPTH`] words
//! anyway, and the parts are added as floats. `|Σ c·q| <= 32,767 · 128 · 512 < 2³¹`. Every kernel gives the same integers,
//! and what happens to them afterwards is the same code: all instruction sets give the same bits, at any thread count.
//!
//! **What is not finite** reaches the scale of its row or channel, and everything that it touches comes out not finite.

pub(crate) mod kernel;
mod quantize;

#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod avx2;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod vnni;

use alloc::vec::Vec;
use core::ops::Range;

use ndarray::{ArrayViewMut2, Axis, s};

use self::kernel::{Ahead, Block, Kernel, Line, ROWS, WIDTH, WithKernel, Words};
use super::matrix::TernaryMatrix;
use crate::ops::matmul::{Out, mat_mut};
use crate::par;
use crate::simd::{self, Isa};

/// Tokens of the weight gradient whose products are added up as integers.
const CHUNK: usize = 512;
/// Words of depth that are multiplied in one go.
const DEPTH: usize = 512;
/// Lines of a packed block: a megabyte, half the second-level cache.
const BLOCK_LINES: usize = 1 << 12;
/// Rows of the output that one task computes: 8 blocks.
const TASK_ROWS: usize = 8 * ROWS;
/// Rows that one task rounds.
const QUANTIZE_ROWS: usize = 64;

/// The int8 activations that a projection read, `[tokens, in]`, with their scales `[tokens]`.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    /// `[tokens, in]`
    pub codes: &'a [i8],
    /// `[tokens]`
    pub scales: &'a [f32],
}

/// Buffers of the int16 gradients, grown on use.
#[derive(Debug, Default)]
pub struct Int16Scratch {
    /// `dy` in int16 pairs: `[tokens, words of out]`, or `[out, words of a chunk]`
    words: Vec<i32>,
    /// A packed block of the other operand
    packed: Vec<Line>,
    /// Scale of every row of `words`
    scales: Vec<f32>,
    /// Largest magnitudes by channel, `[groups of QUANTIZE_ROWS tokens, out]`, as bits
    largest: Vec<u32>,
}

impl Int16Scratch {
    /// Bytes after the gradients of projections `[out, in]` of `tokens`.
    pub fn planned_bytes(tokens: usize, shapes: impl Iterator<Item = (usize, usize)>) -> usize {
        let mut most = [0; 4];
        for (out, input) in shapes {
            let packed = [out, tokens.min(CHUNK)].map(|depth| block_lines(depth.div_ceil(2), input));
            let here = [words(tokens, out), packed[0].max(packed[1]), tokens.max(out), groups(tokens) * out];
            most.iter_mut().zip(here).for_each(|(most, here)| *most = here.max(*most));
        }
        4 * (most[0] + most[2] + most[3]) + size_of::<Line>() * most[1]
    }
}

/// Words that `dy` takes.
fn words(tokens: usize, out: usize) -> usize {
    (tokens * out.div_ceil(2)).max(out * tokens.min(CHUNK).div_ceil(2))
}

/// Groups of tokens that are rounded together.
fn groups(tokens: usize) -> usize {
    tokens.div_ceil(QUANTIZE_ROWS)
}

/// Columns of a packed block of `depth` words at most.
fn block_columns(depth: usize) -> usize {
    BLOCK_LINES / depth.min(DEPTH) * WIDTH
}

/// Lines of a packed block.
fn block_lines(depth: usize, columns: usize) -> usize {
    depth.min(DEPTH) * columns.min(block_columns(depth)).div_ceil(WIDTH)
}

impl TernaryMatrix {
    /// [`TernaryMatrix::gradients`], with `dy` `[tokens, out]` rounded to int16: `dx` `[tokens, in]` `(=|+=)`, and
    /// `dw` `[out, in]` `+=`.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub(super) fn gradients_int16(
        &self,
        dy: &[f32],
        x: Activations,
        (dx, out): (&mut [f32], Out),
        dw: &mut [f32],
        scratch: &mut Int16Scratch,
    ) {
        self.gradients_int16_with(Isa::detect(), dy, x, (dx, out), dw, scratch);
    }

    /// `gradients_int16` with the kernels of one instruction set at most; returns the one that ran.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn gradients_int16_with(
        &self,
        isa: Isa,
        dy: &[f32],
        x: Activations,
        (dx, out): (&mut [f32], Out),
        dw: &mut [f32],
        scratch: &mut Int16Scratch,
    ) -> Isa {
        let tokens = x.scales.len();
        assert_eq!(
            (dy.len(), x.codes.len()),
            (tokens * self.out_dim(), tokens * self.in_dim()),
            "rows of {tokens} tokens"
        );
        let dx = mat_mut(dx, tokens, self.in_dim());
        let dw = mat_mut(dw, self.out_dim(), self.in_dim());
        kernel::dispatch(isa, Gradients { matrix: self, dy, x, dx, out, dw, scratch })
    }
}

struct Gradients<'a> {
    matrix: &'a TernaryMatrix,
    dy: &'a [f32],
    x: Activations<'a>,
    dx: ArrayViewMut2<'a, f32>,
    out: Out,
    dw: ArrayViewMut2<'a, f32>,
    scratch: &'a mut Int16Scratch,
}

impl WithKernel for Gradients<'_> {
    fn run<K: Kernel>(mut self, kernel: K) {
        let (tokens, out_dim, in_dim) = (self.x.scales.len(), self.matrix.out_dim(), self.matrix.in_dim());
        if tokens == 0 || out_dim == 0 || in_dim == 0 {
            if self.out == Out::Store {
                self.dx.fill(0.0);
            }
            return;
        }
        let Int16Scratch { words, packed, scales, largest } = self.scratch;
        let pitch = out_dim.div_ceil(2);
        grow(words, self::words(tokens, out_dim), 0);
        grow(scales, tokens.max(out_dim), 0.0);
        grow(largest, groups(tokens) * out_dim, 0);

        let (rows, row_scales) = (&mut words[..tokens * pitch], &mut scales[..tokens]);
        quantize::rows(self.dy, self.x.scales, self.matrix.gamma(), rows, row_scales, largest);
        let rows = Words { data: rows, pitch, rows: tokens };
        multiply(kernel, rows, row_scales, self.matrix, packed, self.dx, self.out);

        for first in (0..tokens).step_by(CHUNK) {
            let len = (tokens - first).min(CHUNK);
            let (dy, act) = (&self.dy[first * out_dim..][..len * out_dim], &self.x.scales[first..first + len]);
            let pitch = len.div_ceil(2);
            let (columns, scales) = (&mut words[..out_dim * pitch], &mut scales[..out_dim]);
            let largest = &largest[first / QUANTIZE_ROWS * out_dim..][..len.div_ceil(QUANTIZE_ROWS) * out_dim];
            quantize::columns(dy, act, largest, columns, scales);
            let columns = Words { data: columns, pitch, rows: out_dim };
            let q = Tokens { q: &self.x.codes[first * in_dim..][..len * in_dim], tokens: len, in_dim };
            multiply(kernel, columns, scales, &q, packed, self.dw.view_mut(), Out::Add);
        }
    }
}

/// Makes room; the contents are of no use.
fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.clear();
        buffer.reserve_exact(len);
        buffer.resize(len, value);
    }
}

/// The right-hand side of a product: it can write its panels.
trait Operand: Sync {
    /// Words of depth, and columns.
    fn dim(&self) -> (usize, usize);
    /// Writes words `words` of columns `col..col + WIDTH` into `panel`; columns past the last as anything.
    fn pack(&self, words: Range<usize>, col: usize, panel: &mut [Line]);
}

/// `W₃`: its depth is the output rows of the matrix.
impl Operand for TernaryMatrix {
    fn dim(&self) -> (usize, usize) {
        (self.out_dim().div_ceil(2), self.in_dim())
    }

    #[inline(always)]
    fn pack(&self, words: Range<usize>, col: usize, panel: &mut [Line]) {
        for (word, line) in words.zip(panel) {
            for (codes, line) in self.row_pair(word, col).zip(line.0.as_chunks_mut::<4>().0) {
                for j in 0..4 {
                    line[j] = [codes[j] as i16 - 1, codes[j + 4] as i16 - 1];
                }
            }
        }
    }
}

/// `q` of a chunk of tokens.
struct Tokens<'a> {
    q: &'a [i8],
    tokens: usize,
    in_dim: usize,
}

impl Operand for Tokens<'_> {
    fn dim(&self) -> (usize, usize) {
        (self.tokens.div_ceil(2), self.in_dim)
    }

    #[inline(always)]
    fn pack(&self, words: Range<usize>, col: usize, panel: &mut [Line]) {
        let cols = (self.in_dim - col).min(WIDTH);
        let row = |t: usize| &self.q[t * self.in_dim + col..][..cols];
        for (word, line) in words.zip(panel) {
            let (even, odd) = (row(2 * word), row((2 * word + 1).min(self.tokens - 1)));
            match (even.first_chunk::<WIDTH>(), odd.first_chunk::<WIDTH>()) {
                (Some(even), Some(odd)) => {
                    for j in 0..WIDTH {
                        line.0[j] = [even[j] as i16, odd[j] as i16];
                    }
                }
                _ => {
                    for ((line, x), y) in line.0.iter_mut().zip(even).zip(odd) {
                        *line = [*x as i16, *y as i16];
                    }
                }
            }
        }
    }
}

/// `C (=|+=) (A · B) ⊙ scales`, a scale a row, spread over the current thread pool.
fn multiply<K: Kernel>(
    kernel: K,
    a: Words,
    scales: &[f32],
    b: &impl Operand,
    packed: &mut Vec<Line>,
    mut c: ArrayViewMut2<f32>,
    out: Out,
) {
    let (depth, n) = b.dim();
    assert!(a.pitch == depth && c.dim() == (a.rows, n) && scales.len() == a.rows, "int16 product onto {:?}", c.dim());
    let columns = block_columns(depth);
    grow(packed, block_lines(depth, n), Line::ZERO);
    for col in (0..n).step_by(columns) {
        let cols = col..n.min(col + columns);
        for first in (0..depth).step_by(DEPTH) {
            let words = first..depth.min(first + DEPTH);
            let packed = &mut packed[..words.len() * cols.len().div_ceil(WIDTH)];
            par::for_each(packed.chunks_mut(words.len()).enumerate().collect(), |(p, panel): (usize, &mut [Line])| {
                simd::vectorize(
                    #[inline(always)]
                    || b.pack(words.clone(), cols.start + p * WIDTH, panel),
                );
            });
            let out = if first == 0 { out } else { Out::Add };
            let mut c = c.slice_mut(s![.., cols.clone()]);
            let tasks = c.axis_chunks_iter_mut(Axis(0), TASK_ROWS).enumerate().collect();
            par::for_each(tasks, |(task, c): (usize, ArrayViewMut2<f32>)| {
                let row = task * TASK_ROWS;
                let a = Words { data: &a.data[row * a.pitch + first..], pitch: a.pitch, rows: c.nrows() };
                tile(kernel, a, &scales[row..], packed, words.len(), c, out);
            });
        }
    }
}

/// Some rows of the output.
fn tile<K: Kernel>(
    kernel: K,
    a: Words,
    scales: &[f32],
    packed: &[Line],
    depth: usize,
    mut c: ArrayViewMut2<f32>,
    out: Out,
) {
    let mut block: Block = [[0; WIDTH]; ROWS];
    for (g, mut c) in c.axis_chunks_iter_mut(Axis(0), ROWS).enumerate() {
        let data = &a.data[g * ROWS * a.pitch..];
        let group = Words { data, pitch: a.pitch, rows: c.nrows() };
        let scales = &scales[g * ROWS..];
        let pitch = c.strides()[0] as usize;
        for (p, (panel, mut c)) in packed.chunks(depth).zip(c.axis_chunks_iter_mut(Axis(1), WIDTH)).enumerate() {
            let next = data.as_ptr().wrapping_add(ROWS * a.pitch);
            let given = p * depth.div_ceil(8);
            let ahead = Ahead { words: next, pitch: a.pitch, depth, given, output: (c.as_ptr(), pitch) };
            kernel.block(group, panel, ahead, &mut block);
            simd::vectorize(
                #[inline(always)]
                || {
                    for ((c, sums), scale) in c.rows_mut().into_iter().zip(&block).zip(scales) {
                        let c = c.into_slice().expect("rows of the output are contiguous");
                        match <&mut [f32; WIDTH]>::try_from(&mut *c) {
                            Ok(c) => finish(c, sums, *scale, out),
                            Err(_) => finish(c, sums, *scale, out),
                        }
                    }
                },
            );
        }
    }
}

/// Sums to floats.
#[inline(always)]
fn finish(c: &mut [f32], sums: &[i32; WIDTH], scale: f32, out: Out) {
    match out {
        Out::Store => c.iter_mut().zip(sums).for_each(|(c, sum)| *c = *sum as f32 * scale),
        Out::Add => c.iter_mut().zip(sums).for_each(|(c, sum)| *c += *sum as f32 * scale),
    }
}

#[cfg(test)]
mod tests;
