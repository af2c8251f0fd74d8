//! ChatML: dialogues as tokens.
//!
//! `<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n…<|im_end|>`, then `<|endoftext|>` as after every document. A turn's
//! head, its content and the line break after it are tokenised apart, as they are when a model is asked: no merge
//! crosses from what is given to what is to be predicted.

use super::tokenizer::{Cache, END_OF_TEXT_ID, IM_END_ID, IM_START_ID, Tokenizer};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Sets the frame.
    System,
    /// Asks.
    User,
    /// Answers; the only one whose words are training targets.
    Assistant,
}

impl Role {
    /// The name in ChatML.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }

    /// By the names that data sets use.
    pub fn from_name(name: &str) -> Option<Role> {
        match name {
            "system" => Some(Role::System),
            "user" | "human" | "prompter" => Some(Role::User),
            "assistant" | "gpt" | "bot" | "model" => Some(Role::Assistant),
            _ => None,
        }
    }
}

/// A turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Appends the tokens of a dialogue, `<|endoftext|>` included, and for each whether it is a target: the assistant's
/// words and the `<|im_end|>` after them.
pub fn encode(tokenizer: &Tokenizer, turns: &[Turn], cache: &mut Cache, tokens: &mut Vec<u32>, mask: &mut Vec<bool>) {
    for (i, turn) in turns.iter().enumerate() {
        if i > 0 {
            tokenizer.encode_into("\n", cache, tokens);
        }
        tokens.push(IM_START_ID);
        tokenizer.encode_into(turn.role.name(), cache, tokens);
        tokenizer.encode_into("\n", cache, tokens);
        mask.resize(tokens.len(), false);
        tokenizer.encode_into(&turn.content, cache, tokens);
        tokens.push(IM_END_ID);
        mask.resize(tokens.len(), turn.role == Role::Assistant);
    }
    tokens.push(END_OF_TEXT_ID);
    mask.push(false);
}

/// The prompt that asks for the assistant's next turn.
pub fn encode_prompt(tokenizer: &Tokenizer, turns: &[Turn]) -> Vec<u32> {
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    let cache = &mut Cache::default();
    encode(tokenizer, turns, cache, &mut tokens, &mut mask);
    tokens.pop();
    if !turns.is_empty() {
        tokenizer.encode_into("\n", cache, &mut tokens);
    }
    tokens.push(IM_START_ID);
    tokenizer.encode_into(Role::Assistant.name(), cache, &mut tokens);
    tokenizer.encode_into("\n", cache, &mut tokens);
    tokens
}
