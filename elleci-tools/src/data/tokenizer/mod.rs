//! The tokenizer: byte-level BPE in the file format of the `tokenizers` crate.
//!
//! `tokenizer.json` is what every Hugging Face tool reads. Beside it stands `tokenizer.config.json`, a [`TokenizerConfig`]:
//! the padded vocabulary of the models that use it, and the words that training guaranteed to be single tokens.

mod bpe;
mod pretokenize;
mod train;

pub use bpe::{Cache, Encoder};
pub use pretokenize::{Pieces, pieces};
pub use train::{TrainOptions, WORDS, default_word_count, train_tokenizer, words};

use super::shards::{MAX_VOCAB, sha256_hex};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Ends every document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Fills batches; never a target.
pub const PADDING: &str = "<|padding|>";
/// Starts a ChatML turn.
pub const IM_START: &str = "<|im_start|>";
/// Ends a ChatML turn.
pub const IM_END: &str = "<|im_end|>";
/// The special tokens by id.
pub const SPECIALS: [&str; 4] = [END_OF_TEXT, PADDING, IM_START, IM_END];
/// The id of [`END_OF_TEXT`].
pub const END_OF_TEXT_ID: u32 = 0;
/// The id of [`IM_START`].
pub const IM_START_ID: u32 = 2;
/// The id of [`IM_END`].
pub const IM_END_ID: u32 = 3;

/// `tokenizer.config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Rows of the embedding of models that use the tokenizer; ids from `tokens` on never occur.
    pub vocab_size: usize,
    /// Tokens that the tokenizer has.
    pub tokens: usize,
    /// SHA-256 of `tokenizer.json`, in hexadecimal.
    pub tokenizer_sha256: String,
    /// Words that are one token, with a space before them and without.
    pub single_token_words: Vec<String>,
}

/// A loaded tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    json: Vec<u8>,
    config: TokenizerConfig,
    encoder: Encoder,
    /// The bytes of every token that exists; empty for special tokens.
    token_text: Vec<Vec<u8>>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` (or the one in a directory) and the config beside it, if there is one.
    ///
    /// # Errors
    /// A missing or damaged file, a tokenizer of another kind, special tokens with other ids, a vocabulary that 16
    /// bits do not hold, or a config that belongs to another tokenizer. The message names the file.
    pub fn load(path: &Path) -> Result<Tokenizer> {
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        let json = fs::read(&path).with_context(|| {
            format!("{}: cannot read the tokenizer; `elleci-data tokenizer` makes one", path.display())
        })?;
        let config_path = config_path(&path);
        let config = match fs::read(&config_path) {
            Ok(bytes) => Some(
                serde_json::from_slice(&bytes)
                    .with_context(|| format!("{}: not a valid tokenizer config", config_path.display()))?,
            ),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(e).with_context(|| format!("{}: cannot read", config_path.display())),
        };
        if let Some(TokenizerConfig { tokenizer_sha256, .. }) = &config {
            ensure!(
                *tokenizer_sha256 == sha256_hex(&json),
                "{}: `tokenizer_sha256` is not the hash of {}; the two files do not belong together (or one is \
                 damaged): restore both or train again",
                config_path.display(),
                path.display()
            );
        }
        Tokenizer::from_json(json, config).with_context(|| format!("{}: unusable tokenizer", path.display()))
    }

    /// A tokenizer from the contents of `tokenizer.json`. Without a config nothing is padded.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_json(json: Vec<u8>, config: Option<TokenizerConfig>) -> Result<Tokenizer> {
        let parts = Parts::of(&json).context("not a valid tokenizer: no JSON")?;
        check_kind(&parts.rest)?;
        let parsed = parse_vocabulary(&parts)?;
        let tokens = parsed.get_vocab_size(true);
        for (id, special) in (0..).zip(SPECIALS) {
            let found = parsed.token_to_id(special);
            ensure!(found == Some(id), "`{special}` has the id {found:?}; it must be {id}");
        }
        let token_text = token_texts(&parsed, tokens)?;
        let encoder = encoder(&parsed, parts.merges)?;
        let config = config.unwrap_or_else(|| TokenizerConfig {
            vocab_size: tokens,
            tokens,
            tokenizer_sha256: sha256_hex(&json),
            single_token_words: Vec::new(),
        });
        ensure!(config.tokens == tokens, "it has {tokens} tokens, but its config says `tokens` {}", config.tokens);
        ensure!(
            config.vocab_size >= tokens && config.vocab_size <= MAX_VOCAB,
            "`vocab_size` is {}; it must be {tokens} (the tokens there are) to {MAX_VOCAB}",
            config.vocab_size
        );
        Ok(Tokenizer { json, config, encoder, token_text })
    }

    /// Writes `tokenizer.json` to `path` and the config beside it; creates the directory.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut config = serde_json::to_vec_pretty(&self.config)?;
        config.push(b'\n');
        let parent = super::files::parent_of(path);
        fs::create_dir_all(&parent).with_context(|| format!("{}: cannot create", parent.display()))?;
        super::files::write_atomically(path, &self.json)?;
        super::files::write_atomically(&config_path(path), &config)
    }

    /// The contents of `tokenizer.json`.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// The config.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// SHA-256 of `tokenizer.json`, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.config.tokenizer_sha256
    }

    /// Rows of the embedding of models that use it.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Bytes of text that each id stands for, `[vocab_size]`.
    pub fn token_bytes(&self) -> Vec<u16> {
        let mut table: Vec<u16> = self.token_text.iter().map(|t| t.len() as u16).collect();
        table.resize(self.config.vocab_size, 0);
        table
    }

    /// Appends the tokens of `text`. Text that looks like a special token becomes ordinary tokens.
    pub fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) {
        self.encoder.encode(text, cache, out);
    }

    /// The tokens of `text`; see [`Tokenizer::encode_into`].
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        self.encoder.encode(text, &mut Cache::default(), &mut out);
        out
    }

    /// The text of `tokens`; special and unknown tokens are left out, bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(tokens)).into_owned()
    }

    /// The bytes of `tokens`; special and unknown tokens are left out.
    pub fn decode_bytes(&self, tokens: &[u32]) -> Vec<u8> {
        let text = |t: &u32| self.token_text.get(*t as usize).map_or(&[][..], Vec::as_slice);
        tokens.iter().flat_map(text).copied().collect()
    }

    /// Whether `text` is exactly one token.
    pub fn is_single_token(&self, text: &str) -> bool {
        self.encode(text).len() == 1
    }
}

/// `tokenizer.config.json` beside `tokenizer.json`.
pub fn config_path(path: &Path) -> PathBuf {
    path.with_extension("config.json")
}

/// The members of an object, as they are written.
type Members<'a> = BTreeMap<String, &'a RawValue>;

/// The parts of a `tokenizer.json`. Vocabulary and merges, which are nearly all of it, are not parsed here.
struct Parts<'a> {
    top: Members<'a>,
    /// The list of merges
    merges: Option<&'a RawValue>,
    /// All but the vocabulary and the merges
    rest: serde_json::Value,
}

impl Parts<'_> {
    fn of(json: &[u8]) -> serde_json::Result<Parts<'_>> {
        let top: Members = serde_json::from_slice(json)?;
        let mut model: Option<Members> = top.get("model").and_then(|m| serde_json::from_str(m.get()).ok());
        let mut merges = None;
        if let Some(model) = &mut model {
            model.remove("vocab");
            merges = model.remove("merges");
        }
        let mut rest =
            serde_json::to_value(top.iter().filter(|(name, _)| *name != "model").collect::<BTreeMap<_, _>>())?;
        if let Some(model) = model {
            rest["model"] = serde_json::to_value(model)?;
        }
        Ok(Parts { top, merges, rest })
    }
}

/// The vocabulary and merges as the `tokenizers` crate reads them: it decides whether they are sound. It sees nothing else of the
/// file, which `check_kind` has looked at: it panics on some decoders and normalizers that are none.
fn parse_vocabulary(parts: &Parts) -> Result<tokenizers::Tokenizer> {
    let part = |name: &str| parts.top.get(name).map_or("null", |value| value.get());
    let (version, added, model) = (part("version"), part("added_tokens"), part("model"));
    let added = if added == "null" { "[]" } else { added };
    let json = format!(r#"{{"version":{version},"added_tokens":{added},"model":{model}}}"#);
    tokenizers::Tokenizer::from_bytes(json).map_err(|e| anyhow!("not a valid tokenizer: {e}"))
}

/// Only what [`Encoder`] computes may pass: a file that means something else must not be tokenised wrongly.
fn check_kind(value: &serde_json::Value) -> Result<()> {
    let at = |path: &str| value.pointer(path).cloned().unwrap_or_default();
    let is = |path: &str, allowed: &[serde_json::Value]| -> Result<()> {
        let found = at(path);
        ensure!(
            allowed.contains(&found),
            "`{}` is {found}; only byte-level BPE with the GPT-2 split and no normalizer is supported",
            path[1..].replace('/', ".")
        );
        Ok(())
    };
    use serde_json::{Value, json};
    is("/model/type", &[json!("BPE")])?;
    is("/normalizer", &[Value::Null])?;
    is("/pre_tokenizer/type", &[json!("ByteLevel")])?;
    is("/pre_tokenizer/add_prefix_space", &[json!(false)])?;
    is("/pre_tokenizer/use_regex", &[json!(true), Value::Null])?;
    is("/decoder/type", &[json!("ByteLevel"), Value::Null])?;
    is("/model/ignore_merges", &[json!(false), Value::Null])?;
    is("/model/byte_fallback", &[json!(false), Value::Null])?;
    is("/model/dropout", &[Value::Null])?;
    is("/model/continuing_subword_prefix", &[Value::Null, json!("")])?;
    is("/model/end_of_word_suffix", &[Value::Null, json!("")])?;
    if let Some(added) = at("/added_tokens").as_array() {
        for token in added {
            let content = token["content"].as_str().unwrap_or_default();
            ensure!(
                SPECIALS.contains(&content),
                "`added_tokens` holds `{content}`; only the special tokens may be added, all else must be merges"
            );
        }
    }
    Ok(())
}

fn token_texts(parsed: &tokenizers::Tokenizer, tokens: usize) -> Result<Vec<Vec<u8>>> {
    ensure!(tokens <= MAX_VOCAB, "it has {tokens} tokens; shards hold at most {MAX_VOCAB}");
    let bytes = train::bytes_of_chars();
    let text = |id: usize| -> Result<Vec<u8>> {
        let Some(token) = parsed.id_to_token(id as u32) else { bail!("no token has the id {id}; ids must be dense") };
        if SPECIALS.contains(&token.as_str()) {
            return Ok(Vec::new());
        }
        let text: Vec<u8> = token
            .chars()
            .map(|c| bytes.get(&c).copied())
            .collect::<Option<_>>()
            .with_context(|| format!("token {id}, `{token}`, is not in the byte-level alphabet"))?;
        ensure!(text.len() <= usize::from(u16::MAX), "token {id} is {} bytes long", text.len());
        Ok(text)
    };
    (0..tokens).map(text).collect()
}

fn encoder(parsed: &tokenizers::Tokenizer, merges: Option<&RawValue>) -> Result<Encoder> {
    let id = |token: &str| parsed.token_to_id(token).with_context(|| format!("`{token}` is not in the vocabulary"));
    let chars = train::chars_of_bytes();
    let mut bytes = [0; 256];
    for (b, c) in chars.iter().enumerate() {
        bytes[b] = id(&c.to_string())?;
    }
    let listed = merges.context("`model.merges` is missing")?;
    let listed: Vec<serde_json::Value> = serde_json::from_str(listed.get()).context("`model.merges` is no list")?;
    let mut merges = Vec::with_capacity(listed.len());
    for merge in &listed {
        // Both spellings of the format: "a b" and ["a", "b"].
        let pair = match merge {
            serde_json::Value::String(s) => s.split_once(' '),
            other => other.get(0).and_then(|a| a.as_str()).zip(other.get(1).and_then(|b| b.as_str())),
        };
        let (left, right) = pair.with_context(|| format!("`model.merges` holds {merge}"))?;
        merges.push((id(left)?, id(right)?, id(&format!("{left}{right}"))?));
    }
    Ok(Encoder::new(bytes, merges))
}

#[cfg(test)]
mod tests;
