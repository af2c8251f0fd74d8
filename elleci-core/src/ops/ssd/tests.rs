use super::*;
use crate::ops::activation::exp;
use alloc::vec;
use proptest::prelude::*;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    // A multiplicative hash: values in [-1, 1), asymmetric.
    (0..n as u32)
        .map(|i| ((i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 8) as f32)
        .map(|v| v / (1 << 23) as f32 - 1.0)
        .collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

fn absolute(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| x.abs() as f64).collect()
}

/// One problem: inputs of a shape, dt log-uniform in [1e-3, 1e-1] times `pace`, a in [-16, -1].
struct Case {
    shape: SsdShape,
    xbc: Vec<f32>,
    dt: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
    dy: Vec<f32>,
}

struct Got {
    y: Vec<f32>,
    dxbc: Vec<f32>,
    ddt: Vec<f32>,
    da: Vec<f32>,
    dd: Vec<f32>,
}

impl Case {
    fn new(shape: SsdShape, pace: f32, seed: u32) -> Case {
        let dt = noise(shape.tokens() * shape.heads, seed ^ 1);
        Case {
            shape,
            xbc: noise(shape.tokens() * shape.width(), seed),
            dt: dt.iter().map(|v| pace * exp(2.3 * (v - 2.0))).collect(),
            a: noise(shape.heads, seed ^ 2).iter().map(|v| -8.5 + 7.5 * v).collect(),
            d: noise(shape.heads, seed ^ 3),
            dy: noise(shape.tokens() * shape.d_inner(), seed ^ 4),
        }
    }

    fn run(&self) -> Got {
        let Case { shape, xbc, dt, a, d, dy } = self;
        let mut scratch = SsdScratch::new();
        let mut y = vec![f32::NAN; dy.len()];
        let mut states = vec![f32::NAN; shape.states_len()];
        ssd_forward(*shape, xbc, dt, a, d, &mut y, &mut states, &mut scratch);
        let (mut dxbc, mut ddt) = (vec![f32::NAN; xbc.len()], vec![f32::NAN; dt.len()]);
        let (mut da, mut dd) = (vec![1.0; a.len()], vec![1.0; a.len()]);
        scratch.get(shape.backward_scratch_len()).fill(f32::NAN);
        ssd_backward(*shape, xbc, dt, a, d, &states, dy, &mut dxbc, &mut ddt, &mut da, &mut dd, &mut scratch);
        Got { y, dxbc, ddt, da, dd }
    }

    /// Relative error of one term, for `n` numbers added up to reach the result. A term is a product of decays and
    /// at most six operands. A chunk's decay is exp of a difference of running sums: each of up to CHUNK roundings of
    /// at most the chunk's largest |sum|, twice, plus 1.5 ulp (3 units); there is one for every chunk it spans. A
    /// sum of n terms in any order adds at most n units.
    fn units(&self, n: usize) -> f64 {
        let steps = CHUNK.min(self.shape.seq) as f64;
        let exponent = self.dt.iter().fold(0.0, |m: f32, v| m.max(*v)) as f64 * 16.0 * steps;
        let decay = 2.0 * (steps + 1.0) * exponent.min(87.0) + 3.0;
        (self.shape.chunks() as f64 * (decay + 2.0) + 8.0 + n as f64) * 2f64.powi(-24)
    }

    /// Holds the fast path against the reference: the error of a sum is at most `units` times the sum of the absolute
    /// values of its terms, which the reference computes from absolute inputs.
    fn check(&self) {
        let Case { shape, xbc, dt, a, d, dy } = self;
        let got = self.run();
        let (dt64, a64) = (wide(dt), wide(a));
        let sizes = reference::forward(*shape, &absolute(xbc), &dt64, &a64, &absolute(d));
        let want = reference::forward(*shape, &wide(xbc), &dt64, &a64, &wide(d));
        // Every product's inner length, once for each level: steps of the chunks, rows of the state.
        let terms = shape.seq + CHUNK + shape.d_state;
        close("y", &got.y, &want, &sizes, self.units(terms));

        let sizes = reference::backward(*shape, &absolute(xbc), &dt64, &a64, &absolute(d), &absolute(dy));
        let want = reference::backward(*shape, &wide(xbc), &dt64, &a64, &wide(d), &wide(dy));
        // dB and dC also add over all channels; the exponents' gradients over everything.
        let terms = terms + shape.d_inner() + shape.heads;
        close("dxbc", &got.dxbc, &want.dxbc, &sizes.dxbc, self.units(terms));
        let ddt_sizes: Vec<f64> =
            (0..dt.len()).map(|i| sizes.ddt[i] - 2.0 * a64[i % shape.heads] * sizes.dexponent[i]).collect();
        let terms = terms + 3 * shape.seq + shape.d_state;
        close("ddt", &got.ddt, &want.ddt, &ddt_sizes, self.units(terms));
        let plus_one = |x: &[f64]| x.iter().map(|v| v + 1.0).collect::<Vec<_>>();
        let terms = terms + shape.tokens();
        close("da", &got.da, &plus_one(&want.da), &plus_one(&sizes.da), self.units(terms));
        close("dd", &got.dd, &plus_one(&want.dd), &plus_one(&sizes.dd), self.units(terms));
    }
}

impl Case {
    /// Outputs, sequence by sequence, and what is kept after runs of the given lengths.
    fn steps(&self, lengths: &[usize]) -> (Vec<f32>, Vec<(Vec<f32>, Recent)>) {
        let shape = self.shape;
        let (width, heads, d_inner) = (shape.seq * shape.width(), shape.seq * shape.heads, shape.d_inner());
        let sequences = self.xbc.chunks(width).zip(self.dt.chunks(heads));
        let mut all = vec![f32::NAN; shape.tokens() * d_inner];
        let kept = sequences.zip(all.chunks_mut(shape.seq * d_inner)).map(|((xbc, dt), all)| {
            let mut state = vec![0.0; shape.state_len()];
            let mut recent = Recent::new(d_inner, shape.d_state).unwrap();
            let (mut start, mut room) = (0, Vec::new());
            for &seq in lengths {
                let run = SsdShape { batch: 1, seq, ..shape };
                let (xbc, dt) = (&xbc[start * shape.width()..], &dt[start * shape.heads..]);
                let (xbc, dt) = (&xbc[..seq * shape.width()], &dt[..seq * shape.heads]);
                let y = &mut all[start * d_inner..(start + seq) * d_inner];
                let mut passed = (vec![f32::NAN; y.len()], recent.clone());
                ssd_steps(
                    run,
                    xbc,
                    dt,
                    &self.a,
                    &self.d,
                    ScanState::Passed(&state),
                    &mut passed.1,
                    &mut passed.0,
                    &mut room,
                );
                let over = recent.is_over_within(seq);
                let before = state.clone();
                ssd_steps(run, xbc, dt, &self.a, &self.d, ScanState::Kept(&mut state), &mut recent, y, &mut room);
                assert_eq!(y, passed.0, "what becomes of the state");
                assert!(over || (before == state && recent == passed.1), "the state is written at the end of blocks");
                start += seq;
            }
            (state, recent)
        });
        let kept = kept.collect();
        (all, kept)
    }

    /// Holds single steps against the chunked form, and runs of the given lengths to the bit against single steps.
    fn check_steps(&self, cuts: &[&[usize]]) {
        let Case { shape, xbc, dt, a, d, .. } = self;
        let sizes = reference::forward(*shape, &absolute(xbc), &wide(dt), &wide(a), &absolute(d));
        let units = 2.0 * self.units(shape.seq + CHUNK + shape.d_state) + (shape.seq * 3) as f64 * 2f64.powi(-24);
        let steps = self.steps(&vec![1; shape.seq]);
        close("steps", &steps.0, &wide(&self.run().y), &sizes, units);
        for lengths in cuts {
            assert!(self.steps(lengths) == steps, "{lengths:?}");
        }
    }
}

#[track_caller]
fn close(name: &str, got: &[f32], want: &[f64], sizes: &[f64], units: f64) {
    for i in 0..want.len() {
        // Results below the normal range are flushed.
        let bound = units * sizes[i] + 1e-30;
        assert!((got[i] as f64 - want[i]).abs() <= bound, "{name}[{i}]: {} {}, bound {bound:e}", got[i], want[i]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn chunked_form_is_the_recurrence(
        batch in 1usize..3, seq in 1usize..200, heads in 1usize..6, head_dim in 1usize..20, d_state in 1usize..20,
        pace in prop::sample::select(vec![0.1f32, 1.0, 10.0]), seed: u32,
    ) {
        Case::new(SsdShape { batch, seq, heads, head_dim, d_state }, pace, seed).check();
    }

    #[test]
    fn steps_are_the_recurrence_and_however_many_at_once(
        batch in 1usize..3, first in 1usize..70, second in 1usize..40, heads in 1usize..4, head_dim in 1usize..20,
        d_state in 1usize..9, seed: u32,
    ) {
        let shape = SsdShape { batch, seq: first + second, heads, head_dim, d_state };
        Case::new(shape, 1.0, seed).check_steps(&[&[shape.seq], &[first, second], &[second, first]]);
    }
}

/// Shapes with several groups of heads and several tasks a sequence, the last of each smaller than the others.
#[test]
fn groups_and_tasks_of_uneven_size() {
    for (batch, heads, head_dim) in [(1, 37, 64), (9, 35, 48), (2, 9, 200), (1, 3, 600)] {
        let shape = SsdShape { batch, seq: 70, heads, head_dim, d_state: 5 };
        assert!(!shape.heads.is_multiple_of(shape.group_heads()) || shape.group_heads() == 1);
        let case = Case::new(shape, 1.0, 7);
        case.check();
        case.check_steps(&[&[70], &[1, 69], &[37, 33]]);
    }
}

/// A decay so fast that a step forgets everything: no infinity and no NaN may come out of L.
#[test]
fn total_forgetting() {
    let mut case = Case::new(SsdShape { batch: 1, seq: 130, heads: 2, head_dim: 3, d_state: 4 }, 1.0, 3);
    case.dt.iter_mut().for_each(|v| *v *= 1e4);
    let got = case.run();
    for v in [got.y, got.dxbc, got.ddt, got.da, got.dd].concat() {
        assert!(v.is_finite());
    }
}

#[test]
fn reference_gradients_are_finite_differences() {
    let shape = SsdShape { batch: 2, seq: 6, heads: 2, head_dim: 2, d_state: 3 };
    let case = Case::new(shape, 3.0, 11);
    let inputs = [wide(&case.xbc), wide(&case.dt), wide(&case.a), wide(&case.d)];
    let dy = wide(&case.dy);
    let loss = |p: &[Vec<f64>; 4]| -> f64 {
        reference::forward(shape, &p[0], &p[1], &p[2], &p[3]).iter().zip(&dy).map(|(y, d)| y * d).sum()
    };
    let g = reference::backward(shape, &inputs[0], &inputs[1], &inputs[2], &inputs[3], &dy);
    for (which, grad) in [&g.dxbc, &g.ddt, &g.da, &g.dd].into_iter().enumerate() {
        for i in 0..grad.len() {
            let at = |h: f64| {
                let mut p = inputs.clone();
                p[which][i] += h;
                loss(&p)
            };
            // Central differences: h^2/6 times the third derivative (at most |a|^3 = 4096 times a loss below 10 for
            // dt), 7e-7 at h = 1e-5; rounding 2^-52 * 10 / h = 2e-10.
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((numeric - grad[i]).abs() < 1e-6, "{which} {i}: {numeric} {}", grad[i]);
        }
    }
}

#[cfg(feature = "std")]
#[test]
fn same_bits_at_any_thread_count() {
    let case = Case::new(SsdShape { batch: 2, seq: 100, heads: 20, head_dim: 64, d_state: 16 }, 1.0, 5);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let got = case.run();
            [got.y, got.dxbc, got.ddt, got.da, got.dd]
        })
    };
    assert!(run(1) == run(3));
}
