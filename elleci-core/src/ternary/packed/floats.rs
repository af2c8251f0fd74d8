//! Products of a packed matrix with float32 vectors, for the absorbed form of attention: a few rows at a time, in either direction.

use alloc::vec::Vec;
use core::ops::Range;

use pulp::{Simd, WithSimd};

use super::{LINES, Line, PackedTernary, ROWS};
use crate::ops::lanes::dispatch;
use crate::simd::Isa;

/// Rows of a code line.
const LINE_ROWS: usize = 16;
/// Columns of a code line.
const COLUMNS: usize = 4;

/// Working memory of the products, kept for the next.
#[derive(Debug, Default)]
pub struct Room {
    /// An unpacked panel
    lines: Vec<Line>,
    /// The vector, padded
    x: Vec<f32>,
}

impl PackedTernary<'_> {
    /// `y[r] = Σ W₃[rows.start + r, c] · x[c]`, in float32 and without γ.
    ///
    /// # Panics
    /// When `rows` is out of range or a slice does not have its size.
    pub fn times(&self, rows: Range<usize>, x: &[f32], y: &mut [f32], room: &mut Room) {
        assert_eq!((x.len(), y.len()), (self.in_dim, rows.len()), "vectors");
        let Room { lines, x: padded } = room;
        padded.clear();
        padded.extend_from_slice(x);
        padded.resize(x.len().next_multiple_of(COLUMNS), 0.0);
        self.panels(rows, lines, |lines, at, part| {
            let mut sums = [0.0; ROWS];
            dispatch(Times { lines, x: padded, sums: &mut sums });
            y[at..at + part.len()].copy_from_slice(&sums[part]);
        });
    }

    /// `y[c] += Σ x[r] · W₃[rows.start + r, c]`, in float32 and without γ.
    ///
    /// # Panics
    /// When `rows` is out of range or a slice does not have its size.
    pub fn add_transposed_times(&self, rows: Range<usize>, x: &[f32], y: &mut [f32], room: &mut Room) {
        assert_eq!((x.len(), y.len()), (rows.len(), self.in_dim), "vectors");
        self.panels(rows, &mut room.lines, |lines, at, part| {
            let mut own = [0.0; ROWS];
            own[part.clone()].copy_from_slice(&x[at..at + part.len()]);
            dispatch(TransposedTimes { lines, x: &own, y: &mut *y });
        });
    }

    /// Calls `visit(code lines, first, rows)` for every panel with some of the rows: `rows` of the panel, of which the first is the
    /// `first`th asked for.
    fn panels(&self, rows: Range<usize>, lines: &mut Vec<Line>, mut visit: impl FnMut(&[Line], usize, Range<usize>)) {
        assert!(rows.end <= self.out_dim, "rows");
        lines.resize(self.packing.code_lines(self.in_dim), Line([0; 64]));
        let mut row = rows.start;
        while row < rows.end {
            let (panel, first) = (row / ROWS, row % ROWS);
            let n = (ROWS - first).min(rows.end - row);
            self.unpack(Isa::detect(), panel, lines);
            visit(&lines[..self.in_dim.div_ceil(COLUMNS) * LINES], row - rows.start, first..first + n);
            row += n;
        }
    }
}

/// The codes of column `c` of a line, four columns of which are `words`.
#[inline(always)]
fn codes<S: Simd>(simd: S, words: S::u32s, c: usize) -> S::f32s {
    // 2^23 and a small integer in its last bits are a float32 that is exactly their sum.
    let biased = simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(8 * c as u32));
    let biased = simd.or_u32s(simd.and_u32s(biased, simd.splat_u32s(3)), simd.splat_u32s(0x4b00_0000));
    simd.sub_f32s(simd.transmute_f32s_u32s(biased), simd.splat_f32s(8_388_609.0))
}

/// The words of a line: a row's codes plus one, a byte a column.
#[inline(always)]
fn words<S: Simd>(line: &Line) -> &[S::u32s] {
    S::as_simd_u32s(bytemuck::cast_ref::<[u8; 64], [u32; LINE_ROWS]>(&line.0)).0
}

struct Times<'a> {
    lines: &'a [Line],
    x: &'a [f32],
    sums: &'a mut [f32; ROWS],
}

impl WithSimd for Times<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Times { lines, x, sums } = self;
        for (j, sums) in sums.chunks_exact_mut(LINE_ROWS).enumerate() {
            let sums = S::as_mut_simd_f32s(sums).0;
            for (v, sum) in sums.iter_mut().enumerate() {
                // A chain of additions a column of the line: one would wait for its own latency.
                let mut acc = [simd.splat_f32s(0.0); COLUMNS];
                for (group, x) in lines.chunks_exact(LINES).zip(x.chunks_exact(COLUMNS)) {
                    let words = words::<S>(&group[j])[v];
                    for c in 0..COLUMNS {
                        acc[c] = simd.mul_add_e_f32s(codes(simd, words, c), simd.splat_f32s(x[c]), acc[c]);
                    }
                }
                *sum = simd.add_f32s(simd.add_f32s(acc[0], acc[1]), simd.add_f32s(acc[2], acc[3]));
            }
        }
    }
}

struct TransposedTimes<'a> {
    lines: &'a [Line],
    x: &'a [f32; ROWS],
    y: &'a mut [f32],
}

impl WithSimd for TransposedTimes<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let TransposedTimes { lines, x, y } = self;
        for (group, y) in lines.chunks_exact(LINES).zip(y.chunks_mut(COLUMNS)) {
            for (c, y) in y.iter_mut().enumerate() {
                let mut sum = simd.splat_f32s(0.0);
                for (line, x) in group.iter().zip(x.chunks_exact(LINE_ROWS)) {
                    for (words, x) in words::<S>(line).iter().zip(S::as_simd_f32s(x).0) {
                        sum = simd.mul_add_e_f32s(codes(simd, *words, c), *x, sum);
                    }
                }
                *y += simd.reduce_sum_f32s(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Packing, pack};
    use super::*;
    use crate::ternary::TernaryMatrix;
    use alloc::vec;

    /// Rows that begin and end inside of panels, columns that fill neither a word nor a run.
    #[test]
    fn products_are_the_definition() {
        let mut room = Room::default();
        let code = |r: usize, c: usize| (r * 7 + c * 5 + r * c) % 3;
        for (out, input) in [(1, 1), (70, 33), (200, 64), (130, 7)] {
            let codes: Vec<i8> = (0..out * input).map(|i| code(i / input, i % input) as i8 - 1).collect();
            let weights: Vec<f32> = codes.iter().map(|c| *c as f32).collect();
            let matrix = TernaryMatrix::from_weights(&weights, out, input);
            for packing in Packing::ALL {
                let lines = pack(&matrix, packing);
                let view = PackedTernary::new(packing, out, input, 1.0, &lines).unwrap();
                for rows in [0..out, out / 3..out, 0..out / 2, out - 1..out] {
                    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
                    let weight = |r: usize, c: usize| codes[(rows.start + r) * input + c] as f64;
                    let (x, z): (Vec<f32>, Vec<f32>) =
                        ((0..input).map(value).collect(), (0..rows.len()).map(value).collect());
                    let (mut y, mut yt) = (vec![f32::NAN; rows.len()], vec![0.5; input]);
                    view.times(rows.clone(), &x, &mut y, &mut room);
                    view.add_transposed_times(rows.clone(), &z, &mut yt, &mut room);
                    // Values of at most 1: every addition is off by 2^-24 of a sum of at most as many.
                    let bound = |n: usize| ((n + 2) * (n + 2)) as f64 * 2f64.powi(-24);
                    for (r, y) in y.iter().enumerate() {
                        let want: f64 = (0..input).map(|c| weight(r, c) * x[c] as f64).sum();
                        assert!((*y as f64 - want).abs() <= bound(input), "{packing:?} {out} {input} {rows:?}");
                    }
                    for (c, y) in yt.iter().enumerate() {
                        let want: f64 = 0.5 + (0..rows.len()).map(|r| weight(r, c) * z[r] as f64).sum::<f64>();
                        assert!((*y as f64 - want).abs() <= bound(rows.len()), "{packing:?} {out} {input} {rows:?}");
                    }
                }
            }
        }
    }
}
