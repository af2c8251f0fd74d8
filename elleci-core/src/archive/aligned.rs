//! Memory that is aligned as an archive wants it.

use alloc::vec;
use alloc::vec::Vec;

use crate::ternary::packed::Line;

/// Bytes on the heap that start at a multiple of 64.
#[derive(Clone, Debug, Default)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> AlignedBytes {
        AlignedBytes { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// None yet, and room for `bytes`.
    pub fn with_capacity(bytes: usize) -> AlignedBytes {
        AlignedBytes { lines: Vec::with_capacity(bytes.div_ceil(64)), len: 0 }
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }

    /// Appends bytes.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let from = self.len;
        self.len += bytes.len();
        self.lines.resize(self.len.div_ceil(64), Line([0; 64]));
        self.as_mut_slice()[from..].copy_from_slice(bytes);
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl From<&[u8]> for AlignedBytes {
    fn from(bytes: &[u8]) -> AlignedBytes {
        let mut aligned = AlignedBytes::zeroed(bytes.len());
        aligned.as_mut_slice().copy_from_slice(bytes);
        aligned
    }
}

/// Bytes of a `static` that start at a multiple of 64:
/// `static MODEL: StaticBytes<{ include_bytes!("model.elleci").len() }> = StaticBytes(*include_bytes!("model.elleci"));`
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct StaticBytes<const N: usize>(pub [u8; N]);

impl<const N: usize> AsRef<[u8]> for StaticBytes<N> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
