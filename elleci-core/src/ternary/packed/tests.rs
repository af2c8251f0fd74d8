use proptest::prelude::*;

use super::*;
use crate::ternary::tests::{Lcg, definition, levels, matrix};

/// A matrix of the given codes, packed, and what it unpacks to.
fn packed(codes: &[i8], out: usize, input: usize, packing: Packing) -> (TernaryMatrix, Vec<Line>) {
    let m = matrix(codes, out, input);
    let lines = pack(&m, packing);
    (m, lines)
}

fn view<'a>(m: &TernaryMatrix, packing: Packing, lines: &'a [Line]) -> PackedTernary<'a> {
    PackedTernary::new(packing, m.out_dim(), m.in_dim(), m.gamma(), lines).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn round_trips_and_every_isa_gives_the_same_integers(
        tokens in 0usize..12,
        out in 1usize..150,
        input in prop_oneof![1usize..45, 238usize..262, 500usize..520],
        seed in any::<u64>(),
    ) {
        let mut rng = Lcg(seed);
        let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        let want = definition(&codes, &q, out, input);
        for packing in Packing::ALL {
            let (m, lines) = packed(&codes, out, input, packing);
            let view = view(&m, packing, &lines);
            let mut read = vec![2; out * input];
            for (panel, rows) in read.chunks_mut(ROWS * input).enumerate() {
                view.panel_codes(panel, rows);
            }
            prop_assert_eq!(&read, &codes, "{:?}", packing);
            for isa in levels() {
                let mut got = vec![i32::MIN; tokens * out];
                // Columns have kernels of their own for one token.
                let own = packing == Packing::C5 && tokens == 1 && isa != Isa::Avx512Vbmi;
                prop_assert_eq!(view.sums_with(isa, &q, tokens, &mut got), if own { Isa::Portable } else { isa });
                prop_assert!(got == want, "{:?} {:?}", packing, isa);
            }
        }
    }

    /// Bytes that no packer wrote: every ISA still agrees, nothing is read out of bounds.
    #[test]
    fn any_bytes_mean_the_same_everywhere(
        out in 1usize..130,
        input in 1usize..90,
        seed in any::<u64>(),
    ) {
        let mut rng = Lcg(seed);
        for packing in Packing::ALL {
            let lines: Vec<Line> = (0..packing.bytes(out, input).unwrap() / 64)
                .map(|_| Line([(); 64].map(|()| rng.next() as u8)))
                .collect();
            let view = PackedTernary::new(packing, out, input, 1.0, &lines).unwrap();
            let q: Vec<i8> = (0..9 * input).map(|_| rng.next() as i8).collect();
            for tokens in [1, 3, 9] {
                let mut want = vec![0; tokens * out];
                view.sums_with(Isa::Portable, &q[..tokens * input], tokens, &mut want);
                for isa in levels() {
                    let mut got = vec![i32::MIN; tokens * out];
                    view.sums_with(isa, &q[..tokens * input], tokens, &mut got);
                    prop_assert!(got == want, "{:?} {:?}", packing, isa);
                }
            }
        }
    }
}

/// What C5 leaves out changes nothing: columns that no token needs, or one of several alone, and all of them.
#[test]
fn zeros_among_the_activations_change_nothing() {
    let (out, input) = (333, 700);
    let mut rng = Lcg(5);
    let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
    for tokens in [1, 2, 3, 4, 5, 8, 9, 25, 33] {
        for share in [0, 1, 4] {
            let q = (0..tokens * input).map(|_| if rng.next() % 8 < share { rng.next() as i8 } else { 0 });
            let q: Vec<i8> = q.collect();
            let want = definition(&codes, &q, out, input);
            for packing in Packing::ALL {
                let (m, lines) = packed(&codes, out, input, packing);
                for isa in levels() {
                    for threads in [1, 3] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                        let mut got = vec![i32::MIN; tokens * out];
                        pool.install(|| view(&m, packing, &lines).sums_with(isa, &q, tokens, &mut got));
                        assert!(got == want, "{packing:?} {isa:?}, {tokens} tokens, {share} of 8, {threads} threads");
                    }
                }
            }
        }
    }
}

/// Nothing saturates or wraps, at the longest rows that a config allows.
#[test]
fn extremes_are_exact() {
    for input in [240, 256, 260, 8192, 65_536, 65_540, 132_104] {
        for (code, q) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
            for packing in Packing::ALL {
                let (m, lines) = packed(&vec![code; 2 * input], 2, input, packing);
                for tokens in [1, 7, 9] {
                    let q = vec![q; tokens * input];
                    for isa in levels() {
                        let mut got = vec![0; 2 * tokens];
                        view(&m, packing, &lines).sums_with(isa, &q, tokens, &mut got);
                        let want = vec![code as i32 * q[0] as i32 * input as i32; 2 * tokens];
                        assert!(got == want, "{packing:?} {isa:?} {input}");
                    }
                }
            }
        }
    }
}

/// The fifth trit of a byte stands highest while it is added up: of the longest columns that a config allows, too.
#[test]
fn extremes_of_the_highest_trit_are_exact() {
    let (out, input) = (4 * ROWS + 1, 132_104);
    for packing in [Packing::T5, Packing::C5] {
        let (m, lines) = packed(&vec![1; out * input], out, input, packing);
        for tokens in [1, 2] {
            for isa in levels() {
                let mut got = vec![0; tokens * out];
                view(&m, packing, &lines).sums_with(isa, &vec![-128; tokens * input], tokens, &mut got);
                assert!(got == vec![-128 * input as i32; tokens * out], "{packing:?} {isa:?} {tokens}");
            }
        }
    }
}

/// The code 3, which no packer writes, is three everywhere: 16-bit sums have room for it.
#[test]
fn bytes_that_mean_nothing_are_exact_too() {
    let (out, input) = (64, 1024);
    let lines = vec![Line([0xff; 64]); Packing::I2.bytes(out, input).unwrap() / 64];
    let view = PackedTernary::new(Packing::I2, out, input, 1.0, &lines).unwrap();
    for q in [127i8, -128] {
        for tokens in [1, 7, 9] {
            for isa in levels() {
                let mut got = vec![0; tokens * out];
                view.sums_with(isa, &vec![q; tokens * input], tokens, &mut got);
                // Σ (3 - 1) q
                assert_eq!(got, vec![2 * i32::from(q) * input as i32; tokens * out], "{isa:?}");
            }
        }
    }
}

#[test]
fn threads_change_nothing_and_training_computes_the_same() {
    let (out, input) = (1300, 400);
    let mut rng = Lcg(7);
    let w: Vec<f32> = (0..out * input).map(|_| rng.unit()).collect();
    let m = TernaryMatrix::from_weights(&w, out, input);
    for tokens in [1, 5, 9] {
        let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
        let scales: Vec<f32> = (0..tokens).map(|t| 0.01 + t as f32 * 1e-3).collect();
        let mut want = vec![0.0; tokens * out];
        m.forward(&q, &scales, tokens, &mut want);
        for packing in Packing::ALL {
            let lines = pack(&m, packing);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut y = vec![0.0; tokens * out];
                pool.install(|| view(&m, packing, &lines).forward(&q, &scales, &mut y));
                assert!(y == want, "{packing:?} {tokens} tokens, {threads} threads");
            }
        }
    }
}

/// The bytes of the specification, for a matrix of 2 rows and 5 columns.
#[test]
fn golden_bytes() {
    let codes = [1, 0, -1, 1, -1, /**/ 0, 0, 1, -1, 1];
    let (m, i2) = packed(&codes, 2, 5, Packing::I2);
    // Line 0: columns 0..4 of rows 0 and 1 in bits 0 and 1; line 1: column 4.
    assert_eq!(i2.len(), 2);
    assert_eq!(i2[0].0[..9], [2, 1, 0, 2, 1, 1, 2, 0, 0]);
    assert_eq!(i2[1].0[..9], [0, 0, 0, 0, 2, 0, 0, 0, 0]);
    let t5 = pack(&m, Packing::T5);
    // Four lines of 16 rows; byte 4 r + c has columns c, c + 4, ..: its second trit is column 4 where c is 0.
    assert_eq!(t5.len(), 4);
    assert_eq!(t5[0].0[..9], [2, 1, 0, 2, 1 + 3 * 2, 1, 2, 0, 0]);
    assert!(t5[1..].iter().all(|l| l.0 == [0; 64]));
    // Row 16 has its own line in T5, and bits 2 and 3 in I2.
    let mut codes = [-1; 17];
    codes[16] = 1;
    assert_eq!(packed(&codes, 17, 1, Packing::I2).1[0].0[0], 2 << 2);
    assert_eq!(packed(&codes, 17, 1, Packing::T5).1[1].0[0], 2);
    // C5: a line a column, byte b with rows b, 64 + b, ..
    let c5 = pack(&m, Packing::C5);
    let starts: Vec<[u8; 3]> = c5.iter().map(|line| [0, 1, 2].map(|b| line.0[b])).collect();
    assert_eq!(starts, [[2, 1, 0], [1, 1, 0], [0, 2, 0], [2, 0, 0], [0, 2, 0]]);
    let mut codes = [-1; 321];
    (codes[64], codes[320]) = (1, 1);
    let c5 = packed(&codes, 321, 1, Packing::C5).1;
    assert_eq!((c5.len(), c5[0].0[0], c5[1].0[0]), (2, 3 * 2, 2));
}

#[test]
fn a_wrong_length_is_refused() {
    let lines = [Line([0; 64]); 3];
    for packing in Packing::ALL {
        assert!(PackedTernary::new(packing, 64, 20, 1.0, &lines).is_none());
    }
    assert!(PackedTernary::new(Packing::I2, 64, 12, 1.0, &lines).is_some());
    assert_eq!(Packing::I2.bytes(usize::MAX, usize::MAX), None);
}

/// Products by look-up, whether or not they are faster here.
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod tables {
    use super::super::avx512::Vbmi;
    use super::super::{Finish, sum, tables_avx512};
    use super::*;

    const LOOKED_UP: [Packing; 2] = [Packing::T5, Packing::C5];

    /// As [`PackedTernary::sums_with`].
    fn sums(kernel: Vbmi, view: &PackedTernary, q: &[i8], tokens: usize) -> Vec<i32> {
        let mut out = vec![i32::MIN; tokens * view.out_dim()];
        let finish = |_: usize, biased: &[i32], offset: i32, out: &mut [i32]| {
            out.iter_mut().zip(biased).for_each(|(out, sum)| *out = sum - offset);
        };
        let finish = Finish { finish, offsets: q.chunks_exact(view.in_dim()).map(sum).collect() };
        tables_avx512::product(kernel, view, q, &mut out, &finish);
        out
    }

    fn kernel() -> Option<Vbmi> {
        levels().any(|isa| isa == Isa::Avx512Vbmi).then(Vbmi::detect).flatten()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn give_the_same_integers(
            tokens in prop_oneof![1usize..6, 127usize..132],
            out in prop_oneof![1usize..200, 300usize..400],
            // Less than a run, one part and a little more, several.
            input in prop_oneof![1usize..45, 300usize..345, 620usize..660],
            seed in any::<u64>(),
        ) {
            let Some(kernel) = kernel() else { return Ok(()) };
            let mut rng = Lcg(seed);
            let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
            let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
            let want = definition(&codes, &q, out, input);
            for packing in LOOKED_UP {
                let (m, lines) = packed(&codes, out, input, packing);
                prop_assert!(sums(kernel, &view(&m, packing, &lines), &q, tokens) == want, "{:?}", packing);
            }
        }

        #[test]
        fn any_bytes_mean_the_same(out in 1usize..130, input in 1usize..90, seed in any::<u64>()) {
            let Some(kernel) = kernel() else { return Ok(()) };
            let mut rng = Lcg(seed);
            for packing in LOOKED_UP {
                let lines: Vec<Line> = (0..packing.bytes(out, input).unwrap() / 64)
                    .map(|_| Line([(); 64].map(|()| rng.next() as u8)))
                    .collect();
                let view = PackedTernary::new(packing, out, input, 1.0, &lines).unwrap();
                let q: Vec<i8> = (0..3 * input).map(|_| rng.next() as i8).collect();
                let mut want = vec![0; 3 * out];
                view.sums_with(Isa::Portable, &q, 3, &mut want);
                prop_assert!(sums(kernel, &view, &q, 3) == want, "{:?}", packing);
            }
        }
    }

    /// Threads deal tokens and bands of panels among themselves, evenly or not.
    #[test]
    fn threads_change_nothing() {
        let Some(kernel) = kernel() else { return };
        // Two parts, and bands that begin within a slab.
        let (out, input) = (64 * 33 + 5, 345);
        let mut rng = Lcg(3);
        let codes: Vec<i8> = (0..out * input).map(|_| (rng.next() % 3) as i8 - 1).collect();
        for tokens in [1, 33, 129, 300] {
            let q: Vec<i8> = (0..tokens * input).map(|_| rng.next() as i8).collect();
            let want = definition(&codes, &q, out, input);
            for packing in LOOKED_UP {
                let (m, lines) = packed(&codes, out, input, packing);
                for threads in [1, 2, 3, 7] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let got = pool.install(|| sums(kernel, &view(&m, packing, &lines), &q, tokens));
                    assert!(got == want, "{packing:?}, {tokens} tokens on {threads} threads");
                }
            }
        }
    }

    #[test]
    fn few_parts_keep_all_threads_at_work() {
        let cuts = |cases: [(usize, usize, usize); 3]| cases.map(|(t, p, n)| tables_avx512::cut(t, p, n));
        assert_eq!(cuts([(128, 32, 1), (300, 32, 1), (64, 8, 2)]), [Some((1, 1)), Some((3, 1)), Some((2, 1))]);
        assert_eq!(cuts([(128, 88, 2), (256, 88, 2), (300, 88, 2)]), [Some((1, 2)), Some((2, 1)), Some((3, 2))]);
        assert_eq!(cuts([(128, 88, 8), (128, 32, 16), (32, 16, 2)]), [Some((2, 4)), None, None]);
    }

    #[test]
    fn extremes_are_exact() {
        let Some(kernel) = kernel() else { return };
        for input in [319, 320, 321, 5632, 65_540] {
            for (code, value) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
                for packing in LOOKED_UP {
                    let (m, lines) = packed(&vec![code; 2 * input], 2, input, packing);
                    let got = sums(kernel, &view(&m, packing, &lines), &vec![value; 3 * input], 3);
                    let want = vec![i32::from(code) * i32::from(value) * input as i32; 6];
                    assert!(got == want, "{packing:?} {input} {code} {value}");
                }
            }
        }
    }
}
