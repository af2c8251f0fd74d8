//! A dialogue on one session: every turn computes only what is new.

use std::io;

use anyhow::Context;
use elleci_core::inference::Session;
use elleci_core::sampler::Sampler;

use super::command::Settings;
use crate::data::chatml::{self, Role, Turn};
use crate::data::tokenizer::{Cache, IM_END_ID, Tokenizer};
use crate::run::answer::{Answer, Piece, Request, answer};
use crate::run::model::OpenModel;

/// A message, its answer, and where they begin.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Exchange {
    /// What was said.
    pub message: String,
    /// What was answered.
    pub answer: String,
    /// The first token of the message's turn in [`Dialogue::tokens`].
    pub start: usize,
}

/// The dialogue so far and the session that has computed it.
///
/// The session has taken a prefix of `tokens`; what it lacks is fed with the next message. So whatever is taken back
/// or restored, the next answer follows from `tokens` alone.
pub struct Dialogue<'m> {
    pub(super) open: &'m OpenModel,
    tokenizer: &'m Tokenizer,
    pub(super) session: Session,
    empty: Session,
    pub(super) sampler: Sampler,
    /// The system turn.
    pub system: Option<String>,
    /// All complete exchanges.
    pub exchanges: Vec<Exchange>,
    /// All turns as tokens.
    pub tokens: Vec<u32>,
    /// The session as it was before the last exchange.
    before_last: Option<Session>,
    banned: Vec<u32>,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    context: usize,
}

impl<'m> Dialogue<'m> {
    /// A dialogue that begins with the system turn, if there is one.
    ///
    /// # Errors
    /// A model without tokenizer.
    pub fn new(
        open: &'m OpenModel,
        sampler: Sampler,
        system: Option<String>,
        max_tokens: usize,
        context: usize,
    ) -> anyhow::Result<Dialogue<'m>> {
        let session = Session::new(open.packed())?;
        let mut dialogue = Dialogue {
            open,
            empty: session.clone(),
            session,
            tokenizer: open.need_tokenizer()?,
            sampler,
            system,
            exchanges: Vec::new(),
            tokens: Vec::new(),
            before_last: None,
            banned: open.banned(false),
            max_tokens,
            context,
        };
        dialogue.reset();
        Ok(dialogue)
    }

    /// Forgets all exchanges.
    pub fn reset(&mut self) {
        self.exchanges.clear();
        self.tokens.clear();
        if let Some(system) = &self.system {
            let turn = Turn { role: Role::System, content: system.clone() };
            let mut mask = Vec::new();
            chatml::encode(self.tokenizer, &[turn], &mut Cache::default(), &mut self.tokens, &mut mask);
            // A dialogue goes on: no end of text yet.
            self.tokens.pop();
        }
        self.forget_session();
    }

    /// An empty session: everything is computed anew with the next message.
    fn forget_session(&mut self) {
        self.session.rewind(&self.empty);
        self.before_last = None;
    }

    /// What `/set` changes.
    pub fn settings(&self) -> Settings {
        Settings { sampling: *self.sampler.options(), max_tokens: self.max_tokens }
    }

    /// Changes them.
    ///
    /// # Errors
    /// Options without a meaning.
    pub fn set(&mut self, settings: Settings) -> anyhow::Result<()> {
        self.sampler.set_options(settings.sampling)?;
        self.max_tokens = settings.max_tokens;
        Ok(())
    }

    /// Says something; the answer goes to `show` as it comes. Without an answer nothing has been said.
    ///
    /// # Errors
    /// A context that is full, and whatever [`answer`] reports.
    pub fn say(&mut self, message: &str, show: &mut dyn FnMut(&str) -> io::Result<()>) -> anyhow::Result<Answer> {
        let start = self.tokens.len();
        let mark = self.session.clone();
        if start > 0 {
            self.tokenizer.encode_into("\n", &mut Cache::default(), &mut self.tokens);
        }
        let turn = Turn { role: Role::User, content: message.to_string() };
        self.tokens.extend(chatml::encode_prompt(self.tokenizer, &[turn]));
        let request = Request {
            max_tokens: self.max_tokens,
            context: self.context,
            ends: self.open.ends(),
            stops: &[],
            banned: &self.banned,
        };
        let prompt = &self.tokens[self.session.position()..];
        let mut show = |piece: Piece<'_>| show(piece.text);
        match answer(self.open, &mut self.session, &mut self.sampler, &request, prompt, &mut show) {
            Ok(answer) => {
                self.tokens.extend(&answer.tokens);
                self.tokens.push(IM_END_ID);
                let message = message.to_string();
                self.exchanges.push(Exchange { message, answer: answer.text.clone(), start });
                self.before_last = Some(mark);
                Ok(answer)
            }
            Err(e) => {
                self.tokens.truncate(start);
                self.session.rewind(&mark);
                Err(e).context("/undo takes the last exchange back, /reset begins anew")
            }
        }
    }

    /// Takes the last exchange back and returns its message.
    pub fn undo(&mut self) -> Option<String> {
        let exchange = self.exchanges.pop()?;
        self.tokens.truncate(exchange.start);
        match self.before_last.take() {
            Some(mark) => self.session.rewind(&mark),
            // Only the last exchange has a mark, for it keeps every Mamba state: what is left is computed again.
            None => self.forget_session(),
        }
        Some(exchange.message)
    }

    /// Takes over what a file held.
    pub(super) fn restore(
        &mut self,
        (system, exchanges, tokens): (Option<String>, Vec<Exchange>, Vec<u32>),
        sampler: Sampler,
        session: Session,
    ) {
        self.before_last = None;
        self.session = session;
        self.sampler = sampler;
        (self.system, self.exchanges, self.tokens) = (system, exchanges, tokens);
    }

    /// Hash of the tokenizer.
    pub(super) fn tokenizer_sha256(&self) -> &str {
        self.tokenizer.sha256()
    }
}
