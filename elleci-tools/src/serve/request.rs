//! Bodies of requests as typed values. Everything that is wrong with one is found here.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use elleci_core::sampler::SamplerOptions;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, kind_of};
use super::job::{Generate, Job, Task};
use super::vocabulary;
use crate::data::chatml::{Role, Turn, encode_prompt};
use crate::data::tokenizer::{END_OF_TEXT_ID, Tokenizer};

/// Prompts of a request at most.
const PROMPTS: usize = 2048;
/// Choices of a prompt at most, as OpenAI has it.
const COPIES: usize = 128;
/// Stop strings of a request at most.
const STOPS: usize = 16;
/// Bytes of a stop string at most: every token is held against all beginnings of them.
const STOP_BYTES: usize = 1000;
/// Likeliest tokens that may be asked for at a place.
const TOP: usize = 20;
/// Tokens of a completion that says nothing about it, as OpenAI has it.
const COMPLETION_TOKENS: usize = 16;

/// What the reading of requests depends on.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens that there are.
    pub vocab_size: usize,
    /// Tokens that prompt and answer together may have.
    pub context: usize,
    /// How tokens are chosen when a request does not say.
    pub sampling: SamplerOptions,
}

/// A prompt with the text that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens; never empty.
    pub tokens: Vec<u32>,
    /// As it was given, where it was text.
    pub text: Option<String>,
}

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// At once.
    Whole,
    /// As it comes.
    Stream {
        /// With the number of tokens at the end.
        usage: bool,
    },
}

/// `/v1/completions`, and what a chat becomes.
#[derive(Clone, Debug)]
pub struct Completion {
    /// What is continued.
    pub prompts: Vec<Prompt>,
    /// How.
    pub generate: Arc<Generate>,
    /// And how the answer is given.
    pub delivery: Delivery,
}

impl Completion {
    /// The work of it.
    pub fn jobs(&self) -> Vec<Job> {
        self.prompts.iter().map(|p| Job::new(&p.tokens, Task::Generate(self.generate.clone()))).collect()
    }
}

/// How embeddings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingFormat {
    /// A list of numbers.
    Float,
    /// Little-endian float32 in base64.
    Base64,
}

/// Reads bodies.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// What is allowed.
    pub limits: &'a Limits,
}

impl Reader<'_> {
    /// A body of `/v1/completions`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn completion(&self, body: &Value) -> Result<Completion, ApiError> {
        let fields = Fields::of(body)?;
        fields.refuse("suffix", |v| v == "")?;
        let prompts = self.prompts(&fields, "prompt")?;
        let mut generate = self.generate(&fields)?;
        generate.logprobs = fields.count("logprobs", TOP)?;
        generate.echo = fields.flag("echo")?;
        let asked = fields.count("max_tokens", 1 << 24)?;
        generate.max_tokens = self.room(&prompts, "prompt", ("max_tokens", asked.or(Some(COMPLETION_TOKENS))))?;
        self.finish(&fields, prompts, generate)
    }

    /// A body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn chat(&self, body: &Value) -> Result<Completion, ApiError> {
        let fields = Fields::of(body)?;
        for name in ["tools", "functions"] {
            fields.refuse(name, |v| v.as_array().is_some_and(Vec::is_empty))?;
        }
        fields.refuse("response_format", |v| v["type"] == "text")?;
        let tokens = encode_prompt(self.tokenizer, &turns(&fields)?);
        let prompts = vec![Prompt { tokens, text: None }];
        let mut generate = self.generate(&fields)?;
        let top = fields.count("top_logprobs", TOP)?;
        generate.logprobs = fields.flag("logprobs")?.then_some(top.unwrap_or(0));
        if top.is_some() && generate.logprobs.is_none() {
            return Err(ApiError::field("top_logprobs", "needs `logprobs` to be true"));
        }
        let either = ["max_completion_tokens", "max_tokens"].into_iter().find(|name| fields.get(name).is_some());
        let name = either.unwrap_or("max_tokens");
        generate.max_tokens = self.room(&prompts, "messages", (name, fields.count(name, 1 << 24)?))?;
        self.finish(&fields, prompts, generate)
    }

    /// A body of `/v1/embeddings`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn embeddings(&self, body: &Value, d_model: usize) -> Result<(Vec<Prompt>, EmbeddingFormat), ApiError> {
        let fields = Fields::of(body)?;
        let prompts = self.prompts(&fields, "input")?;
        self.room(&prompts, "input", ("input", Some(0)))?;
        fields.refuse("dimensions", |v| v.as_u64() == Some(d_model as u64))?;
        let format = match fields.string("encoding_format")? {
            None | Some("float") => EmbeddingFormat::Float,
            Some("base64") => EmbeddingFormat::Base64,
            Some(other) => {
                return Err(ApiError::field("encoding_format", format!("is \"{other}\"; it may be float or base64")));
            }
        };
        Ok((prompts, format))
    }

    /// The text of a body of `/tokenize`.
    ///
    /// # Errors
    /// When there is none.
    pub fn text<'b>(&self, body: &'b Value) -> Result<&'b str, ApiError> {
        let fields = Fields::of(body)?;
        let text = match fields.string("prompt")? {
            Some(text) => Some(text),
            None => fields.string("content")?,
        };
        text.ok_or_else(|| ApiError::field("prompt", "is missing"))
    }

    /// The tokens of a body of `/detokenize`.
    ///
    /// # Errors
    /// When there are none, or they are not in the vocabulary.
    pub fn tokens(&self, body: &Value) -> Result<Vec<u32>, ApiError> {
        match Fields::of(body)?.get("tokens") {
            Some(Value::Array(items)) => self.ids("tokens", items),
            Some(other) => Err(ApiError::field("tokens", format!("must be a list of tokens, not {}", kind_of(other)))),
            None => Err(ApiError::field("tokens", "is missing")),
        }
    }

    /// What chat and completion have in common.
    fn generate(&self, fields: &Fields<'_>) -> Result<Generate, ApiError> {
        let default = self.limits.sampling;
        let either = |a: &str, b: &str| Ok::<_, ApiError>(if fields.get(a).is_some() { a } else { b }.to_string());
        let penalty = either("repetition_penalty", "repeat_penalty")?;
        let window = either("repetition_window", "repeat_last_n")?;
        let sampling = SamplerOptions {
            temperature: fields.number("temperature", 0.0..=100.0)?.unwrap_or(default.temperature),
            top_k: fields.integer("top_k", -1..=1 << 24)?.map_or(default.top_k, |k| k.max(0) as u32),
            // OpenAI's range begins at 0, where the likeliest token alone is left.
            top_p: fields.number("top_p", 0.0..=1.0)?.map_or(default.top_p, |p| p.max(f32::MIN_POSITIVE)),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(default.min_p),
            repetition_penalty: fields.number(&penalty, 0.0..=100.0)?.unwrap_or(default.repetition_penalty),
            repetition_window: fields.count(&window, 1 << 24)?.map_or(default.repetition_window, |n| n as u32),
            seed: fields
                .integer("seed", i64::MIN..=i64::MAX)?
                .filter(|seed| *seed != -1)
                .map_or_else(random_seed, |s| s as u64),
        };
        if sampling.repetition_penalty == 0.0 {
            return Err(ApiError::field(&penalty, "is 0; it must be more, and 1 changes nothing"));
        }
        // Its messages begin with the name of the field.
        sampling.validate().map_err(|e| ApiError::invalid(e.to_string()))?;
        let copies = fields.integer("n", 1..=COPIES as i64)?.unwrap_or(1) as usize;
        fields.refuse("best_of", |v| v.as_u64() == Some(copies as u64))?;
        Ok(Generate {
            copies,
            sampling,
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            bias: self.bias(fields)?,
            max_tokens: 0,
            stops: fields.strings("stop", STOPS, STOP_BYTES)?,
            ignore_eos: fields.flag("ignore_eos")?,
            logprobs: None,
            echo: false,
            stream: false,
        })
    }

    fn finish(
        &self,
        fields: &Fields<'_>,
        prompts: Vec<Prompt>,
        mut generate: Generate,
    ) -> Result<Completion, ApiError> {
        generate.stream = fields.flag("stream")?;
        let usage = match fields.object("stream_options")? {
            Some(options) => options.flag("include_usage")?,
            None => false,
        };
        let delivery = if generate.stream { Delivery::Stream { usage } } else { Delivery::Whole };
        Ok(Completion { prompts, generate: Arc::new(generate), delivery })
    }

    fn bias(&self, fields: &Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
        let Some(value) = fields.get("logit_bias") else { return Ok(Vec::new()) };
        let wrong = |what: String| ApiError::field("logit_bias", what);
        let object = value.as_object().ok_or_else(|| wrong("must be an object of tokens and numbers".into()))?;
        let entry = |(token, bias): (&String, &Value)| {
            let id = token.parse().ok().filter(|id| (*id as usize) < self.limits.vocab_size);
            let id: u32 = id.ok_or_else(|| wrong(format!("holds `{token}`, which is no token")))?;
            match bias.as_f64() {
                Some(-100.0) => Ok((id, f32::NEG_INFINITY)),
                Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((id, bias as f32)),
                _ => Err(wrong(format!("of `{token}` must be a number from -100 to 100"))),
            }
        };
        object.iter().map(entry).collect()
    }

    /// A string, strings, tokens, or lists of tokens.
    fn prompts(&self, fields: &Fields<'_>, name: &str) -> Result<Vec<Prompt>, ApiError> {
        let forms = "must be a string, a list of strings, a list of tokens, or a list of lists of tokens";
        let one = |value: &Value| match value {
            Value::String(text) => Ok(self.text_prompt(text)),
            Value::Array(items) => Ok(Prompt { tokens: self.ids(name, items)?, text: None }),
            _ => Err(ApiError::field(name, forms)),
        };
        let prompts = match fields.get(name) {
            None => return Err(ApiError::field(name, "is missing")),
            Some(Value::Array(items)) if items.first().is_some_and(Value::is_number) => {
                vec![Prompt { tokens: self.ids(name, items)?, text: None }]
            }
            Some(Value::Array(items)) if items.len() > PROMPTS => {
                return Err(ApiError::field(name, format!("holds {} prompts; it may hold {PROMPTS}", items.len())));
            }
            Some(Value::Array(items)) => items.iter().map(one).collect::<Result<_, _>>()?,
            Some(value) => vec![one(value)?],
        };
        if prompts.is_empty() || prompts.iter().any(|p| p.tokens.is_empty()) {
            return Err(ApiError::field(name, "is empty"));
        }
        Ok(prompts)
    }

    /// An empty text is the beginning of a document.
    fn text_prompt(&self, text: &str) -> Prompt {
        let mut tokens = vocabulary::encode(self.tokenizer, text);
        if tokens.is_empty() {
            tokens.push(END_OF_TEXT_ID);
        }
        Prompt { tokens, text: Some(text.to_string()) }
    }

    fn ids(&self, name: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
        let most = self.limits.vocab_size - 1;
        let id = |v: &Value| {
            let id = v.as_u64().filter(|id| *id <= most as u64);
            id.map(|id| id as u32).ok_or_else(|| ApiError::field(name, format!("holds {v}; tokens are 0 to {most}")))
        };
        items.iter().map(id).collect()
    }

    /// How many tokens may be chosen: as many as asked for by a field, else as many as the context holds. A prompt is never cut.
    fn room(&self, prompts: &[Prompt], name: &str, (field, asked): (&str, Option<usize>)) -> Result<usize, ApiError> {
        let context = self.limits.context;
        let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        let wanted = asked.unwrap_or(1);
        if longest + wanted > context {
            let plus = match asked {
                Some(0) => String::new(),
                Some(n) => format!(" and {n} are to be chosen"),
                None => " and leaves no room for an answer".to_string(),
            };
            let message = format!(
                "the context is {context} tokens (--context), and the prompt has {longest}{plus}: it is not cut"
            );
            let wrong = if longest < context && asked != Some(0) { field } else { name };
            return Err(ApiError::too_long(wrong, [longest, context], message));
        }
        Ok(asked.unwrap_or(context - longest))
    }
}

/// The turns of a chat.
fn turns(fields: &Fields<'_>) -> Result<Vec<Turn>, ApiError> {
    let messages = match fields.get("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        Some(_) => return Err(ApiError::field("messages", "must be a list that is not empty")),
        None => return Err(ApiError::field("messages", "is missing")),
    };
    let turn = |(i, message): (usize, &Value)| {
        let at = |name: &str| format!("messages[{i}].{name}");
        let role = match message["role"].as_str() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some(other) => {
                let problem = format!("is \"{other}\"; it may be system, user or assistant");
                return Err(ApiError::field(&at("role"), problem));
            }
            None => return Err(ApiError::field(&at("role"), "must be a string")),
        };
        let content = match &message["content"] {
            Value::String(text) => text.clone(),
            // An answer that called a tool or refused has none.
            Value::Null if role == Role::Assistant => String::new(),
            Value::Array(parts) => parts.iter().map(part).collect::<Option<_>>().ok_or_else(|| {
                ApiError::field(&at("content"), "may hold parts of type text, each with a string `text`, and no others")
            })?,
            _ => return Err(ApiError::field(&at("content"), "must be a string or a list of text parts")),
        };
        Ok(Turn { role, content })
    };
    messages.iter().enumerate().map(turn).collect()
}

fn part(part: &Value) -> Option<&str> {
    part["text"].as_str().filter(|_| part["type"] == "text")
}

/// Another one each time.
fn random_seed() -> u64 {
    // The standard library seeds its hash maps from the system's randomness and a counter; 32 bits are easy to send again.
    RandomState::new().build_hasher().finish() & 0xffff_ffff
}
