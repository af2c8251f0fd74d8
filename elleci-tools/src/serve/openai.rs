//! Responses in the form that OpenAI's clients read.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::job::{Count, End, Piece, TokenScore};
use super::request::{Completion, Prompt};
use super::vocabulary;
use crate::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID, Tokenizer};

/// Which of the two forms an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `/v1/completions`
    Text,
    /// `/v1/chat/completions`
    Chat,
}

/// Everything that the parts of an answer share.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its form.
    pub form: Form,
    /// Of the answer.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Head {
    fn object(&self, chunk: bool) -> &'static str {
        match (self.form, chunk) {
            (Form::Text, _) => "text_completion",
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
        }
    }

    /// A whole answer as JSON. Its choices are written one after the other: as values they are many times as large.
    pub fn answer(&self, choices: impl Iterator<Item = Value>, usage: &Usage) -> String {
        let field = |name: &str, value: Value| format!("\"{name}\":{value},");
        let mut answer = "{".to_string();
        answer += &field("id", self.id.as_str().into());
        answer += &field("object", self.object(false).into());
        answer += &field("created", self.created.into());
        answer += &field("model", self.model.as_str().into());
        answer += "\"choices\":[";
        for (i, choice) in choices.enumerate() {
            // Writing to a string cannot fail.
            let _ = write!(answer, "{}{choice}", if i == 0 { "" } else { "," });
        }
        let _ = write!(answer, "],\"usage\":{}}}", usage.json());
        answer
    }

    /// A part of a streamed answer. With `usage` asked for, every part says that it has none.
    pub fn chunk(&self, choices: Vec<Value>, usage: Option<&Usage>, wanted: bool) -> Value {
        let mut chunk = json!({
            "id": self.id, "object": self.object(true), "created": self.created, "model": self.model, "choices": choices
        });
        if wanted {
            chunk["usage"] = usage.map_or(Value::Null, Usage::json);
        }
        chunk
    }
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage(pub Count);

impl Usage {
    /// Adds a choice.
    pub fn add(&mut self, count: Count) {
        self.0.prompt += count.prompt;
        self.0.cached += count.cached;
        self.0.chosen += count.chosen;
    }

    fn json(&self) -> Value {
        let Count { prompt, cached, chosen } = self.0;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": chosen,
            "total_tokens": prompt + chosen,
            "prompt_tokens_details": { "cached_tokens": cached }
        })
    }
}

/// What a choice looks like so far: log-probabilities of a text say where their tokens begin.
#[derive(Clone, Debug, Default)]
pub struct ChoiceState {
    /// Characters of the tokens told so far.
    offset: usize,
    /// Whether anything has been told.
    begun: bool,
}

/// The text of a prompt.
pub fn prompt_text(tokenizer: &Tokenizer, prompt: &Prompt) -> String {
    prompt.text.clone().unwrap_or_else(|| vocabulary::decode(tokenizer, &prompt.tokens))
}

/// Writes choices.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// The form of the answer.
    pub form: Form,
    /// What was asked.
    pub asked: &'a Completion,
}

impl Writer<'_> {
    fn wants_scores(&self) -> bool {
        self.asked.generate.logprobs.is_some()
    }

    /// A choice of a whole answer. `prompt_scores` are those of the prompt's tokens, if they were wanted.
    pub fn choice(&self, choice: usize, prompt_scores: &[TokenScore], piece: &Piece, end: End) -> Value {
        let mut state = ChoiceState::default();
        match self.form {
            Form::Text => {
                let (mut text, mut scores) = self.echoed(choice, prompt_scores, &mut state);
                text += &piece.text;
                if let Some(scores) = &mut scores {
                    self.add_scores(scores, &piece.scores, &mut state);
                }
                json!({ "index": choice, "text": text, "logprobs": scores, "finish_reason": end.name() })
            }
            Form::Chat => json!({
                "index": choice,
                "message": { "role": "assistant", "content": piece.text, "refusal": null },
                "logprobs": self.chat_scores(&piece.scores),
                "finish_reason": end.name()
            }),
        }
    }

    /// A choice of a part of a streamed answer; the last one of a choice has its end.
    pub fn delta(
        &self,
        choice: usize,
        prompt_scores: &[TokenScore],
        piece: &Piece,
        end: Option<End>,
        state: &mut ChoiceState,
    ) -> Value {
        let finish = end.map(End::name);
        let first = !std::mem::replace(&mut state.begun, true);
        match self.form {
            Form::Text => {
                let (mut text, mut scores) = match first {
                    true => self.echoed(choice, prompt_scores, state),
                    false => (String::new(), self.wants_scores().then(empty_scores)),
                };
                text += &piece.text;
                if let Some(scores) = &mut scores {
                    self.add_scores(scores, &piece.scores, state);
                }
                json!({ "index": choice, "text": text, "logprobs": scores, "finish_reason": finish })
            }
            Form::Chat => {
                let mut delta = json!({});
                if first {
                    delta["role"] = "assistant".into();
                }
                if first || !piece.text.is_empty() {
                    delta["content"] = piece.text.as_str().into();
                }
                let scores = self.chat_scores(&piece.scores);
                json!({ "index": choice, "delta": delta, "logprobs": scores, "finish_reason": finish })
            }
        }
    }

    /// What comes before the text: the prompt, if its echo is wanted, and the scores of its tokens.
    fn echoed(&self, choice: usize, scores: &[TokenScore], state: &mut ChoiceState) -> (String, Option<Value>) {
        let mut listed = self.wants_scores().then(empty_scores);
        if !self.asked.generate.echo {
            return (String::new(), listed);
        }
        let prompt = &self.asked.prompts[choice / self.asked.generate.copies];
        if let Some(listed) = &mut listed {
            // Nothing comes before the first token: it has no probability.
            self.add(listed, prompt.tokens[0], Value::Null, Value::Null, state);
            self.add_scores(listed, scores, state);
        }
        (prompt_text(self.tokenizer, prompt), listed)
    }

    fn add_scores(&self, listed: &mut Value, scores: &[TokenScore], state: &mut ChoiceState) {
        for score in scores {
            let name = |token| vocabulary::name(self.tokenizer, token);
            let mut top: serde_json::Map<String, Value> =
                score.top.iter().map(|(token, logprob)| (name(*token), (*logprob).into())).collect();
            if self.asked.generate.logprobs != Some(0) {
                // The same number where it is among the likeliest.
                top.insert(name(score.token), score.logprob.into());
            }
            self.add(listed, score.token, score.logprob.into(), top.into(), state);
        }
    }

    fn add(&self, listed: &mut Value, token: u32, logprob: Value, top: Value, state: &mut ChoiceState) {
        let entry = [
            ("tokens", vocabulary::name(self.tokenizer, token).into()),
            ("token_logprobs", logprob),
            ("top_logprobs", top),
            ("text_offset", state.offset.into()),
        ];
        for (name, value) in entry {
            if let Some(list) = listed[name].as_array_mut() {
                list.push(value);
            }
        }
        state.offset += vocabulary::characters(&vocabulary::bytes(self.tokenizer, token));
    }

    /// The tokens that are text, with their bytes.
    fn chat_scores(&self, scores: &[TokenScore]) -> Value {
        if !self.wants_scores() {
            return Value::Null;
        }
        let entry = |token: u32, logprob: f64| {
            let bytes = vocabulary::bytes(self.tokenizer, token);
            json!({ "token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes })
        };
        let ends = |token: u32| [END_OF_TEXT_ID, IM_END_ID].contains(&token);
        let content: Vec<Value> = scores
            .iter()
            .filter(|s| !ends(s.token))
            .map(|s| {
                let mut all = entry(s.token, s.logprob);
                all["top_logprobs"] = s.top.iter().map(|(t, l)| entry(*t, *l)).collect();
                all
            })
            .collect();
        json!({ "content": content, "refusal": null })
    }
}

fn empty_scores() -> Value {
    json!({ "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [] })
}
