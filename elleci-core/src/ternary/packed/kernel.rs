//! What a kernel for packed matrices is, and the one place that chooses among them.

use super::super::kernel::{Line, ROWS};
use super::portable::Portable;
use super::{LINES, RowPacking};
use crate::simd::Isa;

/// Tokens that meet a packed panel together at most. For more it is better unpacked, once for all.
pub const GROUP: usize = 8;

/// [`PackedKernel::dot`] of as many tokens as there are rows of sums, without codes standing in memory: of a panel and `q` `[tokens, ..]`.
///
/// # Panics
/// When the activations are not as many as the panel and the tokens want, or the tokens are not 2 to [`GROUP`].
pub type Dots<K> = fn(K, RowPacking, &[Line], &[i8], &mut [[i32; ROWS]]);

/// Works on packed panels. A type of this trait is proof that the machine can run it.
pub trait PackedKernel: Copy + Send + Sync {
    /// Writes `Σ (code + 1) · q` for the 64 rows of a panel.
    ///
    /// # Panics
    /// When `q` is not whole runs of [`RowPacking::columns`], as many as the panel has.
    fn dot(self, packing: RowPacking, panel: &[Line], q: &[i8], sums: &mut [i32; ROWS]);

    /// The form for a few tokens, where there is one that is faster than unpacking.
    const DOTS: Option<Dots<Self>> = None;

    /// Writes the code lines of a panel.
    ///
    /// # Panics
    /// When `codes` is not as long as [`RowPacking::code_lines`] says.
    fn unpack(self, packing: RowPacking, panel: &[Line], codes: &mut [Line]);
}

/// Work that is generic over the kernel.
pub trait WithPackedKernel {
    /// Does it.
    fn run<K: PackedKernel>(self, kernel: K);
}

/// Runs `work` with the best kernel that this machine has, at most `ceiling`; returns the level that ran.
pub fn dispatch(ceiling: Isa, work: impl WithPackedKernel) -> Isa {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        use super::{avx2::Avx2, avx512::Avx512, avx512::Vbmi, avx512::Vnni};
        if ceiling >= Isa::Avx512Vbmi
            && let Some(kernel) = Vbmi::detect()
        {
            work.run(kernel);
            return Isa::Avx512Vbmi;
        }
        if ceiling >= Isa::Avx512Vnni
            && let Some(kernel) = Vnni::detect()
        {
            work.run(kernel);
            return Isa::Avx512Vnni;
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
        use super::super::neon::{Neon, NeonDot};
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

/// The shape check that the pointers of [`PackedKernel::dot`] rest on.
#[inline(always)]
pub(super) fn check_dot(packing: RowPacking, panel: &[Line], q: &[i8]) {
    let runs = panel.len() / packing.lines();
    assert!(
        panel.len() == runs * packing.lines() && q.len() == runs * packing.columns(),
        "panel of {} lines",
        panel.len()
    );
}

/// The shape check of [`PackedKernel::dots`].
#[inline(always)]
#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(super) fn check_dots(packing: RowPacking, panel: &[Line], q: &[i8], tokens: usize) {
    let runs = panel.len() / packing.lines();
    assert!((2..=GROUP).contains(&tokens), "{tokens} tokens");
    assert!(
        panel.len() == runs * packing.lines() && q.len() == runs * packing.columns() * tokens,
        "panel of {} lines",
        panel.len()
    );
}

/// The shape check that the pointers of [`PackedKernel::unpack`] rest on.
#[inline(always)]
pub(super) fn check_unpack(packing: RowPacking, panel: &[Line], codes: &[Line]) {
    let runs = panel.len() / packing.lines();
    let code_lines = runs * packing.columns() / 4 * LINES;
    assert!(panel.len() == runs * packing.lines() && codes.len() == code_lines, "panel of {} lines", panel.len());
}
