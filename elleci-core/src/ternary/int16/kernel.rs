//! What an int16 kernel is, the one in plain Rust, and the one place that chooses among them.
//!
//! Both operands hold pairs of int16 that are neighbours along the depth of the product, a pair in the 32 bits that one
//! lane of `vpdpwssd`, or of `pmaddwd`, multiplies and adds up: a *word*. The left one is rows of words; the right one
//! is cut into panels of [`WIDTH`] columns, and a [`Line`] is a word of each of them. An odd depth ends in a zero.

use crate::simd::Isa;

/// Rows of a block at most.
pub const ROWS: usize = 6;
/// Columns of a panel.
pub const WIDTH: usize = 64;

/// A word of each column of a panel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Line(pub [[i16; 2]; WIDTH]);

impl Line {
    /// All zeros.
    pub const ZERO: Line = Line([[0; 2]; WIDTH]);
}

/// Sums of a block, `[row][column of the panel]`.
pub type Block = [[i32; WIDTH]; ROWS];

/// Rows of words, `pitch` words apart.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a> {
    /// The first row begins here.
    pub data: &'a [i32],
    /// Words from one row to the next.
    pub pitch: usize,
    /// Rows.
    pub rows: usize,
}

/// Lines that a kernel asks the cache for while it multiplies: addresses only, never read.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(all(feature = "std", target_arch = "x86_64")),
    expect(dead_code, reason = "plain Rust has no prefetch: only the x86 kernels read it")
)]
pub struct Ahead {
    /// Where the words of the next rows begin.
    pub words: *const i32,
    /// Words from one of those rows to the next.
    pub pitch: usize,
    /// Words that are wanted of each of them.
    pub depth: usize,
    /// Lines of them that were asked for before.
    pub given: usize,
    /// Where the output of this block begins, and floats from one of its rows to the next.
    pub output: (*const f32, usize),
}

/// A product of up to [`ROWS`] rows with one panel. A type of this trait is proof that the machine can run it.
pub trait Kernel: Copy + Send + Sync {
    /// Writes `Σ_k a[r][k] · panel[k][j]` into the first rows of `block`. The sums must fit an int32.
    ///
    /// # Panics
    /// When `a` is not 1 to [`ROWS`] rows of at least as many words as `panel` has lines.
    fn block(self, a: Words, panel: &[Line], ahead: Ahead, block: &mut Block);
}

/// Work that is generic over the kernel.
pub trait WithKernel {
    /// Does it.
    fn run<K: Kernel>(self, kernel: K);
}

/// Runs `work` with the best kernel that this machine has, at most `ceiling`; returns the level that ran. (AVX-512
/// without VNNI has nothing to offer here over AVX2.)
pub fn dispatch(ceiling: Isa, work: impl WithKernel) -> Isa {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        use super::{avx2::Avx2, vnni::Vnni};
        if ceiling >= Isa::Avx512Vnni
            && let Some(kernel) = Vnni::detect()
        {
            work.run(kernel);
            return ceiling.min(Isa::machine());
        }
        if ceiling >= Isa::Avx2
            && let Some(kernel) = Avx2::detect()
        {
            work.run(kernel);
            return Isa::Avx2;
        }
    }
    #[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
    {
        use super::neon::Neon;
        if ceiling >= Isa::Neon
            && let Some(kernel) = Neon::detect()
        {
            work.run(kernel);
            return ceiling.min(Isa::machine());
        }
    }
    let _ = ceiling;
    work.run(Portable);
    Isa::Portable
}

/// The shape check that every kernel's pointers rest on.
#[inline(always)]
pub fn check(a: Words, panel: &[Line]) {
    let fits = panel.is_empty() || (a.rows - 1) * a.pitch + panel.len() <= a.data.len();
    assert!((1..=ROWS).contains(&a.rows) && fits, "{} rows of {} words", a.rows, panel.len());
}

/// Available everywhere.
#[derive(Clone, Copy)]
pub struct Portable;

impl Kernel for Portable {
    fn block(self, a: Words, panel: &[Line], _: Ahead, block: &mut Block) {
        check(a, panel);
        for (r, sums) in block[..a.rows].iter_mut().enumerate() {
            *sums = [0; _];
            for (word, line) in a.data[r * a.pitch..].iter().zip(panel) {
                let [x, y] = bytemuck::cast::<i32, [i16; 2]>(*word);
                for (sum, b) in sums.iter_mut().zip(&line.0) {
                    *sum += x as i32 * b[0] as i32 + y as i32 * b[1] as i32;
                }
            }
        }
    }
}
