//! Transposed copies.

/// `to[c · pitch + r] = from[r · stride + c]` for the `rows` and `cols` of `size`.
///
/// # Panics
/// When a slice is too short.
pub(crate) fn transpose(from: &[f32], stride: usize, size: (usize, usize), to: &mut [f32], pitch: usize) {
    let (rows, cols) = size;
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(cols <= stride && (rows - 1) * stride + cols <= from.len(), "transpose: from");
    assert!(rows <= pitch && (cols - 1) * pitch + rows <= to.len(), "transpose: to");
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if crate::simd::Isa::detect() >= crate::simd::Isa::Avx512 {
        // SAFETY: the features were detected; what is read and written was checked.
        return unsafe { avx512::transpose(from.as_ptr(), stride, size, to.as_mut_ptr(), pitch) };
    }
    for (r, from) in from.chunks(stride).take(rows).enumerate() {
        for (c, value) in from[..cols].iter().enumerate() {
            to[c * pitch + r] = *value;
        }
    }
}

#[cfg(all(feature = "std", target_arch = "x86_64"))]
pub(crate) mod avx512 {
    use core::arch::x86_64::*;

    /// Rows and columns of a tile.
    pub(crate) const TILE: usize = 16;

    /// [`super::transpose`], a tile of registers at a time.
    ///
    /// # Safety
    /// AVX-512 F is there, and both sides have the elements that are named.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(
        from: *const f32,
        stride: usize,
        (rows, cols): (usize, usize),
        to: *mut f32,
        pitch: usize,
    ) {
        let mask = |left: usize| u16::MAX >> (TILE - left.min(TILE));
        for r in (0..rows).step_by(TILE) {
            let (height, down) = ((rows - r).min(TILE), mask(rows - r));
            for c in (0..cols).step_by(TILE) {
                let across = mask(cols - c);
                let mut tile = [_mm512_setzero_si512(); TILE];
                for (i, row) in tile.iter_mut().enumerate().take(height) {
                    // SAFETY: row r + i is below `rows`, and the mask has the columns that there are.
                    *row = unsafe { _mm512_maskz_loadu_epi32(across, from.add((r + i) * stride + c).cast()) };
                }
                for (i, column) in tile_transposed(tile).into_iter().enumerate().take(cols - c) {
                    // SAFETY: column c + i is below `cols`, and the mask has the rows that there are.
                    unsafe { _mm512_mask_storeu_epi32(to.add((c + i) * pitch + r).cast(), down, column) };
                }
            }
        }
    }

    /// Lane r of vector c becomes lane c of vector r.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn tile_transposed(rows: [__m512i; TILE]) -> [__m512i; TILE] {
        // Quarters of vector 4 g + k: column 4 q + k of rows 4 g to 4 g + 3, in quarter q.
        let mut quads = [_mm512_setzero_si512(); TILE];
        for g in 0..4 {
            let [a, b, c, d] = [rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]];
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            quads[4 * g] = _mm512_unpacklo_epi64(ab, cd);
            quads[4 * g + 1] = _mm512_unpackhi_epi64(ab, cd);
            let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            quads[4 * g + 2] = _mm512_unpacklo_epi64(ab, cd);
            quads[4 * g + 3] = _mm512_unpackhi_epi64(ab, cd);
        }
        let mut columns = [_mm512_setzero_si512(); TILE];
        for k in 0..4 {
            let [a, b, c, d] = [quads[k], quads[4 + k], quads[8 + k], quads[12 + k]];
            // Even and odd quarters, of two vectors and then of four.
            let (ab, cd) = (_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d));
            columns[k] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd);
            columns[8 + k] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd);
            let (ab, cd) = (_mm512_shuffle_i32x4::<0b11_01_11_01>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d));
            columns[4 + k] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd);
            columns[12 + k] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn every_element_and_no_other() {
        for (rows, cols) in [(1, 1), (2, 16), (16, 16), (17, 33), (31, 15), (64, 48), (5, 70)] {
            for (stride, pitch) in [(cols, rows), (cols + 3, rows + 16)] {
                let from: Vec<f32> = (0..(rows - 1) * stride + cols).map(|i| i as f32).collect();
                let mut to = vec![-1.0; (cols - 1) * pitch + rows];
                transpose(&from, stride, (rows, cols), &mut to, pitch);
                for (i, value) in to.iter().enumerate() {
                    let (c, r) = (i / pitch, i % pitch);
                    let want = if r < rows { (r * stride + c) as f32 } else { -1.0 };
                    assert_eq!(*value, want, "{rows} x {cols}, {stride}, {pitch}");
                }
            }
        }
    }
}
