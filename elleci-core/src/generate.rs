//! Text from a session: the loop of prefill, choice and next step.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use elleci_core::archive::{AlignedBytes, Archive};
//! use elleci_core::generate::{GenerateOptions, generate};
//! use elleci_core::inference::Session;
//! use elleci_core::sampler::{Sampler, SamplerOptions};
//!
//! let archive = Archive::open(AlignedBytes::from(&std::fs::read("model.elleci")?[..]))?;
//! let model = archive.model();
//! let mut session = Session::new(model)?;
//! let mut sampler = Sampler::new(SamplerOptions::default())?;
//! let options = GenerateOptions { max_tokens: 100, ..GenerateOptions::default() };
//! let text = generate(model, &mut session, &mut sampler, options, &[17, 4, 99], |token| {
//!     print!("{token} ");
//!     ControlFlow::Continue(())
//! })?;
//! println!("{} tokens: {:?}", text.tokens.len(), text.reason);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use alloc::vec::Vec;
use core::fmt;
use core::ops::ControlFlow;

use crate::archive::PackedModel;
use crate::inference::{InferenceError, Session};
use crate::sampler::{Sampler, SamplerError};

/// Sees, and may change, the logits `[vocab_size]` before each choice; with them the whole sequence so far.
pub type LogitsHook<'a> = dyn FnMut(&mut [f32], &[u32]) + 'a;

/// What to generate.
#[derive(Default)]
pub struct GenerateOptions<'a> {
    /// Tokens at most. 0 feeds the prompt and chooses nothing.
    pub max_tokens: usize,
    /// Token sequences that end the text. They are not part of it. None may be empty.
    pub stop: &'a [&'a [u32]],
    /// Changes logits before the sampler sees them, as by setting what is not wanted to -∞.
    pub hook: Option<&'a mut LogitsHook<'a>>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// `max_tokens` were generated.
    MaxTokens,
    /// The stop sequence of this index was met.
    Stop(usize),
    /// The callback asked for it.
    Cancelled,
}

/// A generated text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens that the callback saw.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub reason: StopReason,
}

/// Why generation failed. What the callback has seen stands.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateError {
    /// The stop sequence of this index holds no token.
    EmptyStop(usize),
    /// The session refused.
    Inference(InferenceError),
    /// The sampler found no token to choose.
    Sampler(SamplerError),
}

impl fmt::Display for GenerateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GenerateError::EmptyStop(i) => write!(f, "stop sequence {i} is empty"),
            GenerateError::Inference(e) => e.fmt(f),
            GenerateError::Sampler(e) => e.fmt(f),
        }
    }
}

impl core::error::Error for GenerateError {}

/// Feeds `prompt` (not empty) to the session and continues it. `on_token` sees every token of the text as soon as it is
/// certain that it belongs to the text: tokens that may turn out to begin a stop sequence wait. It ends the text by
/// breaking.
///
/// Afterwards the session has taken the prompt and everything that was chosen except for the last token: that one
/// has not been needed yet. To go on, begin the next prompt with what [`Session::tokens`] lacks.
///
/// # Errors
/// See [`GenerateError`].
pub fn generate(
    model: PackedModel<'_>,
    session: &mut Session,
    sampler: &mut Sampler,
    options: GenerateOptions<'_>,
    prompt: &[u32],
    on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    run(&mut Bound { model, session }, sampler, options, prompt, on_token)
}

/// What takes tokens and answers with the logits after the last one.
trait Decode {
    fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], InferenceError>;
    /// All tokens taken so far.
    fn tokens(&self) -> &[u32];
}

struct Bound<'a> {
    model: PackedModel<'a>,
    session: &'a mut Session,
}

impl Decode for Bound<'_> {
    fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], InferenceError> {
        self.session.extend(self.model, tokens)
    }

    fn tokens(&self) -> &[u32] {
        self.session.tokens()
    }
}

fn run(
    session: &mut impl Decode,
    sampler: &mut Sampler,
    options: GenerateOptions<'_>,
    prompt: &[u32],
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    let GenerateOptions { max_tokens, stop, mut hook } = options;
    if let Some(empty) = stop.iter().position(|s| s.is_empty()) {
        return Err(GenerateError::EmptyStop(empty));
    }
    let mut text = Text { tokens: Vec::new(), shown: 0 };
    let mut logits = Vec::new();
    let mut last;
    let mut feed = prompt;
    loop {
        let answer = session.extend(feed).map_err(GenerateError::Inference)?;
        if text.tokens.len() == max_tokens {
            return Ok(text.end(StopReason::MaxTokens));
        }
        logits.clear();
        logits.extend_from_slice(answer);
        if let Some(hook) = &mut hook {
            hook(&mut logits, session.tokens());
        }
        last = sampler.sample(&mut logits, session.tokens()).map_err(GenerateError::Sampler)?;
        feed = core::slice::from_ref(&last);
        text.tokens.push(last);
        if let Some((index, sequence)) = stop.iter().enumerate().find(|(_, s)| text.tokens.ends_with(s)) {
            text.tokens.truncate(text.tokens.len() - sequence.len());
            let reason = match text.show(0, &mut on_token) {
                ControlFlow::Continue(()) => StopReason::Stop(index),
                ControlFlow::Break(()) => StopReason::Cancelled,
            };
            return Ok(text.end(reason));
        }
        // The last token that there may be waits for nothing.
        let full = text.tokens.len() == max_tokens;
        let waiting = if full { 0 } else { text.may_begin(stop) };
        if text.show(waiting, &mut on_token).is_break() {
            return Ok(text.end(StopReason::Cancelled));
        }
        if full {
            return Ok(text.end(StopReason::MaxTokens));
        }
    }
}

/// Tokens chosen so far, and how many of them the callback has seen.
struct Text {
    tokens: Vec<u32>,
    shown: usize,
}

impl Text {
    /// How many of the last tokens are the beginning of a stop sequence.
    fn may_begin(&self, stop: &[&[u32]]) -> usize {
        let begins = |s: &[u32]| (1..s.len()).rev().find(|&n| self.tokens.ends_with(&s[..n]));
        stop.iter().filter_map(|s| begins(s)).max().unwrap_or(0)
    }

    /// Shows all but the last `waiting` tokens.
    fn show(&mut self, waiting: usize, on_token: &mut impl FnMut(u32) -> ControlFlow<()>) -> ControlFlow<()> {
        while self.shown < self.tokens.len() - waiting {
            self.shown += 1;
            on_token(self.tokens[self.shown - 1])?;
        }
        ControlFlow::Continue(())
    }

    fn end(mut self, reason: StopReason) -> Generated {
        self.tokens.truncate(self.shown);
        Generated { tokens: self.tokens, reason }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::sampler::SamplerOptions;

    /// Counts up from the last token, modulo its vocabulary; refuses tokens past it.
    struct Counter {
        tokens: Vec<u32>,
        calls: Vec<usize>,
        logits: Vec<f32>,
    }

    impl Counter {
        fn new(vocab_size: usize) -> Counter {
            Counter { tokens: vec![], calls: vec![], logits: vec![0.0; vocab_size] }
        }
    }

    impl Decode for Counter {
        fn extend(&mut self, tokens: &[u32]) -> Result<&[f32], InferenceError> {
            let vocab_size = self.logits.len();
            if let Some(&token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
                return Err(InferenceError::Token { token, vocab_size });
            }
            self.calls.push(tokens.len());
            self.tokens.extend_from_slice(tokens);
            let next = (*self.tokens.last().unwrap() as usize + 1) % self.logits.len();
            self.logits.fill(0.0);
            self.logits[next] = 1.0;
            Ok(&self.logits)
        }

        fn tokens(&self) -> &[u32] {
            &self.tokens
        }
    }

    fn greedy() -> Sampler {
        Sampler::new(SamplerOptions::greedy()).unwrap()
    }

    /// Runs with a counter of ten tokens; returns the text, what the callback saw after each step, and the counter.
    fn counted(stop: &[&[u32]], max_tokens: usize, break_at: Option<u32>) -> (Generated, Vec<u32>, Counter) {
        let mut counter = Counter::new(10);
        let mut seen = vec![];
        let options = GenerateOptions { max_tokens, stop, hook: None };
        let text = run(&mut counter, &mut greedy(), options, &[1, 2], |t| {
            seen.push(t);
            if break_at == Some(t) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        (text.unwrap(), seen, counter)
    }

    #[test]
    fn the_prompt_is_fed_once_and_the_last_token_not_at_all() {
        let (text, seen, counter) = counted(&[], 4, None);
        assert_eq!(text, Generated { tokens: vec![3, 4, 5, 6], reason: StopReason::MaxTokens });
        assert_eq!(seen, text.tokens);
        assert_eq!(counter.calls, [2, 1, 1, 1]);
        assert_eq!(counter.tokens, [1, 2, 3, 4, 5]);

        let (text, _, counter) = counted(&[], 0, None);
        assert_eq!((text.tokens.len(), text.reason), (0, StopReason::MaxTokens));
        assert_eq!(counter.calls, [2]);
    }

    #[test]
    fn a_stop_sequence_is_no_part_of_the_text() {
        let (text, seen, counter) = counted(&[&[9, 9], &[6, 7]], 100, None);
        assert_eq!(text, Generated { tokens: vec![3, 4, 5], reason: StopReason::Stop(1) });
        assert_eq!(seen, [3, 4, 5]);
        assert_eq!(counter.tokens, [1, 2, 3, 4, 5, 6]);
        // The prompt's end is no part of a stop sequence.
        assert_eq!(counted(&[&[2, 3]], 2, None).0.reason, StopReason::MaxTokens);
        // A sequence that begins and does not end is text, in its order; so is one that the last token leaves open.
        assert_eq!(counted(&[&[4, 5, 7], &[5, 6, 7, 9]], 8, None).1, [3, 4, 5, 6, 7, 8, 9, 0]);
        assert_eq!(counted(&[&[4, 5, 6]], 3, None).1, [3, 4, 5]);
        // The longer of two that overlap is met at its end, though a shorter one begins inside it.
        assert_eq!(counted(&[&[5, 6, 7], &[6, 9]], 8, None).0.tokens, [3, 4]);
    }

    #[test]
    fn the_callback_sees_a_token_only_when_it_is_certain() {
        let mut counter = Counter::new(10);
        // What was seen before each choice.
        let seen = core::cell::RefCell::new(vec![]);
        let mut before = vec![];
        let mut hook = |_: &mut [f32], so_far: &[u32]| before.push((so_far.len(), seen.borrow().len()));
        let options = GenerateOptions { max_tokens: 4, stop: &[&[3, 4, 9]], hook: Some(&mut hook) };
        let show = |t| {
            seen.borrow_mut().push(t);
            ControlFlow::Continue(())
        };
        run(&mut counter, &mut greedy(), options, &[2], show).unwrap();
        assert_eq!(*seen.borrow(), [3, 4, 5, 6]);
        // 3 and 4 wait until 5 has been chosen.
        assert_eq!(before, [(1, 0), (2, 0), (3, 0), (4, 3)]);
    }

    #[test]
    fn breaking_ends_the_text() {
        let (text, seen, counter) = counted(&[], 100, Some(5));
        assert_eq!(text, Generated { tokens: vec![3, 4, 5], reason: StopReason::Cancelled });
        assert_eq!(seen, text.tokens);
        assert_eq!(counter.tokens, [1, 2, 3, 4]);
        // Among tokens that were set free together, and at the stop itself.
        let (text, ..) = counted(&[&[4, 5, 6, 9]], 100, Some(5));
        assert_eq!(text.tokens, [3, 4, 5]);
        assert_eq!(counted(&[&[6, 7], &[5, 6, 9]], 100, Some(5)).0.reason, StopReason::Cancelled);
    }

    #[test]
    fn a_hook_bans_and_forces() {
        let mut counter = Counter::new(10);
        let mut hook = |logits: &mut [f32], so_far: &[u32]| {
            if so_far.last() == Some(&4) {
                logits[5] = f32::NEG_INFINITY;
                logits[8] = 0.5;
            }
        };
        let options = GenerateOptions { max_tokens: 4, stop: &[], hook: Some(&mut hook) };
        let text = run(&mut counter, &mut greedy(), options, &[2], |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(text.tokens, [3, 4, 8, 9]);

        let mut all = |logits: &mut [f32], _: &[u32]| logits.fill(f32::NEG_INFINITY);
        let options = GenerateOptions { max_tokens: 1, stop: &[], hook: Some(&mut all) };
        let text = run(&mut counter, &mut greedy(), options, &[2], |_| ControlFlow::Continue(()));
        assert_eq!(text, Err(GenerateError::Sampler(SamplerError::NoCandidate)));
    }

    #[test]
    fn what_cannot_be_run_is_refused_before_anything_is_fed() {
        let mut counter = Counter::new(10);
        let mut go = |stop: &[&[u32]], prompt: &[u32]| {
            let options = GenerateOptions { max_tokens: 1, stop, hook: None };
            run(&mut counter, &mut greedy(), options, prompt, |_| ControlFlow::Continue(())).unwrap_err()
        };
        assert_eq!(go(&[&[1], &[]], &[1]), GenerateError::EmptyStop(1));
        assert_eq!(go(&[], &[10]), GenerateError::Inference(InferenceError::Token { token: 10, vocab_size: 10 }));
        assert_eq!(counter.calls, [0; 0]);
    }
}
