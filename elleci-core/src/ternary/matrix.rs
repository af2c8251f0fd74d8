//! A weight matrix in its ternary form, and its product with int8 tokens.

use alloc::vec;
use alloc::vec::Vec;

use ndarray::{ArrayViewMut2, Axis};

use super::kernel::{self, Block, DEPTH, Kernel, LINES, Line, ROWS, TOKENS, WithKernel};
use super::quantize::{absmean, biased_code};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{self, Isa};

/// Tokens of a tile when the work is cut by tokens.
const TILE_TOKENS: usize = 16 * TOKENS;
/// Codes that all tokens of a tile meet before the next ones: half a megabyte stays in the second-level cache. Inside of
/// that, a few tokens meet all codes, so that the output is written along its rows; the other way round, writing took
/// longer than the products.
const RESIDENT: usize = 1 << 19;
/// Multiply-adds that make a tile of output rows worth a task of its own.
const TILE_MACS: usize = 1 << 20;

/// `W₃` and γ of a weight matrix `[out, in]`. One byte a weight, in the layout of the `kernel` module; rows are padded to 64 and
/// columns to 4, so that any size is fine.
#[derive(Clone, Debug)]
pub struct TernaryMatrix {
    out_dim: usize,
    in_dim: usize,
    gamma: f32,
    /// Panels one after the other, each [`TernaryMatrix::panel_lines`] long.
    lines: Vec<Line>,
}

impl TernaryMatrix {
    /// The ternary form of `w` `[out, in]`: `γ = max(mean |W|, 1e-5)`, `W₃ = clamp(rne(W/γ), -1, 1)`.
    ///
    /// # Panics
    /// When `w` does not have `out * input` elements.
    pub fn from_weights(w: &[f32], out: usize, input: usize) -> TernaryMatrix {
        let lines = vec![Line([0; 64]); out.div_ceil(ROWS) * input.div_ceil(DEPTH) * LINES];
        let mut matrix = TernaryMatrix { out_dim: out, in_dim: input, gamma: 1.0, lines };
        matrix.update(w);
        matrix
    }

    /// Derives γ and the codes again, in place.
    ///
    /// # Panics
    /// When `w` does not have `out * in` elements.
    pub fn update(&mut self, w: &[f32]) {
        assert_eq!(w.len(), self.out_dim * self.in_dim, "weights for [{}, {}]", self.out_dim, self.in_dim);
        self.gamma = absmean(w);
        if w.is_empty() {
            return;
        }
        let (in_dim, half) = (self.in_dim, self.gamma / 2.0);
        let panel_lines = self.panel_lines();
        let items: Vec<_> = w.chunks(ROWS * in_dim).zip(self.lines.chunks_mut(panel_lines)).collect();
        par::for_each(items, |(w, panel)| {
            simd::vectorize(
                #[inline(always)]
                || pack_codes(w, in_dim, half, panel),
            )
        });
    }

    /// Output rows.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// Input columns.
    pub fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// The scale γ of the tensor.
    pub fn gamma(&self) -> f32 {
        self.gamma
    }

    /// Bytes that the codes take.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Bytes that the codes of an `[out, in]` matrix take.
    pub fn planned_bytes(out: usize, input: usize) -> usize {
        out.div_ceil(ROWS) * input.div_ceil(DEPTH) * LINES * size_of::<Line>()
    }

    /// The code of one weight, in {-1, 0, 1}.
    ///
    /// # Panics
    /// When `row` or `col` is out of range.
    pub fn code(&self, row: usize, col: usize) -> i8 {
        assert!(row < self.out_dim && col < self.in_dim, "({row}, {col}) of [{}, {}]", self.out_dim, self.in_dim);
        let group = self.panel(row / ROWS, col / DEPTH);
        group[row % ROWS / 16].0[row % 16 * DEPTH + col % DEPTH] as i8 - 1
    }

    fn panel_lines(&self) -> usize {
        self.in_dim.div_ceil(DEPTH) * LINES
    }

    /// A panel from one of its groups on.
    pub(super) fn panel(&self, panel: usize, group: usize) -> &[Line] {
        &self.lines[panel * self.panel_lines()..][..self.panel_lines()][group * LINES..]
    }

    /// The codes plus one of rows `2 pair` and `2 pair + 1`, four columns of each at a time, from column `col` (a multiple of
    /// four) on. A row past the last gives anything.
    #[inline(always)]
    pub(super) fn row_pair(&self, pair: usize, col: usize) -> impl Iterator<Item = [u8; 2 * DEPTH]> {
        let row = 2 * pair;
        let groups = self.panel(row / ROWS, col / DEPTH).chunks(LINES);
        groups.map(move |group| group[row % ROWS / 16].0.as_chunks().0[row % 16 / 2])
    }

    /// The integers `W₃ · q`: `q` `[tokens, in]`, `out` `[tokens, out]`.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn sums(&self, q: &[i8], tokens: usize, out: &mut [i32]) {
        self.sums_with(Isa::detect(), q, tokens, out);
    }

    /// [`TernaryMatrix::sums`] with the kernels of one instruction set at most; returns the one that ran.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn sums_with(&self, isa: Isa, q: &[i8], tokens: usize, out: &mut [i32]) -> Isa {
        let out = mat_mut(out, tokens, self.out_dim);
        self.product(isa, q, out, Integers)
    }

    /// `Ternary(x; W)`, `y` `[tokens, out]` `= (W₃ · q) · (γ · scale)`, with `q` `[tokens, in]` and `scales` `[tokens]`
    /// from [`quantize_row`](super::quantize_row).
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn forward(&self, q: &[i8], scales: &[f32], tokens: usize, y: &mut [f32]) {
        assert_eq!(scales.len(), tokens, "scales");
        let y = mat_mut(y, tokens, self.out_dim);
        self.product(Isa::detect(), q, y, Scaled { gamma: self.gamma, scales });
    }

    fn product<T: Copy + Send>(&self, isa: Isa, q: &[i8], out: ArrayViewMut2<T>, finish: impl Finish<T>) -> Isa {
        assert_eq!(q.len(), out.nrows() * self.in_dim, "activations");
        kernel::dispatch(isa, Product { matrix: self, q, out, finish })
    }
}

/// How sums become outputs.
trait Finish<T>: Sync {
    /// One run of rows for token `token`: the sums are `biased - offset`.
    fn finish(&self, token: usize, biased: &[i32], offset: i32, out: &mut [T]);
}

struct Integers;

impl Finish<i32> for Integers {
    #[inline(always)]
    fn finish(&self, _: usize, biased: &[i32], offset: i32, out: &mut [i32]) {
        for (out, sum) in out.iter_mut().zip(biased) {
            *out = sum - offset;
        }
    }
}

struct Scaled<'a> {
    gamma: f32,
    scales: &'a [f32],
}

impl Finish<f32> for Scaled<'_> {
    #[inline(always)]
    fn finish(&self, token: usize, biased: &[i32], offset: i32, out: &mut [f32]) {
        let scale = self.gamma * self.scales[token];
        for (out, sum) in out.iter_mut().zip(biased) {
            // Below 2^24 in magnitude (see `ModelConfig::validate`), so that the conversion is exact.
            *out = (sum - offset) as f32 * scale;
        }
    }
}

/// `W₃ · q`, finished.
struct Product<'a, T, F> {
    matrix: &'a TernaryMatrix,
    q: &'a [i8],
    out: ArrayViewMut2<'a, T>,
    finish: F,
}

impl<T: Copy + Send, F: Finish<T>> WithKernel for Product<'_, T, F> {
    fn run<K: Kernel>(mut self, kernel: K) {
        let (tokens, out_dim) = self.out.dim();
        if tokens == 0 || out_dim == 0 {
            return;
        }
        // Few tokens share a panel: cut the rows. Many: cut the tokens, and let each tile walk over all panels.
        let row_tile = (TILE_MACS / (self.matrix.in_dim.max(1) * tokens)).next_multiple_of(ROWS).max(ROWS);
        let (axis, step) = if tokens.div_ceil(TILE_TOKENS) >= out_dim.div_ceil(row_tile) {
            (Axis(0), TILE_TOKENS)
        } else {
            (Axis(1), row_tile)
        };
        let items: Vec<_> = self.out.axis_chunks_iter_mut(axis, step).enumerate().collect();
        let (matrix, q, finish) = (self.matrix, self.q, &self.finish);
        par::for_each(items, |(i, out)| {
            let (token, row) = if axis == Axis(0) { (i * step, 0) } else { (0, i * step) };
            let q = &q[token * matrix.in_dim..][..out.nrows() * matrix.in_dim];
            tile(kernel, matrix, q, (token, row), out, finish);
        });
    }
}

/// One tile: tokens `q`, from token `first.0` on, output rows from `first.1` (a multiple of [`ROWS`]) on.
fn tile<K: Kernel, T: Copy>(
    kernel: K,
    matrix: &TernaryMatrix,
    q: &[i8],
    first: (usize, usize),
    mut out: ArrayViewMut2<T>,
    finish: &impl Finish<T>,
) {
    let in_dim = matrix.in_dim;
    let mut block: Block = [[0; ROWS]; TOKENS];
    let mut offsets = [0i32; TILE_TOKENS];
    let resident = (RESIDENT / in_dim.max(1)).next_multiple_of(ROWS);
    // Tiles cut by rows may have any number of tokens, but few; the sums over them are made once a panel, then.
    for (part, mut out) in out.axis_chunks_iter_mut(Axis(0), TILE_TOKENS).enumerate() {
        let tokens = out.nrows();
        let q = &q[part * TILE_TOKENS * in_dim..][..tokens * in_dim];
        simd::vectorize(
            #[inline(always)]
            || {
                for t in 0..tokens {
                    offsets[t] = q[t * in_dim..][..in_dim].iter().map(|v| *v as i32).sum();
                }
            },
        );
        for (r, mut out) in out.axis_chunks_iter_mut(Axis(1), resident).enumerate() {
            let row = first.1 + r * resident;
            for (b, mut out) in out.axis_chunks_iter_mut(Axis(0), TOKENS).enumerate() {
                let token = b * TOKENS;
                let q = &q[token * in_dim..][..out.nrows() * in_dim];
                for (p, mut out) in out.axis_chunks_iter_mut(Axis(1), ROWS).enumerate() {
                    if in_dim > 0 {
                        kernel.block(matrix.panel(row / ROWS + p, 0), q, in_dim, &mut block);
                    }
                    simd::vectorize(
                        #[inline(always)]
                        || {
                            for (t, out) in out.rows_mut().into_iter().enumerate() {
                                let out = out.into_slice().expect("rows of the output are contiguous");
                                let token = token + t;
                                finish.finish(first.0 + part * TILE_TOKENS + token, &block[t], offsets[token], out);
                            }
                        },
                    );
                }
            }
        }
    }
}

/// Codes of up to [`ROWS`] rows of weights into their panel. Rows and columns past the matrix stay 0.
#[inline(always)]
fn pack_codes(w: &[f32], in_dim: usize, half_gamma: f32, panel: &mut [Line]) {
    /// Columns quantised at once, before their bytes are spread over the groups.
    const COLS: usize = 64;
    for (r, row) in w.chunks(in_dim).enumerate() {
        for (c, cols) in row.chunks(COLS).enumerate() {
            let mut codes = [0u8; COLS];
            for (code, w) in codes.iter_mut().zip(cols) {
                *code = biased_code(*w, half_gamma);
            }
            let groups = panel[c * (COLS / DEPTH) * LINES..].chunks_mut(LINES);
            for (group, codes) in groups.zip(codes.as_chunks::<DEPTH>().0) {
                group[r / 16].0[r % 16 * DEPTH..][..DEPTH].copy_from_slice(codes);
            }
        }
    }
}
