//! What a sampler does, and why a wish or a state is refused.

use core::fmt;

/// How the next token is chosen. See [`Sampler`](super::Sampler) for the order of the filters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits: below 1 the likely become likelier. 0 chooses the likeliest token always.
    pub temperature: f32,
    /// Only the likeliest so many tokens are drawn from. 0 = no limit.
    pub top_k: u32,
    /// Only the likeliest tokens that together have at least this probability are drawn from. 1 = all.
    pub top_p: f32,
    /// Only tokens with at least this share of the likeliest token's probability are drawn from. 0 = all.
    pub min_p: f32,
    /// Positive logits of recent tokens are divided by this, negative ones multiplied. 1 = no penalty.
    pub repetition_penalty: f32,
    /// How many of the last tokens count as recent. 0 = none.
    pub repetition_window: u32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// Temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no penalty: what llama.cpp starts from.
    fn default() -> SamplerOptions {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// The likeliest token, always.
    pub fn greedy() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }
    }

    /// Checks that every value has a meaning.
    ///
    /// # Errors
    /// The first that has none.
    pub fn validate(&self) -> Result<(), SamplerError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(SamplerError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplerError::TopP(self.top_p));
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return Err(SamplerError::MinP(self.min_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(SamplerError::RepetitionPenalty(self.repetition_penalty));
        }
        Ok(())
    }
}

/// Why a sampler cannot be made, restored, or cannot choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SamplerError {
    /// `temperature` is negative or not finite.
    Temperature(f32),
    /// `top_p` is not in (0, 1].
    TopP(f32),
    /// `min_p` is not in [0, 1].
    MinP(f32),
    /// `repetition_penalty` is not a positive finite number.
    RepetitionPenalty(f32),
    /// No logit is finite: there is no token to choose.
    NoCandidate,
    /// A saved state has another length than this version writes.
    StateLength {
        /// Bytes given.
        found: usize,
        /// Bytes of a state.
        expected: usize,
    },
    /// A saved state is of another version, or is none.
    StateVersion(u32),
}

impl fmt::Display for SamplerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SamplerError::Temperature(v) => write!(f, "`temperature` is {v}; it must be a number from 0 (greedy) on"),
            SamplerError::TopP(v) => write!(f, "`top_p` is {v}; it must be above 0 and at most 1 (off)"),
            SamplerError::MinP(v) => write!(f, "`min_p` is {v}; it must be 0 (off) to 1"),
            SamplerError::RepetitionPenalty(v) => {
                write!(f, "`repetition_penalty` is {v}; it must be a positive number, 1 for none")
            }
            SamplerError::NoCandidate => f.write_str("no logit is a finite number: there is no token to choose"),
            SamplerError::StateLength { found, expected } => {
                write!(f, "a saved sampler has {expected} bytes, not {found}")
            }
            SamplerError::StateVersion(v) => {
                write!(f, "not a saved sampler of version {}: it says {v}", super::STATE_VERSION)
            }
        }
    }
}

impl core::error::Error for SamplerError {}
