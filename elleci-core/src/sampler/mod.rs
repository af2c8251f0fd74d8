//! Choosing the next token from its logits.
//!
//! [`Sampler`] applies its filters in one fixed order, the one that llama.cpp has, so that values which people
//! know from there mean the same here:
//!
//! 1. **repetition penalty** on the logits of recent tokens: it changes which tokens are likely, so it comes first;
//! 2. **top-k**: the `k` largest logits;
//! 3. **top-p**: the fewest likeliest tokens whose probabilities, among those that top-k left, reach `p`;
//! 4. **min-p**: tokens whose probability is at least `min_p` times the likeliest one's;
//! 5. **temperature**, and a draw from the softmax of what is left.
//!
//! Temperature comes last: what counts as too unlikely is judged by the model's own distribution, and a high temperature
//! flattens the choice among good tokens instead of letting bad ones in. Temperature 0 takes the largest logit after
//! the penalty. Equal logits rank by id, lower first, everywhere.
//!
//! A logit that is not finite is never chosen; so a hook bans a token by setting its logit to -∞.
//!
//! Exponentials come from `libm` and sums run in a fixed order: the same logits and the same seed give the same
//! token on every machine.

mod options;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub use options::{SamplerError, SamplerOptions};

/// Draws have a stream of the generator to themselves; initialisation and training use lower ones.
const STREAM: u64 = 1 << 33;
/// Raised when the bytes of a saved sampler change their meaning.
const STATE_VERSION: u32 = 1;
/// Logits of a group, whose largest says whether any of them is worth a look.
const GROUP: usize = 32;
/// Nucleus sampling orders this many candidates at first, then four times as many each time.
const FIRST_ORDERED: usize = 64;

/// A token that may be chosen, with its logit.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token: u32,
}

/// Likelier first, then the lower id. Logits are finite here, so this order is total; 0 and -0 are equal in it.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// Chooses tokens: options, and how many draws have been made.
///
/// Buffers grow with the first token and are kept: later tokens allocate nothing.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha8Rng,
    draws: u64,
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
    /// The largest finite logit of every group, and the same in another order
    maxima: Vec<f32>,
    ordered: Vec<f32>,
    /// One bit a token: whether the penalty has met it already. All zero between calls.
    met: Vec<u64>,
}

impl Sampler {
    /// Bytes of a saved sampler.
    pub const STATE_BYTES: usize = 44;

    /// A sampler that has drawn nothing yet.
    ///
    /// # Errors
    /// The first option that has no meaning.
    pub fn new(options: SamplerOptions) -> Result<Sampler, SamplerError> {
        options.validate()?;
        Ok(Sampler::at(options, 0))
    }

    fn at(options: SamplerOptions, draws: u64) -> Sampler {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(STREAM);
        // A draw takes two words of 32 bits.
        rng.set_word_pos(2 * u128::from(draws));
        Sampler {
            options,
            rng,
            draws,
            candidates: Vec::new(),
            weights: Vec::new(),
            maxima: Vec::new(),
            ordered: Vec::new(),
            met: Vec::new(),
        }
    }

    /// Its options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Other options from here on. A new seed starts its own sequence of draws; the same one goes on with its own.
    ///
    /// # Errors
    /// The first option that has no meaning; nothing has changed then.
    pub fn set_options(&mut self, options: SamplerOptions) -> Result<(), SamplerError> {
        options.validate()?;
        if options.seed != self.options.seed {
            *self = Sampler::at(options, 0);
        }
        self.options = options;
        Ok(())
    }

    /// Draws made so far: one a token, none for greedy choices.
    pub fn draws(&self) -> u64 {
        self.draws
    }

    /// Chooses a token. `logits` `[vocab_size]` are used as scratch; `history` is the sequence so far, prompt included, of
    /// which the last `repetition_window` tokens count. Tokens of `history` that have no logit are passed over.
    ///
    /// # Errors
    /// [`SamplerError::NoCandidate`] when no logit is finite; no draw has been made then.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32, SamplerError> {
        self.penalise(logits, history);
        group_maxima(logits, &mut self.maxima);
        let likeliest = argmax(logits, &self.maxima).ok_or(SamplerError::NoCandidate)?;
        if self.options.temperature == 0.0 {
            return Ok(likeliest.token);
        }
        self.top_k(logits);
        self.cut(likeliest.logit);
        Ok(self.draw(likeliest.logit))
    }

    /// Divides positive logits of recent tokens and multiplies the others, each token once however often it occurred.
    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        let recent = &history[history.len().saturating_sub(self.options.repetition_window as usize)..];
        if penalty == 1.0 || recent.is_empty() {
            return;
        }
        self.met.resize(logits.len().div_ceil(64).max(self.met.len()), 0);
        for &token in recent {
            let (word, bit) = (token as usize / 64, 1 << (token % 64));
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if self.met[word] & bit != 0 || !logit.is_finite() {
                continue;
            }
            self.met[word] |= bit;
            let penalised = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            // A huge logit may overflow; it must not become infinite, which would mean that it was banned.
            *logit = penalised.clamp(f32::MIN, f32::MAX);
        }
        for &token in recent {
            if let Some(word) = self.met.get_mut(token as usize / 64) {
                *word = 0;
            }
        }
    }

    /// Leaves the `k` likeliest tokens in `candidates`, likeliest first; without a limit all, by id.
    ///
    /// At least `k` logits reach the `k`-th largest of the groups' maxima, so that none below it is among the `k` likeliest: most groups
    /// are passed over. What is left is kept in a buffer of 2k that is halved when it is full; the `k`-th largest so far is the
    /// threshold from then on.
    fn top_k(&mut self, logits: &[f32]) {
        let kept = &mut self.candidates;
        kept.clear();
        let k = self.options.top_k as usize;
        let limited = k != 0 && k < logits.len();
        let capacity = if limited { (2 * k).min(logits.len()) } else { logits.len() };
        kept.reserve(capacity);
        // As many weights as there may ever be: a flatter distribution later on must not allocate.
        self.weights.clear();
        self.weights.reserve(if limited { k } else { capacity });
        let mut threshold = f32::NEG_INFINITY;
        if limited && k <= self.maxima.len() {
            self.ordered.clone_from(&self.maxima);
            let (_, least, _) = self.ordered.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            // Those that equal it may be among them too.
            threshold = least.next_down();
        }
        for (g, (group, max)) in logits.chunks(GROUP).zip(&self.maxima).enumerate() {
            if *max <= threshold {
                continue;
            }
            for (i, &logit) in group.iter().enumerate() {
                // A logit that equals the threshold has a higher id than the tokens kept, and ranks behind them.
                if logit > threshold && logit < f32::INFINITY {
                    kept.push(Candidate { logit, token: (g * GROUP + i) as u32 });
                    if limited && kept.len() == capacity {
                        threshold = kept.select_nth_unstable_by(k - 1, rank).1.logit;
                        kept.truncate(k);
                    }
                }
            }
        }
        if limited {
            if kept.len() > k {
                kept.select_nth_unstable_by(k - 1, rank);
                kept.truncate(k);
            }
            kept.sort_unstable_by(rank);
        }
    }

    /// Top-p, then min-p. Both keep the likeliest so many, so the shorter of the two prefixes is what is left.
    fn cut(&mut self, max: f32) {
        let SamplerOptions { top_p, min_p, .. } = self.options;
        let kept = &mut self.candidates;
        // The whole that top-p is a share of counts what min-p is about to remove.
        let goal = (top_p < 1.0).then(|| f64::from(top_p) * kept.iter().map(|c| weight(c, max)).sum::<f64>());
        if min_p > 0.0 {
            let lowest = libm::logf(min_p);
            kept.retain(|c| c.logit - max >= lowest);
        }
        let Some(goal) = goal else { return };
        let (mut mass, mut done, mut end) = (0.0, 0, FIRST_ORDERED);
        // Ordering all of a large vocabulary would cost more than the rest together, and the first few tokens mostly
        // have the mass: those are ordered first, more only when they do not reach.
        while done < kept.len() {
            end = end.min(kept.len());
            if end < kept.len() {
                kept[done..].select_nth_unstable_by(end - done, rank);
            }
            kept[done..end].sort_unstable_by(rank);
            for i in done..end {
                mass += weight(&kept[i], max);
                if mass >= goal {
                    kept.truncate(i + 1);
                    return;
                }
            }
            (done, end) = (end, 4 * end);
        }
    }

    /// Draws from the softmax of the candidates' logits over the temperature.
    fn draw(&mut self, max: f32) -> u32 {
        let temperature = self.options.temperature;
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| libm::expf((c.logit - max) / temperature)));
        let total: f64 = self.weights.iter().map(|&w| f64::from(w)).sum();
        // Uniform in [0, 1), 53 bits.
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        // A saved state may claim any number of draws, the last one too.
        self.draws = self.draws.wrapping_add(1);
        let mut left = uniform * total;
        let mut chosen = 0;
        for (i, &w) in self.weights.iter().enumerate() {
            if w > 0.0 {
                // Rounding may leave a hair over the end of the sum: then the last one that has any weight is it.
                chosen = i;
                left -= f64::from(w);
                if left < 0.0 {
                    break;
                }
            }
        }
        self.candidates[chosen].token
    }

    /// Everything that the next choices depend on, little-endian: version, options in the order of their
    /// declaration, draws.
    pub fn to_bytes(&self) -> [u8; Sampler::STATE_BYTES] {
        let o = &self.options;
        let mut out = [0; Sampler::STATE_BYTES];
        let words = [
            STATE_VERSION,
            o.temperature.to_bits(),
            o.top_k,
            o.top_p.to_bits(),
            o.min_p.to_bits(),
            o.repetition_penalty.to_bits(),
            o.repetition_window,
        ];
        let bytes = words.iter().flat_map(|w| w.to_le_bytes());
        let bytes = bytes.chain(o.seed.to_le_bytes()).chain(self.draws.to_le_bytes());
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = from;
        }
        out
    }

    /// The sampler that [`Sampler::to_bytes`] saved: it makes the choices that the saved one would have made.
    ///
    /// # Errors
    /// Bytes that are not such a state.
    pub fn from_bytes(bytes: &[u8]) -> Result<Sampler, SamplerError> {
        let state: &[u8; Sampler::STATE_BYTES] = bytes
            .try_into()
            .map_err(|_| SamplerError::StateLength { found: bytes.len(), expected: Sampler::STATE_BYTES })?;
        let word = |i: usize| u32::from_le_bytes(core::array::from_fn(|b| state[4 * i + b]));
        let long = |at: usize| u64::from_le_bytes(core::array::from_fn(|b| state[at + b]));
        if word(0) != STATE_VERSION {
            return Err(SamplerError::StateVersion(word(0)));
        }
        let options = SamplerOptions {
            temperature: f32::from_bits(word(1)),
            top_k: word(2),
            top_p: f32::from_bits(word(3)),
            min_p: f32::from_bits(word(4)),
            repetition_penalty: f32::from_bits(word(5)),
            repetition_window: word(6),
            seed: long(28),
        };
        options.validate()?;
        Ok(Sampler::at(options, long(36)))
    }
}

/// The largest finite logit of every group, -∞ where there is none.
fn group_maxima(logits: &[f32], maxima: &mut Vec<f32>) {
    // A NaN is never larger.
    let larger = |max: f32, logit: f32| if logit > max { logit } else { max };
    maxima.clear();
    maxima.extend(logits.chunks(GROUP).map(|group| {
        let (rows, rest) = group.as_chunks::<8>();
        // Eight at a time, as the compiler makes vectors of those, and then by halves.
        let mut max = [f32::NEG_INFINITY; 8];
        for row in rows {
            max.iter_mut().zip(row).for_each(|(max, logit)| *max = larger(*max, *logit));
        }
        let max: [f32; 4] = core::array::from_fn(|i| larger(max[i], max[i + 4]));
        let max = larger(larger(max[0], max[2]), larger(max[1], max[3]));
        let max = rest.iter().fold(max, |max, logit| larger(max, *logit));
        if max < f32::INFINITY {
            return max;
        }
        group.iter().filter(|logit| **logit < f32::INFINITY).fold(f32::NEG_INFINITY, |max, logit| larger(max, *logit))
    }));
}

/// The likeliest token. `None` when no logit is finite.
fn argmax(logits: &[f32], maxima: &[f32]) -> Option<Candidate> {
    let (mut group, mut max) = (0, f32::NEG_INFINITY);
    for (g, of_group) in maxima.iter().enumerate() {
        if *of_group > max {
            (group, max) = (g, *of_group);
        }
    }
    let token = logits.iter().skip(group * GROUP).position(|logit| *logit == max)? + group * GROUP;
    (max > f32::NEG_INFINITY).then_some(Candidate { logit: max, token: token as u32 })
}

/// Probability of a candidate up to a common factor.
fn weight(c: &Candidate, max: f32) -> f64 {
    f64::from(libm::expf(c.logit - max))
}
