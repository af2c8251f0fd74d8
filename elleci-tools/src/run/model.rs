//! Opening a model for inference, from whatever form it has.

use std::path::Path;

use anyhow::{Context, ensure};
use elleci_core::config::ModelConfig;
use elleci_core::model::Model;

use super::stub::PackedModel;
use crate::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID, IM_START_ID, SPECIALS, Tokenizer};
use crate::report::format::si;
use crate::train::step::load_model;

/// A model that is open, with its tokenizer if it has one.
pub struct OpenModel {
    /// What it is called in reports: the name of its file or folder.
    pub name: String,
    model: Model,
    tokenizer: Option<Tokenizer>,
}

impl OpenModel {
    /// Opens an archive by mapping it; packs a folder or a checkpoint in memory.
    ///
    /// # Errors
    /// What is missing or damaged; a tokenizer that does not fit the model.
    pub fn open(path: &Path) -> anyhow::Result<OpenModel> {
        let (config, params) = load_model(path)?;
        let json = path.join(crate::hf::TOKENIZER);
        let tokenizer = json.is_file().then(|| Tokenizer::load(&json)).transpose()?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let open = OpenModel { name, model: Model::new(config, params)?, tokenizer };
        open.check_tokenizer().with_context(|| path.display().to_string())?;
        Ok(open)
    }

    fn check_tokenizer(&self) -> anyhow::Result<()> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        let (tokens, rows) = (tokenizer.config().tokens, self.config().vocab_size);
        ensure!(
            tokens <= rows,
            "its tokenizer has {tokens} tokens, more than the model's `vocab_size` of {rows}: they do not belong together"
        );
        Ok(())
    }

    /// The model, as sessions take it.
    pub fn packed(&self) -> PackedModel<'_> {
        PackedModel(&self.model)
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// The tokenizer, where the model has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When the model has none.
    pub fn need_tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().with_context(|| {
            format!("{} has no tokenizer: only `generate --tokens`, `bench` and `logits` can use it", self.name)
        })
    }

    /// One line on what was opened.
    pub fn announcement(&self) -> String {
        let parameters = si(elleci_core::params::ParamLayout::new(self.config()).len() as f64);
        format!("model {} | {parameters} parameters | vocabulary {}", self.name, self.config().vocab_size)
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &'static [&'static [u32]] {
        if self.tokenizer.is_some() { &[&[END_OF_TEXT_ID], &[IM_END_ID]] } else { &[] }
    }

    /// Tokens that must never be chosen: padding of the vocabulary, and special tokens that no text holds.
    pub fn banned(&self, ends_too: bool) -> Vec<u32> {
        let Some(tokenizer) = &self.tokenizer else { return Vec::new() };
        let ends = [END_OF_TEXT_ID, IM_END_ID];
        let specials = (0..SPECIALS.len() as u32).filter(|t| ends_too || !ends.contains(t));
        debug_assert!((IM_START_ID as usize) < SPECIALS.len());
        specials.chain(tokenizer.config().tokens as u32..self.config().vocab_size as u32).collect()
    }
}
