//! Gradients to int16 words: by rows, and by columns into the transposed order.

use core::array::from_fn;

use alloc::vec::Vec;

use super::{CHUNK, QUANTIZE_ROWS};
use crate::ops::rows::rne_bits;
use crate::{par, simd};

/// The largest code.
const LIMIT: f32 = 32_767.0;
/// Smallest magnitude that counts as the largest: keeps what is divided by it finite, for rows of zeros.
const FLOOR: f32 = 1.0 / (1u128 << 100) as f32;
/// Columns that one task rounds.
const COLUMNS: usize = 128;
/// Words that are transposed in one go.
const WORDS: usize = 16;

/// The bits of a magnitude: they order like the magnitudes, NaN above all.
#[inline(always)]
fn magnitude(v: f32) -> u32 {
    v.to_bits() & 0x7fff_ffff
}

/// `rne(v · inverse)`. With `inverse` = 32767 / amax it cannot leave the range: `|v · inverse| <= 32767 · (1 + 2^-24)^2`.
#[inline(always)]
fn code(v: f32, inverse: f32) -> i16 {
    rne_bits(v * inverse) as i16
}

/// A row a token: `dy` `[tokens, out]` into `words` `[tokens, out / 2 up]`, `scales[t] = γ · amax / 32767`. Also the
/// largest `|dy · act|` of every channel, by groups of [`QUANTIZE_ROWS`] tokens, as bits.
pub fn rows(dy: &[f32], act: &[f32], gamma: f32, words: &mut [i32], scales: &mut [f32], largest: &mut [u32]) {
    let out_dim = dy.len() / act.len();
    let pitch = out_dim.div_ceil(2);
    let items: Vec<_> = dy
        .chunks(QUANTIZE_ROWS * out_dim)
        .zip(act.chunks(QUANTIZE_ROWS))
        .zip(words.chunks_mut(QUANTIZE_ROWS * pitch))
        .zip(scales.chunks_mut(QUANTIZE_ROWS))
        .zip(largest.chunks_mut(out_dim))
        .collect();
    par::for_each(items, |((((dy, act), words), scales), largest)| {
        simd::vectorize(
            #[inline(always)]
            || {
                largest.fill(0);
                let rows = dy.chunks_exact(out_dim).zip(words.chunks_exact_mut(pitch));
                for (((dy, words), act), scale) in rows.zip(act).zip(scales) {
                    let mut amax = FLOOR.to_bits();
                    for (v, largest) in dy.iter().zip(largest.iter_mut()) {
                        amax = amax.max(magnitude(*v));
                        *largest = (*largest).max(magnitude(v * act));
                    }
                    let amax = f32::from_bits(amax);
                    let inverse = LIMIT / amax;
                    *scale = gamma * (amax / LIMIT);
                    let codes: &mut [i16] = bytemuck::cast_slice_mut(words);
                    if let Some(last) = codes.last_mut() {
                        *last = 0;
                    }
                    for (code_, v) in codes.iter_mut().zip(dy) {
                        *code_ = code(*v, inverse);
                    }
                }
            },
        );
    });
}

/// A row a channel: `dy` `[tokens, out]`, times `act`, into `words` `[out, tokens / 2 up]`, `scales[o] = amax / 32767`.
/// `largest` is what [`rows`] found for these tokens, of which there are at most [`CHUNK`].
pub fn columns(dy: &[f32], act: &[f32], largest: &[u32], words: &mut [i32], scales: &mut [f32]) {
    let (out_dim, pitch) = (scales.len(), act.len().div_ceil(2));
    assert!(act.len() <= CHUNK, "{} tokens in a chunk", act.len());
    let items: Vec<_> = words.chunks_mut(COLUMNS * pitch).zip(scales.chunks_mut(COLUMNS)).enumerate().collect();
    par::for_each(items, |(task, (words, scales))| {
        let columns = task * COLUMNS..task * COLUMNS + scales.len();
        simd::vectorize(
            #[inline(always)]
            || {
                let mut amax = [FLOOR.to_bits(); COLUMNS];
                for largest in largest.chunks_exact(out_dim) {
                    amax.iter_mut().zip(&largest[columns.clone()]).for_each(|(a, b)| *a = (*a).max(*b));
                }
                let amax = amax.map(f32::from_bits);
                let inverse = amax.map(|a| LIMIT / a);
                scales.iter_mut().zip(amax).for_each(|(s, a)| *s = a / LIMIT);
                let mut block = [[[0i16; 2]; COLUMNS]; WORDS];
                for (part, tokens) in act.chunks(2 * WORDS).enumerate() {
                    let first = part * 2 * WORDS;
                    for (w, act) in tokens.chunks(2).enumerate() {
                        let row = |i: usize| &dy[(first + 2 * w + i) * out_dim..][columns.clone()];
                        let odd = act.len() - 1;
                        round_pair(
                            row(0),
                            row(odd),
                            [act[0], if odd == 1 { act[1] } else { 0.0 }],
                            &inverse,
                            &mut block[w],
                        );
                    }
                    transpose(&block, tokens.len().div_ceil(2), &mut words[part * WORDS..], pitch, scales.len());
                }
            },
        );
    });
}

/// Two tokens of some channels.
#[inline(always)]
fn round_pair(even: &[f32], odd: &[f32], act: [f32; 2], inverse: &[f32; COLUMNS], words: &mut [[i16; 2]; COLUMNS]) {
    for (((word, x), y), inverse) in words.iter_mut().zip(even).zip(odd).zip(inverse) {
        *word = [code(x * act[0], *inverse), code(y * act[1], *inverse)];
    }
}

/// `count` words of `columns` columns into rows `pitch` words apart.
#[inline(always)]
fn transpose(block: &[[[i16; 2]; COLUMNS]; WORDS], count: usize, to: &mut [i32], pitch: usize, columns: usize) {
    let words: &[[i32; COLUMNS]; WORDS] = bytemuck::cast_ref(block);
    for (j, row) in to.chunks_mut(pitch).take(columns).enumerate() {
        let column: [i32; WORDS] = from_fn(|w| words[w][j]);
        row[..count].copy_from_slice(&column[..count]);
    }
}
