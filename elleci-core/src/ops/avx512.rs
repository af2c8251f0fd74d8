//! The float32 register tile of [`super::packed`]: 6 rows × 64 columns in 24 of the 32 registers.
//!
//! A step loads four registers of B and broadcasts six values of A: 10 loads for 24 multiply-adds, which leaves the
//! load ports a sixth to spare. (14 × 32 needs fewer bytes a multiply-add, but reads 14 rows of A at once: with a pitch
//! of 4 kB they all fall into one set of the 12-way cache, so that A has to be copied first. Six rows can be read where
//! they are, and that won.)

use core::arch::x86_64::*;

use ndarray::{ArrayView2, ArrayViewMut2};

use super::matmul::Out;
use crate::simd::Isa;

/// Rows of a tile.
pub(crate) const ROWS: usize = 6;
/// Columns of a tile.
pub(crate) const WIDTH: usize = 64;
/// Rows of B that are multiplied in one go, at most.
pub(crate) const DEPTH: usize = 512;
/// Rows of B to one line fetched ahead.
const AHEAD: usize = 8;
/// Runs of 8 lines that a tile of [`DEPTH`] rows of B fetches ahead.
pub(crate) const RUNS: usize = DEPTH / AHEAD / 8;

/// A row of a panel of B.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Row(pub [f32; WIDTH]);

impl Row {
    pub(crate) const ZERO: Row = Row([0.0; WIDTH]);
}

/// Proof that the machine has AVX-512 F.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// A token, where the machine has what it takes and `ELLECI_ISA` allows it.
    pub(crate) fn detect() -> Option<Avx512> {
        (Isa::detect() >= Isa::Avx512).then_some(Avx512(()))
    }

    /// `C (=|+=) A · B` for `a` of at most 6 rows, `b` a panel of as many rows as `a` has columns, `c` of at most 64
    /// columns, side by side. Meanwhile eight cache lines at each place in `ahead` are
    /// brought into the second-level cache.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[inline(always)]
    pub(crate) fn tile(
        self,
        a: ArrayView2<f32>,
        b: &[Row],
        mut c: ArrayViewMut2<f32>,
        out: Out,
        ahead: [*const f32; RUNS],
    ) {
        let (rows, cols) = c.dim();
        assert!(a.dim() == (rows, b.len()) && (1..=ROWS).contains(&rows), "tile of {:?} x {}", a.dim(), b.len());
        assert!((1..=WIDTH).contains(&cols) && (c.strides()[1] == 1 || cols == 1), "tile onto {rows} x {cols}");
        let a = A { at: a.as_ptr(), row: a.strides()[0], column: a.strides()[1] };
        let c = C { at: c.as_mut_ptr(), row: c.strides()[0], mask: u64::MAX >> (WIDTH - cols), out, ahead };
        // SAFETY: `self` exists only where AVX-512 F was detected. `a` and `c` describe the elements of two views, one
        // of them mutable, of the sizes that the chosen function assumes.
        unsafe {
            match rows {
                1 => wide::<1>(a, b, c),
                2 => wide::<2>(a, b, c),
                3 => wide::<3>(a, b, c),
                4 => wide::<4>(a, b, c),
                5 => wide::<5>(a, b, c),
                _ => wide::<6>(a, b, c),
            }
        }
    }
}

/// The floats of a panel, row after row.
pub(crate) fn floats(panel: &mut [Row]) -> &mut [f32] {
    // SAFETY: a row is 64 floats without padding.
    unsafe { core::slice::from_raw_parts_mut(panel.as_mut_ptr().cast(), panel.len() * WIDTH) }
}

impl Avx512 {
    /// Copies `from`, whose columns lie side by side, to rows `pitch` floats apart.
    ///
    /// # Panics
    /// When `to` is too short, or the column elements of `from` are apart.
    pub(crate) fn transpose(self, from: ArrayView2<f32>, to: &mut [f32], pitch: usize) {
        let (rows, cols) = from.dim();
        if rows == 0 || cols == 0 {
            return;
        }
        assert!(cols <= pitch && to.len() >= (rows - 1) * pitch + cols, "{rows} x {cols} into {}", to.len());
        assert!(from.strides()[0] == 1 || rows == 1, "columns are not contiguous");
        for col in (0..cols).step_by(16) {
            for row in (0..rows).step_by(16) {
                let part = Part { rows: (rows - row).min(16), cols: (cols - col).min(16), stride: from.strides()[1] };
                // SAFETY: `self` exists only where AVX-512 F was detected; the part lies inside of `from`, and its
                // place inside of `to`, as just asserted.
                unsafe {
                    let from = from.as_ptr().offset(col as isize * part.stride).add(row);
                    transpose(from, part, to.as_mut_ptr().add(row * pitch + col), pitch);
                }
            }
        }
    }
}

/// At most 16 × 16 elements, columns `stride` apart.
struct Part {
    rows: usize,
    cols: usize,
    stride: isize,
}

/// Sixteen columns become rows in four rounds of shuffles: single floats, pairs, quarters, halves.
///
/// # Safety
/// `from` is a readable `part`; `to` is writable in `part.rows` rows of `part.cols` floats, `pitch` apart.
#[target_feature(enable = "avx512f")]
unsafe fn transpose(from: *const f32, part: Part, to: *mut f32, pitch: usize) {
    let (row_mask, col_mask) = ((u16::MAX >> (16 - part.rows)), (u16::MAX >> (16 - part.cols)));
    let mut v = [_mm512_setzero_ps(); 16];
    for c in 0..16 {
        if c < part.cols {
            // SAFETY: column c of the part; the mask keeps off rows that it does not have.
            v[c] = unsafe { _mm512_maskz_loadu_ps(row_mask, from.offset(c as isize * part.stride)) };
        }
    }
    let mut w = [_mm512_setzero_pd(); 16];
    for i in 0..8 {
        w[2 * i] = _mm512_castps_pd(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]));
        w[2 * i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for i in (0..16).step_by(4) {
        for j in 0..2 {
            v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(w[i + j], w[i + j + 2]));
            v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(w[i + j], w[i + j + 2]));
        }
    }
    // Now quarter q of v[i + j] holds columns i.. i + 4 of row 4 q + j.
    for j in 0..4 {
        let (even0, odd0) = quarters(v[j], v[4 + j]);
        let (even1, odd1) = quarters(v[8 + j], v[12 + j]);
        let ((q0, q2), (q1, q3)) = (quarters(even0, even1), quarters(odd0, odd1));
        for (q, row) in [q0, q1, q2, q3].into_iter().enumerate() {
            if 4 * q + j < part.rows {
                // SAFETY: a row of the part; the mask keeps off columns that it does not have.
                unsafe { _mm512_mask_storeu_ps(to.add((4 * q + j) * pitch), col_mask, row) };
            }
        }
    }
}

/// The even and the odd quarters of two registers.
#[target_feature(enable = "avx512f")]
fn quarters(a: __m512, b: __m512) -> (__m512, __m512) {
    (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
}

/// Where A is, and how far its rows and columns are apart.
struct A {
    at: *const f32,
    row: isize,
    column: isize,
}

/// The part of the output that a tile writes.
struct C {
    at: *mut f32,
    row: isize,
    /// Bit j: column j exists.
    mask: u64,
    out: Out,
    ahead: [*const f32; RUNS],
}

/// # Safety
/// As [`tile`], with as many registers a row as the mask needs.
#[target_feature(enable = "avx512f")]
unsafe fn wide<const M: usize>(a: A, b: &[Row], c: C) {
    // SAFETY: the caller's promise; H registers cover the columns of the mask.
    unsafe {
        match c.mask.trailing_ones().div_ceil(16) {
            1 => tile::<M, 1>(a, b, c),
            2 => tile::<M, 2>(a, b, c),
            3 => tile::<M, 3>(a, b, c),
            _ => tile::<M, 4>(a, b, c),
        }
    }
}

/// # Safety
/// `a` has M rows and as many columns as `b` rows; `c` has M rows, writable in the columns of the mask, which are among
/// the first 16 H.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const M: usize, const H: usize>(a: A, b: &[Row], c: C) {
    let mut sums = [[_mm512_setzero_ps(); H]; M];
    let mut at = a.at;
    for (part, rows) in b.chunks(AHEAD).enumerate() {
        let output = c.at.wrapping_offset((part / H % M) as isize * c.row);
        fetch::<_MM_HINT_T0>(output.wrapping_add(part % H * 16));
        fetch::<_MM_HINT_T1>(c.ahead[part / 8 % RUNS].wrapping_add(part % 8 * 16));
        for row in rows {
            let mut columns = [_mm512_setzero_ps(); H];
            for h in 0..H {
                // SAFETY: a row is four aligned runs of 16 floats.
                columns[h] = unsafe { _mm512_load_ps(row.0.as_ptr().add(16 * h)) };
            }
            for r in 0..M {
                // SAFETY: element (r, k) of A; `at` has moved by one column for every row of B.
                let v = _mm512_set1_ps(unsafe { *at.offset(r as isize * a.row) });
                for h in 0..H {
                    sums[r][h] = _mm512_fmadd_ps(v, columns[h], sums[r][h]);
                }
            }
            at = at.wrapping_offset(a.column);
        }
    }
    for r in 0..M {
        for h in 0..H {
            let mask = (c.mask >> (16 * h)) as u16;
            // SAFETY: row r of the output; the mask keeps off columns that it does not have.
            unsafe {
                let at = c.at.offset(r as isize * c.row).wrapping_add(16 * h);
                if c.out == Out::Add {
                    sums[r][h] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums[r][h]);
                }
                _mm512_mask_storeu_ps(at, mask, sums[r][h]);
            }
        }
    }
}

/// Asks for the cache line at `at`, which may be any address.
#[inline(always)]
fn fetch<const HINT: i32>(at: *const f32) {
    // SAFETY: a prefetch reads nothing and never faults; SSE is part of x86-64.
    unsafe { _mm_prefetch::<HINT>(at.cast()) };
}
