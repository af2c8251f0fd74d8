//! [`super::columns`] with VBMI and VNNI. The bytes of four columns are brought together, so that every 32-bit lane holds four
//! columns of five rows; from there on it is T5.
//!
//! Four lines take 8 instructions to interleave and 4 · 14 for their trits and products, 16 cycles a line at two a cycle: behind the
//! memory, which takes ten for a line, by less than what is left out.

use core::arch::x86_64::*;

use super::avx512::{Vbmi, add_vnni, load, tables, trits_vbmi, word};
use super::columns::{QUAD, Quad, SLAB};
use super::{LINES, Line};
use crate::simd::{prefetch_later, prefetch_line};

/// Quads whose columns are asked for before they are needed, near and far.
const SOON: usize = 2;
const LATER: usize = 8;

/// Sums of a slab in the order of the lanes: `[4 quarters of the interleaved line][5 trits]`, 16 lanes each.
type Sums = [[__m512i; 5]; QUAD];

/// `Σ (code + 1) · q` of every row, added to `sums`, [`SLAB`] rows a line of a column.
///
/// # Panics
/// When a column lies outside of `lines`, or `sums` has another size.
pub(super) fn add_products(kernel: Vbmi, lines: &[Line], per: usize, quads: &[Quad], sums: &mut [i32]) {
    assert_eq!(sums.len(), per * SLAB, "sums");
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(lines, per, quads, sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni")]
fn run(lines: &[Line], per: usize, quads: &[Quad], sums: &mut [i32]) {
    let tables = tables();
    let mut acc: alloc::vec::Vec<Sums> = alloc::vec![[[_mm512_setzero_si512(); 5]; QUAD]; per];
    for (i, quad) in quads.iter().enumerate() {
        for (ahead, fetch) in [(SOON, prefetch_line as fn(*const u8)), (LATER, prefetch_later)] {
            if let Some(quad) = quads.get(i + ahead) {
                for column in quad.columns {
                    let first = lines.as_ptr().wrapping_add(column as usize * per);
                    (0..per).for_each(|l| fetch(first.wrapping_add(l).cast()));
                }
            }
        }
        let q = word(&quad.q);
        let columns = quad.columns.map(|c| &lines[c as usize * per..][..per]);
        for (l, acc) in acc.iter_mut().enumerate() {
            let interleaved = interleave(columns.map(
                #[inline(always)]
                |c| load(&c[l]),
            ));
            for (x, acc) in interleaved.into_iter().zip(acc) {
                let trits = trits_vbmi(x, &tables);
                for k in 0..5 {
                    acc[k] = add_vnni(acc[k], trits[k], q);
                }
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums.as_chunks_mut::<SLAB>().0) {
        for (m, acc) in acc.iter().enumerate() {
            for (k, acc) in acc.iter().enumerate() {
                let mut lanes = [0i32; 16];
                // SAFETY: `lanes` is 16 int32.
                unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), *acc) };
                // Lane d of 128-bit part p has the row of byte 16 p + 4 m + d.
                for (p, lanes) in lanes.as_chunks::<LINES>().0.iter().enumerate() {
                    let row = 64 * k + 16 * p + 4 * m;
                    sums[row..row + LINES].iter_mut().zip(lanes).for_each(|(sum, lane)| *sum += lane);
                }
            }
        }
    }
}

/// Four lines byte by byte: 32-bit lane d of part p of vector m has byte `16 p + 4 m + d` of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleave(x: [__m512i; QUAD]) -> [__m512i; QUAD] {
    let (a, b) = (_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]));
    let (c, d) = (_mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3]));
    [_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)]
}
