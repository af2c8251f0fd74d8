//! Stands in for the packed model and its session until they are there.
#![allow(missing_docs, reason = "temporary")]

use elleci_core::config::ModelConfig;
use elleci_core::model::{Model, ModelError};

#[derive(Clone, Copy)]
pub struct PackedModel<'a>(pub &'a Model);

impl<'a> PackedModel<'a> {
    pub fn config(&self) -> &'a ModelConfig {
        self.0.config()
    }
}

pub struct Mark(usize);

pub struct Session {
    tokens: Vec<u32>,
    inner: elleci_core::session::Session,
    fed: usize,
    logits: Vec<f32>,
}

impl Session {
    pub fn new(model: PackedModel<'_>) -> Session {
        Session { tokens: vec![], inner: elleci_core::session::Session::new(model.0), fed: 0, logits: vec![] }
    }
    pub fn extend(&mut self, model: PackedModel<'_>, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.tokens.extend_from_slice(tokens);
        if self.fed == usize::MAX {
            self.inner = elleci_core::session::Session::new(model.0);
            self.fed = 0;
        }
        for &t in &self.tokens[self.fed..] {
            self.logits = self.inner.step(model.0, t)?.to_vec();
        }
        self.fed = self.tokens.len();
        Ok(&self.logits)
    }
    pub fn position(&self) -> usize {
        self.tokens.len()
    }
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
    pub fn mark(&self) -> Mark {
        Mark(self.tokens.len())
    }
    pub fn rewind(&mut self, mark: &Mark) {
        self.tokens.truncate(mark.0);
        self.fed = usize::MAX;
    }
    pub fn to_bytes(&self) -> Vec<u8> {
        self.tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
    }
    pub fn from_bytes(model: PackedModel<'_>, bytes: &[u8]) -> Result<Session, ModelError> {
        let mut s = Session::new(model);
        let tokens: Vec<u32> = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        s.extend(model, &tokens)?;
        Ok(s)
    }
}
