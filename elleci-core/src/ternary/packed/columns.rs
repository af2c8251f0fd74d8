//! [`Packing::C5`]: every column is a run of memory, so that one token reads only those whose activation is not zero.
//!
//! A line is one column of a slab of 320 rows, five panels: byte b holds rows `64 k + b`, k = 0..5, as the five trits of [`super::t5`].
//! A column's lines, one a slab, follow one another, and then come those of the next column.
//!
//! Behind a squared ReLU two thirds of the activations are zero from the start, and seven eighths in a trained model (docs/LOG.md).
//! Sums of integers are the same in any order, so that leaving zeros out changes nothing.

use alloc::vec;
use alloc::vec::Vec;

use super::{LINES, Line, PackedTernary, ROWS, t5};
use crate::par;
use crate::simd::{Isa, vectorize};
use crate::ternary::TernaryMatrix;

/// Rows of a slab.
pub(super) const SLAB: usize = 5 * ROWS;
/// Columns that meet their activations together.
pub(super) const QUAD: usize = 4;
/// Tasks that the columns are dealt to. Each has sums of its own for all rows.
const TASKS: usize = 16;

/// Lines of a column.
pub(super) fn column_lines(out_dim: usize) -> usize {
    out_dim.div_ceil(SLAB)
}

/// The lines of a matrix.
pub(super) fn pack(matrix: &TernaryMatrix) -> Vec<Line> {
    let (out, per) = (matrix.out_dim(), column_lines(matrix.out_dim()));
    let mut packed = vec![Line([0; 64]); matrix.in_dim() * per];
    let items: Vec<_> = packed.chunks_mut(per.max(1) * 64).enumerate().collect();
    par::for_each(items, |(run, lines)| {
        for (i, line) in lines.iter_mut().enumerate() {
            let (col, slab) = (run * 64 + i / per, i % per);
            for (b, byte) in line.0.iter_mut().enumerate() {
                let trit = |k: usize| {
                    let row = slab * SLAB + k * ROWS + b;
                    if row < out { (matrix.code(row, col) + 1) as u8 } else { 0 }
                };
                *byte = t5::encode([trit(0), trit(1), trit(2), trit(3), trit(4)]);
            }
        }
    });
    packed
}

/// The trits of 64 bytes, as [`t5::decode`] reads them, in operations that vectorise.
#[inline(always)]
fn trits(line: &Line) -> [[u8; 64]; 5] {
    let mut all = [[0; 64]; 5];
    for b in 0..64 {
        let x = line.0[b];
        let escaped = x & t5::ESCAPE == t5::ESCAPE;
        let low = if escaped { x.rotate_left(3) } else { x } & 31;
        let high = if escaped { 8 } else { x >> 5 };
        // What no packer writes reads as three ones.
        let low = if low >= 27 { 13 } else { low };
        // Thirds of numbers below 32.
        let (third, ninth) = (((low as u16 * 43) >> 7) as u8, ((low as u16 * 57) >> 9) as u8);
        let high_third = ((high as u16 * 43) >> 7) as u8;
        all[0][b] = low - 3 * third;
        all[1][b] = third - 3 * ninth;
        all[2][b] = ninth;
        all[3][b] = high - 3 * high_third;
        all[4][b] = high_third;
    }
    all
}

/// The code lines of a panel, as the other packings unpack them.
pub(super) fn unpack(matrix: &PackedTernary, panel: usize, codes: &mut [Line]) {
    let (per, slab, k) = (column_lines(matrix.out_dim), panel / 5, panel % 5);
    vectorize(
        #[inline(always)]
        || {
            for (group, codes) in codes.chunks_exact_mut(LINES).enumerate() {
                let mut columns = [[0u8; 64]; QUAD];
                for (c, column) in columns.iter_mut().enumerate() {
                    if let Some(line) = matrix.lines.get((group * QUAD + c) * per + slab) {
                        *column = trits(line)[k];
                    }
                }
                for (j, codes) in codes.iter_mut().enumerate() {
                    for r in 0..16 {
                        for c in 0..QUAD {
                            codes.0[QUAD * r + c] = columns[c][16 * j + r];
                        }
                    }
                }
            }
        },
    );
}

/// Columns with an activation: four of them at a time, and their four activations. The last are filled up with zeros.
pub(super) struct Quad {
    pub columns: [u32; QUAD],
    pub q: [i8; QUAD],
}

/// `Σ (code + 1) · q` of every row, added to `sums` (a multiple of [`SLAB`]).
fn add_products(isa: Isa, matrix: &PackedTernary, quads: &[Quad], sums: &mut [i32]) -> Isa {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if isa >= Isa::Avx512Vbmi
        && let Some(kernel) = super::avx512::Vbmi::detect()
    {
        super::columns_avx512::add_products(kernel, matrix.lines, column_lines(matrix.out_dim), quads, sums);
        return Isa::Avx512Vbmi;
    }
    let _ = isa;
    vectorize(
        #[inline(always)]
        || add_products_plain(matrix, quads, sums),
    );
    Isa::Portable
}

#[inline(always)]
fn add_products_plain(matrix: &PackedTernary, quads: &[Quad], sums: &mut [i32]) {
    let per = column_lines(matrix.out_dim);
    for quad in quads {
        for (slab, sums) in sums.chunks_exact_mut(SLAB).enumerate() {
            let codes = quad.columns.map(|c| trits(&matrix.lines[c as usize * per + slab]));
            for (k, sums) in sums.chunks_exact_mut(ROWS).enumerate() {
                for (b, sum) in sums.iter_mut().enumerate() {
                    // At most 4 · 2 · 128 in magnitude.
                    let dot: i16 = (0..QUAD).map(|c| codes[c][k][b] as i16 * quad.q[c] as i16).sum();
                    *sum += dot as i32;
                }
            }
        }
    }
}

/// One token: `finish(biased, offset, out)` makes outputs of the sums of as many rows. Returns the kernel that ran.
pub(super) fn product<T: Send>(
    isa: Isa,
    matrix: &PackedTernary,
    q: &[i8],
    out: &mut [T],
    finish: impl Fn(&[i32], i32, &mut [T]) + Sync,
) -> Isa {
    let rows = column_lines(matrix.out_dim) * SLAB;
    let run = q.len().div_ceil(TASKS).next_multiple_of(QUAD);
    let mut parts: Vec<(Vec<i32>, Isa)> = q.chunks(run.max(1)).map(|_| (Vec::new(), Isa::Portable)).collect();
    let items: Vec<_> = q.chunks(run.max(1)).zip(&mut parts).enumerate().collect();
    par::for_each(items, |(task, (q, (sums, ran)))| {
        let mut columns: Vec<(u32, i8)> = vec![((task * run) as u32, 0); q.len().next_multiple_of(QUAD)];
        let mut count = 0;
        for (i, q) in q.iter().enumerate() {
            // Without a branch that nobody could predict: a zero's place is taken by the next.
            columns[count] = ((task * run + i) as u32, *q);
            count += usize::from(*q != 0);
        }
        columns.truncate(count.next_multiple_of(QUAD));
        columns[count..].fill(((task * run) as u32, 0));
        let quads: Vec<Quad> = columns.as_chunks::<QUAD>().0.iter().map(quad).collect();
        *sums = vec![0; rows];
        *ran = add_products(isa, matrix, &quads, sums);
    });
    let offset = super::sum(q);
    let items: Vec<_> = out.chunks_mut(SLAB).enumerate().collect();
    par::for_each(items, |(slab, out)| {
        let mut sums = [0; SLAB];
        for (part, _) in &parts {
            sums.iter_mut().zip(&part[slab * SLAB..]).for_each(|(sum, part)| *sum += part);
        }
        finish(&sums[..out.len()], offset, out);
    });
    parts.first().map_or(Isa::Portable, |(_, ran)| *ran)
}

fn quad(columns: &[(u32, i8); QUAD]) -> Quad {
    Quad { columns: columns.map(|(c, _)| c), q: columns.map(|(_, q)| q) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectorised_trits_are_the_definition() {
        for first in (0..=255u8).step_by(64) {
            let line = Line(core::array::from_fn(|b| first + b as u8));
            let got = trits(&line);
            for b in 0..64 {
                assert_eq!([0, 1, 2, 3, 4].map(|k| got[k][b]), t5::decode(line.0[b]), "{}", line.0[b]);
            }
        }
    }
}
