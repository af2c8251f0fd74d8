//! Stands in for the packed model and its session until they are there.
#![allow(missing_docs, reason = "temporary")]

pub use elleci_core::archive::PackedModel;
use elleci_core::model::{Model, ModelError};
use elleci_core::params::{Id, ParamLayout, Params};

fn unpack(model: PackedModel<'_>) -> Model {
    let mut params = Params::zeros(ParamLayout::new(model.config()));
    let layout = params.layout().clone();
    for (i, p) in layout.params().iter().enumerate() {
        model.read(Id(i), &mut params.data_mut()[p.range.clone()]).unwrap();
    }
    Model::new(model.config().clone(), params).unwrap()
}

pub struct Mark(usize);

pub struct Session {
    tokens: Vec<u32>,
    inner: elleci_core::session::Session,
    fed: usize,
    logits: Vec<f32>,
    model: std::sync::Arc<Model>,
}

impl Session {
    pub fn new(model: PackedModel<'_>) -> Session {
        let model = std::sync::Arc::new(unpack(model));
        Session { tokens: vec![], inner: elleci_core::session::Session::new(&model), fed: 0, logits: vec![], model }
    }
    pub fn extend(&mut self, _model: PackedModel<'_>, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.tokens.extend_from_slice(tokens);
        if self.fed == usize::MAX {
            self.inner = elleci_core::session::Session::new(&self.model);
            self.fed = 0;
        }
        for &t in &self.tokens[self.fed..] {
            self.logits = self.inner.step(&self.model, t)?.to_vec();
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
