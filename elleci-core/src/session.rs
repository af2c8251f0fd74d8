//! Decoding token by token with caches: the logits equal the sequence forward's (ternary integers exactly).

use alloc::vec;
use alloc::vec::Vec;

use crate::layers::mamba::{self, MambaState};
use crate::layers::mla::{self, MlaCache};
use crate::layers::{Context, StepRow, ffn};
use crate::model::{Model, ModelError};
use crate::ops::matmul::{Out, mat, mat_mut, matmul};
use crate::ops::norm::{QuantizedRows, rmsnorm_quantize, rmsnorm_row};
use crate::ops::rope::RopeTable;
use crate::ops::rows;
use crate::params::MixerIds;

#[derive(Clone, Debug)]
enum MixerState {
    Mamba(MambaState),
    Mla(MlaCache),
}

/// The state of one decoded sequence.
#[derive(Debug)]
pub struct Session {
    position: usize,
    mixers: Vec<MixerState>,
    rope: RopeTable,
    row: StepRow,
    norm: QuantizedRows,
    /// `[d_model]` each: residual stream, output of a mixer or feed-forward, output of a norm
    h: Vec<f32>,
    y: Vec<f32>,
    normed: Vec<f32>,
    logits: Vec<f32>,
}

fn context<'a>(model: &'a Model, rope: &'a RopeTable) -> Context<'a> {
    Context { config: model.config(), params: model.params(), ternary: model.ternary_forms(), rope, batch: 1, seq: 1 }
}

impl Session {
    /// An empty sequence.
    pub fn new(model: &Model) -> Session {
        let c = model.config();
        let rope = RopeTable::new(c.d_rope, c.rope_base, 0);
        let ctx = context(model, &rope);
        let mixers = model.layout().layers().iter().map(|ids| match &ids.mixer {
            MixerIds::Mamba(_) => MixerState::Mamba(MambaState::new(c)),
            MixerIds::Mla(m) => MixerState::Mla(MlaCache::new(&ctx, m)),
        });
        let mixers = mixers.collect();
        let buffer = || vec![0.0; c.d_model];
        Session {
            position: 0,
            mixers,
            row: StepRow::new(c),
            norm: QuantizedRows::new(1, c.d_model),
            h: buffer(),
            y: buffer(),
            normed: buffer(),
            logits: vec![0.0; c.vocab_size],
            rope,
        }
    }

    /// Tokens decoded so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Takes the next token; returns the logits `[vocab_size]` of the one after it. `model` must be the one that the
    /// session was made for, with the same weights.
    ///
    /// # Errors
    /// A token that is not in the vocabulary.
    pub fn step(&mut self, model: &Model, token: u32) -> Result<&[f32], ModelError> {
        let c = model.config();
        let (d, vocab_size) = (c.d_model, c.vocab_size);
        if token as usize >= vocab_size {
            return Err(ModelError::Token { token, vocab_size });
        }
        self.rope.extend(c.rope_base, self.position + 1);
        let ctx = context(model, &self.rope);
        let emb = &model.params()[model.layout().tok_emb()];
        let Session { mixers, row, norm, h, y, normed, logits, .. } = self;
        h.copy_from_slice(&emb[token as usize * d..(token as usize + 1) * d]);
        for (ids, mixer) in model.layout().layers().iter().zip(mixers) {
            let gain = &ctx.params[ids.mixer_norm];
            rmsnorm_quantize(
                #[inline(always)]
                |_, x| x.copy_from_slice(h),
                gain,
                c.norm_eps,
                norm,
                Some(normed),
            );
            match (&ids.mixer, mixer) {
                (MixerIds::Mamba(m), MixerState::Mamba(state)) => mamba::step(&ctx, m, norm, normed, state, row, y),
                (MixerIds::Mla(m), MixerState::Mla(cache)) => mla::step(&ctx, m, norm, cache, row, y),
                _ => unreachable!("the session was made from this layout"),
            }
            rows::add_scaled(h, 1.0, y);
            let gain = &ctx.params[ids.ffn_norm];
            rmsnorm_quantize(
                #[inline(always)]
                |_, x| x.copy_from_slice(h),
                gain,
                c.norm_eps,
                norm,
                None,
            );
            ffn::step(&ctx, &ids.ffn, norm, row, y);
            rows::add_scaled(h, 1.0, y);
        }
        rmsnorm_row(h, &ctx.params[model.layout().final_norm()], c.norm_eps, normed);
        let head = mat(&ctx.params[model.layout().lm_head()], vocab_size, d);
        matmul(head, mat(normed, d, 1), mat_mut(logits, vocab_size, 1), Out::Store);
        self.position += 1;
        Ok(&self.logits)
    }
}
