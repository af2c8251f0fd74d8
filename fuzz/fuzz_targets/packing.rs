//! Packed matrices of any shape and any bytes: every instruction set gives the integers that the codes give one by one, and nothing
//! is read out of bounds.
#![no_main]

use elleci_core::simd::Isa;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing};
use libfuzzer_sys::fuzz_target;

/// Multiply-adds of an input at most, counted with the rows that fill up panels: what keeps an input to a fraction of a millisecond.
/// Few rows and tokens leave room for long rows, and the other way round.
const PRODUCTS: usize = 1 << 14;
/// Rows at most: past two slabs of the packing by columns (320 rows), the largest unit that a packing has.
const ROWS: usize = 645;

fuzz_target!(|data: &[u8]| {
    let [kind, tokens, rows_low, rows_high, cols_low, cols_high, stride, rest @ ..] = data else { return };
    let packing = Packing::ALL[*kind as usize % Packing::ALL.len()];
    // More than meet packed panels together (eight), which are met by unpacked ones as five and four.
    let tokens = *tokens as usize % 9 + 1;
    let rows = u16::from_le_bytes([*rows_low, *rows_high]) as usize % ROWS + 1;
    let most = (PRODUCTS / (rows.next_multiple_of(64) * tokens)).max(1);
    let cols = u16::from_le_bytes([*cols_low, *cols_high]) as usize % most + 1;

    let rest = if rest.is_empty() { &[0] } else { rest };
    // Every line another one, unless the stride is 0: then one byte makes the extremes, all weights or activations the same.
    let mut bytes = rest.iter().cycle();
    let mut line =
        |l: usize| Line(core::array::from_fn(|_| bytes.next().expect("endless") ^ (l as u8).wrapping_mul(*stride)));
    let count = packing.bytes(rows, cols).expect("small") / size_of::<Line>();
    let lines: Vec<Line> = (0..count).map(&mut line).collect();
    let q: Vec<i8> = rest.iter().rev().cycle().take(tokens * cols).map(|b| *b as i8).collect();
    let matrix = PackedTernary::new(packing, rows, cols, 1.0, &lines).expect("as many lines as the shape needs");

    let mut want = vec![0; tokens * rows];
    let mut codes = vec![0; 64 * cols];
    for panel in 0..rows.div_ceil(64) {
        matrix.panel_codes(panel, &mut codes);
        for (row, codes) in (64 * panel..rows).zip(codes.chunks_exact(cols)) {
            for (token, q) in q.chunks_exact(cols).enumerate() {
                want[token * rows + row] = codes.iter().zip(q).map(|(w, q)| *w as i32 * *q as i32).sum();
            }
        }
    }
    for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine()) {
        let mut got = vec![0; tokens * rows];
        matrix.sums_with(isa, &q, tokens, &mut got);
        assert_eq!(got, want, "{isa:?}");
    }
});
