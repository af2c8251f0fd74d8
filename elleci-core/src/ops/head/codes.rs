//! Operands of the head in int16: rows of words, and panels of lines.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::BLOCK;
use crate::ops::rows::rne_bits;
use crate::ternary::int16::kernel::{Line, WIDTH};
use crate::{par, simd};

/// The largest code.
pub const LIMIT: f32 = 32_767.0;
/// Smallest magnitude that counts as the largest of a row: what is below 2^-15 of it becomes zero. Its square, and those
/// of all values that do not become zero, are far from where float32 loses them.
pub const FLOOR: f32 = 1.0 / (1u64 << 60) as f32;
/// Words that are transposed in one go, and columns.
const SQUARE: usize = 16;

/// `rne(v · inverse)`, for `|v · inverse|` up to 32,767 and the rounding of `inverse`.
#[inline(always)]
pub fn code(v: f32, inverse: f32) -> i16 {
    rne_bits(v * inverse) as i16
}

/// The largest norm of a row of `depth` values divided by their scale. Rounding moves each by half a unit at most, so that
/// the codes' norm is at most `46,300 < √(2³¹ − 1)`: the part in a thousand between covers float32's rounding of norms of
/// up to 8,192 values.
pub fn norm_limit(depth: usize) -> f32 {
    46_300.0 - 0.5 * libm::sqrtf(depth as f32)
}

/// The scale of a row from its largest magnitude, the sum of its squares, and its length.
#[inline(always)]
pub fn scale(amax: f32, squares: f32, norm_limit: f32) -> f32 {
    let (by_range, by_norm) = (amax.max(FLOOR) / LIMIT, sqrt(squares) / norm_limit);
    // Not `max`, which would drop a NaN.
    if by_norm <= by_range { by_range } else { by_norm }
}

/// Correctly rounded either way; the `std` one becomes a vector instruction.
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    #[cfg(feature = "std")]
    return x.sqrt();
    #[cfg(not(feature = "std"))]
    return libm::sqrtf(x);
}

/// A row's scale. NaN or infinite where a value is, or where a square overflows.
#[inline(always)]
pub fn row_scale(row: &[f32], norm_limit: f32) -> f32 {
    let (mut amax, mut squares) = ([0.0f32; 128], [0.0f32; 128]);
    let (blocks, rest) = row.as_chunks::<128>();
    for block in blocks {
        for l in 0..128 {
            amax[l] = amax[l].max(block[l].abs());
            squares[l] += block[l] * block[l];
        }
    }
    for (l, v) in rest.iter().enumerate() {
        amax[l] = amax[l].max(v.abs());
        squares[l] += v * v;
    }
    let mut half = 64;
    while half > 0 {
        for l in 0..half {
            amax[l] = amax[l].max(amax[l + half]);
            squares[l] += squares[l + half];
        }
        half /= 2;
    }
    scale(amax[0], squares[0], norm_limit)
}

/// The head's rows in both orders: by vocabulary for the logits, and transposed, a block of [`BLOCK`] rows at a time, for
/// the gradient of its input.
#[derive(Debug, Default)]
pub struct HeadCodes {
    /// `[vocab, words of d]`
    pub rows: Vec<i32>,
    /// `[vocab]`
    pub row_scales: Vec<f32>,
    /// Of each block `[d, words of the block's rows]`
    pub columns: Vec<i32>,
    /// `[blocks, d]`
    pub column_scales: Vec<f32>,
}

impl HeadCodes {
    /// Bytes for a head `[vocab, d]`.
    pub fn planned_bytes(vocab: usize, d: usize) -> usize {
        4 * (vocab * d.div_ceil(2) + vocab + d * vocab.div_ceil(2) + d * vocab.div_ceil(BLOCK))
    }

    /// Rounds `head` `[vocab, d]`. False when a scale is not finite: the codes are then of no use.
    pub fn fill(&mut self, head: &[f32], vocab: usize, d: usize) -> bool {
        let pitch = d.div_ceil(2);
        self.rows.resize(vocab * pitch, 0);
        self.row_scales.resize(vocab, 0.0);
        // All blocks but the last have an even number of rows.
        self.columns.resize(d * vocab.div_ceil(2), 0);
        self.column_scales.resize(d * vocab.div_ceil(BLOCK), 0.0);
        let items: Vec<_> = head
            .chunks(BLOCK * d)
            .zip(self.rows.chunks_mut(BLOCK * pitch))
            .zip(self.row_scales.chunks_mut(BLOCK))
            .zip(self.columns.chunks_mut(d * BLOCK / 2))
            .zip(self.column_scales.chunks_mut(d))
            .collect();
        par::for_each(items, |((((head, rows), row_scales), columns), column_scales)| {
            simd::vectorize(
                #[inline(always)]
                || {
                    by_row(head, d, rows, row_scales);
                    by_column(head, d, columns, column_scales);
                },
            );
        });
        self.row_scales.iter().chain(&self.column_scales).all(|s| s.is_finite())
    }
}

/// Rows `[n, d]` to words `[n, d / 2 up]`.
#[inline(always)]
fn by_row(from: &[f32], d: usize, words: &mut [i32], scales: &mut [f32]) {
    let limit = norm_limit(d);
    for ((row, words), scale) in from.chunks_exact(d).zip(words.chunks_exact_mut(d.div_ceil(2))).zip(scales) {
        *scale = row_scale(row, limit);
        let inverse = 1.0 / *scale;
        let codes: &mut [i16] = bytemuck::cast_slice_mut(words);
        codes[d..].fill(0);
        codes.iter_mut().zip(row).for_each(|(c, v)| *c = code(*v, inverse));
    }
}

/// Rows `[n, d]` to words `[d, n / 2 up]`.
#[inline(always)]
fn by_column(from: &[f32], d: usize, words: &mut [i32], scales: &mut [f32]) {
    let n = from.len() / d;
    let pitch = n.div_ceil(2);
    let mut squares = vec![0.0f32; d];
    column_scales(from.chunks_exact(d), norm_limit(n), scales, &mut squares);
    let inverse = &mut squares[..];
    inverse.iter_mut().zip(&*scales).for_each(|(i, s)| *i = 1.0 / s);
    for col in (0..d).step_by(SQUARE) {
        let cols = col..d.min(col + SQUARE);
        for first in (0..pitch).step_by(SQUARE) {
            let count = (pitch - first).min(SQUARE);
            let mut block = [[[0i16; 2]; SQUARE]; SQUARE];
            for (w, block) in block[..count].iter_mut().enumerate() {
                let at = 2 * (first + w);
                pair(from, d, at, n, &cols, &inverse[cols.clone()], block);
            }
            let block: &[[i32; SQUARE]; SQUARE] = bytemuck::cast_ref(&block);
            for (j, c) in cols.clone().enumerate() {
                let column: [i32; SQUARE] = core::array::from_fn(|w| block[w][j]);
                words[c * pitch + first..][..count].copy_from_slice(&column[..count]);
            }
        }
    }
}

/// Codes of rows `at` and `at + 1` of `n`, in some columns.
#[inline(always)]
fn pair(from: &[f32], d: usize, at: usize, n: usize, cols: &Range<usize>, inverse: &[f32], words: &mut [[i16; 2]]) {
    let even = &from[at * d..][cols.clone()];
    for ((word, v), inverse) in words.iter_mut().zip(even).zip(inverse) {
        *word = [code(*v, *inverse), 0];
    }
    if at + 1 < n {
        let odd = &from[(at + 1) * d..][cols.clone()];
        for ((word, v), inverse) in words.iter_mut().zip(odd).zip(inverse) {
            word[1] = code(*v, *inverse);
        }
    }
}

/// Scales of the columns of some rows; `squares` is scratch.
#[inline(always)]
fn column_scales<'a>(rows: impl Iterator<Item = &'a [f32]>, limit: f32, scales: &mut [f32], squares: &mut [f32]) {
    scales.fill(0.0);
    squares.fill(0.0);
    for row in rows {
        for ((amax, squares), v) in scales.iter_mut().zip(squares.iter_mut()).zip(row) {
            *amax = amax.max(v.abs());
            *squares += v * v;
        }
    }
    scales.iter_mut().zip(squares).for_each(|(s, squares)| *s = scale(*s, *squares, limit));
}

/// The input of the head, both as it enters the logits and the head's own gradient.
#[derive(Debug, Default)]
pub struct InputCodes {
    /// Panels of tokens, words along d
    pub tokens: Vec<Line>,
    /// `[tokens]`; 0 for tokens of weight 0 and past the last
    pub token_scales: Vec<f32>,
    /// Panels of channels, words along the tokens
    pub channels: Vec<Line>,
    /// `[d up to whole panels]`
    pub channel_scales: Vec<f32>,
}

impl InputCodes {
    /// Bytes for a chunk of `n` tokens, a multiple of the panel's width.
    pub fn planned_bytes(n: usize, d: usize) -> usize {
        let panels = d.div_ceil(WIDTH);
        size_of::<Line>() * (n / WIDTH * d.div_ceil(2) + panels * n / 2) + 4 * (n + panels * WIDTH)
    }

    /// Rounds `x` `[at most n, d]`; tokens of weight 0, and those past the last, become zeros.
    pub fn fill(&mut self, x: &[f32], weights: &[f32], n: usize, d: usize) {
        let (pitch, panels) = (d.div_ceil(2), d.div_ceil(WIDTH));
        self.tokens.resize(n / WIDTH * pitch, Line::ZERO);
        self.token_scales.resize(n, 0.0);
        self.channels.resize(panels * n / 2, Line::ZERO);
        self.channel_scales.resize(panels * WIDTH, 0.0);
        let items = self.tokens.chunks_mut(pitch).zip(self.token_scales.chunks_mut(WIDTH)).enumerate().collect();
        par::for_each(items, |(p, (lines, scales)): (usize, (&mut [Line], &mut [f32]))| {
            let rows = p * WIDTH..weights.len().min((p + 1) * WIDTH);
            let first = rows.start.min(rows.end);
            simd::vectorize(
                #[inline(always)]
                || token_panel(&x[first * d..rows.end * d], &weights[first..rows.end], d, lines, scales),
            );
        });
        let items = self.channels.chunks_mut(n / 2).zip(self.channel_scales.chunks_mut(WIDTH)).enumerate().collect();
        par::for_each(items, |(p, (lines, scales)): (usize, (&mut [Line], &mut [f32]))| {
            let cols = p * WIDTH..d.min((p + 1) * WIDTH);
            simd::vectorize(
                #[inline(always)]
                || channel_panel(x, weights, d, cols, lines, scales),
            );
        });
    }
}

/// A panel of at most [`WIDTH`] tokens.
#[inline(always)]
fn token_panel(x: &[f32], weights: &[f32], d: usize, lines: &mut [Line], scales: &mut [f32]) {
    lines.fill(Line::ZERO);
    scales.fill(0.0);
    let limit = norm_limit(d);
    for (j, ((row, weight), scale)) in x.chunks_exact(d).zip(weights).zip(scales).enumerate() {
        if *weight == 0.0 {
            continue;
        }
        *scale = row_scale(row, limit);
        let inverse = 1.0 / *scale;
        for (line, v) in lines.iter_mut().zip(row.chunks(2)) {
            line.0[j] = [code(v[0], inverse), v.get(1).map_or(0, |v| code(*v, inverse))];
        }
    }
}

/// A panel of at most [`WIDTH`] channels.
#[inline(always)]
fn channel_panel(x: &[f32], weights: &[f32], d: usize, cols: Range<usize>, lines: &mut [Line], scales: &mut [f32]) {
    let n = weights.len();
    let zero = [0.0f32; WIDTH];
    let row = |t: usize| match weights.get(t) {
        Some(w) if *w != 0.0 => &x[t * d..][cols.clone()],
        _ => &zero[..cols.len()],
    };
    let mut inverse = [0.0f32; WIDTH];
    scales.fill(0.0);
    column_scales((0..n).map(row), norm_limit(n), &mut scales[..cols.len()], &mut inverse);
    inverse.iter_mut().zip(&*scales).for_each(|(i, s)| *i = if *s > 0.0 { 1.0 / s } else { 0.0 });
    for (w, line) in lines.iter_mut().enumerate() {
        *line = Line::ZERO;
        let pairs = row(2 * w).iter().zip(row(2 * w + 1)).zip(&inverse);
        for (word, ((x, y), inverse)) in line.0.iter_mut().zip(pairs) {
            *word = [code(*x, *inverse), code(*y, *inverse)];
        }
    }
}
