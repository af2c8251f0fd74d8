//! [`Packing::C5`]: every column is a run of memory, so that one token reads only those whose activation is not zero.
//!
//! A line is one column of a slab of 320 rows, five panels: byte b holds rows `64 k + b`, k = 0..5, as the five trits of [`super::t5`].
//! A column's lines, one a slab, follow one another, and then come those of the next column.
//!
//! Behind a squared ReLU two thirds of the activations are zero from the start, and seven eighths in a trained model (docs/LOG.md).
//! Sums of integers are the same in any order, so that leaving zeros out changes nothing.

use alloc::vec;
use alloc::vec::Vec;

use ndarray::Axis;

use super::super::kernel::{Block, Kernel, TOKENS, WithKernel, dispatch};
use super::{Finish, LINES, Line, PackedTernary, ROWS, t5};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{Isa, vectorize};
use crate::ternary::TernaryMatrix;

/// Panels of a slab.
pub(super) const PANELS: usize = 5;
/// Rows of a slab.
pub(super) const SLAB: usize = PANELS * ROWS;
/// Columns of a code line.
pub(super) const QUAD: usize = 4;
/// Columns that are unpacked before tokens meet them: the code lines of a slab are 40 KB.
const CHUNK: usize = 128;
/// Columns of a task at most: trits that stand at bit 6 of their bytes may be added up for so many, and twice that, in an int32.
const LONGEST: usize = 1 << 16;
/// Tokens that meet packed columns where the kernel can; more have them unpacked, once for all.
#[cfg(all(feature = "std", target_arch = "x86_64"))]
const DIRECT: usize = 8;
/// Tokens that share unpacked columns. Their sums, of all rows, stay in the second cache.
const GROUP: usize = 24;

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

/// Columns of a code line, by their numbers.
pub(super) type Quad = [u32; QUAD];

/// The quads of neighbouring columns; the last may repeat the last column.
fn quads(columns: core::ops::Range<usize>) -> impl Iterator<Item = Quad> {
    let last = columns.end.saturating_sub(1);
    columns.step_by(QUAD).map(move |first| [0, 1, 2, 3].map(|c| (first + c).min(last) as u32))
}

/// The code lines of some columns in the five panels of a slab: `codes` `[PANELS][quads][LINES]`.
fn unpack_slab(isa: Isa, matrix: &PackedTernary, slab: usize, quads: &[Quad], codes: &mut [Line]) {
    let per = column_lines(matrix.out_dim);
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if isa >= Isa::Avx512Vbmi
        && let Some(kernel) = super::avx512::Vbmi::detect()
    {
        return super::columns_avx512::unpack(kernel, matrix.lines, per, slab, quads, codes);
    }
    let _ = isa;
    let panel = codes.len() / PANELS;
    vectorize(
        #[inline(always)]
        || {
            for (group, quad) in quads.iter().enumerate() {
                // The lines of the four columns byte by byte: rows 16 j + r of the five panels, and column c, at 4 r + c.
                let columns = quad.map(|c| &matrix.lines[c as usize * per + slab].0);
                let mut packed = [Line([0; 64]); LINES];
                for (j, packed) in packed.iter_mut().enumerate() {
                    for (r, word) in packed.0.as_chunks_mut::<QUAD>().0.iter_mut().enumerate() {
                        *word = [0, 1, 2, 3].map(|c| columns[c][16 * j + r]);
                    }
                }
                for (j, packed) in packed.iter().enumerate() {
                    for (k, trits) in trits(packed).into_iter().enumerate() {
                        codes[k * panel + group * LINES + j].0 = trits;
                    }
                }
            }
        },
    );
}

/// The code lines of a panel, as the other packings unpack them. Behind the last column anything may stand.
pub(super) fn unpack(isa: Isa, matrix: &PackedTernary, panel: usize, codes: &mut [Line]) {
    let quads: Vec<Quad> = quads(0..matrix.in_dim).collect();
    let mut slab = [Line([0; 64]); PANELS * LINES * CHUNK / QUAD];
    for (quads, codes) in quads.chunks(CHUNK / QUAD).zip(codes.chunks_mut(CHUNK / QUAD * LINES)) {
        let slab = &mut slab[..PANELS * codes.len()];
        unpack_slab(isa, matrix, panel / PANELS, quads, slab);
        codes.copy_from_slice(&slab[panel % PANELS * codes.len()..][..codes.len()]);
    }
}

/// What a task makes of its columns.
struct Part {
    /// `Σ (code + 1) · q` of its columns: `[tokens, rows]`, in whole slabs
    sums: Vec<i32>,
    ran: Isa,
}

/// `W₃ · q` for `q` `[tokens, in]`, finished into `out` `[tokens, out]`. Returns the level of a kernel that ran.
pub(super) fn product<T: Send>(
    isa: Isa,
    matrix: &PackedTernary,
    q: &[i8],
    out: &mut [T],
    finish: &Finish<impl Fn(usize, &[i32], i32, &mut [T]) + Sync>,
) -> Isa {
    let (in_dim, out_dim) = (matrix.in_dim, matrix.out_dim);
    let rows = column_lines(out_dim) * SLAB;
    let mut ran = isa;
    let groups = q.chunks((GROUP * in_dim).max(1)).zip(out.chunks_mut((GROUP * out_dim).max(1)));
    for (group, (q, out)) in groups.enumerate() {
        let tokens = q.len() / in_dim;
        // A task begins at columns that nobody has asked for, and its sums are added to the others': so there are few.
        let tasks = if par::threads() > 1 { 2 * par::threads() } else { 1 };
        let run = in_dim.div_ceil(tasks).next_multiple_of(QUAD).min(LONGEST);
        let mut parts: Vec<_> = (0..in_dim).step_by(run).map(|_| Part { sums: Vec::new(), ran: isa }).collect();
        let items: Vec<_> = parts.iter_mut().enumerate().collect();
        par::for_each(items, |(task, part)| {
            let columns = task * run..in_dim.min((task + 1) * run);
            part.sums = vec![0; tokens * rows];
            part.ran = add_products(isa, matrix, &used(q, tokens, in_dim, columns), &mut part.sums);
        });
        let mut out = mat_mut(out, tokens, out_dim);
        let items: Vec<_> = out.axis_chunks_iter_mut(Axis(1), SLAB).enumerate().collect();
        par::for_each(items, |(slab, mut out)| {
            for (t, mut out) in out.rows_mut().into_iter().enumerate() {
                let out = out.as_slice_mut().expect("rows of the output are contiguous");
                let mut sums = [0; SLAB];
                for part in &parts {
                    let part = &part.sums[t * rows + slab * SLAB..][..SLAB];
                    sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                let token = group * GROUP + t;
                (finish.finish)(token, &sums[..out.len()], finish.offsets[token], out);
            }
        });
        ran = parts.first().map_or(ran, |part| part.ran);
    }
    ran
}

/// Columns that some token needs, and their activations.
struct Used {
    quads: Vec<Quad>,
    /// `[tokens, 4 quads]`: zeros fill up the last quad
    q: Vec<i8>,
    tokens: usize,
}

/// The columns of a run in which some of `q` `[tokens, in]` is not zero.
fn used(q: &[i8], tokens: usize, in_dim: usize, run: core::ops::Range<usize>) -> Used {
    let row = |t: usize| &q[t * in_dim..][run.clone()];
    let mut any = row(0).to_vec();
    for t in 1..tokens {
        any.iter_mut().zip(row(t)).for_each(|(any, q)| *any |= q);
    }
    let mut columns = vec![run.start as u32; any.len().next_multiple_of(QUAD)];
    let mut count = 0;
    for (i, any) in any.iter().enumerate() {
        // Without a branch that nobody could predict: the place of one that is not used is taken by the next.
        columns[count] = (run.start + i) as u32;
        count += usize::from(*any != 0);
    }
    // Any columns fill up the last quad, as their activations are zero there.
    columns.truncate(count.next_multiple_of(QUAD));
    let mut packed = vec![0; tokens * columns.len()];
    for (t, to) in packed.chunks_exact_mut(columns.len().max(1)).enumerate() {
        let row = row(t);
        for (to, column) in to.iter_mut().zip(&columns[..count]) {
            *to = row[*column as usize - run.start];
        }
    }
    Used { quads: columns.as_chunks::<QUAD>().0.to_vec(), q: packed, tokens }
}

/// `Σ (code + 1) · q` of every row, added to `sums` `[tokens, rows]`. Returns the level of the kernel that ran.
fn add_products(isa: Isa, matrix: &PackedTernary, used: &Used, sums: &mut [i32]) -> Isa {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if used.tokens <= DIRECT
        && isa >= Isa::Avx512Vbmi
        && let Some(kernel) = super::avx512::Vbmi::detect()
    {
        use super::columns_avx512::{GROUP, add_products};
        // Groups of equal size, as below.
        let step = used.tokens.div_ceil(used.tokens.div_ceil(GROUP));
        let (per, rows, columns) = (column_lines(matrix.out_dim), sums.len() / used.tokens, used.quads.len() * QUAD);
        for (q, sums) in used.q.chunks((step * columns).max(1)).zip(sums.chunks_mut(step * rows)) {
            add_products(kernel, matrix.lines, per, &used.quads, q, sums);
        }
        return Isa::Avx512Vbmi;
    }
    if used.tokens == 1 {
        vectorize(
            #[inline(always)]
            || add_products_plain(matrix, used, sums),
        );
        return Isa::Portable;
    }
    dispatch(isa, Unpacked { isa, matrix, used, sums })
}

/// One token, in operations that vectorise.
#[inline(always)]
fn add_products_plain(matrix: &PackedTernary, used: &Used, sums: &mut [i32]) {
    let per = column_lines(matrix.out_dim);
    for (quad, q) in used.quads.iter().zip(used.q.as_chunks::<QUAD>().0) {
        for (slab, sums) in sums.chunks_exact_mut(SLAB).enumerate() {
            let codes = quad.map(|c| trits(&matrix.lines[c as usize * per + slab]));
            for (k, sums) in sums.chunks_exact_mut(ROWS).enumerate() {
                for (b, sum) in sums.iter_mut().enumerate() {
                    // At most 4 · 2 · 128 in magnitude.
                    let dot: i16 = (0..QUAD).map(|c| codes[c][k][b] as i16 * q[c] as i16).sum();
                    *sum += dot as i32;
                }
            }
        }
    }
}

/// Columns that become code lines, a chunk at a time, before all tokens meet them.
struct Unpacked<'a> {
    isa: Isa,
    matrix: &'a PackedTernary<'a>,
    used: &'a Used,
    sums: &'a mut [i32],
}

impl WithKernel for Unpacked<'_> {
    fn run<K: Kernel>(self, kernel: K) {
        let Unpacked { isa, matrix, used: Used { quads, q, tokens }, sums } = self;
        let (columns, rows, panels) = (quads.len() * QUAD, sums.len() / tokens, matrix.out_dim.div_ceil(ROWS));
        let mut codes = vec![Line([0; 64]); PANELS * LINES * quads.len().min(CHUNK / QUAD)];
        let (mut block, mut piece): (Block, _) = ([[0; ROWS]; TOKENS], Vec::new());
        // Blocks of equal size: eight tokens are better met by four and four than by six and two.
        let step = tokens.div_ceil(tokens.div_ceil(TOKENS));
        for (chunk, quads) in quads.chunks(CHUNK / QUAD).enumerate() {
            let width = quads.len() * QUAD;
            piece.clear();
            q.chunks_exact(columns).for_each(|q| piece.extend_from_slice(&q[chunk * CHUNK..][..width]));
            let codes = &mut codes[..PANELS * LINES * quads.len()];
            for slab in 0..column_lines(matrix.out_dim) {
                unpack_slab(isa, matrix, slab, quads, codes);
                for (k, codes) in codes.chunks_exact(LINES * quads.len()).enumerate().take(panels - slab * PANELS) {
                    let first = slab * SLAB + k * ROWS;
                    for (q, sums) in piece.chunks(step * width).zip(sums.chunks_mut(step * rows)) {
                        kernel.block(codes, q, width, &mut block);
                        for (block, sums) in block.iter().zip(sums.chunks_exact_mut(rows)) {
                            sums[first..][..ROWS].iter_mut().zip(block).for_each(|(sum, block)| *sum += block);
                        }
                    }
                }
            }
        }
    }
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
