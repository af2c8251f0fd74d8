//! [`super::columns`] with VBMI and VNNI. The bytes of four columns are brought together, so that every 32-bit lane holds four
//! columns of five rows; from there on it is T5.
//!
//! A line takes two instructions to interleave and some fifteen for its trits and products, 9 to 10 cycles: ahead of the memory, which
//! takes 13 of one thread of two that read 35 GB/s.

use core::arch::x86_64::*;

use super::avx512::{
    LOWER, PLACES, UPPER, Vbmi, add_vnni, apart, indices_vbmi, load, store, store_sums, tables, token, trits_vbmi, word,
};
use super::columns::{PANELS, QUAD, Quad, SLAB};
use super::{LINES, Line};
use crate::simd::{prefetch_later, prefetch_line};

/// Tokens that meet the packed lines together at most.
pub(super) const GROUP: usize = 4;
/// Quads that meet a slab's sums while these are in registers.
const BLOCK: usize = 8;

/// A token's sums of a slab in the order of the lanes: `[4 quarters of the interleaved line][5 panels]`, 16 lanes each.
type Sums = [[__m512i; PANELS]; QUAD];

/// `Σ (code + 1) · q` of every row, added to `sums` `[tokens, rows]`, [`SLAB`] rows a line of a column; `q` is `[tokens, 4 quads]`.
///
/// # Panics
/// When a column lies outside of `lines`, `sums` or `q` has another size, or the tokens are not 1 to [`GROUP`].
pub(super) fn add_products(kernel: Vbmi, lines: &[Line], per: usize, quads: &[Quad], q: &[i8], sums: &mut [i32]) {
    let tokens = sums.len() / (per * SLAB);
    assert_eq!((q.len(), sums.len()), (tokens * quads.len() * QUAD, tokens * per * SLAB), "activations and sums");
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe {
        match tokens {
            1 => run::<1, 4>(lines, per, quads, q, sums),
            2 => run::<2, 2>(lines, per, quads, q, sums),
            3 => run::<3, 1>(lines, per, quads, q, sums),
            GROUP => run::<4, 1>(lines, per, quads, q, sums),
            _ => panic!("{tokens} tokens"),
        }
    }
}

/// `T` tokens, with `M` quarters of an interleaved line at a time: so that their sums stay in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn run<const T: usize, const M: usize>(lines: &[Line], per: usize, quads: &[Quad], q: &[i8], sums: &mut [i32]) {
    let tokens: [&[[i8; QUAD]]; T] = core::array::from_fn(|t| token(q, t, T).as_chunks().0);
    let mut all: alloc::vec::Vec<[Sums; T]> = alloc::vec![[[[_mm512_setzero_si512(); PANELS]; QUAD]; T]; per];
    let line = |column: u32, l: usize| lines.as_ptr().wrapping_add(column as usize * per + l).cast::<u8>();
    for quad in quads.iter().take(BLOCK) {
        quad.iter().for_each(|c| (0..per).for_each(|l| prefetch_later(line(*c, l))));
    }
    for (b, block) in quads.chunks(BLOCK).enumerate() {
        let q = tokens.map(
            #[inline(always)]
            |token| &token[b * BLOCK..][..block.len()],
        );
        let next = &quads[quads.len().min((b + 1) * BLOCK)..];
        for (l, sums) in all.iter_mut().enumerate() {
            let columns = Columns { lines, per, block, next };
            quarters::<T, M, 0>(&columns, l, &q, sums);
            if M < 4 {
                quarters::<T, M, 1>(&columns, l, &q, sums);
            }
            if M < 2 {
                quarters::<T, M, 2>(&columns, l, &q, sums);
                quarters::<T, M, 3>(&columns, l, &q, sums);
            }
        }
    }
    for (l, all) in all.iter().enumerate() {
        for (all, sums) in all.iter().zip(sums.chunks_exact_mut(per * SLAB)) {
            for k in 0..PANELS {
                let lanes = in_order([all[0][k], all[1][k], all[2][k], all[3][k]]);
                for j in 0..LINES {
                    let sums = &mut sums.as_chunks_mut::<16>().0[(l * PANELS + k) * LINES + j];
                    // SAFETY: `sums` is 16 int32.
                    let before = unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) };
                    let placed = _mm512_srav_epi32(lanes[j], _mm512_set1_epi32(PLACES[k].0 as i32));
                    store_sums(sums, _mm512_add_epi32(before, placed));
                }
            }
        }
    }
}

/// A block of quads, and those that follow.
struct Columns<'a> {
    lines: &'a [Line],
    per: usize,
    block: &'a [Quad],
    next: &'a [Quad],
}

/// Quarters `P M ..` of a block's lines of slab `l`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
fn quarters<const T: usize, const M: usize, const P: usize>(
    columns: &Columns,
    l: usize,
    q: &[&[[i8; QUAD]]; T],
    sums: &mut [Sums; T],
) {
    let Columns { lines, per, block, next } = *columns;
    let tables = placed_tables();
    let line = |column: u32, l: usize| lines.as_ptr().wrapping_add(column as usize * per + l).cast::<u8>();
    let mut acc = [[[_mm512_setzero_si512(); PANELS]; M]; T];
    for t in 0..T {
        for m in 0..M {
            acc[t][m] = sums[t][P * M + m];
        }
    }
    for (i, quad) in block.iter().enumerate() {
        if P == 0 {
            // The next slab's line of these columns, or the first of the next; and this slab's of the next.
            let (soon, at) = if l + 1 < per { (Some(quad), l + 1) } else { (next.get(i), 0) };
            if let Some(soon) = soon {
                soon.iter().for_each(|c| prefetch_line(line(*c, at)));
            }
            if let Some(later) = next.get(i) {
                later.iter().for_each(|c| prefetch_later(line(*c, l)));
            }
        }
        let [a, b, c, d] = quad.map(|c| &lines[c as usize * per + l]);
        let interleaved = interleave([load(a), load(b), load(c), load(d)]);
        for m in 0..M {
            let codes = placed_vbmi(interleaved[P * M + m], &tables);
            for k in 0..PANELS {
                for t in 0..T {
                    acc[t][m][k] = add_vnni(acc[t][m][k], codes[k], word(&q[t][i]));
                }
            }
        }
    }
    for t in 0..T {
        for m in 0..M {
            sums[t][P * M + m] = acc[t][m];
        }
    }
}

/// What [`placed_vbmi`] looks up in.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn placed_tables() -> [__m512i; 2] {
    [load(&UPPER), load(&LOWER)]
}

/// The five trits of every byte, at [`PLACES`]: two look-ups, as the second's index is part of what the first finds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn placed_vbmi(x: __m512i, [upper, lower]: &[__m512i; 2]) -> [__m512i; 5] {
    let [found, index, _] = indices_vbmi(x, *upper);
    let [t0, t1, t2] = apart(_mm512_permutexvar_epi8(index, *lower));
    let (t3, t4) = (_mm512_and_si512(found, _mm512_set1_epi8(3)), _mm512_and_si512(found, _mm512_set1_epi8(3 << 6)));
    [t0, t1, t2, t3, t4]
}

/// The code lines of columns in a slab, of all its panels: `codes` `[PANELS][quads][LINES]`.
///
/// # Panics
/// When a column lies outside of `lines`, or `codes` has another size.
pub(super) fn unpack(kernel: Vbmi, lines: &[Line], per: usize, slab: usize, quads: &[Quad], codes: &mut [Line]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn run(lines: &[Line], per: usize, slab: usize, quads: &[Quad], codes: &mut [Line]) {
        let (tables, panel) = (tables(), quads.len() * LINES);
        for (g, quad) in quads.iter().enumerate() {
            let packed = packed_lines(lines, per, slab, quad);
            for j in 0..LINES {
                let trits = trits_vbmi(packed[j], &tables);
                for k in 0..PANELS {
                    store(&mut codes[k * panel + g * LINES + j], trits[k]);
                }
            }
        }
    }
    assert_eq!(codes.len(), PANELS * quads.len() * LINES, "code lines");
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(lines, per, slab, quads, codes) }
}

/// The lines of a quad in a slab, byte by byte: byte `4 r + c` of vector j has rows `16 j + r` of the five panels, and column c.
///
/// # Panics
/// When a column lies outside of `lines`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn packed_lines(lines: &[Line], per: usize, slab: usize, quad: &Quad) -> [__m512i; LINES] {
    let [a, b, c, d] = quad.map(|c| &lines[c as usize * per + slab]);
    in_order(interleave([load(a), load(b), load(c), load(d)]))
}

/// Four lines byte by byte: 32-bit lane d of part p of vector m has byte `16 p + 4 m + d` of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleave(x: [__m512i; QUAD]) -> [__m512i; QUAD] {
    let (a, b) = (_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]));
    let (c, d) = (_mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3]));
    [_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)]
}

/// The lanes of [`interleave`] in the order of the rows: part p of vector m becomes part m of vector p.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn in_order(x: [__m512i; QUAD]) -> [__m512i; LINES] {
    let (a, b) = (_mm512_shuffle_i32x4::<0x44>(x[0], x[1]), _mm512_shuffle_i32x4::<0xee>(x[0], x[1]));
    let (c, d) = (_mm512_shuffle_i32x4::<0x44>(x[2], x[3]), _mm512_shuffle_i32x4::<0xee>(x[2], x[3]));
    [
        _mm512_shuffle_i32x4::<0x88>(a, c),
        _mm512_shuffle_i32x4::<0xdd>(a, c),
        _mm512_shuffle_i32x4::<0x88>(b, d),
        _mm512_shuffle_i32x4::<0xdd>(b, d),
    ]
}
