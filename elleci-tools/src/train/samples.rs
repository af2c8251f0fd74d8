//! Texts that the model continues while it is trained, drawn from seeded randomness.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::backend::Backend;

/// Text to tokens and back.
pub trait Text {
    /// Token ids of a text.
    ///
    /// # Errors
    /// When the tokenizer refuses.
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>>;

    /// The text of token ids.
    ///
    /// # Errors
    /// When the tokenizer refuses.
    fn decode(&self, tokens: &[u32]) -> anyhow::Result<String>;

    /// The token that ends a document.
    fn end_of_text(&self) -> u32;
}

/// How the next token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits.
    pub temperature: f32,
    /// Only the likeliest so many are drawn from.
    pub top_k: usize,
    /// Tokens at most.
    pub max_tokens: usize,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { temperature: 0.7, top_k: 40, max_tokens: 64 }
    }
}

/// Draws one token from the softmax of the `top_k` largest logits. Not-a-number logits are never drawn.
fn draw(logits: &[f32], sampling: Sampling, rng: &mut ChaCha8Rng) -> Option<u32> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
    // Ties fall to the lower id, so that the order is one and the same everywhere.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(sampling.top_k);
    let first = logits[*order.first()?];
    let weights: Vec<f64> =
        order.iter().map(|&i| f64::from((logits[i] - first) / sampling.temperature).exp()).collect();
    let mut at = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * weights.iter().sum::<f64>();
    let hit = weights.iter().position(|w| {
        at -= w;
        at < 0.0
    });
    Some(order[hit.unwrap_or(0)] as u32)
}

/// Continues `prompt`. The draw is a function of `(seed, number)`.
///
/// # Errors
/// When the tokenizer refuses, or a fault of the device.
pub fn sample(
    backend: &mut dyn Backend,
    text: &dyn Text,
    prompt: &str,
    sampling: Sampling,
    (seed, number): (u64, u64),
) -> anyhow::Result<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Streams below 2^32 belong to the initialisation of parameters.
    rng.set_stream((1 << 32) + number);
    let mut prompt_tokens = text.encode(prompt)?;
    if prompt_tokens.is_empty() {
        prompt_tokens.push(text.end_of_text());
    }
    let mut tokens = Vec::new();
    backend.sample(&prompt_tokens, &mut |logits| {
        let token = draw(logits, sampling, &mut rng).filter(|&t| t != text.end_of_text())?;
        tokens.push(token);
        (tokens.len() < sampling.max_tokens).then_some(token)
    })?;
    text.decode(&[prompt_tokens, tokens].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax_of_the_largest() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [0.0, f32::NAN, 2f32.ln() * 0.5, -9.0];
        let sampling = Sampling { temperature: 0.5, top_k: 2, max_tokens: 1 };
        let mut counts = [0; 4];
        for _ in 0..3000 {
            counts[draw(&logits, sampling, &mut rng).unwrap() as usize] += 1;
        }
        assert_eq!((counts[1], counts[3]), (0, 0));
        // Probabilities 1/3 and 2/3: the standard deviation of the count is 26; five of them.
        assert!((counts[2] - 2000i32).abs() < 130, "{counts:?}");
        assert_eq!(draw(&[f32::NAN], sampling, &mut rng), None);
        assert_eq!(draw(&[f32::INFINITY, 0.0], Sampling { top_k: 1, ..sampling }, &mut rng), Some(0));
    }
}
