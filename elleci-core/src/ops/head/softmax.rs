//! The softmax between the products, on logits stored by vocabulary: `[vocab, tokens of a chunk]`.

use alloc::vec::Vec;

use super::codes::{code, norm_limit, row_scale, scale};
use super::{BLOCK, HeadInput, LOGIT_ROWS};
use crate::ops::activation::exp;
use crate::ternary::int16::kernel::{Line, WIDTH};
use crate::{par, simd};

/// Rows whose exponentials are added up on their own: keeps the partial sums of a block short.
const SUM_ROWS: usize = 64;
/// Words (pairs of rows) that one task rounds.
const ROUND_WORDS: usize = 32;
/// θ in units of a row's mean.
const THRESHOLD: f32 = 64.0;

/// What is found by part of the vocabulary, for every token of a chunk.
#[derive(Debug, Default)]
pub struct Parts {
    /// Largest logit of every [`LOGIT_ROWS`] rows
    pub maxima: Vec<f32>,
    /// `Σe` of every [`BLOCK`] rows
    sums: Vec<f32>,
    /// `Σe²`
    squares: Vec<f32>,
    /// Largest e
    largest: Vec<f32>,
    /// Scale of the codes of `min(e, θ)`
    pub line_scales: Vec<f32>,
}

impl Parts {
    /// Bytes for a chunk of `n` tokens.
    pub fn planned_bytes(vocab: usize, n: usize) -> usize {
        4 * n * (vocab.div_ceil(LOGIT_ROWS) + 4 * vocab.div_ceil(BLOCK))
    }

    pub fn resize(&mut self, vocab: usize, n: usize) {
        self.maxima.resize(vocab.div_ceil(LOGIT_ROWS) * n, 0.0);
        for part in [&mut self.sums, &mut self.squares, &mut self.largest, &mut self.line_scales] {
            part.resize(vocab.div_ceil(BLOCK) * n, 0.0);
        }
    }
}

/// What is known of every token of a chunk; zeros past its last.
#[derive(Debug, Default)]
pub struct Totals {
    /// Largest logit
    pub max: Vec<f32>,
    /// The target's logit less the largest
    at_target: Vec<f32>,
    /// `g = weight · scale / Z`
    pub factor: Vec<f32>,
    /// `weight · scale`
    pub target: Vec<f32>,
    /// θ
    threshold: Vec<f32>,
}

impl Totals {
    /// Bytes for a chunk of `n` tokens.
    pub fn planned_bytes(n: usize) -> usize {
        4 * 5 * n
    }

    /// The largest logit of every token.
    pub fn find_max(&mut self, parts: &Parts, n: usize) {
        for part in [&mut self.max, &mut self.at_target, &mut self.factor, &mut self.target, &mut self.threshold] {
            part.clear();
            part.resize(n, 0.0);
        }
        self.max.fill(f32::NEG_INFINITY);
        for part in parts.maxima.chunks_exact(n) {
            self.max.iter_mut().zip(part).for_each(|(m, p)| *m = m.max(*p));
        }
    }

    /// The targets' logits.
    pub fn at_targets(&mut self, input: HeadInput, logits: &[f32], n: usize) {
        for (t, (target, weight)) in input.targets.iter().zip(input.weights).enumerate() {
            if *weight != 0.0 {
                self.at_target[t] = logits[*target as usize * n + t] - self.max[t];
            }
        }
    }

    /// Sums, factors, thresholds, scales of the blocks; returns the loss of the chunk.
    pub fn finish(&mut self, parts: &mut Parts, input: HeadInput, scale_: f32, vocab: usize, n: usize) -> f64 {
        let mut loss = 0.0;
        for t in 0..n {
            let total: f64 = parts.sums.iter().skip(t).step_by(n).map(|s| *s as f64).sum();
            self.threshold[t] = THRESHOLD * total as f32 / vocab as f32;
            if let Some(&weight) = input.weights.get(t).filter(|w| **w != 0.0) {
                loss += weight as f64 * (libm::log(total) - self.at_target[t] as f64);
                self.factor[t] = weight * scale_ / total as f32;
                self.target[t] = weight * scale_;
            }
        }
        let limit = norm_limit(vocab.min(BLOCK));
        let blocks = parts.sums.chunks_exact(n).zip(parts.squares.chunks_exact(n)).zip(parts.largest.chunks_exact(n));
        for (((sums, squares), largest), scales) in blocks.zip(parts.line_scales.chunks_exact_mut(n)) {
            for (t, s) in scales.iter_mut().enumerate() {
                // Σ min(e, θ)² is at most either of these.
                let squares = squares[t].min(self.threshold[t] * sums[t]);
                *s = scale(largest[t].min(self.threshold[t]), squares, limit);
            }
        }
        loss
    }
}

/// `e = exp(l − max)` in place, and its sums, squares and largest by block.
pub fn exponentials(logits: &mut [f32], n: usize, max: &[f32], parts: &mut Parts) {
    let blocks = parts.sums.chunks_mut(n).zip(parts.squares.chunks_mut(n)).zip(parts.largest.chunks_mut(n));
    par::for_each(logits.chunks_mut(BLOCK * n).zip(blocks).collect(), |(logits, ((sums, squares), largest))| {
        simd::vectorize(
            #[inline(always)]
            || {
                sums.fill(0.0);
                squares.fill(0.0);
                largest.fill(0.0);
                for rows in logits.chunks_mut(SUM_ROWS * n) {
                    for tokens in (0..n).step_by(WIDTH) {
                        let (mut sum, mut square, mut large) = ([0.0f32; WIDTH], [0.0f32; WIDTH], [0.0f32; WIDTH]);
                        let max: &[f32; WIDTH] = max[tokens..].first_chunk().expect("whole panels");
                        for row in rows.chunks_exact_mut(n) {
                            let row: &mut [f32; WIDTH] = row[tokens..].first_chunk_mut().expect("whole panels");
                            for j in 0..WIDTH {
                                let e = exp(row[j] - max[j]);
                                row[j] = e;
                                sum[j] += e;
                                square[j] += e * e;
                                large[j] = if e > large[j] { e } else { large[j] };
                            }
                        }
                        for j in 0..WIDTH {
                            sums[tokens + j] += sum[j];
                            squares[tokens + j] += square[j];
                            largest[tokens + j] = largest[tokens + j].max(large[j]);
                        }
                    }
                }
            },
        );
    });
}

/// An entry above its token's θ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Excess {
    /// In the chunk.
    pub token: u32,
    /// In the vocabulary.
    pub row: u32,
    /// `e − θ`
    pub value: f32,
}

/// Some rows of the vocabulary, and where their codes go.
pub struct Block<'a> {
    /// In the vocabulary.
    pub first: usize,
    /// `[rows, n]`
    pub e: &'a [f32],
    /// Tokens
    pub n: usize,
    /// `e · g` `[rows, n / 2]`
    pub words: &'a mut [i32],
    /// `[rows]`
    pub word_scales: &'a mut [f32],
    /// `min(e, θ)`: panels of tokens, words along the rows
    pub lines: &'a mut [Line],
}

/// Some pairs of rows.
struct Pairs<'a> {
    first: usize,
    e: &'a [f32],
    words: &'a mut [i32],
    scales: &'a mut [f32],
    /// A part of every panel
    lines: Vec<&'a mut [Line]>,
    excess: Vec<Excess>,
}

impl Block<'_> {
    /// Rounds the block to both codes, and appends what is above θ, by rows.
    pub fn round(self, totals: &Totals, line_scales: &[f32], excess: &mut Vec<Excess>) {
        let n = self.n;
        let depth = (self.e.len() / n).div_ceil(2);
        let rows = self.e.chunks(2 * ROUND_WORDS * n).zip(self.words.chunks_mut(ROUND_WORDS * n));
        let mut items: Vec<Pairs> = rows
            .zip(self.word_scales.chunks_mut(2 * ROUND_WORDS))
            .enumerate()
            .map(|(task, ((e, words), scales))| {
                let first = self.first + task * 2 * ROUND_WORDS;
                Pairs { first, e, words, scales, lines: Vec::with_capacity(n / WIDTH), excess: Vec::new() }
            })
            .collect();
        for panel in self.lines.chunks_mut(depth) {
            items.iter_mut().zip(panel.chunks_mut(ROUND_WORDS)).for_each(|(item, lines)| item.lines.push(lines));
        }
        par::for_each(items.iter_mut().collect(), |pairs: &mut Pairs| {
            simd::vectorize(
                #[inline(always)]
                || pairs.round(n, totals, line_scales),
            );
        });
        items.iter().for_each(|pairs| excess.extend_from_slice(&pairs.excess));
    }
}

impl Pairs<'_> {
    #[inline(always)]
    fn round(&mut self, n: usize, totals: &Totals, line_scales: &[f32]) {
        let limit = norm_limit(n);
        let mut weighted = [0.0f32; super::CHUNK_TOKENS];
        let weighted = &mut weighted[..n];
        let rows = self.e.chunks_exact(n).zip(self.words.chunks_exact_mut(n / 2)).zip(self.scales.iter_mut());
        for (r, ((e, words), scale)) in rows.enumerate() {
            let mut over = 0u32;
            for (((w, e), g), theta) in weighted.iter_mut().zip(e).zip(&totals.factor).zip(&totals.threshold) {
                *w = e * g;
                over |= (*e > *theta) as u32;
            }
            *scale = row_scale(weighted, limit);
            let inverse = 1.0 / *scale;
            let codes: &mut [i16] = bytemuck::cast_slice_mut(words);
            codes.iter_mut().zip(&*weighted).for_each(|(c, v)| *c = code(*v, inverse));
            if over != 0 {
                self.excess.extend((0..n).filter(|t| e[*t] > totals.threshold[*t]).map(|t| Excess {
                    token: t as u32,
                    row: (self.first + r) as u32,
                    value: e[t] - totals.threshold[t],
                }));
            }
        }
        for (p, lines) in self.lines.iter_mut().enumerate() {
            let at = p * WIDTH;
            let theta: &[f32; WIDTH] = totals.threshold[at..].first_chunk().expect("whole panels");
            let inverse: [f32; WIDTH] = core::array::from_fn(|j| 1.0 / line_scales[at + j]);
            for (pair, line) in self.e.chunks(2 * n).zip(lines.iter_mut()) {
                let even: &[f32; WIDTH] = pair[at..].first_chunk().expect("whole panels");
                let odd = pair.get(n + at..).and_then(|row| row.first_chunk::<WIDTH>()).unwrap_or(&[0.0; WIDTH]);
                for j in 0..WIDTH {
                    line.0[j] = [capped(even[j], theta[j], inverse[j]), capped(odd[j], theta[j], inverse[j])];
                }
            }
        }
    }
}

/// The code of `min(e, θ)`.
#[inline(always)]
fn capped(e: f32, theta: f32, inverse: f32) -> i16 {
    code(if e < theta { e } else { theta }, inverse)
}
