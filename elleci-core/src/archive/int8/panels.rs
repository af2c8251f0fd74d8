//! Many tokens, with AVX-512 VNNI: 64 rows become a panel of the int16 product ([`crate::ternary::int16`]), a word of each of them in a
//! line, which all tokens meet. Sums then lie in lanes as outputs do, where rows as they are stored leave a sum in all lanes of a
//! vector, and adding those up takes as long as half of the products of 256 columns.

use alloc::vec::Vec;
use core::arch::x86_64::*;

use super::{Activations, Outputs};
use crate::ops::transpose::avx512::{TILE, tile_transposed};
use crate::ternary::int16::kernel::{Ahead, Block, Kernel, Line, ROWS as GROUP, WIDTH, Words};
use crate::ternary::int16::vnni::Vnni;

/// Tokens that are worth making panels, at least.
const TOKENS: usize = 16;
/// Columns that a token is worth: a panel takes time by its columns, what it saves is a part of every sum.
const COLUMNS: usize = 16;
/// Rows of a panel.
pub(super) const ROWS: usize = WIDTH;

/// Whether panels pay for themselves.
pub(super) fn worth(tokens: usize, cols: usize) -> bool {
    tokens >= TOKENS.max(cols / COLUMNS)
}

/// All rows of `codes`, a multiple of [`ROWS`], with all tokens. `panel` is room.
pub(super) fn rows(kernel: Vnni, codes: &[i8], cols: usize, x: &Activations, panel: &mut Vec<Line>, mut out: Outputs) {
    let tokens = x.check(cols);
    let (pitch, stride) = (x.width / 2, out.y.strides()[0] as usize);
    panel.resize(pitch, Line::ZERO);
    // Groups of equal size: eight tokens are better met by four and four than by six and two.
    let groups = tokens.div_ceil(GROUP);
    let bound = |group: usize| group * tokens / groups;
    let mut block: Block = [[0; WIDTH]; GROUP];
    for (p, codes) in codes.chunks_exact(ROWS * cols).enumerate() {
        // SAFETY: the token is proof of the features; the rows have `cols` columns, which are no more than the panel's words have.
        unsafe { pack(codes, cols, panel) };
        for group in 0..groups {
            let (from, to) = (bound(group), bound(group + 1));
            let words = |token: usize| &x.words[token * pitch..];
            let output = (out.y.as_ptr().wrapping_add(from * stride + p * ROWS), stride);
            // Rows of the next panel, one after the other; all tokens are near after the first.
            let next = codes.as_ptr().wrapping_add(codes.len()).cast();
            let ahead =
                Ahead { words: next, pitch: 0, depth: codes.len() / 4, given: group * pitch.div_ceil(8), output };
            kernel.block(Words { data: words(from), pitch, rows: to - from }, panel, ahead, &mut block);
            for (token, sums) in (from..to).zip(block) {
                out.put(p * ROWS, token, sums);
            }
        }
    }
}

/// Writes [`ROWS`] rows into the panel; columns past the last are zeros.
///
/// # Safety
/// The features are there, `codes` is `[ROWS, cols]`, and the panel has words of `cols` columns at least, a multiple of [`TILE`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack(codes: &[i8], cols: usize, panel: &mut [Line]) {
    for (tile, lines) in panel.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let at = 2 * TILE * tile;
        let mask = u32::MAX.checked_shr((at + 2 * TILE).saturating_sub(cols) as u32).unwrap_or(0);
        for first in (0..ROWS).step_by(TILE) {
            let mut rows = [_mm512_setzero_si512(); TILE];
            for r in 0..TILE {
                let row = codes.as_ptr().wrapping_add((first + r) * cols + at);
                // SAFETY: the mask has the columns that there are.
                rows[r] = _mm512_cvtepi8_epi16(unsafe { _mm256_maskz_loadu_epi8(mask, row) });
            }
            let columns = tile_transposed(rows);
            for (line, column) in lines.iter_mut().zip(columns) {
                // SAFETY: a line has the words of all rows, and is aligned to 64 bytes.
                unsafe { _mm512_store_si512(line.0.as_mut_ptr().add(first).cast(), column) };
            }
        }
    }
}
