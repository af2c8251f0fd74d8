//! Advancing sessions, one or several at once.

use alloc::vec::Vec;

use super::pass::{Call, Constants, Outputs, Scratch, Sessions, Visit};
use super::{InferenceError, Session};
use crate::archive::PackedModel;
use crate::par::{self, Exclusive};

/// Tokens for one session.
#[derive(Debug)]
pub struct Feed<'a> {
    /// The sequence.
    pub session: &'a mut Session,
    /// What comes next in it.
    pub tokens: &'a [u32],
}

/// Tokens that a session would have next, without taking them.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The sequence, which stays as it is.
    pub session: &'a Session,
    /// What might come next in it.
    pub tokens: &'a [u32],
}

/// What a call computes for a feed, besides its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Nothing: more of the sequence is to come.
    Nothing,
    /// The logits `[vocab_size]` after the last token.
    Last,
    /// The logits after every token.
    Each,
    /// The logits after every token from the one with this index on.
    From(usize),
    /// What the head would read at every token: the residual stream after the final norm, `[d_model]`.
    Hidden,
}

/// Working memory for advancing sessions, one or several at once. It holds no state between calls.
#[derive(Debug, Default)]
pub struct Batch {
    /// One a thread that takes passes by itself
    scratch: Vec<Scratch>,
    constants: Option<Constants>,
    logits: Vec<f32>,
    one_form: bool,
}

impl Batch {
    /// Empty; memory is taken as it is needed.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// The same, with one form of attention for everything: the bits of a sequence do not depend on how it is cut into calls. For
    /// scoring: a call with a single token for a sequence expands its whole context, as one with several does.
    pub fn with_one_form(self) -> Batch {
        Batch { one_form: true, ..self }
    }

    /// The logits of the last call to [`Batch::extend`], `[feeds, vocab_size]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Advances every session by its tokens; returns the logits `[feeds, vocab_size]` after the last of each.
    ///
    /// # Errors
    /// A token that is not in the vocabulary, a feed without tokens, a session of another model. All sessions are unchanged.
    pub fn extend(&mut self, model: PackedModel<'_>, feeds: &mut [Feed<'_>]) -> Result<&[f32], InferenceError> {
        let vocab = model.config().vocab_size;
        let mut logits = core::mem::take(&mut self.logits);
        logits.resize(feeds.len() * vocab, 0.0);
        let done = self.extend_with(
            model,
            feeds,
            |_| Output::Last,
            |feed, _, row| logits[feed * vocab..(feed + 1) * vocab].copy_from_slice(row),
        );
        self.logits = logits;
        done.map(|()| &self.logits[..])
    }

    /// As [`Batch::extend`], with the logits after every token: `visit(feed, index, logits)` is called once for each, in order
    /// within a feed, from any thread but never twice at a time. It should be short: threads that wait for it stay awake. After a panic in it no
    /// more outputs come, and the sessions can only be rewound.
    ///
    /// # Errors
    /// As [`Batch::extend`].
    pub fn extend_each(
        &mut self,
        model: PackedModel<'_>,
        feeds: &mut [Feed<'_>],
        visit: impl FnMut(usize, usize, &[f32]) + Send,
    ) -> Result<(), InferenceError> {
        self.extend_with(model, feeds, |_| Output::Each, visit)
    }

    /// As [`Batch::extend_each`], with an output of its own for every feed: `outputs(feed)` says which, and `visit` gets those
    /// alone.
    ///
    /// # Errors
    /// As [`Batch::extend`].
    pub fn extend_with(
        &mut self,
        model: PackedModel<'_>,
        feeds: &mut [Feed<'_>],
        outputs: impl Fn(usize) -> Output + Sync,
        visit: impl FnMut(usize, usize, &[f32]) + Send,
    ) -> Result<(), InferenceError> {
        // With whether a call of it has begun: after a panic it is not called again.
        let visit = Exclusive::new((visit, false));
        self.run(model, feeds, Sessions::Advance, &outputs, &|feed, index, row| {
            let (visit, begun) = &mut *visit.take();
            if !core::mem::replace(begun, true) {
                visit(feed, index, row);
                *begun = false;
            }
        })
    }

    /// The outputs that [`Batch::extend_with`] would give, with sessions that stay as they are: for scoring what may follow. Their states
    /// are not written. `visit` is called by several threads at a time, for one probe in order.
    ///
    /// # Errors
    /// As [`Batch::extend`].
    pub fn probe(
        &mut self,
        model: PackedModel<'_>,
        probes: &[Probe<'_>],
        outputs: impl Fn(usize) -> Output + Sync,
        visit: impl Fn(usize, usize, &[f32]) + Sync,
    ) -> Result<(), InferenceError> {
        let mut sessions: Vec<Session> = probes.iter().map(|p| p.session.clone()).collect();
        let feeds = sessions.iter_mut().zip(probes);
        let mut feeds: Vec<Feed<'_>> = feeds.map(|(session, p)| Feed { session, tokens: p.tokens }).collect();
        self.run(model, &mut feeds, Sessions::Discard, &outputs, &visit)
    }

    fn run(
        &mut self,
        model: PackedModel<'_>,
        feeds: &mut [Feed<'_>],
        sessions: Sessions,
        outputs: &Outputs<'_>,
        visit: &Visit<'_>,
    ) -> Result<(), InferenceError> {
        check(model, feeds)?;
        let Batch { scratch, constants, one_form, .. } = self;
        let constants = match constants {
            Some(known) if known.fingerprint == model.fingerprint() => known,
            _ => constants.insert(Constants::new(model)),
        };
        let call = Call { model, constants, sessions, one_form: *one_form };
        par::together(|| call.run(scratch, feeds, outputs, visit));
        Ok(())
    }
}

/// Everything that can go wrong, before anything changes.
fn check(model: PackedModel<'_>, feeds: &[Feed<'_>]) -> Result<(), InferenceError> {
    let c = model.config();
    let mut row = Vec::new();
    for feed in feeds {
        if feed.session.fingerprint != model.fingerprint() {
            return Err(InferenceError::OtherModel);
        }
        if feed.session.interrupted {
            return Err(InferenceError::Interrupted);
        }
        if feed.tokens.is_empty() {
            return Err(InferenceError::NoTokens);
        }
        for &token in feed.tokens {
            if token as usize >= c.vocab_size {
                return Err(InferenceError::Token { token, vocab_size: c.vocab_size });
            }
            model.verify_row(model.layout().tok_emb(), token as usize, &mut row)?;
        }
    }
    Ok(())
}
