//! A context of 131,072 tokens: its memory is what the caches take, and a session that was saved on the way goes on to the bit.
//!
//! Too slow for every run: `cargo test --release -p elleci-core --test long_context -- --ignored --nocapture`.

use elleci_core::archive::{Archive, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::init::initialise;

const TOKENS: usize = 1 << 17;
/// Tokens a call.
const CALL: usize = 4096;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 64,
        d_model: 16,
        n_layers: 2,
        layer_pattern: "SA".into(),
        n_heads: 1,
        kv_rank: 64,
        d_nope: 8,
        d_rope: 4,
        d_v: 8,
        d_inner: 32,
        head_dim: 16,
        d_state: 8,
        ffn_hidden: 32,
        ..ModelConfig::preset("nano").unwrap()
    }
}

/// Bytes of this process that are in memory; `None` where the system does not say.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split_whitespace().nth(1)?.parse::<usize>().ok()? * 4096)
}

#[test]
#[ignore = "half a minute"]
fn a_context_of_128k_takes_the_caches_and_nothing_else() {
    let c = config();
    let archive = Archive::open(to_bytes(&c, &initialise(&c, 1), None, PackOptions::default()).unwrap()).unwrap();
    let model = archive.model();
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect();

    let mut session = Session::new(model).unwrap();
    let feed = |session: &mut Session, range: std::ops::Range<usize>| {
        for call in tokens[range].chunks(CALL) {
            session.extend(model, call).unwrap();
        }
    };
    // Working memory, the pool's stacks and what the allocator keeps are there after some calls.
    let warm = 4 * CALL;
    feed(&mut session, 0..warm);
    let (before, of_state) = (resident(), session.bytes());
    feed(&mut session, warm..TOKENS / 2);
    let saved = session.to_bytes();
    let saved_bytes = saved.len();
    let mut restored = Session::from_bytes(model, &saved).unwrap();
    drop(saved);
    let copy = restored.bytes();
    assert_eq!(copy, session.bytes());
    feed(&mut session, TOKENS / 2..TOKENS);

    // A token of the one attention layer: int8 latent, its scale, the rotated key; and the token itself.
    let a_token = c.kv_rank + 4 + 4 * c.d_rope + 4;
    assert_eq!(session.bytes() - of_state, (TOKENS - warm) * a_token);
    if let (Some(before), Some(after)) = (before, resident()) {
        // Beside the two sessions: the list of tokens may have as much room again, in both; 1 MiB for the allocator. Working memory
        // that grew with the context by 16 bytes a token would not fit.
        let planned = (TOKENS - warm) * a_token + copy + 2 * 4 * TOKENS + (1 << 20);
        let grown = after.saturating_sub(before);
        println!("{TOKENS} tokens: {} bytes of state, {grown} more resident of {planned} planned", session.bytes());
        assert!(grown <= planned, "{grown} bytes more than at {warm} tokens, {planned} planned");
        assert!(saved_bytes < copy + 4096, "a saved session is its state");
    }

    feed(&mut restored, TOKENS / 2..TOKENS);
    // Single tokens take the absorbed attention over the whole context.
    for token in 0..4 {
        let want = session.extend(model, &[token]).unwrap().to_vec();
        let got = restored.extend(model, &[token]).unwrap();
        assert!(want.iter().zip(got).all(|(a, b)| a.to_bits() == b.to_bits()), "token {token} after {TOKENS}");
        assert!(want.iter().all(|v| v.is_finite()));
    }
    assert_eq!(session.to_bytes(), restored.to_bytes());
}
