//! From the engine's events to a response, at once or as they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderValue, StatusCode};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use tokio::sync::mpsc::UnboundedReceiver;

use super::account::Account;
use super::error::ApiError;
use super::job::{End, Event, Piece, TokenScore};
use super::openai::{ChoiceState, Head, Usage, Writer};
use super::request::Completion;
use super::{Loaded, json_text};

/// A comment is sent when nothing else has been for so long: proxies and clients give up on silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Log-probabilities from which on an answer is written by a thread of its own: it would hold up everyone else.
const LARGE_ANSWER: usize = 4096;

/// Waits for all choices.
///
/// # Errors
/// What the engine reports.
pub async fn collect(
    loaded: Arc<Loaded>,
    head: Head,
    asked: Completion,
    mut events: UnboundedReceiver<Event>,
    account: &Account,
) -> Result<Response, ApiError> {
    let mut choices: Vec<Option<(Piece, End)>> = vec![None; asked.prompts.len() * asked.generate.copies];
    let mut scores: Vec<Vec<TokenScore>> = vec![Vec::new(); asked.prompts.len()];
    let (mut left, mut usage) = (choices.len(), Usage::default());
    while left > 0 {
        match events.recv().await {
            Some(Event::Prompt { prompt, scores: found }) => scores[prompt] = found,
            Some(Event::Done { choice, piece, end, count }) => {
                choices[choice] = Some((piece, end));
                usage.add(count);
                account.count(count);
                left -= 1;
            }
            Some(Event::Failed(error)) => return Err(error),
            Some(Event::Piece { .. } | Event::Embedding { .. }) => {}
            None => return Err(ApiError::internal("the engine has ended")),
        }
    }
    let per_place = 1 + asked.generate.logprobs.unwrap_or(0);
    let echoed = scores.iter().map(Vec::len).sum::<usize>() * asked.generate.copies;
    let places = echoed + choices.iter().flatten().map(|(piece, _)| piece.scores.len()).sum::<usize>();
    let write = move || {
        let writer = Writer { tokenizer: loaded.tokenizer(), form: head.form, asked: &asked };
        let copies = asked.generate.copies;
        let written = choices.iter().enumerate().filter_map(|(choice, done)| {
            let (piece, end) = done.as_ref()?;
            Some(writer.choice(choice, &scores[choice / copies], piece, *end))
        });
        json_text(StatusCode::OK, head.answer(written, &usage))
    };
    if places * per_place < LARGE_ANSWER {
        return Ok(write());
    }
    tokio::task::spawn_blocking(write).await.map_err(|_| ApiError::internal("writing the answer failed"))
}

/// An answer as server-sent events: `data: {chunk}`, …, `data: [DONE]`.
pub fn stream(
    loaded: Arc<Loaded>,
    head: Head,
    asked: Completion,
    events: UnboundedReceiver<Event>,
    account: Arc<Account>,
    usage_wanted: bool,
) -> Response {
    let choices = asked.prompts.len() * asked.generate.copies;
    let streaming = Streaming {
        scores: vec![Vec::new(); asked.prompts.len()],
        states: vec![ChoiceState::default(); choices],
        left: choices,
        usage: Usage::default(),
        ready: VecDeque::new(),
        over: false,
        usage_wanted,
        loaded,
        head,
        asked,
        events,
        account,
    };
    let stream = unfold(streaming, |mut streaming| async move {
        let data = streaming.next().await?;
        Some((Ok::<_, Infallible>(sse::Event::default().data(data)), streaming))
    });
    let mut response = Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies must not gather it.
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Streaming {
    loaded: Arc<Loaded>,
    head: Head,
    asked: Completion,
    events: UnboundedReceiver<Event>,
    account: Arc<Account>,
    usage_wanted: bool,
    /// Of the prompts
    scores: Vec<Vec<TokenScore>>,
    states: Vec<ChoiceState>,
    /// Choices that are not complete
    left: usize,
    usage: Usage,
    /// Data to be sent
    ready: VecDeque<String>,
    over: bool,
}

impl Streaming {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() {
            if self.over {
                return None;
            }
            match self.events.recv().await {
                Some(event) => self.take(event),
                None => self.take(Event::Failed(ApiError::internal("the engine has ended"))),
            }
        }
        self.ready.pop_front()
    }

    fn take(&mut self, event: Event) {
        let (choice, piece, end) = match event {
            Event::Prompt { prompt, scores } => {
                self.scores[prompt] = scores;
                return;
            }
            Event::Piece { choice, piece } => (choice, piece, None),
            Event::Done { choice, piece, end, count } => {
                self.usage.add(count);
                self.account.count(count);
                self.left -= 1;
                (choice, piece, Some(end))
            }
            Event::Failed(error) => {
                self.ready.push_back(error.body().to_string());
                self.over = true;
                return;
            }
            Event::Embedding { .. } => return,
        };
        let writer = Writer { tokenizer: self.loaded.tokenizer(), form: self.head.form, asked: &self.asked };
        let scores = &self.scores[choice / self.asked.generate.copies];
        let delta = writer.delta(choice, scores, &piece, end, &mut self.states[choice]);
        self.ready.push_back(self.head.chunk(vec![delta], None, self.usage_wanted).to_string());
        if self.left == 0 {
            if self.usage_wanted {
                self.ready.push_back(self.head.chunk(Vec::new(), Some(&self.usage), true).to_string());
            }
            self.ready.push_back("[DONE]".to_string());
            self.over = true;
        }
    }
}
