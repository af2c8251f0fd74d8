//! One text from one prompt: what `generate` and every turn of `chat` do.

use std::io;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::bail;
use elleci_core::generate::{GenerateOptions, StopReason, generate};
use elleci_core::inference::Session;
use elleci_core::sampler::Sampler;
use serde::Serialize;

use super::interrupt::Generating;
use super::model::OpenModel;
use super::text::TextStream;

/// What a text may be.
pub struct Request<'a> {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Tokens that prompt and text together may have.
    pub context: usize,
    /// Token sequences that end the text.
    pub ends: &'a [&'a [u32]],
    /// Strings that end the text.
    pub stops: &'a [String],
    /// Tokens that must not be chosen.
    pub banned: &'a [u32],
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// By itself: an end token.
    EndOfText,
    /// A stop string was met.
    StopString,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The context is full.
    Context,
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads the output any more.
    Closed,
}

/// Tokens and the time they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Pace {
    /// How many.
    pub tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
    /// Quotient of the two; 0 where there is none.
    pub tokens_per_second: f64,
}

impl Pace {
    /// `tokens` in `seconds`.
    pub fn new(tokens: usize, seconds: f64) -> Pace {
        let tokens_per_second = if tokens > 0 && seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        Pace { tokens, seconds, tokens_per_second }
    }
}

/// A text, how it ended and how long it took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The text; empty without a tokenizer.
    pub text: String,
    /// Its tokens. The last ones may belong to a stop string.
    pub tokens: Vec<u32>,
    /// How it ended.
    pub end: End,
    /// Of the prompt.
    pub prefill: Pace,
    /// Of the steps after the prompt's: one a token but the first, and one for the token that ended the text.
    pub decode: Pace,
}

/// A piece of a text that has become certain.
pub struct Piece<'a> {
    /// The token that made it certain; `None` at the end.
    pub token: Option<u32>,
    /// The text, without a tokenizer empty.
    pub text: &'a str,
}

/// A long prompt is fed in parts of this many tokens, so that Ctrl-C does not have to wait for all of it. A multiple of the
/// runs that a session cuts its input into anyway, so that no pass is wasted; and no part is a single token, so that no bit changes.
const PART: usize = 1024;

/// Continues `prompt`, which must fit the context. `show` gets text as it becomes certain.
///
/// # Errors
/// A prompt that is empty or too long, a token that is not in the vocabulary, logits that are not numbers; what `show`
/// returns but for a closed pipe.
pub fn answer(
    open: &OpenModel,
    session: &mut Session,
    sampler: &mut Sampler,
    request: &Request<'_>,
    prompt: &[u32],
    show: &mut dyn FnMut(Piece<'_>) -> io::Result<()>,
) -> anyhow::Result<Answer> {
    let past = session.position() + prompt.len();
    if past > request.context {
        bail!(
            "the prompt brings the context to {past} tokens, and its limit is {}: shorten it, or raise --context",
            request.context
        );
    }
    let room = request.context - past;
    let tokenizer = open.tokenizer();
    let interrupt = Generating::begin();
    let (mut text, mut stream) = (String::new(), TextStream::new(request.stops));
    let (mut met_stop, mut failed) = (false, None);
    let start = Instant::now();
    let fed = feed_parts(open, session, prompt, &interrupt)?;
    if interrupt.stopped() {
        let prefill = Pace::new(fed, start.elapsed().as_secs_f64());
        let decode = Pace::default();
        return Ok(Answer { text, tokens: Vec::new(), end: End::Interrupted, prefill, decode });
    }
    let (mut first, mut latest, mut choices) = (None, start, 0usize);
    let mut hook = |logits: &mut [f32], _: &[u32]| {
        latest = Instant::now();
        first.get_or_insert(latest);
        choices += 1;
        for &token in request.banned {
            logits[token as usize] = f32::NEG_INFINITY;
        }
    };
    let max_tokens = request.max_tokens.min(room);
    let options = GenerateOptions { max_tokens, stop: request.ends, hook: Some(&mut hook) };
    let generated = generate(open.packed(), session, sampler, options, &prompt[fed..], |token| {
        let bytes = tokenizer.map(|t| t.decode_bytes(&[token])).unwrap_or_default();
        let shown = stream.push(&bytes);
        met_stop = shown.stop.is_some();
        text += &shown.text;
        failed = show(Piece { token: Some(token), text: &shown.text }).err();
        let over = failed.is_some() || met_stop || interrupt.stopped();
        if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let rest = stream.finish();
    text += &rest;
    if !rest.is_empty() && failed.is_none() {
        failed = show(Piece { token: None, text: &rest }).err();
    }
    let end = match (generated.reason, failed) {
        (_, Some(e)) if e.kind() == io::ErrorKind::BrokenPipe => End::Closed,
        (_, Some(e)) => return Err(e.into()),
        (StopReason::Cancelled, None) if met_stop => End::StopString,
        (StopReason::Cancelled, None) => End::Interrupted,
        (StopReason::Stop(_), None) => End::EndOfText,
        (StopReason::MaxTokens, None) if room < request.max_tokens => End::Context,
        (StopReason::MaxTokens, None) => End::MaxTokens,
    };
    let first = first.unwrap_or_else(Instant::now);
    Ok(Answer {
        text,
        prefill: Pace::new(prompt.len(), first.duration_since(start).as_secs_f64()),
        decode: Pace::new(choices.saturating_sub(1), latest.saturating_duration_since(first).as_secs_f64()),
        tokens: generated.tokens,
        end,
    })
}

/// Feeds all of a prompt but its last part; returns how many tokens that were.
fn feed_parts(
    open: &OpenModel,
    session: &mut Session,
    prompt: &[u32],
    interrupt: &Generating,
) -> anyhow::Result<usize> {
    let mut fed = 0;
    while prompt.len() - fed > PART + 1 && !interrupt.stopped() {
        session.extend(open.packed(), &prompt[fed..fed + PART])?;
        fed += PART;
    }
    Ok(fed)
}
