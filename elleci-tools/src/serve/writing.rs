//! A text on its way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elleci_core::inference::Session;
use elleci_core::sampler::{Sampler, SamplerError, SamplerOptions};

use super::job::{Ask, Count, End, Event, Generate, Piece, TokenScore};
use crate::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID, Tokenizer};
use crate::run::logprob::{LogRow, likeliest};
use crate::run::text::TextStream;

/// Text that comes sooner than this after the last piece goes with the next one: a picture of most screens lasts as long, and a message a
/// token would cost a small model more than the token.
const PIECE: Duration = Duration::from_millis(16);

/// Scores a token at its place.
pub fn score(row: &[f32], token: u32, top: usize) -> TokenScore {
    let of = LogRow::new(row);
    let top = likeliest(row, top).into_iter().map(|(t, logit)| (t, of.of(logit))).collect();
    TokenScore { token, logprob: of.of(row[token as usize]), top }
}

/// A choice that is being written.
#[derive(Debug)]
pub struct Writing {
    /// Its request.
    pub ask: Arc<Ask>,
    /// Everything up to the token before `next`.
    pub session: Session,
    /// The token to be fed.
    pub next: u32,
    choice: usize,
    generate: Arc<Generate>,
    sampler: Sampler,
    stream: TextStream,
    /// How often each token has been chosen; only counted for penalties.
    chosen: HashMap<u32, u32>,
    count: Count,
    pending: Piece,
    told: Option<Instant>,
    end: Option<End>,
}

impl Writing {
    /// Copy `copy` of what follows the prompt that `session` has taken.
    ///
    /// # Errors
    /// Options without a meaning.
    pub fn new(
        (ask, session): (Arc<Ask>, Session),
        (prompt, copy): (usize, usize),
        generate: Arc<Generate>,
        count: Count,
    ) -> Result<Writing, SamplerError> {
        let seed = generate.sampling.seed.wrapping_add(copy as u64);
        Ok(Writing {
            ask,
            session,
            next: 0,
            choice: prompt * generate.copies + copy,
            sampler: Sampler::new(SamplerOptions { seed, ..generate.sampling })?,
            stream: TextStream::new(&generate.stops),
            chosen: HashMap::new(),
            count,
            pending: Piece::default(),
            told: None,
            end: (generate.max_tokens == 0).then_some(End::Length),
            generate,
        })
    }

    /// Whether it is complete.
    pub fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Chooses the next token from the logits after `session`, which are changed.
    ///
    /// # Errors
    /// When no logit is a number.
    pub fn choose(
        &mut self,
        tokenizer: &Tokenizer,
        banned: &[Vec<u32>; 2],
        row: &mut [f32],
    ) -> Result<(), SamplerError> {
        let generate = self.generate.clone();
        // Probabilities are the model's own: of the logits before anything is done to them.
        let own = generate.logprobs.map(|top| (row.to_vec(), top));
        self.change(&generate, &banned[usize::from(generate.ignore_eos)], row);
        let token = self.sampler.sample(row, self.session.tokens())?;
        self.count.chosen += 1;
        if let Some((own, top)) = own {
            self.pending.scores.push(score(&own, token, top));
        }
        self.take(tokenizer, &generate, token);
        Ok(())
    }

    fn change(&mut self, generate: &Generate, banned: &[u32], row: &mut [f32]) {
        for (&token, &times) in &self.chosen {
            row[token as usize] -= generate.frequency_penalty * times as f32 + generate.presence_penalty;
        }
        for &(token, bias) in &generate.bias {
            row[token as usize] += bias;
        }
        banned.iter().for_each(|t| row[*t as usize] = f32::NEG_INFINITY);
    }

    fn take(&mut self, tokenizer: &Tokenizer, generate: &Generate, token: u32) {
        if !generate.ignore_eos && (token == END_OF_TEXT_ID || token == IM_END_ID) {
            self.end = Some(End::Stop);
            return;
        }
        if generate.frequency_penalty != 0.0 || generate.presence_penalty != 0.0 {
            *self.chosen.entry(token).or_default() += 1;
        }
        self.next = token;
        let shown = self.stream.push(&tokenizer.decode_bytes(&[token]));
        self.pending.text += &shown.text;
        if shown.stop.is_some() {
            self.end = Some(End::Stop);
        } else if self.count.chosen == generate.max_tokens {
            self.end = Some(End::Length);
        }
    }

    /// Tells what is new, if it is time: the end, or a piece of a text that is wanted as it comes. Whether it is over.
    pub fn tell(&mut self, now: Instant) -> bool {
        if let Some(end) = self.end {
            self.pending.text += &self.stream.finish();
            let piece = std::mem::take(&mut self.pending);
            self.ask.tell(Event::Done { choice: self.choice, piece, end, count: self.count });
            return true;
        }
        let due = self.told.is_none_or(|told| now.duration_since(told) >= PIECE);
        if self.generate.stream && due && !self.pending.text.is_empty() {
            let piece = std::mem::take(&mut self.pending);
            self.ask.tell(Event::Piece { choice: self.choice, piece });
            self.told = Some(now);
        }
        false
    }
}
