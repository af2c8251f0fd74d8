//! Training the tokenizer.
//!
//! The merges come from the corpus (trainer of the `tokenizers` crate). Then the merges that the listed words still
//! lack are appended, at the lowest ranks: they apply only where no merge of the corpus does, so other words are cut as
//! before or better, which an added token, searched for anywhere in the text, would not guarantee. The vocabulary stays at
//! its size: as many of the corpus' last merges give way.

use super::{Encoder, SPECIALS, Tokenizer, TokenizerConfig, pieces};
use anyhow::{Context, Result, anyhow, ensure};
use std::collections::{HashMap, HashSet};
use tokenizers::models::bpe::{BPE, BpeTrainer, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Trainer};

use crate::data::chatml::Role;
use crate::data::shards::{MAX_VOCAB, sha256_hex};
use crate::exit::usage;

/// The commonest Italian words, commonest first.
pub const WORDS: &str = include_str!("../italian-words.txt");

/// Bytes of the longest token: runs of dashes and the like would fill the vocabulary otherwise.
const MAX_TOKEN_BYTES: usize = 32;
/// Bytes of the longest listed word: what is longer is no word but a file of another kind, and would take as many merges.
const MAX_WORD_BYTES: usize = 256;
/// Tokens that every vocabulary has: the special ones and the bytes.
const SMALLEST: usize = SPECIALS.len() + 256;

/// What [`train_tokenizer`] makes.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Tokens, the special ones and the 256 bytes included. A small corpus may give fewer.
    pub tokens: usize,
    /// Rows of the embedding; at least `tokens`.
    pub vocab_size: usize,
    /// Words that must be one token, with a space before them and without.
    pub words: Vec<String>,
}

impl TrainOptions {
    /// `tokens` padded to `vocab_size`, with the first [`default_word_count`] of the common Italian words and the roles
    /// of ChatML, which stand in every turn of a dialogue.
    pub fn new(tokens: usize, vocab_size: usize) -> TrainOptions {
        let roles = [Role::System, Role::User, Role::Assistant].map(Role::name);
        let italian = words(WORDS).take(default_word_count(tokens));
        let words = italian.chain(roles).map(str::to_string).collect();
        TrainOptions { tokens, vocab_size, words }
    }

    /// What [`train_tokenizer`] would refuse whatever the text.
    ///
    /// # Errors
    /// Wrong usage: sizes that do not fit, or a word that cannot be a token.
    pub fn validate(&self) -> Result<()> {
        let TrainOptions { tokens, vocab_size, words } = self;
        if *tokens < SMALLEST || *tokens > MAX_VOCAB {
            let range = format!("{SMALLEST} (specials and bytes) to {MAX_VOCAB}");
            return Err(usage(format!("the vocabulary is {tokens}; it must be {range}")));
        }
        if vocab_size < tokens || *vocab_size > MAX_VOCAB {
            return Err(usage(format!(
                "padding to {vocab_size} does not fit a vocabulary of {tokens}; it must be {tokens} to {MAX_VOCAB}"
            )));
        }
        for word in words {
            if word.len() > MAX_WORD_BYTES {
                let (shown, bytes) = (shown(word), word.len());
                return Err(usage(format!(
                    "the word `{shown}` has {bytes} bytes; a listed word (one a line) has at most {MAX_WORD_BYTES}"
                )));
            }
            if [format!(" {word}"), word.clone()].iter().any(|form| pieces(form).count() != 1) {
                return Err(usage(format!(
                    "the word `{}` is split before merges apply; it cannot be one token",
                    shown(word)
                )));
            }
        }
        Ok(())
    }
}

/// A word as messages have it: its beginning, if it is long.
fn shown(word: &str) -> String {
    const CHARS: usize = 40;
    match word.char_indices().nth(CHARS) {
        Some((at, _)) => format!("{}…", &word[..at]),
        None => word.to_string(),
    }
}

/// The words of a list: one a line, `#` starts a comment.
pub fn words(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(|l| l.split('#').next().unwrap_or_default().trim()).filter(|w| !w.is_empty())
}

/// How many of the common words a vocabulary guarantees: one in 32 tokens (128 words of 4,096; all from 12,800 on), so
/// that even if each needed both its forms, they took a sixteenth of the vocabulary plus their parts.
pub fn default_word_count(tokens: usize) -> usize {
    tokens / 32
}

/// Trains a byte-level BPE on `texts`. The result depends on the texts alone, not on their order or on threads.
///
/// # Errors
/// Sizes that do not fit, an empty corpus, or a listed word that is not one token in the end (the message lists them).
pub fn train_tokenizer(texts: impl Iterator<Item = String> + Send, options: &TrainOptions) -> Result<Tokenizer> {
    options.validate()?;
    let mut builder = Builder::new(corpus_merges(texts, options.tokens)?);
    let forms: Vec<String> = options.words.iter().flat_map(|w| [format!(" {w}"), w.clone()]).collect();
    let merges = builder.complete(&forms, options.tokens - SMALLEST)?;
    let json = to_json(&merges)?;
    let config = TokenizerConfig {
        vocab_size: options.vocab_size,
        tokens: SMALLEST + merges.iter().map(|(a, b)| format!("{a}{b}")).collect::<HashSet<_>>().len(),
        tokenizer_sha256: sha256_hex(json.as_bytes()),
        single_token_words: options.words.clone(),
    };
    let tokenizer = Tokenizer::from_json(json.into_bytes(), Some(config))?;
    let failed: Vec<String> =
        forms.iter().filter(|f| !tokenizer.is_single_token(f)).map(|f| format!("`{}`", shown(f))).collect();
    ensure!(failed.is_empty(), "these words are not one token after training: {}", failed.join(", "));
    Ok(tokenizer)
}

/// The merges that the corpus alone would give a vocabulary of `tokens`.
fn corpus_merges(texts: impl Iterator<Item = String> + Send, tokens: usize) -> Result<Vec<(String, String)>> {
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(tokens)
        .min_frequency(2)
        .max_token_length(Some(MAX_TOKEN_BYTES))
        .special_tokens(SPECIALS.map(|s| AddedToken::from(s, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let chars = chars_of_bytes();
    let to_chars = |piece: &str| piece.bytes().map(|b| chars[b as usize]).collect::<String>();
    let mut empty = true;
    let texts = texts.inspect(|t| empty &= t.trim().is_empty());
    trainer.feed(texts, |text| Ok(pieces(text).map(to_chars).collect())).map_err(|e| anyhow!("{e}"))?;
    ensure!(!empty, "the corpus holds no text; a tokenizer needs some to learn from");
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(|e| anyhow!("training the tokenizer: {e}"))?;
    let value = serde_json::to_value(&model)?;
    let merges = value.get("merges").and_then(|m| m.as_array()).context("the trainer gave no merges")?;
    let pair = |m: &serde_json::Value| Some((m.get(0)?.as_str()?.to_string(), m.get(1)?.as_str()?.to_string()));
    merges.iter().map(|m| pair(m).with_context(|| format!("unexpected merge {m}"))).collect()
}

/// Appends merges for words to a prefix of the corpus' merges.
struct Builder {
    corpus: Vec<(String, String)>,
}

/// Merges under construction, with ids that only serve to encode.
struct Merges {
    list: Vec<(String, String)>,
    ids: HashMap<String, u32>,
    texts: Vec<String>,
}

impl Merges {
    fn new() -> Merges {
        let texts: Vec<String> = chars_of_bytes().iter().map(char::to_string).collect();
        let ids = texts.iter().cloned().zip(0..).collect();
        Merges { list: Vec::new(), ids, texts }
    }

    fn push(&mut self, pair: &(String, String)) {
        let merged = format!("{}{}", pair.0, pair.1);
        if !self.ids.contains_key(&merged) {
            self.ids.insert(merged.clone(), self.texts.len() as u32);
            self.texts.push(merged);
        }
        self.list.push(pair.clone());
    }

    /// Tokens made by merges.
    fn tokens(&self) -> usize {
        self.texts.len() - 256
    }

    fn encoder(&self) -> Encoder {
        let ids = self.list.iter().map(|(a, b)| (self.ids[a], self.ids[b], self.ids[&format!("{a}{b}")]));
        Encoder::new(std::array::from_fn(|b| b as u32), ids)
    }

    fn encode(&self, encoder: &Encoder, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        encoder.encode_piece(text, &mut out);
        out
    }
}

impl Builder {
    fn new(corpus: Vec<(String, String)>) -> Builder {
        Builder { corpus }
    }

    /// The first `kept` corpus merges and those that the words need after them.
    fn with_words(&self, kept: usize, forms: &[String]) -> Merges {
        let mut merges = Merges::new();
        self.corpus[..kept].iter().for_each(|m| merges.push(m));
        let mut encoder = merges.encoder();
        for form in forms {
            loop {
                let tokens = merges.encode(&encoder, form);
                let [left, right, ..] = tokens[..] else { break };
                let pair = (merges.texts[left as usize].clone(), merges.texts[right as usize].clone());
                merges.push(&pair);
                // The ids of the two sides are stable, so the encoder only grows by the new pair.
                let merged = merges.ids[&format!("{}{}", pair.0, pair.1)];
                encoder.push(left, right, merged);
            }
        }
        merges
    }

    /// Merges for exactly `room` tokens (fewer if the corpus has no more) in which every form is one token.
    fn complete(&mut self, forms: &[String], room: usize) -> Result<Vec<(String, String)>> {
        self.corpus.truncate(room);
        let mut kept = self.corpus.len();
        let mut merges = loop {
            let merges = self.with_words(kept, forms);
            let over = merges.tokens().saturating_sub(room);
            if over == 0 {
                break merges;
            }
            // A dropped merge may itself be needed by a word, so one pass may not be enough; it always advances.
            ensure!(
                kept > 0,
                "a vocabulary of {} has no room for the {} listed words; list fewer of them",
                room + SMALLEST,
                forms.len() / 2
            );
            kept = kept.saturating_sub(over);
        };
        for pair in &self.corpus[kept..] {
            if merges.tokens() == room {
                break;
            }
            if !merges.list.contains(pair) {
                merges.push(pair);
            }
        }
        Ok(merges.list)
    }
}

fn to_json(merges: &[(String, String)]) -> Result<String> {
    let mut vocab: Vec<String> = SPECIALS.map(str::to_string).to_vec();
    let mut alphabet = chars_of_bytes().to_vec();
    alphabet.sort_unstable();
    vocab.extend(alphabet.iter().map(char::to_string));
    let mut seen: HashSet<String> = vocab.iter().cloned().collect();
    for (a, b) in merges {
        let merged = format!("{a}{b}");
        if seen.insert(merged.clone()) {
            vocab.push(merged);
        }
    }
    let vocab: Vocab = vocab.into_iter().zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges.to_vec())
        .build()
        .map_err(|e| anyhow!("building the tokenizer: {e}"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let byte_level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer.add_special_tokens(&SPECIALS.map(|s| AddedToken::from(s, true)));
    tokenizer.to_string(true).map_err(|e| anyhow!("writing the tokenizer: {e}"))
}

/// GPT-2's printable stand-in for each byte: printable Latin-1 is itself, the rest counts up from U+0100.
pub fn chars_of_bytes() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|b| {
        let printable = matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { b as u32 } else { next };
        next += u32::from(!printable);
        char::from_u32(code).unwrap_or('\u{fffd}')
    })
}

/// The inverse of [`chars_of_bytes`].
pub fn bytes_of_chars() -> HashMap<char, u8> {
    chars_of_bytes().into_iter().zip(0..=255).collect()
}
