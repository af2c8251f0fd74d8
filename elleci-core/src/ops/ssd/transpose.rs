//! Transposing squares of 16, for right sides that lie in columns.

/// `out[k * stride + j] = columns[j][k]` for j, k < 16.
///
/// # Panics
/// When `out` is shorter than `15 * stride + 16`.
pub(super) fn transpose16(columns: [&[f32; 16]; 16], out: &mut [f32], stride: usize) {
    assert!(out.len() >= 15 * stride + 16);
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if crate::simd::Isa::detect() >= crate::simd::Isa::Avx512 {
        // SAFETY: the level says that the machine has AVX-512 F.
        return unsafe { avx512(columns, out, stride) };
    }
    for (j, column) in columns.iter().enumerate() {
        for k in 0..16 {
            out[k * stride + j] = column[k];
        }
    }
}

/// Four rounds of 16 shuffles: pairs of floats, pairs of pairs, and quarters twice.
///
/// # Safety
/// `out` must hold `15 * stride + 16` elements.
#[cfg(all(feature = "std", target_arch = "x86_64"))]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(columns: [&[f32; 16]; 16], out: &mut [f32], stride: usize) {
    use core::arch::x86_64::*;
    // SAFETY: each column is 16 floats.
    let column = |j: usize| unsafe { _mm512_loadu_ps(columns[j].as_ptr()) };
    let mut a = [_mm512_setzero_ps(); 16];
    let mut b = [_mm512_setzero_ps(); 16];
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(column(2 * i), column(2 * i + 1));
        a[2 * i + 1] = _mm512_unpackhi_ps(column(2 * i), column(2 * i + 1));
    }
    for i in [0, 4, 8, 12] {
        let pair = |i: usize| _mm512_castps_pd(a[i]);
        b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(i), pair(i + 2)));
        b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(i), pair(i + 2)));
        b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(i + 1), pair(i + 3)));
        b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(i + 1), pair(i + 3)));
    }
    // b[4 i + c] holds, in its quarter q, row 4 q + c of the result for the columns 4 i .. 4 i + 4.
    for c in 0..4 {
        a[c] = _mm512_shuffle_f32x4::<0x88>(b[c], b[4 + c]);
        a[4 + c] = _mm512_shuffle_f32x4::<0xdd>(b[c], b[4 + c]);
        a[8 + c] = _mm512_shuffle_f32x4::<0x88>(b[8 + c], b[12 + c]);
        a[12 + c] = _mm512_shuffle_f32x4::<0xdd>(b[8 + c], b[12 + c]);
    }
    for c in 0..4 {
        b[c] = _mm512_shuffle_f32x4::<0x88>(a[c], a[8 + c]);
        b[4 + c] = _mm512_shuffle_f32x4::<0x88>(a[4 + c], a[12 + c]);
        b[8 + c] = _mm512_shuffle_f32x4::<0xdd>(a[c], a[8 + c]);
        b[12 + c] = _mm512_shuffle_f32x4::<0xdd>(a[4 + c], a[12 + c]);
    }
    for (k, row) in b.into_iter().enumerate() {
        // SAFETY: the caller vouches for `15 * stride + 16` elements, and k is at most 15.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(k * stride), row) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_moves_to_its_place() {
        let source: [[f32; 16]; 16] = core::array::from_fn(|j| core::array::from_fn(|k| (100 * j + k) as f32));
        let mut out = [-1.0; 15 * 19 + 16];
        transpose16(core::array::from_fn(|j| &source[j]), &mut out, 19);
        for (i, got) in out.into_iter().enumerate() {
            let (k, j) = (i / 19, i % 19);
            assert_eq!(got, if j < 16 { (100 * j + k) as f32 } else { -1.0 });
        }
    }
}
