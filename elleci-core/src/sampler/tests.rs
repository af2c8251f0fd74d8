use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;

/// No filter, no penalty, temperature 1.
fn plain() -> SamplerOptions {
    SamplerOptions {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        repetition_window: 64,
        seed: 1,
    }
}

/// The definition: the tokens that may be drawn and their probabilities, likeliest first, by sorting everything. With
/// them the smallest relative distance by which any comparison was decided.
fn reference(logits: &[f32], history: &[u32], o: &SamplerOptions) -> (Vec<(u32, f64)>, f64) {
    let mut logits = logits.to_vec();
    let window = history.len().saturating_sub(o.repetition_window as usize);
    let mut recent = history[window..].to_vec();
    recent.sort_unstable();
    recent.dedup();
    for t in recent {
        if let Some(l) = logits.get_mut(t as usize) {
            *l = if *l > 0.0 { *l / o.repetition_penalty } else { *l * o.repetition_penalty };
        }
    }
    let finite = (0..logits.len()).filter(|&i| logits[i].is_finite());
    let mut kept: Vec<(u32, f64)> = finite.map(|i| (i as u32, f64::from(logits[i]))).collect();
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    if o.top_k > 0 {
        kept.truncate(o.top_k as usize);
    }
    let max = kept[0].1;
    let mut margin = f64::INFINITY;
    let masses: Vec<f64> = kept.iter().map(|c| libm::exp(c.1 - max)).collect();
    let total: f64 = masses.iter().sum();
    if o.top_p < 1.0 {
        let (mut cumulative, mut n) = (0.0, kept.len());
        for (i, m) in masses.iter().enumerate() {
            cumulative += m;
            margin = margin.min((cumulative / total / f64::from(o.top_p) - 1.0).abs());
            if cumulative >= f64::from(o.top_p) * total {
                n = i + 1;
                break;
            }
        }
        kept.truncate(n);
    }
    if o.min_p > 0.0 {
        for m in &masses {
            margin = margin.min((m / f64::from(o.min_p) - 1.0).abs());
        }
        kept.retain(|c| libm::exp(c.1 - max) >= f64::from(o.min_p));
    }
    let scale = |l: f64| libm::exp((l - max) / f64::from(o.temperature));
    let sum: f64 = kept.iter().map(|c| scale(c.1)).sum();
    (kept.into_iter().map(|(t, l)| (t, scale(l) / sum)).collect(), margin)
}

/// The tokens that a sampler draws from, by id.
fn drawn_from(logits: &[f32], history: &[u32], o: &SamplerOptions) -> Vec<u32> {
    let mut sampler = Sampler::new(*o).unwrap();
    sampler.sample(&mut logits.to_vec(), history).unwrap();
    let mut tokens: Vec<u32> = sampler.candidates.iter().map(|c| c.token).collect();
    tokens.sort_unstable();
    tokens
}

/// Logits on a coarse grid, so that many are equal; a few that are not finite.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        20 => (-60i32..60).prop_map(|i| i as f32 / 8.0),
        5 => -7.0f32..7.0,
        1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]),
    ];
    prop::collection::vec(logit, 1..700)
}

fn options() -> impl Strategy<Value = SamplerOptions> {
    let off_or = |off: f32, on: core::ops::Range<f32>| prop_oneof![Just(off), on];
    let top_k = prop_oneof![Just(0u32), 1u32..9, 1u32..800];
    (0.05f32..3.0, top_k, off_or(1.0, 0.01..1.0), off_or(0.0, 0.001..1.0), 0.5f32..2.0, 0u32..40).prop_map(
        |(temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)| SamplerOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            repetition_window,
            seed: 7,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// All filters together leave exactly the tokens of the definition.
    #[test]
    fn the_filters_leave_what_the_definition_leaves(
        logits in logits(), history in prop::collection::vec(0u32..720, 0..60), o in options(),
    ) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let (want, margin) = reference(&logits, &history, &o);
        // float32 exponentials are within an ulp (6e-8) of these, and so are sums over them; a difference of logits
        // up to 2^4 is rounded by 2^-21 at most. Comparisons decided by less than 2e-6 may fall either way.
        prop_assume!(margin > 2e-6);
        let mut want: Vec<u32> = want.into_iter().map(|c| c.0).collect();
        want.sort_unstable();
        prop_assert_eq!(drawn_from(&logits, &history, &o), want);
    }

    /// Greedy is the largest logit after the penalty, the lowest id among equals, and takes no draw.
    #[test]
    fn greedy_is_the_argmax(logits in logits(), history in prop::collection::vec(0u32..720, 0..60), o in options()) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let want = reference(&logits, &history, &SamplerOptions { top_k: 1, ..o }).0[0].0;
        let mut sampler = Sampler::new(SamplerOptions { temperature: 0.0, ..o }).unwrap();
        prop_assert_eq!(sampler.sample(&mut logits.clone(), &history).unwrap(), want);
        prop_assert_eq!(sampler.draws(), 0);
    }

    /// A sampler that was saved at any point makes the choices that the first one makes.
    #[test]
    fn a_saved_sampler_goes_on_exactly(logits in logits(), o in options(), before in 0usize..40) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let mut first = Sampler::new(o).unwrap();
        let draw = |s: &mut Sampler| s.sample(&mut logits.clone(), &[]).unwrap();
        for _ in 0..before {
            draw(&mut first);
        }
        let mut second = Sampler::from_bytes(&first.to_bytes()).unwrap();
        prop_assert_eq!(second.options(), &o);
        for _ in 0..20 {
            prop_assert_eq!(draw(&mut first), draw(&mut second));
        }
        prop_assert_eq!(first.to_bytes(), second.to_bytes());
    }

    /// Whatever bits the logits have, nothing panics and nothing that is not finite is chosen.
    #[test]
    fn any_bits_are_survived(bits in prop::collection::vec(any::<u32>(), 0..300), history: Vec<u32>, o in options()) {
        let logits: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
        let chosen = Sampler::new(o).unwrap().sample(&mut logits.clone(), &history);
        match chosen {
            Ok(token) => prop_assert!(logits[token as usize].is_finite()),
            Err(e) => {
                prop_assert_eq!(e, SamplerError::NoCandidate);
                prop_assert!(logits.iter().all(|l| !l.is_finite()));
            }
        }
    }

    /// Any bytes are a sampler that saves to the same bytes, or are refused.
    #[test]
    fn states_are_checked(mut bytes in prop::collection::vec(any::<u8>(), 40..48), sound: bool) {
        if sound && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&STATE_VERSION.to_le_bytes());
        }
        if let Ok(sampler) = Sampler::from_bytes(&bytes) {
            prop_assert_eq!(&sampler.to_bytes()[..], &bytes[..]);
        }
    }
}

/// Frequencies against the probabilities of the definition, by Pearson's chi-square.
#[test]
fn frequencies_are_the_probabilities() {
    let logits: Vec<f32> = (0..60).map(|i| 3.0 * libm::sinf(i as f32 * 1.7)).collect();
    let history = [3, 9, 9, 12];
    let cases = [
        plain(),
        SamplerOptions { temperature: 0.5, ..plain() },
        SamplerOptions { temperature: 1.7, top_k: 10, ..plain() },
        SamplerOptions { top_p: 0.8, ..plain() },
        SamplerOptions { min_p: 0.1, ..plain() },
        SamplerOptions { repetition_penalty: 1.8, ..plain() },
        SamplerOptions { temperature: 0.9, top_k: 30, top_p: 0.9, min_p: 0.02, repetition_penalty: 1.3, ..plain() },
    ];
    for o in cases {
        let (want, _) = reference(&logits, &history, &o);
        let mut counts = vec![0u32; logits.len()];
        let mut sampler = Sampler::new(o).unwrap();
        let draws = 20_000;
        for _ in 0..draws {
            counts[sampler.sample(&mut logits.clone(), &history).unwrap() as usize] += 1;
        }
        assert_eq!(sampler.draws(), draws);
        let (mut chi2, mut cells, mut rest, mut rest_count, mut seen) = (0.0, 0, 0.0, 0, 0);
        let mut cell = |expected: f64, count: u32| chi2 += (f64::from(count) - expected).powi(2) / expected;
        for &(token, p) in &want {
            let (expected, count) = (p * draws as f64, counts[token as usize]);
            seen += count;
            if expected >= 10.0 {
                cell(expected, count);
                cells += 1;
            } else {
                (rest, rest_count) = (rest + expected, rest_count + count);
            }
        }
        if rest >= 1.0 {
            cell(rest, rest_count);
            cells += 1;
        }
        assert_eq!(u64::from(seen), draws, "{o:?}: a token was drawn that the filters remove");
        // Mean f, variance 2f. Its tail is heavier than a normal's: mean + 5 deviations is exceeded by 1 in 10^4 or less,
        // and the seed is fixed.
        let f = f64::from(cells - 1);
        assert!(cells > 3 && chi2 < f + 5.0 * (2.0 * f).sqrt(), "{o:?}: chi2 {chi2} with {f} degrees of freedom");
    }
}

#[test]
fn each_filter_alone_by_hand() {
    // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
    let logits: Vec<f32> = [8.0f32, 4.0, 2.0, 1.0, 1.0].iter().map(|w| libm::logf(*w)).collect();
    let left = |o: SamplerOptions| drawn_from(&logits, &[], &o);
    assert_eq!(left(plain()), [0, 1, 2, 3, 4]);
    assert_eq!(left(SamplerOptions { top_k: 2, ..plain() }), [0, 1]);
    assert_eq!(left(SamplerOptions { top_k: 4, ..plain() }), [0, 1, 2, 3], "the lower id of equals");
    assert_eq!(left(SamplerOptions { top_k: 900, ..plain() }), [0, 1, 2, 3, 4]);
    assert_eq!(left(SamplerOptions { top_p: 0.4, ..plain() }), [0], "never none");
    assert_eq!(left(SamplerOptions { top_p: 0.7, ..plain() }), [0, 1]);
    assert_eq!(left(SamplerOptions { min_p: 0.2, ..plain() }), [0, 1, 2]);
    // Of the two that top-k leaves the first has 2/3: top-p sees what top-k left.
    assert_eq!(left(SamplerOptions { top_k: 2, top_p: 0.6, ..plain() }), [0]);
    // Filters judge the distribution before the temperature: a high one lets nothing in.
    assert_eq!(left(SamplerOptions { min_p: 0.2, temperature: 100.0, ..plain() }), [0, 1, 2]);
    // ln 8 / 3 < ln 4: the penalty comes before top-k.
    let o = SamplerOptions { top_k: 1, repetition_penalty: 3.0, ..plain() };
    assert_eq!(drawn_from(&logits, &[0], &o), [1]);
    assert_eq!(drawn_from(&logits, &[0, 2, 2], &SamplerOptions { repetition_window: 2, ..o }), [0], "forgotten");
    assert_eq!(drawn_from(&logits, &[0], &SamplerOptions { repetition_window: 0, ..o }), [0]);
}

#[test]
fn draws_belong_to_the_seed() {
    let logits: Vec<f32> = (0..500).map(|i| (i % 7) as f32).collect();
    let run = |seed: u64| {
        let mut s = Sampler::new(SamplerOptions { seed, ..plain() }).unwrap();
        (0..32).map(|_| s.sample(&mut logits.clone(), &[]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    // The draws are part of what a seed means: another generator or stream would change every saved transcript.
    assert_eq!(run(1)[..8], GOLDEN, "{:?}", &run(1)[..8]);
}

/// The first draws of seed 1 in the test above.
const GOLDEN: [u32; 8] = [348, 349, 95, 347, 411, 459, 257, 398];

#[test]
fn other_options_in_the_middle() {
    let logits: Vec<f32> = (0..500).map(|i| (i % 7) as f32).collect();
    let mut a = Sampler::new(plain()).unwrap();
    a.sample(&mut logits.clone(), &[]).unwrap();
    let before = a.to_bytes();
    assert_eq!(a.set_options(SamplerOptions { top_p: 0.0, ..plain() }), Err(SamplerError::TopP(0.0)));
    assert_eq!(a.to_bytes(), before);
    a.set_options(SamplerOptions { top_k: 3, ..plain() }).unwrap();
    assert_eq!(a.draws(), 1);
    a.set_options(SamplerOptions { seed: 5, ..plain() }).unwrap();
    assert_eq!(a.to_bytes(), Sampler::new(SamplerOptions { seed: 5, ..plain() }).unwrap().to_bytes());
}

#[test]
fn wrong_options_and_states_are_named() {
    let with = |change: fn(&mut SamplerOptions)| {
        let mut o = SamplerOptions::default();
        change(&mut o);
        Sampler::new(o).map(|_| ()).unwrap_err()
    };
    assert_eq!(with(|o| o.temperature = -0.5), SamplerError::Temperature(-0.5));
    assert!(matches!(with(|o| o.temperature = f32::NAN), SamplerError::Temperature(_)));
    assert!(matches!(with(|o| o.temperature = f32::INFINITY), SamplerError::Temperature(_)));
    assert_eq!(with(|o| o.top_p = 1.5), SamplerError::TopP(1.5));
    assert_eq!(with(|o| o.top_p = 0.0), SamplerError::TopP(0.0));
    assert!(matches!(with(|o| o.min_p = f32::NAN), SamplerError::MinP(_)));
    assert_eq!(with(|o| o.repetition_penalty = 0.0), SamplerError::RepetitionPenalty(0.0));

    let sound = Sampler::new(SamplerOptions::default()).unwrap().to_bytes();
    let length = |bytes: &[u8]| Sampler::from_bytes(bytes).map(|_| ()).unwrap_err();
    assert_eq!(length(&sound[..43]), SamplerError::StateLength { found: 43, expected: 44 });
    assert_eq!(length(&[]), SamplerError::StateLength { found: 0, expected: 44 });
    let mut other = sound;
    other[0] = 9;
    assert_eq!(length(&other), SamplerError::StateVersion(9));
    let mut bad = sound;
    bad[12..16].copy_from_slice(&2f32.to_le_bytes());
    assert_eq!(length(&bad), SamplerError::TopP(2.0));
}

/// A state may say that as many draws have been made as there are numbers for.
#[test]
fn the_last_number_of_draws_is_survived() {
    let mut state = Sampler::new(SamplerOptions::default()).unwrap().to_bytes();
    state[36..].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut sampler = Sampler::from_bytes(&state).unwrap();
    assert!(sampler.sample(&mut [1.0, 2.0], &[]).is_ok());
    assert_eq!(sampler.draws(), 0);
}

#[test]
fn no_finite_logit_is_an_error_and_takes_no_draw() {
    let mut s = Sampler::new(plain()).unwrap();
    for logits in [&[][..], &[f32::NAN], &[f32::INFINITY, f32::NEG_INFINITY]] {
        assert_eq!(s.sample(&mut logits.to_vec(), &[0, 1]), Err(SamplerError::NoCandidate));
    }
    assert_eq!(s.draws(), 0);
    assert_eq!(s.sample(&mut [f32::INFINITY, -5.0, f32::NAN], &[]), Ok(1));
    // The extremes of what is finite overflow nowhere.
    let mut hot = Sampler::new(SamplerOptions { repetition_penalty: 0.5, ..plain() }).unwrap();
    assert_eq!(hot.sample(&mut [f32::MAX, f32::MIN, 0.0], &[0, 1]), Ok(0));
}
