//! What a sequence leaves behind: one recurrent state a Mamba layer, one growing cache an MLA layer.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Batch, Feed, InferenceError};
use crate::archive::PackedModel;
use crate::config::{LayerKind, ModelConfig};
use crate::ops::ssd::Recent;

/// Tokens of a page of an MLA cache.
pub(super) const PAGE: usize = 256;

/// The state of one sequence.
///
/// Cloning is cheap, and is how a session is forked: states and full cache pages are shared until one of the two writes. A clone
/// kept aside is a mark to come back to, see [`Session::rewind`].
#[derive(Debug)]
pub struct Session {
    pub(super) fingerprint: u64,
    pub(super) tokens: Vec<u32>,
    pub(super) layers: Vec<LayerState>,
    /// While a call works on it, and after one that a panic has ended: what there is fits nowhere
    pub(super) interrupted: bool,
    /// Working memory of [`Session::extend`]; not part of the state
    batch: Option<Box<Batch>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum LayerState {
    Mamba(MambaState),
    Mla(MlaCache),
}

/// What [`ssd_steps`](crate::ops::ssd::ssd_steps) keeps: the state, which few steps write, and what all do.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MambaState {
    pub scan: Arc<Vec<f32>>,
    pub recent: Arc<MambaRecent>,
}

/// Besides the steps since the state was written the last inputs of the convolution `[d_conv - 1, channels]`, oldest first.
#[derive(Debug, Default, PartialEq)]
pub(super) struct MambaRecent {
    pub steps: Recent,
    pub conv: Vec<f32>,
}

impl Clone for MambaRecent {
    fn clone(&self) -> MambaRecent {
        MambaRecent { steps: self.steps.clone(), conv: self.conv.clone() }
    }

    fn clone_from(&mut self, other: &MambaRecent) {
        self.steps.clone_from(&other.steps);
        self.conv.clone_from(&other.conv);
    }
}

/// Per token the int8 latent that `kv_up` reads, with its scale, and the rotated shared key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct MlaCache {
    pub pages: Vec<Arc<Page>>,
    pub len: usize,
}

/// Up to [`PAGE`] tokens. It grows with them: a short sequence takes little, and what a fork copies is what there is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Page {
    /// `[tokens, kv_rank]`
    pub codes: Vec<i8>,
    /// `[tokens]`
    pub scales: Vec<f32>,
    /// `[tokens, d_rope]`
    pub keys: Vec<f32>,
}

impl Page {
    /// An empty page. Its memory doubles from here to a whole page.
    pub fn new(c: &ModelConfig) -> Page {
        const FIRST: usize = PAGE / 16;
        Page {
            codes: Vec::with_capacity(FIRST * c.kv_rank),
            scales: Vec::with_capacity(FIRST),
            keys: Vec::with_capacity(FIRST * c.d_rope),
        }
    }
}

impl MlaCache {
    /// Appends one token.
    pub fn push(&mut self, c: &ModelConfig, codes: &[i8], scale: f32, key: &[f32]) {
        if self.len.is_multiple_of(PAGE) {
            self.pages.push(Arc::new(Page::new(c)));
        }
        let page = Arc::make_mut(self.pages.last_mut().expect("a page was just pushed, or is not full"));
        page.codes.extend_from_slice(codes);
        page.scales.push(scale);
        page.keys.extend_from_slice(key);
        self.len += 1;
    }

    /// Tokens of page `page`.
    pub fn page_len(&self, page: usize) -> usize {
        (self.len - page * PAGE).min(PAGE)
    }
}

impl Clone for Session {
    fn clone(&self) -> Session {
        let (tokens, layers) = (self.tokens.clone(), self.layers.clone());
        Session { fingerprint: self.fingerprint, tokens, layers, interrupted: self.interrupted, batch: None }
    }
}

impl Session {
    /// An empty sequence.
    ///
    /// # Errors
    /// When the state of a sequence does not fit into memory.
    pub fn new(model: PackedModel<'_>) -> Result<Session, InferenceError> {
        let c = model.config();
        let mut layers = Vec::new();
        for kind in c.layer_kinds() {
            layers.push(match kind {
                LayerKind::Mamba => LayerState::Mamba(MambaState {
                    scan: Arc::new(zeros(c.d_inner.checked_mul(c.d_state))?),
                    recent: Arc::new(MambaRecent {
                        steps: Recent::new(c.d_inner, c.d_state).map_err(|bytes| InferenceError::Memory { bytes })?,
                        conv: zeros((c.d_conv - 1).checked_mul(c.conv_channels()))?,
                    }),
                }),
                LayerKind::Mla => LayerState::Mla(MlaCache::default()),
            });
        }
        let fingerprint = model.fingerprint();
        Ok(Session { fingerprint, tokens: Vec::new(), layers, interrupted: false, batch: None })
    }

    /// Tokens that the sequence has so far.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens themselves.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Takes the next tokens, a prompt or a single one; returns the logits `[vocab_size]` of the token after them.
    ///
    /// # Errors
    /// A token that is not in the vocabulary, no tokens at all, a model that is not the session's. The session is unchanged.
    pub fn extend(&mut self, model: PackedModel<'_>, tokens: &[u32]) -> Result<&[f32], InferenceError> {
        let mut batch = self.batch.take().unwrap_or_default();
        let done = batch.extend(model, &mut [Feed { session: self, tokens }]).map(|_| ());
        let batch = self.batch.insert(batch);
        done.map(|()| batch.logits())
    }

    /// Goes back to where `mark`, an earlier clone of this session (or any session of the same model), stands.
    pub fn rewind(&mut self, mark: &Session) {
        self.fingerprint = mark.fingerprint;
        self.interrupted = mark.interrupted;
        self.tokens.clone_from(&mark.tokens);
        self.layers.resize_with(mark.layers.len(), || LayerState::Mla(MlaCache::default()));
        for (own, marked) in self.layers.iter_mut().zip(&mark.layers) {
            match (own, marked) {
                (LayerState::Mamba(own), LayerState::Mamba(marked)) => {
                    // What the next tokens will write to: sharing would only put the copy off, into new memory.
                    copy(&mut own.recent, &marked.recent);
                    if !Arc::ptr_eq(&own.scan, &marked.scan) {
                        copy(&mut own.scan, &marked.scan);
                    }
                }
                (own, marked) => own.clone_from(marked),
            }
        }
    }

    /// Bytes that the state takes, shared pages included.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerState| match layer {
            LayerState::Mamba(MambaState { scan, recent }) => {
                4 * (scan.len() + recent.conv.len()) + recent.steps.bytes()
            }
            LayerState::Mla(cache) => {
                cache.pages.iter().map(|p| p.codes.capacity() + 4 * (p.scales.capacity() + p.keys.capacity())).sum()
            }
        };
        self.layers.iter().map(layer).sum::<usize>() + 4 * self.tokens.len()
    }
}

/// Makes `own` what `other` is, in its own memory if that is its alone.
fn copy<T: Clone>(own: &mut Arc<T>, other: &Arc<T>) {
    match Arc::get_mut(own) {
        Some(value) => value.clone_from(other),
        None => own.clone_from(other),
    }
}

pub(super) fn zeros(len: Option<usize>) -> Result<Vec<f32>, InferenceError> {
    let mut values = Vec::new();
    let bytes = len.and_then(|n| n.checked_mul(4)).unwrap_or(usize::MAX);
    values.try_reserve_exact(len.unwrap_or(usize::MAX)).map_err(|_| InferenceError::Memory { bytes })?;
    // Written here: zeros that the system hands out unwritten would be mapped when they are read, and copied when they are written to,
    // a page at a time and in the middle of the first step (docs/LOG.md).
    values.resize(bytes / 4, 0.0);
    Ok(values)
}
