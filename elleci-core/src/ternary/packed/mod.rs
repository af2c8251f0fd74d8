//! Ternary matrices as deployment stores them: [`Packing::I2`] (2 bits a weight), [`Packing::T5`] (five weights a byte), and
//! [`Packing::C5`] (the same by columns).
//!
//! The bytes are specified in `docs/packing.md`, and are the same on every machine. In short: a matrix is cut into panels of
//! 64 output rows, in the order of the rows. Inside of a panel the weights stand in *code lines* of 64 bytes, 16 rows × 4
//! columns, as the integer kernels multiply them; a stored weight is its code plus one, in {0, 1, 2}. A packed line holds
//!
//! - `I2`: the four code lines of 64 rows × 4 columns; byte b has code line j (rows `16 j ..`) in bits `2 j .. 2 j + 2`;
//! - `T5`: five code lines of 16 rows, one for each of five runs of 4 columns, one trit of every byte each ([`t5`]). Four
//!   packed lines, of 16 rows each, are the panel's next 20 columns;
//! - `C5`: a column of 320 rows, for matrices whose input is mostly zeros (`columns.rs`). It has no panels.
//!
//! Rows and columns past the matrix are stored as 0 and never contribute.

mod columns;
pub(crate) mod floats;
mod kernel;
mod portable;
pub mod t5;

#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod avx512;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod columns_avx512;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod dot_vbmi;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod tables_avx512;

#[cfg(test)]
mod tests;

use alloc::vec;
use alloc::vec::Vec;

use ndarray::Axis;

use super::TernaryMatrix;
pub use super::kernel::Line;
use super::kernel::{Block, LINES, ROWS, TOKENS, WithKernel};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{Isa, prefetch, vectorize};
use kernel::{GROUP, PackedKernel, WithPackedKernel};

/// How the codes of a ternary matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// 2 bits a weight: the cheapest to unpack.
    I2,
    /// Five weights in a byte, 1.6 bits a weight: the least to read.
    T5,
    /// As `T5`, but five rows of a column in a byte: columns whose activation is zero are not read.
    C5,
}

impl Packing {
    /// All.
    pub const ALL: [Packing; 3] = [Packing::I2, Packing::T5, Packing::C5];

    /// The name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            Packing::I2 => "i2",
            Packing::T5 => "t5",
            Packing::C5 => "c5",
        }
    }

    /// How rows are packed, if they are.
    fn by_rows(self) -> Option<RowPacking> {
        match self {
            Packing::I2 => Some(RowPacking::I2),
            Packing::T5 => Some(RowPacking::T5),
            Packing::C5 => None,
        }
    }

    /// Code lines that unpacking one panel yields: at least those of `in_dim` columns.
    fn code_lines(self, in_dim: usize) -> usize {
        let columns = self.by_rows().map_or(columns::QUAD, RowPacking::columns);
        in_dim.div_ceil(columns) * (columns / 4) * LINES
    }

    /// Bytes of an `[out, in]` matrix, a multiple of 64. `None` when they do not fit an address.
    pub fn bytes(self, out_dim: usize, in_dim: usize) -> Option<usize> {
        let lines = match self.by_rows() {
            Some(packing) => out_dim.div_ceil(ROWS).checked_mul(packing.panel_lines(in_dim))?,
            None => in_dim.checked_mul(columns::column_lines(out_dim))?,
        };
        lines.checked_mul(size_of::<Line>())
    }
}

/// How the rows of a panel are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowPacking {
    I2,
    T5,
}

impl RowPacking {
    /// Columns that a panel's shortest run of whole packed lines covers.
    fn columns(self) -> usize {
        match self {
            RowPacking::I2 => 4,
            RowPacking::T5 => 20,
        }
    }

    /// Packed lines of that run.
    fn lines(self) -> usize {
        match self {
            RowPacking::I2 => 1,
            RowPacking::T5 => LINES,
        }
    }

    /// Packed lines of one panel of a matrix with `in_dim` columns.
    fn panel_lines(self, in_dim: usize) -> usize {
        in_dim.div_ceil(self.columns()) * self.lines()
    }
}

/// Packs the codes of a matrix; see the module for the order.
pub fn pack(matrix: &TernaryMatrix, packing: Packing) -> Vec<Line> {
    let Some(packing) = packing.by_rows() else { return columns::pack(matrix) };
    let in_dim = matrix.in_dim();
    let (panels, panel_lines) = (matrix.out_dim().div_ceil(ROWS), packing.panel_lines(in_dim));
    let mut packed = vec![Line([0; 64]); panels * panel_lines];
    if packed.is_empty() {
        return packed;
    }
    let items: Vec<_> = packed.chunks_mut(panel_lines).enumerate().collect();
    par::for_each(items, |(panel, packed)| {
        let codes = matrix.panel(panel, 0);
        match packing {
            RowPacking::I2 => {
                for (line, codes) in packed.iter_mut().zip(codes.chunks(LINES)) {
                    for (b, byte) in line.0.iter_mut().enumerate() {
                        *byte = (0..LINES).map(|j| codes[j].0[b] << (2 * j)).sum();
                    }
                }
            }
            RowPacking::T5 => {
                for (lines, codes) in packed.chunks_mut(LINES).zip(codes.chunks(5 * LINES)) {
                    for (j, line) in lines.iter_mut().enumerate() {
                        for (b, byte) in line.0.iter_mut().enumerate() {
                            let trit = |k: usize| codes.get(k * LINES + j).map_or(0, |line| line.0[b]);
                            *byte = t5::encode([trit(0), trit(1), trit(2), trit(3), trit(4)]);
                        }
                    }
                }
            }
        }
    });
    packed
}

/// A packed matrix `[out, in]` in someone else's memory.
#[derive(Clone, Copy, Debug)]
pub struct PackedTernary<'a> {
    packing: Packing,
    out_dim: usize,
    in_dim: usize,
    gamma: f32,
    lines: &'a [Line],
}

impl<'a> PackedTernary<'a> {
    /// A view of `lines`; `None` unless they are as many as the shape needs.
    pub fn new(packing: Packing, out: usize, input: usize, gamma: f32, lines: &'a [Line]) -> Option<PackedTernary<'a>> {
        let fits = packing.bytes(out, input) == Some(size_of_val(lines));
        fits.then_some(PackedTernary { packing, out_dim: out, in_dim: input, gamma, lines })
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

    /// How the codes are stored.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The code lines of a panel.
    fn unpack(&self, isa: Isa, panel: usize, lines: &mut [Line]) {
        match self.packing.by_rows() {
            Some(packing) => _ = kernel::dispatch(isa, Unpack { packing, panel: self.panel(packing, panel), lines }),
            None => columns::unpack(isa, self, panel, lines),
        }
    }

    /// Tasks of a product with one token.
    fn tasks(&self, packing: RowPacking) -> usize {
        self.out_dim.div_ceil(ROWS).div_ceil(self.task_panels(packing))
    }

    /// Panels of one of them.
    fn task_panels(&self, packing: RowPacking) -> usize {
        let panel = (packing.panel_lines(self.in_dim) * size_of::<Line>()).max(1);
        let task = size_of_val(self.lines) / (THREAD_TASKS * par::threads());
        (task.clamp(*TASK_BYTES.start(), *TASK_BYTES.end()) / panel).max(1)
    }

    fn panel(&self, packing: RowPacking, panel: usize) -> &'a [Line] {
        let lines = packing.panel_lines(self.in_dim);
        &self.lines[panel * lines..][..lines]
    }

    /// The codes of rows `64 panel ..` as int8 in {-1, 0, 1}: `codes` `[rows of the panel, in]`.
    ///
    /// # Panics
    /// When `panel` is out of range or `codes` is shorter than its rows.
    pub fn panel_codes(&self, panel: usize, codes: &mut [i8]) {
        let mut lines = vec![Line([0; 64]); self.packing.code_lines(self.in_dim)];
        self.unpack(Isa::detect(), panel, &mut lines);
        for (r, row) in codes.chunks_exact_mut(self.in_dim).take(ROWS.min(self.out_dim - panel * ROWS)).enumerate() {
            let (words, tail) = row.as_chunks_mut::<4>();
            let group = |g: usize| lines[g * LINES + r / 16].0.as_chunks::<4>().0[r % 16];
            for (g, word) in words.iter_mut().enumerate() {
                *word = group(g).map(|code| code as i8 - 1);
            }
            let last = words.len();
            tail.iter_mut().enumerate().for_each(|(c, code)| *code = group(last)[c] as i8 - 1);
        }
    }

    /// The integers `W₃ · q` with the kernels of one instruction set at most; returns the one that ran. `q` `[tokens, in]`,
    /// `out` `[tokens, out]`.
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn sums_with(&self, isa: Isa, q: &[i8], tokens: usize, out: &mut [i32]) -> Isa {
        let finish = |_: usize, biased: &[i32], offset: i32, out: &mut [i32]| {
            for (out, sum) in out.iter_mut().zip(biased) {
                *out = sum - offset;
            }
        };
        self.product(isa, q, tokens, out, finish)
    }

    /// `Ternary(x; W)`: `y` `[tokens, out]` `= (W₃ · q) · (γ · scale)`, with `q` `[tokens, in]` and `scales` `[tokens]`
    /// from [`quantize_row`](super::quantize_row). The same bits as [`TernaryMatrix::forward`].
    ///
    /// # Panics
    /// When a slice does not have its size.
    pub fn forward(&self, q: &[i8], scales: &[f32], y: &mut [f32]) {
        let gamma = self.gamma;
        let finish = |token: usize, biased: &[i32], offset: i32, out: &mut [f32]| {
            let scale = gamma * scales[token];
            for (out, sum) in out.iter_mut().zip(biased) {
                // Below 2^24 in magnitude (see `ModelConfig::validate`), so that the conversion is exact.
                *out = (sum - offset) as f32 * scale;
            }
        };
        self.product(Isa::detect(), q, scales.len(), y, finish);
    }

    fn product<T: Send>(
        &self,
        isa: Isa,
        q: &[i8],
        tokens: usize,
        out: &mut [T],
        finish: impl Fn(usize, &[i32], i32, &mut [T]) + Sync,
    ) -> Isa {
        assert_eq!(q.len(), tokens * self.in_dim, "activations");
        assert_eq!(out.len(), tokens * self.out_dim, "outputs");
        if tokens == 1 {
            let finish = |_: &PackedTernary, sums: &[i32], offset, out: &mut [T]| finish(0, sums, offset, out);
            one_token(isa, vec![(*self, out)], q, finish)
        } else {
            let finish = Finish { finish, offsets: q.chunks_exact(self.in_dim.max(1)).map(sum).collect() };
            if self.out_dim == 0 || tokens == 0 {
                return isa;
            }
            #[cfg(all(feature = "std", target_arch = "x86_64"))]
            if isa >= Isa::Avx512Vbmi
                && let Some(kernel) = tables_avx512::detect(self, tokens)
            {
                tables_avx512::product(kernel, self, q, out, &finish);
                return Isa::Avx512Vbmi;
            }
            match self.packing.by_rows() {
                Some(packing) => kernel::dispatch(isa, MatMul { isa, matrix: self, packing, q, out, finish }),
                None => columns::product(isa, self, q, out, &finish),
            }
        }
    }
}

/// How biased sums become outputs: `finish(token, biased, offset, out)` for a run of rows.
struct Finish<F> {
    finish: F,
    /// `Σ q` of every token, which the biased sums have too much
    offsets: Vec<i32>,
}

/// Packed bytes that make a task of a matrix-vector product: enough to outweigh handing it out, and few enough that threads of unequal
/// speed end together.
const TASK_BYTES: core::ops::RangeInclusive<usize> = 64 << 10..=256 << 10;
/// Tasks of a thread, within these bounds.
const THREAD_TASKS: usize = 4;

/// The products of one token's row with several matrices, in one loop over the tasks of all: `parts` are the matrices and their
/// outputs. The same bits as [`PackedTernary::forward`] with each.
///
/// # Panics
/// When a slice does not have its size.
pub fn forward_all<'a>(parts: Vec<(PackedTernary<'a>, &'a mut [f32])>, q: &[i8], scale: f32) {
    for (matrix, out) in &parts {
        assert_eq!((q.len(), out.len()), (matrix.in_dim, matrix.out_dim), "vectors");
    }
    let finish = |matrix: &PackedTernary, sums: &[i32], offset: i32, out: &mut [f32]| {
        let scale = matrix.gamma * scale;
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = (sum - offset) as f32 * scale;
        }
    };
    one_token(Isa::detect(), parts, q, finish);
}

/// Matrices and their outputs.
type Parts<'a, T> = Vec<(PackedTernary<'a>, &'a mut [T])>;

/// The products of one row: `finish(matrix, biased, offset, out)` makes outputs of the sums of as many rows. Returns the level of a
/// kernel that ran.
fn one_token<T: Send>(
    isa: Isa,
    parts: Parts<T>,
    q: &[i8],
    finish: impl Fn(&PackedTernary, &[i32], i32, &mut [T]) + Sync,
) -> Isa {
    let mut ran = isa;
    let mut panels = Vec::with_capacity(parts.len());
    for (matrix, out) in parts {
        if matrix.packing.by_rows().is_some() {
            panels.push((matrix, out));
            continue;
        }
        let finish = |_: usize, sums: &[i32], offset: i32, out: &mut [T]| finish(&matrix, sums, offset, out);
        ran = columns::product(isa, &matrix, q, out, &Finish { finish, offsets: vec![sum(q)] });
    }
    if !panels.is_empty() {
        ran = kernel::dispatch(isa, MatVec { parts: panels, q, finish });
    }
    ran
}

/// Tells idle threads what [`forward_all`] will read next.
pub fn expect(parts: &[PackedTernary]) {
    // Which columns will be read is not known yet.
    let by_rows = || parts.iter().filter_map(|m| Some((m, m.packing.by_rows()?)));
    par::expect(by_rows().map(|(m, packing)| m.tasks(packing)).sum(), |mut task| {
        for (matrix, packing) in by_rows() {
            if task < matrix.tasks(packing) {
                return matrix.panel(packing, task * matrix.task_panels(packing)).as_ptr().cast();
            }
            task -= matrix.tasks(packing);
        }
        core::ptr::null()
    });
}

fn sum(q: &[i8]) -> i32 {
    vectorize(
        #[inline(always)]
        || q.iter().map(|v| *v as i32).sum(),
    )
}

/// [`one_token`] of matrices that are packed by rows.
struct MatVec<'a, T, F> {
    parts: Parts<'a, T>,
    q: &'a [i8],
    finish: F,
}

impl<T: Send, F: Fn(&PackedTernary, &[i32], i32, &mut [T]) + Sync> WithPackedKernel for MatVec<'_, T, F> {
    fn run<K: PackedKernel>(self, kernel: K) {
        let MatVec { parts, q, finish } = self;
        let offset = sum(q);
        let mut padded = Vec::with_capacity(q.len() + RowPacking::T5.columns());
        padded.extend_from_slice(q);
        padded.resize(q.len() + RowPacking::T5.columns(), 0);
        let tasks = |(m, _): &(PackedTernary, _)| m.packing.by_rows().map_or(0, |packing| m.tasks(packing));
        let mut items = Vec::with_capacity(parts.iter().map(tasks).sum());
        for (matrix, out) in parts {
            let Some(packing) = matrix.packing.by_rows() else { continue };
            let panels = matrix.task_panels(packing);
            let tasks = out.chunks_mut(panels * ROWS).enumerate();
            items.extend(tasks.map(|(task, out)| (matrix, packing, task * panels, out)));
        }
        par::for_each(items, |(matrix, packing, first, out)| {
            let q = &padded[..q.len().next_multiple_of(packing.columns())];
            // Another thread has written them.
            prefetch(q);
            let mut sums = [0; ROWS];
            for (p, out) in out.chunks_mut(ROWS).enumerate() {
                kernel.dot(packing, matrix.panel(packing, first + p), q, &mut sums);
                finish(&matrix, &sums[..out.len()], offset, out);
            }
        });
    }
}

/// Rows of activations, filled up with zeros to whole runs of columns.
fn filled<'q>(q: &'q [i8], in_dim: usize, packing: RowPacking, room: &'q mut Vec<i8>) -> &'q [i8] {
    let width = in_dim.next_multiple_of(packing.columns());
    if width == in_dim {
        return q;
    }
    room.resize(q.len() / in_dim * width, 0);
    room.chunks_exact_mut(width).zip(q.chunks_exact(in_dim)).for_each(|(to, q)| to[..in_dim].copy_from_slice(q));
    room
}

/// Several tokens with a matrix that has panels. Where the kernel can, few of them meet the panels as they are read; otherwise every panel
/// is unpacked once, into code lines that all tokens meet.
struct MatMul<'a, T, F> {
    isa: Isa,
    matrix: &'a PackedTernary<'a>,
    packing: RowPacking,
    q: &'a [i8],
    out: &'a mut [T],
    finish: Finish<F>,
}

impl<T: Send, F: Fn(usize, &[i32], i32, &mut [T]) + Sync> WithPackedKernel for MatMul<'_, T, F> {
    fn run<K: PackedKernel>(self, kernel: K) {
        let MatMul { isa, matrix, packing, q, out, finish } = self;
        let tokens = finish.offsets.len();
        let (in_dim, out_dim) = (matrix.in_dim, matrix.out_dim);
        let mut out = mat_mut(out, tokens, out_dim);
        if let Some(dots) = K::DOTS
            && tokens <= GROUP
        {
            let mut room = Vec::new();
            let q = filled(q, in_dim, packing, &mut room);
            // One thread takes all panels as one task.
            let task = if par::threads() == 1 { out_dim.next_multiple_of(ROWS) } else { ROWS };
            par::for_each(out.axis_chunks_iter_mut(Axis(1), task).enumerate().collect(), |(t, mut out)| {
                let mut sums = [[0; ROWS]; GROUP];
                let sums = &mut sums[..tokens];
                for (panel, mut out) in (t * task / ROWS..).zip(out.axis_chunks_iter_mut(Axis(1), ROWS)) {
                    dots(kernel, packing, matrix.panel(packing, panel), q, sums);
                    for (token, (mut out, sums)) in out.rows_mut().into_iter().zip(&*sums).enumerate() {
                        let out = out.as_slice_mut().expect("rows of the output are contiguous");
                        (finish.finish)(token, &sums[..out.len()], finish.offsets[token], out);
                    }
                }
            });
            return;
        }
        let items: Vec<_> = out.axis_chunks_iter_mut(Axis(1), ROWS).enumerate().collect();
        // One buffer for many panels: clearing it for each took 10 % of the time of eight tokens (docs/LOG.md).
        let buffer = || vec![Line([0; 64]); matrix.packing.code_lines(in_dim)];
        par::for_each_init(items, buffer, |lines, (panel, mut out)| {
            kernel.unpack(packing, matrix.panel(packing, panel), lines);
            let lines = &lines[..in_dim.div_ceil(4) * LINES];
            let emit = |token: usize, sums: &[i32; ROWS]| {
                let mut out = out.row_mut(token);
                let out = out.as_slice_mut().expect("rows of the output are contiguous");
                (finish.finish)(token, &sums[..out.len()], finish.offsets[token], out);
            };
            super::kernel::dispatch(isa, PanelTokens { lines, q, in_dim, emit });
        });
    }
}

/// One unpacked panel with all tokens.
struct PanelTokens<'a, E> {
    lines: &'a [Line],
    q: &'a [i8],
    in_dim: usize,
    emit: E,
}

impl<E: FnMut(usize, &[i32; ROWS])> WithKernel for PanelTokens<'_, E> {
    fn run<K: super::kernel::Kernel>(mut self, kernel: K) {
        let mut block: Block = [[0; ROWS]; TOKENS];
        // Blocks of equal size: eight tokens are better met by four and four than by six and two.
        let tokens = self.q.len() / self.in_dim;
        let step = tokens.div_ceil(tokens.div_ceil(TOKENS));
        for (b, q) in self.q.chunks(step * self.in_dim).enumerate() {
            kernel.block(self.lines, q, self.in_dim, &mut block);
            for t in 0..q.len() / self.in_dim {
                (self.emit)(b * step + t, &block[t]);
            }
        }
    }
}

struct Unpack<'a> {
    packing: RowPacking,
    panel: &'a [Line],
    lines: &'a mut [Line],
}

impl WithPackedKernel for Unpack<'_> {
    fn run<K: PackedKernel>(self, kernel: K) {
        kernel.unpack(self.packing, self.panel, self.lines);
    }
}
