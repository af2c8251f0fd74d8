//! What an integer kernel is, and the one place that chooses among them.
//!
//! A matrix is stored in panels of [`ROWS`] output rows. A panel is a run of groups, one for every [`DEPTH`] input
//! columns; a group is [`LINES`] cache lines; a line holds 16 rows × 4 columns, the columns of a row side by side: what
//! one 32-bit lane of `vpdpbusd`, or of `maddubs` followed by `madd`, multiplies with four activations. So all kernels
//! read the same bytes, front to back.
//!
//! Codes are stored plus one, in {0, 1, 2}, because those instructions want one unsigned operand. A block therefore
//! yields `Σ (code + 1) · q`, and the caller takes the token's `Σ q` off. Columns past the matrix are stored as 0 and
//! contribute nothing whatever they are multiplied with.

use crate::simd::Isa;

use super::portable::Portable;

/// Output rows of a panel.
pub const ROWS: usize = 64;
/// Input columns of a group.
pub const DEPTH: usize = 4;
/// Cache lines of a group.
pub const LINES: usize = ROWS * DEPTH / 64;
/// Tokens of a block at most.
pub const TOKENS: usize = 6;

/// 16 rows × 4 columns of codes plus one; row `r`, column `c` at `4 r + c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

// SAFETY: 64 bytes without padding, of which every pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; `Copy`, `'static` and `repr(C)`.
unsafe impl bytemuck::Pod for Line {}

/// The biased sums of a block, `[token][row of the panel]`.
pub type Block = [[i32; ROWS]; TOKENS];

/// A product of one panel with up to [`TOKENS`] tokens. A type of this trait is proof that the machine can run it.
pub trait Kernel: Copy + Send + Sync {
    /// Writes `Σ (code + 1) · q` for the tokens `q` `[tokens, in_dim]` into the first rows of `block`.
    ///
    /// # Panics
    /// When `panel` is not `in_dim` columns long, or `q` is not 1 to [`TOKENS`] rows.
    fn block(self, panel: &[Line], q: &[i8], in_dim: usize, block: &mut Block);
}

/// Work that is generic over the kernel.
pub trait WithKernel {
    /// Does it.
    fn run<K: Kernel>(self, kernel: K);
}

/// Runs `work` with the best kernel that this machine has, at most `ceiling`; returns the level that ran.
pub fn dispatch(ceiling: Isa, work: impl WithKernel) -> Isa {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        use super::{avx2::Avx2, avx512::Avx512, vnni::Vnni};
        if ceiling >= Isa::Avx512Vnni
            && let Some(kernel) = Vnni::detect()
        {
            work.run(kernel);
            // VBMI adds nothing to products of unpacked codes.
            return ceiling.min(Isa::machine());
        }
        if ceiling >= Isa::Avx512
            && let Some(kernel) = Avx512::detect()
        {
            work.run(kernel);
            return Isa::Avx512;
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
        use super::neon::{Neon, NeonDot};
        if ceiling >= Isa::NeonDot
            && let Some(kernel) = NeonDot::detect()
        {
            work.run(kernel);
            return Isa::NeonDot;
        }
        if ceiling >= Isa::Neon
            && let Some(kernel) = Neon::detect()
        {
            work.run(kernel);
            return Isa::Neon;
        }
    }
    let _ = ceiling;
    work.run(Portable);
    Isa::Portable
}

/// The shape check that every kernel's pointers rest on; returns the number of tokens.
#[inline(always)]
pub(super) fn check(panel: &[Line], q: &[i8], in_dim: usize) -> usize {
    let tokens = q.len() / in_dim;
    assert_eq!(panel.len(), in_dim.div_ceil(DEPTH) * LINES, "panel of {} lines for {in_dim} columns", panel.len());
    assert!(q.len() == tokens * in_dim && (1..=TOKENS).contains(&tokens), "{} activations for {in_dim}", q.len());
    tokens
}

/// The activations past the last whole group as a little-endian word, zero-filled. `None` when there are none.
#[inline(always)]
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(super) fn tail_word(row: &[i8]) -> Option<i32> {
    let (_, tail) = row.as_chunks::<DEPTH>();
    let mut bytes = [0; DEPTH];
    for (b, q) in bytes.iter_mut().zip(tail) {
        *b = *q as u8;
    }
    (!tail.is_empty()).then_some(i32::from_le_bytes(bytes))
}
