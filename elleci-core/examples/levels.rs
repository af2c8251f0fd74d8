//! Holds the kernels of every instruction-set level that this machine has against the definition, on the calling thread alone: for
//! emulators on which threads, and with them Rust's test harness, do not run. Where they do, the tests say more.

use elleci_core::simd::Isa;
use elleci_core::ternary::TernaryMatrix;
use elleci_core::ternary::packed::{PackedTernary, Packing, pack};

/// Tokens, output rows, input columns: panels, runs, blocks of tokens and what is left over of each.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (1, 130, 257),
    (2, 64, 240),
    (5, 70, 519),
    (7, 65, 1300),
    (13, 150, 44),
    (1, 320, 2048),
    (6, 2, 8192),
    (1, 2, 132_104),
];

/// Knuth's MMIX generator.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }
}

/// `W₃ · q` straight from the codes.
fn definition(codes: &[i8], q: &[i8], input: usize) -> Vec<i32> {
    let dot = |a: &[i8], b: &[i8]| a.iter().zip(b).map(|(a, b)| *a as i32 * *b as i32).sum();
    q.chunks(input).flat_map(|q| codes.chunks(input).map(move |w| dot(w, q))).collect()
}

/// The number of products of these codes that were compared; panics at one that differs.
fn check(codes: &[i8], q: &[i8], (tokens, out, input): (usize, usize, usize)) -> usize {
    // Their mean magnitude is γ, and 1 > γ/2 always.
    let weights: Vec<f32> = codes.iter().map(|c| *c as f32).collect();
    let matrix = TernaryMatrix::from_weights(&weights, out, input);
    let want = definition(codes, q, input);
    let mut compared = 0;
    for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::machine()) {
        let mut got = vec![i32::MIN; tokens * out];
        assert_eq!(matrix.sums_with(isa, q, tokens, &mut got), isa, "the level asked for runs");
        assert!(got == want, "{} {tokens} x {out} x {input}", isa.name());
        compared += 1;
        for packing in Packing::ALL {
            let lines = pack(&matrix, packing);
            let view = PackedTernary::new(packing, out, input, matrix.gamma(), &lines).expect("its own size");
            got.fill(i32::MIN);
            view.sums_with(isa, q, tokens, &mut got);
            assert!(got == want, "{} {} {tokens} x {out} x {input}", isa.name(), packing.name());
            compared += 1;
        }
    }
    compared
}

fn main() {
    let mut rng = Lcg(1);
    let mut compared = 0;
    for shape @ (tokens, out, input) in SHAPES {
        let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        compared += check(&codes, &q, shape);
        // Extremes: 16-bit sums must not overflow.
        for (code, q) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
            compared += check(&vec![code; out * input], &vec![q; tokens * input], shape);
        }
    }
    if let Ok(name) = std::env::var("ELLECI_ISA") {
        assert_eq!(Isa::detect().name(), name, "ELLECI_ISA asks for {name}, which this machine does not run");
    }
    println!("{compared} products up to {}: all are the definition", Isa::machine().name());
}
