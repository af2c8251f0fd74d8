//! Tokens as text in requests and responses.

use crate::data::tokenizer::{Cache, SPECIALS, Tokenizer};

/// The tokens of a text in which the names of special tokens mean those tokens, as Hugging Face's tokenizers read it. What a user
/// says in a chat is not read so: it cannot end its own turn.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let (mut tokens, mut words, mut rest) = (Vec::new(), Cache::default(), text);
    while let Some((at, id, special)) = first_special(rest) {
        tokenizer.encode_into(&rest[..at], &mut words, &mut tokens);
        tokens.push(id);
        rest = &rest[at + special.len()..];
    }
    tokenizer.encode_into(rest, &mut words, &mut tokens);
    tokens
}

fn first_special(text: &str) -> Option<(usize, u32, &'static str)> {
    // They all begin so: text without it is looked at once.
    let begin = text.find("<|")?;
    let find = |(id, special): (u32, &'static str)| text[begin..].find(special).map(|at| (begin + at, id, special));
    (0..).zip(SPECIALS).filter_map(find).min()
}

/// The bytes of a token; of a special one those of its name.
pub fn bytes(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    match SPECIALS.get(token as usize) {
        Some(name) => name.as_bytes().to_vec(),
        None if token as usize >= tokenizer.config().tokens => format!("<|{token}|>").into_bytes(),
        None => tokenizer.decode_bytes(&[token]),
    }
}

/// The text of tokens, special ones by name; bytes that are no text become U+FFFD.
pub fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let all: Vec<u8> = tokens.iter().flat_map(|t| bytes(tokenizer, *t)).collect();
    String::from_utf8_lossy(&all).into_owned()
}

/// A token as a key of a JSON object: different tokens have different names, so that one that is no text by itself is written as
/// its bytes.
pub fn name(tokenizer: &Tokenizer, token: u32) -> String {
    match String::from_utf8(bytes(tokenizer, token)) {
        Ok(text) => text,
        Err(e) => {
            let escaped: String = e.as_bytes().iter().map(|b| format!("\\x{b:02x}")).collect();
            format!("bytes:{escaped}")
        }
    }
}

/// Characters that bytes add to a text, those that only continue one not counted.
pub fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b & 0xc0 != 0x80).count()
}
