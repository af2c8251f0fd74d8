//! Any bytes as a sampler's state, any bits as logits: a token that may be chosen, or a refusal.
#![no_main]
use elleci_core::sampler::{Sampler, SamplerError};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((state, rest)) = bytes.split_at_checked(Sampler::STATE_BYTES) else {
        assert!(Sampler::from_bytes(bytes).is_err());
        return;
    };
    let Ok(mut sampler) = Sampler::from_bytes(state) else { return };
    assert_eq!(sampler.to_bytes(), state);
    let (history, rest) = rest.split_at(rest.len().min(8));
    let history: Vec<u32> = history.iter().map(|b| u32::from(*b)).collect();
    let logits: Vec<f32> = rest.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    match sampler.sample(&mut logits.clone(), &history) {
        Ok(token) => assert!(logits[token as usize].is_finite()),
        Err(e) => {
            assert_eq!(e, SamplerError::NoCandidate);
            assert!(logits.iter().all(|l| !l.is_finite()));
        }
    }
});
