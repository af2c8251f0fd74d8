//! What the HTTP side asks of the engine, and what it hears from it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;

use elleci_core::sampler::SamplerOptions;
use tokio::sync::mpsc::UnboundedSender;

use super::error::ApiError;

/// How choices are generated.
#[derive(Clone, Debug)]
pub struct Generate {
    /// Choices a prompt.
    pub copies: usize,
    /// How tokens are chosen; choice i of a prompt has the seed plus i.
    pub sampling: SamplerOptions,
    /// Taken off the logit of a token for each time it has been chosen.
    pub frequency_penalty: f32,
    /// Taken off the logit of a token that has been chosen.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens; -∞ bans one.
    pub bias: Vec<(u32, f32)>,
    /// Tokens at most; 0 reads the prompt and chooses nothing.
    pub max_tokens: usize,
    /// Strings that end a text; they are not part of it.
    pub stops: Vec<String>,
    /// Goes on after a token that ends texts.
    pub ignore_eos: bool,
    /// Log-probabilities of the tokens, with so many of the likeliest at each place.
    pub logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens too, if any are wanted.
    pub echo: bool,
    /// Text is wanted as it comes.
    pub stream: bool,
}

impl Generate {
    /// Whether the prompt's tokens are scored too.
    pub fn scores_prompt(&self) -> bool {
        self.echo && self.logprobs.is_some()
    }
}

/// What is done with a prompt.
#[derive(Clone, Debug)]
pub enum Task {
    /// It is continued.
    Generate(Arc<Generate>),
    /// Its hidden states are averaged.
    Embed,
}

impl Task {
    /// Whether something is wanted of every token of the prompt.
    pub fn wants_every_token(&self) -> bool {
        match self {
            Task::Generate(generate) => generate.scores_prompt(),
            Task::Embed => true,
        }
    }
}

/// One prompt of a request, for all choices that follow it or for some of them.
#[derive(Debug)]
pub struct Job {
    /// Never empty, and all in the vocabulary.
    pub prompt: Arc<[u32]>,
    /// What to do with it.
    pub task: Task,
    /// Which of its choices; one for an embedding.
    pub copies: Range<usize>,
}

impl Job {
    /// The work of a prompt.
    pub fn new(prompt: &[u32], task: Task) -> Job {
        let copies = match &task {
            Task::Generate(generate) => generate.copies,
            Task::Embed => 1,
        };
        Job { prompt: prompt.into(), task, copies: 0..copies }
    }

    /// Takes the first `count` of its choices, at most all.
    pub fn take(&mut self, count: usize) -> Job {
        let end = self.copies.end.min(self.copies.start + count);
        let part = Job { prompt: self.prompt.clone(), task: self.task.clone(), copies: self.copies.start..end };
        self.copies.start = end;
        part
    }
}

/// A request as the engine sees it, shared by its prompts.
#[derive(Debug)]
pub struct Ask {
    /// Where answers go. Closed when nobody waits for them any more.
    pub replies: UnboundedSender<Event>,
    /// When it came.
    pub arrived: Instant,
    /// When it must be over.
    pub deadline: Instant,
    /// The same in seconds, for messages.
    pub timeout_s: f64,
    /// Sequences of it that are being computed.
    pub active: AtomicUsize,
}

impl Ask {
    /// Why it need not go on, if so: `None` as the reason when nobody waits for it.
    pub fn over(&self, now: Instant) -> Option<Option<ApiError>> {
        if self.replies.is_closed() {
            return Some(None);
        }
        (now >= self.deadline).then(|| Some(ApiError::timed_out(self.timeout_s)))
    }

    /// Tells the HTTP side; it may have gone.
    pub fn tell(&self, event: Event) {
        let _ = self.replies.send(event);
    }
}

/// A request with its jobs, on its way to the engine.
#[derive(Debug)]
pub struct Submission {
    /// What they share.
    pub ask: Arc<Ask>,
    /// Its prompts, in order.
    pub jobs: Vec<Job>,
    /// Its place in the queue.
    pub ticket: Ticket,
}

/// A place in the queue, given back when it is dropped.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    /// Takes a place, if fewer than `limit` are taken.
    pub fn take(places: &Arc<AtomicUsize>, limit: usize) -> Option<Ticket> {
        let free = |taken: usize| (taken < limit).then_some(taken + 1);
        places.fetch_update(SeqCst, SeqCst, free).ok()?;
        Some(Ticket(places.clone()))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// The log-probability of a token, with the likeliest tokens at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// Likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, or at a stop string.
    Stop,
    /// It has as many tokens as were asked for, or as the context holds.
    Length,
}

impl End {
    /// As OpenAI calls it.
    pub fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Length => "length",
        }
    }
}

/// Part of a choice, or all of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Text.
    pub text: String,
    /// Scores of its tokens, where they are wanted.
    pub scores: Vec<TokenScore>,
}

/// Tokens of a finished choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Of the prompt, counted with its first choice only.
    pub prompt: usize,
    /// Of these, how many a cached session had taken already.
    pub cached: usize,
    /// Chosen, the one that ended the text included.
    pub chosen: usize,
}

/// What the engine tells of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Scores of a prompt's tokens but the first, before anything else of a choice; again if its choices begin at several times.
    Prompt {
        /// The prompt's index.
        prompt: usize,
        /// One a token from the second on.
        scores: Vec<TokenScore>,
    },
    /// More of a choice; only when the text is wanted as it comes.
    Piece {
        /// Prompt index · copies + copy.
        choice: usize,
        /// What is new.
        piece: Piece,
    },
    /// A choice is complete.
    Done {
        /// As above.
        choice: usize,
        /// What has not been told yet.
        piece: Piece,
        /// Why it ended.
        end: End,
        /// Its tokens.
        count: Count,
    },
    /// A prompt's embedding.
    Embedding {
        /// The prompt's index.
        prompt: usize,
        /// `[d_model]`, of length 1.
        vector: Vec<f32>,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// Nothing more will come.
    Failed(ApiError),
}
