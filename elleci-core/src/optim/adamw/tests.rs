use super::*;
use crate::config::ModelConfig;
use crate::optim::schedule::{Cooldown, Wsd};
use proptest::prelude::*;

/// Every kind of parameter, some above [`MIN_8BIT_ELEMS`], and one of these (10,032 values) with a partial last block.
fn layout() -> Arc<ParamLayout> {
    let config = ModelConfig {
        vocab_size: 80,
        d_model: 66,
        n_layers: 2,
        layer_pattern: "SA".into(),
        max_seq_len: 16,
        n_heads: 2,
        kv_rank: 16,
        d_nope: 8,
        d_rope: 8,
        d_v: 16,
        d_inner: 76,
        head_dim: 4,
        d_state: 16,
        ffn_hidden: 96,
        ..ModelConfig::preset("nano").unwrap()
    };
    config.validate().unwrap();
    ParamLayout::new(&config)
}

/// Numbers in [-1, 1) that depend on index and seed alone.
fn noise(i: usize, seed: u64) -> f32 {
    let mut x = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((x >> 40) as f32) / 8_388_608.0 - 1.0
}

fn filled(layout: &Arc<ParamLayout>, value: impl Fn(usize) -> f32) -> Params {
    let mut p = Params::zeros(layout.clone());
    p.data_mut().iter_mut().enumerate().for_each(|(i, p)| *p = value(i));
    p
}

#[test]
fn float32_states_follow_the_definition_in_f64() {
    let layout = layout();
    let cfg = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 0.1 };
    let (wd, scale, steps) = (0.5, 0.5f32, 20);
    let lr = |i: usize| if i.is_multiple_of(2) { 1e-2 } else { 4e-3 };
    let mut p = filled(&layout, |i| noise(i, 1));
    let mut opt = AdamW::new(layout.clone(), cfg, StatePrecision::F32);
    let mut want: Vec<[f64; 3]> = p.data().iter().map(|&p| [p as f64, 0.0, 0.0]).collect();
    for step in 1..=steps {
        // Magnitudes of 1 to 3 before the scale, either sign.
        let g = filled(&layout, |i| noise(i, step).signum() * (2.0 + noise(i, step + 100)));
        opt.step(&mut p, &g, &StepRates { lr_of: &|id| lr(id.0), weight_decay: wd, grad_scale: scale });
        for (index, param) in layout.params().iter().enumerate() {
            let decays = param.shape.len() == 2 && !param.name.contains("conv");
            for i in param.range.clone() {
                let (g, [p, m, v]) = (g.data()[i] as f64 * scale as f64, want[i]);
                let (m, v) = (cfg.beta1 * m + (1.0 - cfg.beta1) * g, cfg.beta2 * v + (1.0 - cfg.beta2) * g * g);
                let m_hat = m / (1.0 - cfg.beta1.powi(step as i32));
                let v_hat = v / (1.0 - cfg.beta2.powi(step as i32));
                let p = p * (1.0 - lr(index) * if decays { wd } else { 0.0 });
                want[i] = [p - lr(index) * m_hat / (v_hat.sqrt() + cfg.eps), m, v];
            }
        }
    }
    assert_eq!(opt.steps(), steps);
    // u = 2^-24, |g| in [0.5, 1.5]. Each step rounds m by at most 3 * 1.5u, so m-hat errs by 4.5u / (1 - beta1) = 45u, and v-hat
    // likewise by 3 * 2.25u / (1 - beta2) = 135u, half of which over v-hat >= 0.25 is 270u of the root; beta2 as f32 adds at most
    // 20u. With |m-hat| <= 1.5 and root + eps >= 0.6 the update errs by 45u / 0.6 + 2.5 * 290u + 3 roundings < 810u, times
    // the rate; the weight itself, below 2, by three roundings of 2u.
    let bound = steps as f64 * (810.0 * 1e-2 + 6.0) * 2f64.powi(-24);
    for (i, (&got, want)) in p.data().iter().zip(&want).enumerate() {
        assert!((got as f64 - want[0]).abs() <= bound, "{i}: {got} {}", want[0]);
    }
}

/// Trains towards a target on gradients with noise; returns the mean squared distance at start and end.
fn descend(precision: StatePrecision, steps: u64) -> (f64, f64) {
    let layout = layout();
    let target = filled(&layout, |i| noise(i, 3));
    let mut p = Params::zeros(layout.clone());
    // Curvatures over four decades, so that the values of a block differ as much.
    let curvature = filled(&layout, |i| libm::powf(10.0, 2.0 * noise(i, 4) - 2.0));
    let mut opt = AdamW::new(layout.clone(), AdamWConfig::default(), precision);
    let wsd = Wsd {
        peak: 2e-2,
        warmup_steps: steps / 20,
        total_steps: steps,
        cooldown_steps: steps / 2,
        cooldown: Cooldown::Linear,
    };
    let distance = |p: &Params| {
        let squares = p.data().iter().zip(target.data()).map(|(&p, &t)| ((p - t) as f64).powi(2));
        squares.sum::<f64>() / layout.len() as f64
    };
    let start = distance(&p);
    for step in 0..steps {
        let g =
            filled(&layout, |i| curvature.data()[i] * (p.data()[i] - target.data()[i] + 0.1 * noise(i, 1000 + step)));
        opt.step(&mut p, &g, &StepRates { lr_of: &|_| wsd.rate(step), weight_decay: 0.0, grad_scale: 1.0 });
    }
    (start, distance(&p))
}

#[test]
fn eight_bit_states_converge_nearly_as_float32_ones() {
    let (start, f32_end) = descend(StatePrecision::F32, 400);
    let (_, block8_end) = descend(StatePrecision::Block8, 400);
    assert!(f32_end < 1e-3 * start, "float32: {start} -> {f32_end}");
    // Not a rounding bound but the claim itself: what 8-bit states leave is of the size of what float32 ones leave.
    assert!(block8_end < 1.5 * f32_end, "float32 ends at {f32_end}, 8-bit at {block8_end}");
}

/// A tiny gradient beside a large one in its block: its second moment is below the smallest code, and must not become 0.
#[test]
fn a_tiny_gradient_beside_a_large_one_never_takes_a_huge_step() {
    let layout = layout();
    let up = layout.by_name("layers.0.ffn.up.weight").unwrap();
    let start = layout.param(up).range.start;
    let mut p = Params::zeros(layout.clone());
    let mut opt = AdamW::new(layout.clone(), AdamWConfig::default(), StatePrecision::Block8);
    let g = filled(&layout, |i| if i == start { 1.0 } else { 1e-4 });
    for _ in 0..50 {
        opt.step(&mut p, &g, &StepRates { lr_of: &|_| 1e-3, weight_decay: 0.0, grad_scale: 1.0 });
    }
    // AdamW's step is at most the rate for a constant gradient: 50 of them, with 1 % for the codes' rounding.
    let moved = p[up].iter().fold(0.0, |max: f32, p| max.max(p.abs()));
    assert!(moved <= 50.0 * 1e-3 * 1.01, "a weight moved by {moved}");
}

#[test]
fn small_tensors_embeddings_and_norms_keep_float32() {
    let layout = layout();
    let opt = AdamW::new(layout.clone(), AdamWConfig::default(), StatePrecision::Block8);
    let dtype = |name: &str| opt.tensors().into_iter().find(|t| t.name == name).map(|t| t.data.dtype());
    assert_eq!(dtype("layers.0.ffn.up.weight.m"), Some(StateType::U8));
    assert_eq!(dtype("layers.0.ffn.up.weight.v_absmax"), Some(StateType::F32));
    assert_eq!(dtype("layers.1.mla.kv_down.weight.m"), Some(StateType::F32), "1,584 values");
    assert_eq!(dtype("tok_emb.weight.m"), Some(StateType::F32), "5,280 values");
    assert_eq!(dtype("lm_head.weight.v"), Some(StateType::F32));
    assert_eq!(dtype("tok_emb.weight.m_absmax"), None);
    let held: usize = opt.tensors().iter().map(|t| t.data.bytes().len()).sum();
    assert_eq!(opt.bytes(), held);
}

#[test]
fn eight_bit_states_of_the_reference_model_save_at_least_65_percent() {
    let layout = ParamLayout::new(&ModelConfig::preset("elleci-1.5b").unwrap());
    let full = state_bytes(&layout, StatePrecision::F32);
    let small = state_bytes(&layout, StatePrecision::Block8);
    assert_eq!(full, 8 * 1_494_416_256);
    assert!((small as f64) < 0.35 * full as f64, "{small} of {full}");
}

fn run(opt: &mut AdamW, p: &mut Params, steps: core::ops::Range<u64>) {
    for step in steps {
        let g = filled(&opt.layout.clone(), |i| noise(i, step));
        opt.step(p, &g, &StepRates { lr_of: &|_| 1e-3, weight_decay: 0.1, grad_scale: 0.9 });
    }
}

#[test]
fn a_restored_optimiser_continues_to_the_bit() {
    for precision in [StatePrecision::F32, StatePrecision::Block8] {
        let layout = layout();
        let mut p = filled(&layout, |i| noise(i, 9));
        let mut opt = AdamW::new(layout.clone(), AdamWConfig::default(), precision);
        run(&mut opt, &mut p, 0..3);
        let mut resumed = AdamW::new(layout, AdamWConfig::default(), precision);
        let mut q = p.clone();
        let saved = opt.tensors();
        let bytes: Vec<_> = saved.iter().map(|t| t.data.bytes()).collect();
        let find = |name: &str| {
            let i = saved.iter().position(|t| t.name == name)?;
            Some((saved[i].data.dtype(), &saved[i].shape[..], &bytes[i][..]))
        };
        resumed.restore(opt.steps(), find).unwrap();
        assert_eq!(resumed.tensors(), saved);
        drop((saved, bytes));
        run(&mut opt, &mut p, 3..6);
        run(&mut resumed, &mut q, 3..6);
        assert_eq!(p.data(), q.data());
        assert_eq!((resumed.steps(), resumed.tensors()), (opt.steps(), opt.tensors()));
    }
}

#[test]
fn every_unsound_state_is_refused_and_changes_nothing() {
    let mut opt = AdamW::new(layout(), AdamWConfig::default(), StatePrecision::Block8);
    let up = "layers.0.ffn.up.weight";
    let name = |suffix: &str| format!("{up}.{suffix}");
    let norm = "final_norm.weight.v".to_string();
    let f32s = |n: usize, last: f32| -> Vec<u8> {
        (0..n).flat_map(|i| if i + 1 == n { last } else { 0.5 }.to_le_bytes()).collect()
    };
    for unknown in ["nothing", "final_norm.weight", "final_norm.weight.m_absmax", "x.y.m"] {
        assert_eq!(opt.load(unknown, StateType::F32, &[1], &[0; 4]), Err(StateError::Unknown(unknown.into())));
    }
    assert_eq!(
        opt.load(&name("m"), StateType::F32, &[96, 66], &f32s(6336, 0.0)),
        Err(StateError::Type { name: name("m"), expected: StateType::U8, found: StateType::F32 })
    );
    assert_eq!(
        opt.load(&name("m"), StateType::U8, &[66, 96], &[0; 6336]),
        Err(StateError::Shape { name: name("m"), expected: vec![96, 66], found: vec![66, 96] })
    );
    assert_eq!(
        opt.load(&norm, StateType::F32, &[66], &[0; 65 * 4]),
        Err(StateError::Bytes { name: norm.clone(), expected: 264, found: 260 })
    );
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        assert_eq!(opt.load(&norm, StateType::F32, &[66], &f32s(66, bad)), Err(StateError::Value(norm.clone())));
        let absmax = name("m_absmax");
        assert_eq!(opt.load(&absmax, StateType::F32, &[25], &f32s(25, bad)), Err(StateError::Value(absmax)));
    }
    let first = opt.tensors()[0].name.clone();
    assert_eq!(opt.restore(1, |_| None), Err(StateError::Missing(first)));
    let fresh = AdamW::new(layout(), AdamWConfig::default(), StatePrecision::Block8);
    assert_eq!((opt.tensors(), opt.steps()), (fresh.tensors(), 0));
    assert_eq!(opt.load("final_norm.weight.m", StateType::F32, &[66], &f32s(66, -1.0)), Ok(()));
}

#[test]
#[cfg(feature = "std")]
fn a_step_has_the_same_bits_on_any_number_of_threads() {
    for precision in [StatePrecision::F32, StatePrecision::Block8] {
        let layout = ParamLayout::new(&ModelConfig { n_layers: 1, ..ModelConfig::preset("nano").unwrap() });
        let end = |threads: Option<usize>| {
            let mut p = filled(&layout, |i| noise(i, 2));
            let mut opt = AdamW::new(layout.clone(), AdamWConfig::default(), precision);
            match threads {
                None => run(&mut opt, &mut p, 0..2),
                Some(n) => {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
                    pool.install(|| run(&mut opt, &mut p, 0..2));
                }
            }
            (p.data().to_vec(), opt)
        };
        let (p, opt) = end(None);
        for threads in [2, 3] {
            let (q, other) = end(Some(threads));
            assert_eq!(p, q);
            assert_eq!(opt.tensors(), other.tensors());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// The first step of AdamW is `-lr * sign(g)` whatever the size of g (far above eps), in both precisions: the states
    /// are quantised after they are used.
    #[test]
    fn the_first_step_is_the_rate(exponent in -4f32..4.0, lr in 1e-5f64..1e-1, seed: u64) {
        for precision in [StatePrecision::F32, StatePrecision::Block8] {
            let layout = layout();
            let g = filled(&layout, |i| libm::powf(10.0, exponent) * (1.5 + noise(i, seed)) * noise(i, !seed).signum());
            let mut p = Params::zeros(layout.clone());
            let mut opt = AdamW::new(layout, AdamWConfig::default(), precision);
            opt.step(&mut p, &g, &StepRates { lr_of: &|_| lr, weight_decay: 0.1, grad_scale: 1.0 });
            for (&p, &g) in p.data().iter().zip(g.data()) {
                // |g| >= 5e-5, so eps takes 1e-8 / 5e-5 = 2e-4 off the step at most; roundings are far below.
                prop_assert!((p as f64 / lr + g.signum() as f64).abs() <= 2.1e-4, "{} for {}", p as f64 / lr, g);
            }
        }
    }
}
