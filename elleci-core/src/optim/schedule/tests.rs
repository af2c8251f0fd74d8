use super::*;
use crate::config::ModelConfig;
use alloc::vec;

/// Hand-computed numbers are given to 12 digits.
fn assert_close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-12 * want.abs().max(1e-3), "{what}: {got}, by hand {want}");
}

fn reference_run(cooldown: Cooldown) -> Wsd {
    Wsd { peak: 1.5e-3, warmup_steps: 2500, total_steps: 50_000, cooldown_steps: 10_000, cooldown }
}

#[test]
fn wsd_at_every_boundary_of_the_reference_run() {
    use Cooldown::*;
    for (cooldown, table) in [
        // A quarter into the cooldown: 1 - sqrt(1/4) = 1/2. Its last step: 1 - sqrt(0.9999) = 5.000125006e-5.
        (OneMinusSqrt, [(42_500, 7.5e-4), (46_400, 3e-4), (49_999, 1.5e-3 * 5.000_125_006_250_391e-5)]),
        (Linear, [(42_500, 1.125e-3), (46_400, 5.4e-4), (49_999, 1.5e-7)]),
        // (1 + cos 45 deg)/2 = 0.853553390593; (1 + cos 90 deg)/2; (1 - cos 0.018 deg)/2 = 2.467401081e-8.
        (Cosine, [(42_500, 1.5e-3 * 0.853_553_390_593_274), (45_000, 7.5e-4), (49_999, 1.5e-3 * 2.467_401_08e-8)]),
    ] {
        let wsd = reference_run(cooldown);
        assert_eq!(wsd.validate(), Ok(()));
        let common = [(0, 6e-7), (1, 1.2e-6), (1249, 7.5e-4), (2498, 1.4994e-3), (2499, 1.5e-3), (2500, 1.5e-3)];
        let stable = [(39_999, 1.5e-3), (40_000, 1.5e-3), (50_000, 0.0), (60_000, 0.0)];
        for (step, rate) in common.into_iter().chain(stable).chain(table) {
            assert_close(wsd.rate(step), rate, &alloc::format!("{cooldown:?} at {step}"));
        }
        for (step, decay) in [(0, 0.1), (39_999, 0.1), (40_000, 0.0), (49_999, 0.0)] {
            assert_eq!(wsd.weight_decay(step, 0.1), decay, "decay at {step}");
        }
    }
}

#[test]
fn wsd_without_warmup_or_cooldown_and_with_nothing_between() {
    let flat = Wsd { warmup_steps: 0, cooldown_steps: 0, total_steps: 3, ..reference_run(Cooldown::Linear) };
    assert_eq!([0, 1, 2, 3].map(|s| flat.rate(s)), [1.5e-3, 1.5e-3, 1.5e-3, 0.0]);
    assert_eq!(flat.weight_decay(2, 0.1), 0.1);
    let full = Wsd { peak: 1.0, warmup_steps: 2, cooldown_steps: 2, total_steps: 4, cooldown: Cooldown::Linear };
    assert_eq!([0, 1, 2, 3, 4].map(|s| full.rate(s)), [0.5, 1.0, 1.0, 0.5, 0.0]);
    assert!(Wsd { total_steps: 3, ..full }.validate().is_err());
    assert!(Wsd { peak: f64::NAN, ..full }.validate().is_err());
    assert!(Wsd { peak: 0.0, ..full }.validate().is_err());
}

#[test]
fn lerac_grows_from_a_geometric_floor_to_one() {
    let grow = Lerac::Grow { floor: 1e-4, until_step: 100 };
    // rho_l = 1e-4^(l/4) of 5 layers: 1, 1e-1, 1e-2, 1e-3, 1e-4; half way its square root.
    for (step, layer, want) in [
        (0, 0, 1.0),
        (0, 1, 1e-1),
        (0, 2, 1e-2),
        (0, 4, 1e-4),
        (50, 0, 1.0),
        (50, 2, 1e-1),
        (50, 4, 1e-2),
        (75, 4, 1e-1),
        (99, 4, 0.912_010_839_355_909_7),
        (100, 4, 1.0),
        (101, 2, 1.0),
    ] {
        assert_close(grow.multiplier(step, layer, 5), want, &alloc::format!("step {step} layer {layer}"));
    }
    assert_eq!(grow.multiplier(0, 0, 1), 1.0);
    assert_eq!(Lerac::Off.multiplier(0, 3, 4), 1.0);
    let fixed = Lerac::Static { ratio: 2.0 };
    for (layer, want) in [(0, 2.0), (1, 1.75), (3, 1.25), (4, 1.0)] {
        assert_close(fixed.multiplier(7, layer, 5), want, "static");
    }
    assert_eq!(fixed.multiplier(0, 0, 1), 1.0);
    for bad in [Lerac::Grow { floor: 0.0, until_step: 1 }, Lerac::Grow { floor: 1.1, until_step: 1 }] {
        assert!(bad.validate().is_err());
    }
    assert!(Lerac::Static { ratio: -1.0 }.validate().is_err());
    assert_eq!(grow.validate(), Ok(()));
}

#[test]
fn embedding_is_rated_as_the_first_layer_and_the_head_as_the_last() {
    let layout = ParamLayout::new(&ModelConfig::preset("nano").unwrap());
    let depth = |name: &str| depth_of(&layout, layout.by_name(name).unwrap());
    assert_eq!(
        ["tok_emb.weight", "layers.2.ffn.up.weight", "final_norm.weight", "lm_head.weight"].map(depth),
        [0, 2, 3, 3]
    );
    let tied = ParamLayout::new(&ModelConfig { tie_embeddings: true, ..ModelConfig::preset("nano").unwrap() });
    assert_eq!(depth_of(&tied, tied.lm_head()), 0);
}

fn curriculum(tokens_per_step: Option<usize>) -> SequenceCurriculum {
    SequenceCurriculum {
        stages: vec![(0.3, 256), (0.7, 512), (1.0, 1024)],
        batch: 16,
        accumulation: 4,
        tokens_per_step,
    }
}

#[test]
fn sequence_lengths_change_at_their_fractions() {
    let c = curriculum(None);
    assert_eq!(c.validate(), Ok(()));
    for (step, seq_len) in
        [(0, 256), (14_999, 256), (15_000, 512), (34_999, 512), (35_000, 1024), (49_999, 1024), (50_000, 1024)]
    {
        let shape = c.shape(step, 50_000);
        assert_eq!(shape, StepShape { seq_len, sequences: 64, micro_batches: 4 }, "step {step}");
        assert_eq!((0..4).map(|i| shape.rows(i)).collect::<Vec<_>>(), [16; 4]);
    }
}

#[test]
fn constant_tokens_change_the_number_of_sequences_and_not_the_memory_of_a_micro_batch() {
    let c = curriculum(Some(65_536));
    assert_eq!(c.validate(), Ok(()));
    // 16 * 1024 tokens a micro-batch: 64, 32, 16 sequences of 256, 512, 1024; 4 micro-batches always.
    for (step, seq_len, sequences) in [(0, 256, 256), (15_000, 512, 128), (35_000, 1024, 64)] {
        let shape = c.shape(step, 50_000);
        assert_eq!(shape, StepShape { seq_len, sequences, micro_batches: 4 });
        assert_eq!(shape.tokens(), 65_536);
    }
    // 5 sequences of 1024 by at most 2 a micro-batch: 2 + 2 + 1; 10 of 512 by at most 4: 4 + 3 + 3.
    let odd = SequenceCurriculum { batch: 2, tokens_per_step: Some(5120), ..curriculum(None) };
    for (step, rows) in [(90, [2, 2, 1]), (30, [4, 3, 3])] {
        let shape = odd.shape(step, 100);
        assert_eq!((0..shape.micro_batches).map(|i| shape.rows(i)).collect::<Vec<_>>(), rows);
    }
}

#[test]
fn phases_change_at_their_fraction() {
    let phases = Phases { stages: vec![(0.9, vec![0.55, 0.35, 0.10]), (1.0, vec![0.20, 0.25, 0.55])] };
    assert_eq!(phases.validate(3), Ok(()));
    for (step, phase) in [(0, 0), (44_999, 0), (45_000, 1), (49_999, 1), (99_999, 1)] {
        assert_eq!(phases.index(step, 50_000), phase, "step {step}");
    }
    assert_eq!(phases.weights(45_000, 50_000), [0.20, 0.25, 0.55]);
    assert!(phases.validate(2).is_err());
    let with = |stages| Phases { stages }.validate(1).is_err();
    assert!(with(vec![]));
    assert!(with(vec![(0.9, vec![1.0])]), "does not end at 1");
    assert!(with(vec![(0.9, vec![1.0]), (0.9, vec![1.0]), (1.0, vec![1.0])]), "does not ascend");
    assert!(with(vec![(1.0, vec![0.0])]));
    assert!(with(vec![(1.0, vec![-1.0])]));
    assert!(with(vec![(f64::NAN, vec![1.0])]));
}

#[test]
fn curricula_that_cannot_run_are_refused() {
    assert!(curriculum(Some(65_537)).validate().is_err());
    assert!(SequenceCurriculum { batch: 0, ..curriculum(None) }.validate().is_err());
    assert!(SequenceCurriculum { stages: vec![(1.0, 0)], ..curriculum(None) }.validate().is_err());
    assert!(SequenceCurriculum { stages: vec![], ..curriculum(None) }.validate().is_err());
}
