//! AdamW, the norm and the running mean, against the core's own, to the bit.

use elleci_core::optim::blockwise8::{BLOCK, DynamicMap};
use elleci_core::optim::norm::clip_factor;
use elleci_cuda::arena::{Buf, Dtype};
use elleci_cuda::device::Device;
use elleci_cuda::ops::optim::{
    ADAM, Adam, ENTRY, MAPS, OUTCOME, Outcome, Scalars, Table, Tensor, TensorRates, blocks, maps, state_blocks,
};
use half::bf16;

use crate::machine::{Bench, Numbers, read, read_bytes};

const ADAM_STEP: Adam =
    Adam { rise1: 0.1, beta2: 0.95, rise2: 0.05, correction2: 0.3, eps: 1e-8, seed: 12345, clip: 1.0, weight: 8.0 };
const OUTCOME_OF_STEP: Outcome = Outcome { loss: 1.0, norm: 1.5, scale: 0.7, updated: true };
const RATES: TensorRates = TensorRates { keep: 0.999, step: 0.01 };

/// The update of `optim/adamw.rs`, in its order.
fn update(g: f32, p: f32, m: &mut f32, v: &mut f32) -> f32 {
    let k = ADAM_STEP;
    let g = OUTCOME_OF_STEP.scale * g;
    *m += k.rise1 * (g - *m);
    *v = k.beta2 * *v + k.rise2 * (g * g);
    p * RATES.keep - RATES.step * (*m / (v.sqrt() / k.correction2 + k.eps))
}

struct Case {
    tensor: Tensor,
    p: Vec<f32>,
    g: Vec<f32>,
}

fn case(bench: &mut Bench, numbers: &mut Numbers, len: usize, coded: bool, bf16_weights: bool) -> Case {
    let mut p = numbers.vec(len, 1.0);
    let g: Vec<f32> = numbers.vec(len, 1.0).iter().map(|v| v * v * v).collect();
    let weights = if bf16_weights {
        let halves: Vec<bf16> = p.iter().map(|v| bf16::from_f32(*v)).collect();
        p = halves.iter().map(|v| v.to_f32()).collect();
        bench.bytes(Dtype::Bf16, len, halves.iter().flat_map(|v| v.to_le_bytes()).collect())
    } else {
        bench.floats(&p)
    };
    let grads = bench.floats(&g);
    let zeros = |bench: &mut Bench, n: usize| bench.floats(&vec![0.0; n]);
    let (moments, absmax) = match coded {
        false => ((zeros(bench, len), zeros(bench, len)), None),
        true => {
            let zero = DynamicMap::signed().zero_code();
            let m = bench.bytes(Dtype::U8, len, vec![zero; len]);
            let v = bench.bytes(Dtype::U8, len, vec![0; len]);
            ((m, v), Some((zeros(bench, state_blocks(len)), zeros(bench, state_blocks(len)))))
        }
    };
    let mean = Some(zeros(bench, len));
    Case { tensor: Tensor { weights, grads, moments, absmax, mean }, p, g }
}

/// The buffers of the scalars, of a step with this outcome.
fn scalars(bench: &mut Bench, outcome: Outcome) -> Scalars {
    Scalars {
        adam: bench.bytes(Dtype::U8, ADAM, ADAM_STEP.bytes()),
        maps: bench.floats(&maps()),
        total: bench.bytes(Dtype::F64, 1, 20.0f64.to_le_bytes().to_vec()),
        outcome: bench.bytes(Dtype::F64, OUTCOME, outcome.bytes()),
    }
}

/// Three steps of float32 and of 8-bit states: weights, codes and absmax are the core's bits.
#[test]
fn three_steps_have_the_cores_bits() {
    let mut numbers = Numbers::new(20);
    let mut bench = Bench::new();
    let mut cases: Vec<Case> = [(5, false), (5000, true), (4096, false), (300, true)]
        .into_iter()
        .map(|(len, coded)| case(&mut bench, &mut numbers, len, coded, false))
        .collect();
    let table_buf = bench.empty(Dtype::U8, cases.len() * ENTRY);
    let scalars = scalars(&mut bench, OUTCOME_OF_STEP);
    assert_eq!(scalars.maps.len, MAPS);
    let squares = bench.empty(Dtype::F64, blocks(cases.iter().map(|c| c.p.len())));
    let norm = bench.empty(Dtype::F64, 1);
    let mut device = bench.start(47);
    let tensors: Vec<Tensor> = cases.iter().map(|c| c.tensor).collect();
    let mut table = Table::new(&tensors, table_buf, device.base());
    device.write(table_buf, table.with_rates(cases.iter().map(|_| RATES))).unwrap();

    table.squares(&mut device, squares, norm).unwrap();
    let got = f64::from_le_bytes(read_bytes(&mut device, norm).try_into().unwrap());
    let want: f64 = cases.iter().flat_map(|c| &c.g).map(|g| *g as f64 * *g as f64).sum();
    assert!((got - want).abs() <= 1e-12 * want);

    let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
    let mut states: Vec<(Vec<f32>, Vec<f32>)> =
        cases.iter().map(|c| (vec![0.0; c.p.len()], vec![0.0; c.p.len()])).collect();
    for step in 0..3 {
        table.update(&mut device, scalars).unwrap();
        for (case, (m, v)) in cases.iter_mut().zip(&mut states) {
            for i in 0..case.p.len() {
                case.p[i] = update(case.g[i], case.p[i], &mut m[i], &mut v[i]);
            }
            assert_eq!(read(&mut device, case.tensor.weights), case.p, "step {step}");
            assert!(read(&mut device, case.tensor.grads).iter().all(|g| *g == 0.0), "gradients are consumed");
            device.write(case.tensor.grads, &case.g.iter().flat_map(|g| g.to_le_bytes()).collect::<Vec<_>>()).unwrap();
            let Some((m_absmax, v_absmax)) = case.tensor.absmax else {
                assert_eq!(read(&mut device, case.tensor.moments.0), *m);
                assert_eq!(read(&mut device, case.tensor.moments.1), *v);
                continue;
            };
            for (map, x, codes, absmax) in
                [(&signed, m, case.tensor.moments.0, m_absmax), (&unsigned, v, case.tensor.moments.1, v_absmax)]
            {
                let mut want = vec![0; x.len()];
                let largest: Vec<f32> =
                    x.chunks(BLOCK).zip(want.chunks_mut(BLOCK)).map(|(x, c)| map.quantise(x, c)).collect();
                assert_eq!(read_bytes(&mut device, codes), want, "step {step}");
                assert_eq!(read(&mut device, absmax), largest);
                // What the next step starts from.
                for ((x, c), a) in x.chunks_mut(BLOCK).zip(want.chunks(BLOCK)).zip(&largest) {
                    map.dequantise(c, *a, x);
                }
            }
        }
    }
    table.average(&mut device, 1.0).unwrap();
    for case in &cases {
        assert_eq!(read(&mut device, case.tensor.mean.unwrap()), case.p);
    }
}

/// The end of a step: the core's clipping factor to the bit, and a step that is not finite changes nothing but the gradients.
#[test]
fn a_step_is_settled_on_the_device() {
    for (seed, squares, total) in
        [(1, 16.0f64, 20.0f64), (2, 0.25, 20.0), (3, 1.0, 20.0), (0, f64::NAN, 20.0), (5, 4.0, f64::NAN)]
    {
        let mut numbers = Numbers::new(22);
        let mut bench = Bench::new();
        let cases = [case(&mut bench, &mut numbers, 300, true, false), case(&mut bench, &mut numbers, 40, false, true)];
        let table_buf = bench.empty(Dtype::U8, cases.len() * ENTRY);
        let scalars = scalars(&mut bench, OUTCOME_OF_STEP);
        let sum = bench.bytes(Dtype::F64, 1, squares.to_le_bytes().to_vec());
        let mut device = bench.start(seed);
        device.write(scalars.total, &total.to_le_bytes()).unwrap();
        let tensors = [cases[0].tensor, cases[1].tensor];
        let mut table = Table::new(&tensors, table_buf, device.base());
        device.write(table_buf, table.with_rates(cases.iter().map(|_| RATES))).unwrap();
        let states = tensors.map(|t| [Some(t.weights), Some(t.moments.0), Some(t.moments.1), t.absmax.map(|a| a.0)]);
        let all = |device: &mut Box<dyn Device>| -> Vec<Vec<u8>> {
            states.iter().flatten().flatten().map(|b| read_bytes(device, *b)).collect()
        };
        let before = all(&mut device);

        table.settle(&mut device, sum, scalars).unwrap();
        table.update(&mut device, scalars).unwrap();
        let got = Outcome::read(read_bytes(&mut device, scalars.outcome).as_slice().try_into().unwrap());
        let finite = squares.is_finite() && total.is_finite();
        assert_eq!(got.updated, finite);
        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
        assert!(same(got.loss, total / ADAM_STEP.weight) && same(got.norm, squares.sqrt()), "{got:?}");
        if finite {
            assert_eq!(got.scale.to_bits(), clip_factor(squares.sqrt(), ADAM_STEP.clip).to_bits());
        }
        let changed = all(&mut device).iter().zip(&before).filter(|(a, b)| a != b).count();
        assert_eq!(changed, if finite { before.len() } else { 0 }, "of {}", before.len());
        for case in &cases {
            assert!(read(&mut device, case.tensor.grads).iter().all(|g| *g == 0.0));
        }
        assert_eq!(read_bytes(&mut device, scalars.total), [0; 8], "the next step's loss begins at 0");
    }
}

/// bf16 weights land on a neighbour of the exact result, and on the upper one as often as they should.
#[test]
fn stochastic_rounding_is_unbiased() {
    let mut numbers = Numbers::new(21);
    let mut bench = Bench::new();
    let mut case = case(&mut bench, &mut numbers, 20_000, false, true);
    let table_buf = bench.empty(Dtype::U8, ENTRY);
    let scalars = scalars(&mut bench, OUTCOME_OF_STEP);
    let mut device = bench.start(53);
    let mut table = Table::new(&[case.tensor], table_buf, device.base());
    device.write(table_buf, table.with_rates([RATES].into_iter())).unwrap();
    table.update(&mut device, scalars).unwrap();
    let got = bf16s(&mut device, case.tensor.weights);
    let (mut ups, mut expected, mut variance) = (0.0f64, 0.0, 0.0);
    for (i, got) in got.iter().enumerate() {
        let exact = update(case.g[i], case.p[i], &mut 0.0, &mut 0.0);
        case.p[i] = exact;
        let below = f32::from_bits(exact.to_bits() & 0xffff_0000); // towards zero
        let above = f32::from_bits(below.to_bits() + 0x1_0000);
        assert!(*got == below || *got == above, "{got} for {exact}");
        let share = (exact.to_bits() & 0xffff) as f64 / 65536.0;
        ups += (*got == above) as u32 as f64;
        expected += share;
        variance += share * (1.0 - share);
    }
    // Five standard deviations of a sum of independent draws.
    assert!((ups - expected).abs() < 5.0 * variance.sqrt(), "{ups} of {expected} +- {}", variance.sqrt());
}

fn bf16s(device: &mut dyn Device, buf: Buf) -> Vec<f32> {
    read_bytes(device, buf).as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
}
