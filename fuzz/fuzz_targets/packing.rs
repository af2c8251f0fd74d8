//! Packed matrices of any shape and any bytes: every instruction set gives the integers of the portable kernel, and nothing is read
//! out of bounds.
#![no_main]

use elleci_core::simd::Isa;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [rows, cols, tokens, kind, rest @ ..] = data else { return };
    let (rows, cols, tokens) = (*rows as usize + 1, *cols as usize * 2 + 1, *tokens as usize % 8 + 1);
    let packing = Packing::ALL[*kind as usize % Packing::ALL.len()];
    let byte = |i: usize| rest.get(i % rest.len().max(1)).copied().unwrap_or(0) ^ (i / 64 * 31) as u8;
    let count = packing.bytes(rows, cols).expect("small") / 64;
    let lines: Vec<Line> = (0..count).map(|l| Line(core::array::from_fn(|b| byte(64 * l + b)))).collect();
    let matrix = PackedTernary::new(packing, rows, cols, 1.0, &lines).expect("as many lines as the shape needs");
    let q: Vec<i8> = (0..tokens * cols).map(|i| byte(i * 7 + 3) as i8).collect();
    let mut want = vec![0; tokens * rows];
    matrix.sums_with(Isa::Portable, &q, tokens, &mut want);
    for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine()) {
        let mut got = vec![0; tokens * rows];
        matrix.sums_with(isa, &q, tokens, &mut got);
        assert_eq!(got, want, "{isa:?}");
    }
});
