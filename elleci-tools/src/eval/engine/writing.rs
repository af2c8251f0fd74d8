//! Texts that the model writes: prompts continued together, a token of each at a time.

use anyhow::bail;
use elleci_core::inference::{Feed, Session};
use elleci_core::sampler::{Sampler, SamplerOptions};

use super::Engine;
use crate::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID};
use crate::run::text::TextStream;

/// How a text is continued.
#[derive(Clone, Debug)]
pub struct Continue {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Strings that end the text; they are not part of it.
    pub until: Vec<String>,
    /// Temperature 0 is greedy.
    pub sampling: SamplerOptions,
}

/// A continuation that the model wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The text, without what ended it.
    pub text: String,
    /// Tokens, without the one that ended the text.
    pub tokens: usize,
    /// Whether a stop string or an end token was met before the limit.
    pub ended: bool,
    /// Tokens that were cut from the left of the prompt.
    pub truncated: usize,
}

/// A text on its way.
struct Writing {
    index: usize,
    /// Tokens to be fed next.
    next: Vec<u32>,
    session: Session,
    sampler: Sampler,
    stream: TextStream,
    done: Continuation,
}

impl Engine<'_> {
    /// Continues `prompts`, all at once. A prompt that leaves no room for `max_tokens` in the window is cut from the left.
    ///
    /// # Errors
    /// More tokens than the window holds; logits that are not numbers.
    pub fn generate(
        &mut self,
        prompts: &[&str],
        how: &Continue,
        seed_of: impl Fn(usize) -> u64,
    ) -> anyhow::Result<Vec<Continuation>> {
        let Some(room) = self.max_length.checked_sub(how.max_tokens).filter(|n| *n > 0) else {
            bail!(
                "{} tokens to generate leave no room for a prompt in a window of {}; raise --max-length",
                how.max_tokens,
                self.max_length
            );
        };
        let mut texts = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.iter().enumerate() {
            let mut tokens = self.encode(prompt);
            if tokens.is_empty() {
                tokens.push(END_OF_TEXT_ID);
            }
            let cut = tokens.len().saturating_sub(room);
            tokens.drain(..cut);
            let options = SamplerOptions { seed: seed_of(i), ..how.sampling };
            texts.push(Writing {
                index: i,
                next: tokens,
                session: Session::new(self.model)?,
                sampler: Sampler::new(options)?,
                stream: TextStream::new(&how.until),
                done: Continuation { text: String::new(), tokens: 0, ended: false, truncated: cut },
            });
        }
        let mut finished: Vec<(usize, Continuation)> = Vec::with_capacity(prompts.len());
        while !texts.is_empty() {
            let taken = texts.len().min(self.sessions);
            let mut active: Vec<Writing> = texts.drain(..taken).collect();
            while !active.is_empty() {
                self.step(&mut active, how)?;
                let is_over = |w: &Writing| w.done.ended || w.done.tokens == how.max_tokens;
                let (over, going): (Vec<_>, Vec<_>) = active.into_iter().partition(is_over);
                active = going;
                for mut writing in over {
                    writing.done.text += &writing.stream.finish();
                    finished.push((writing.index, writing.done));
                }
            }
        }
        finished.sort_by_key(|(index, _)| *index);
        Ok(finished.into_iter().map(|(_, done)| done).collect())
    }

    /// One more token for every text.
    fn step(&mut self, active: &mut [Writing], how: &Continue) -> anyhow::Result<()> {
        let vocab = self.model.config().vocab_size;
        let tokens = active.iter().map(|w| w.next.len() as u64).sum::<u64>();
        self.fed += tokens;
        self.asked += tokens;
        let mut feeds: Vec<Feed<'_>> =
            active.iter_mut().map(|w| Feed { session: &mut w.session, tokens: &w.next }).collect();
        let mut logits = self.writing.extend(self.model, &mut feeds)?.to_vec();
        for (writing, row) in active.iter_mut().zip(logits.chunks_exact_mut(vocab)) {
            if how.max_tokens == 0 {
                writing.done.ended = true;
                continue;
            }
            self.banned.iter().for_each(|t| row[*t as usize] = f32::NEG_INFINITY);
            let token = writing.sampler.sample(row, writing.session.tokens())?;
            if token == END_OF_TEXT_ID || token == IM_END_ID {
                writing.done.ended = true;
                continue;
            }
            writing.done.tokens += 1;
            let shown = writing.stream.push(&self.tokenizer.decode_bytes(&[token]));
            writing.done.text += &shown.text;
            writing.done.ended = shown.stop.is_some();
            writing.next.clear();
            writing.next.push(token);
        }
        Ok(())
    }
}
