//! A session as bytes: exact, and only for the model that it was made with.
//!
//! Little-endian: magic, version, the model's fingerprint, the tokens, then every layer in order (a Mamba layer's state, its
//! convolution's inputs and the steps since the state was written; an MLA layer's codes, scales and keys of the tokens so far), and XXH3-64 of all that.

use alloc::sync::Arc;
use alloc::vec::Vec;

use xxhash_rust::xxh3::xxh3_64;

use super::session::{LayerState, MambaState, MlaCache, PAGE, Page};
use super::{InferenceError, Session};
use crate::archive::PackedModel;
use crate::config::ModelConfig;

const MAGIC: [u8; 8] = *b"\x93ELSESS\n";
const VERSION: u32 = 2;

impl Session {
    /// The whole state. [`Session::from_bytes`] goes on from it to the bit. (It refuses that of an interrupted session.)
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.fingerprint.to_le_bytes());
        bytes.extend((self.tokens.len() as u64).to_le_bytes());
        bytes.extend(self.tokens.iter().flat_map(|t| t.to_le_bytes()));
        for layer in &self.layers {
            match layer {
                LayerState::Mamba(state) => {
                    let [b, left] = state.recent.steps.values();
                    let floats = state.scan.iter().chain(&state.recent.conv).chain(b).chain(left);
                    bytes.extend(floats.flat_map(|v| v.to_le_bytes()));
                }
                LayerState::Mla(cache) => {
                    for page in &cache.pages {
                        bytes.extend(page.codes.iter().map(|c| *c as u8));
                        let floats = page.scales.iter().chain(&page.keys);
                        bytes.extend(floats.flat_map(|v| v.to_le_bytes()));
                    }
                }
            }
        }
        let sum = xxh3_64(&bytes) ^ u64::from(self.interrupted);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    /// Reads [`Session::to_bytes`] again.
    ///
    /// # Errors
    /// Bytes that are not a whole, undamaged session of this model.
    pub fn from_bytes(model: PackedModel<'_>, bytes: &[u8]) -> Result<Session, InferenceError> {
        let fault = InferenceError::Saved;
        let (body, sum) = bytes.split_last_chunk::<8>().ok_or(fault("it is cut off"))?;
        let mut reader = Reader { rest: body };
        if reader.take(8)? != MAGIC {
            return Err(fault("this is no saved session"));
        }
        if reader.word()? != VERSION {
            return Err(fault("it has another format version"));
        }
        if xxh3_64(body) != u64::from_le_bytes(*sum) {
            return Err(fault("it is damaged or cut off"));
        }
        if reader.long()? != model.fingerprint() {
            return Err(InferenceError::OtherModel);
        }
        let c = model.config();
        let count = usize::try_from(reader.long()?).ok().filter(|n| *n <= reader.rest.len() / 4);
        let count = count.ok_or(fault("it has more tokens than bytes"))?;
        let mut session = Session::new(model)?;
        for _ in 0..count {
            let token = reader.word()?;
            if token as usize >= c.vocab_size {
                return Err(InferenceError::Token { token, vocab_size: c.vocab_size });
            }
            session.tokens.push(token);
        }
        for layer in &mut session.layers {
            match layer {
                LayerState::Mamba(MambaState { scan, recent }) => {
                    let recent = Arc::make_mut(recent);
                    reader.floats(Arc::<Vec<f32>>::make_mut(scan))?;
                    reader.floats(&mut recent.conv)?;
                    for values in recent.steps.fill(count) {
                        reader.floats(values)?;
                    }
                }
                LayerState::Mla(cache) => *cache = reader.cache(c, count)?,
            }
        }
        if !reader.rest.is_empty() {
            return Err(fault("it has more bytes than its state"));
        }
        Ok(session)
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], InferenceError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(InferenceError::Saved("it is cut off"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32, InferenceError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes were taken")))
    }

    fn long(&mut self) -> Result<u64, InferenceError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes were taken")))
    }

    fn floats(&mut self, values: &mut [f32]) -> Result<(), InferenceError> {
        let bytes = self.take(4 * values.len())?;
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }

    fn cache(&mut self, c: &ModelConfig, len: usize) -> Result<MlaCache, InferenceError> {
        let mut cache = MlaCache { pages: Vec::new(), len };
        for p in 0..len.div_ceil(PAGE) {
            let n = cache.page_len(p);
            let codes = self.take(n * c.kv_rank)?;
            let mut page = Page::new(c);
            page.codes.extend(codes.iter().map(|byte| *byte as i8));
            page.scales.resize(n, 0.0);
            page.keys.resize(n * c.d_rope, 0.0);
            self.floats(&mut page.scales)?;
            self.floats(&mut page.keys)?;
            cache.pages.push(Arc::new(page));
        }
        Ok(cache)
    }
}
