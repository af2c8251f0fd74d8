//! The parameters of a model: one flat float32 buffer and a layout that names its pieces.
//!
//! Gradients and optimiser states use the same layout, so that an update, a norm or a checkpoint is a walk over it.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::{Index, IndexMut, Range};

use crate::config::{LayerKind, ModelConfig};
use crate::par;

/// What a parameter is, which decides its precision, decay and initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// A ternary projection `[out, in]`: latent float weights, quantised on use.
    Ternary,
    /// A full-precision matrix (`mamba.bcdt`).
    Matrix,
    /// `tok_emb` or `lm_head`.
    Embedding,
    /// A norm gain.
    Norm,
    /// Taps of the causal convolution `[channels, d_conv]`.
    ConvWeight,
    /// Bias of the causal convolution.
    ConvBias,
    /// `dt_bias` `[heads]`.
    DtBias,
    /// `a_log` `[heads]`.
    ALog,
    /// `d` (skip) `[heads]`.
    Skip,
}

impl ParamKind {
    /// Weight decay touches matrices only (ternary, full-precision and embeddings), never norms, taps or scalars.
    pub fn decays(self) -> bool {
        matches!(self, ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding)
    }
}

/// One named tensor of the flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Its name in files, e.g. `layers.3.mla.q.weight`.
    pub name: String,
    /// Its shape, `[out, in]` for matrices.
    pub shape: Vec<usize>,
    /// Its elements in the flat buffer.
    pub range: Range<usize>,
    /// What it is.
    pub kind: ParamKind,
    /// The layer that it belongs to; `None` for embedding, final norm and head.
    pub layer: Option<usize>,
}

impl Param {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no elements (never, in a validated config).
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// A handle on one parameter: its index in [`ParamLayout::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(pub usize);

/// Parameters of an MLA mixer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the tensor names of the file format")]
pub struct MlaIds {
    pub q: Id,
    pub kv_down: Id,
    pub kv_norm: Id,
    pub kv_up: Id,
    pub out_norm: Id,
    pub out: Id,
}

/// Parameters of a Mamba-2 mixer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the tensor names of the file format")]
pub struct MambaIds {
    pub input: Id,
    pub bcdt: Id,
    pub conv_weight: Id,
    pub conv_bias: Id,
    pub dt_bias: Id,
    pub a_log: Id,
    pub d: Id,
    pub gate_norm: Id,
    pub out: Id,
}

/// Parameters of a mixer.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the variants are the layer kinds")]
pub enum MixerIds {
    Mla(MlaIds),
    Mamba(MambaIds),
}

/// Parameters of the feed-forward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the tensor names of the file format")]
pub struct FfnIds {
    pub gate: Id,
    pub up: Id,
    pub sub_norm: Id,
    pub down: Id,
}

/// Parameters of a block.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the tensor names of the file format")]
pub struct LayerIds {
    pub mixer_norm: Id,
    pub mixer: MixerIds,
    pub ffn_norm: Id,
    pub ffn: FfnIds,
}

/// Names, shapes and places of all parameters of a config, in file order.
#[derive(Clone, Debug)]
pub struct ParamLayout {
    params: Vec<Param>,
    layers: Vec<LayerIds>,
    tok_emb: Id,
    final_norm: Id,
    lm_head: Id,
    len: usize,
}

struct Builder {
    params: Vec<Param>,
    len: usize,
}

impl Builder {
    fn add(&mut self, name: String, shape: &[usize], kind: ParamKind, layer: Option<usize>) -> Id {
        let elems: usize = shape.iter().product();
        self.params.push(Param { name, shape: shape.to_vec(), range: self.len..self.len + elems, kind, layer });
        self.len += elems;
        Id(self.params.len() - 1)
    }
}

impl ParamLayout {
    /// The layout of a validated config.
    pub fn new(c: &ModelConfig) -> Arc<ParamLayout> {
        use ParamKind::*;
        let mut b = Builder { params: Vec::new(), len: 0 };
        let tok_emb = b.add("tok_emb.weight".into(), &[c.vocab_size, c.d_model], Embedding, None);
        let mut layers = Vec::new();
        for (i, kind) in c.layer_kinds().into_iter().enumerate() {
            let mut add = |name: &str, shape: &[usize], kind| b.add(format!("layers.{i}.{name}"), shape, kind, Some(i));
            let mixer_norm = add("mixer_norm.weight", &[c.d_model], Norm);
            let mixer = match kind {
                LayerKind::Mla => MixerIds::Mla(MlaIds {
                    q: add("mla.q.weight", &[c.n_heads * c.d_qk(), c.d_model], Ternary),
                    kv_down: add("mla.kv_down.weight", &[c.kv_rank + c.d_rope, c.d_model], Ternary),
                    kv_norm: add("mla.kv_norm.weight", &[c.kv_rank], Norm),
                    kv_up: add("mla.kv_up.weight", &[c.n_heads * (c.d_nope + c.d_v), c.kv_rank], Ternary),
                    out_norm: add("mla.out_norm.weight", &[c.n_heads * c.d_v], Norm),
                    out: add("mla.out.weight", &[c.d_model, c.n_heads * c.d_v], Ternary),
                }),
                LayerKind::Mamba => MixerIds::Mamba(MambaIds {
                    input: add("mamba.in.weight", &[2 * c.d_inner, c.d_model], Ternary),
                    bcdt: add("mamba.bcdt.weight", &[2 * c.d_state + c.mamba_heads(), c.d_model], Matrix),
                    conv_weight: add("mamba.conv.weight", &[c.conv_channels(), c.d_conv], ConvWeight),
                    conv_bias: add("mamba.conv.bias", &[c.conv_channels()], ConvBias),
                    dt_bias: add("mamba.dt_bias", &[c.mamba_heads()], DtBias),
                    a_log: add("mamba.a_log", &[c.mamba_heads()], ALog),
                    d: add("mamba.d", &[c.mamba_heads()], Skip),
                    gate_norm: add("mamba.gate_norm.weight", &[c.d_inner], Norm),
                    out: add("mamba.out.weight", &[c.d_model, c.d_inner], Ternary),
                }),
            };
            let ffn_norm = add("ffn_norm.weight", &[c.d_model], Norm);
            let ffn = FfnIds {
                gate: add("ffn.gate.weight", &[c.ffn_hidden, c.d_model], Ternary),
                up: add("ffn.up.weight", &[c.ffn_hidden, c.d_model], Ternary),
                sub_norm: add("ffn.sub_norm.weight", &[c.ffn_hidden], Norm),
                down: add("ffn.down.weight", &[c.d_model, c.ffn_hidden], Ternary),
            };
            layers.push(LayerIds { mixer_norm, mixer, ffn_norm, ffn });
        }
        let final_norm = b.add("final_norm.weight".into(), &[c.d_model], Norm, None);
        let lm_head = match c.tie_embeddings {
            true => tok_emb,
            false => b.add("lm_head.weight".into(), &[c.vocab_size, c.d_model], Embedding, None),
        };
        Arc::new(ParamLayout { params: b.params, layers, tok_emb, final_norm, lm_head, len: b.len })
    }

    /// All parameters, in file order; their ranges tile `0..len()`.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// One parameter by handle.
    pub fn param(&self, id: Id) -> &Param {
        &self.params[id.0]
    }

    /// One parameter by file name.
    pub fn by_name(&self, name: &str) -> Option<Id> {
        self.params.iter().position(|p| p.name == name).map(Id)
    }

    /// Handles of every block.
    pub fn layers(&self) -> &[LayerIds] {
        &self.layers
    }

    /// `tok_emb.weight` `[vocab_size, d_model]`.
    pub fn tok_emb(&self) -> Id {
        self.tok_emb
    }

    /// `final_norm.weight` `[d_model]`.
    pub fn final_norm(&self) -> Id {
        self.final_norm
    }

    /// `lm_head.weight` `[vocab_size, d_model]`; `tok_emb` itself when tied.
    pub fn lm_head(&self) -> Id {
        self.lm_head
    }

    /// Number of elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the layout is empty (never, in a validated config).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of ternary weights.
    pub fn ternary_elems(&self) -> usize {
        self.params.iter().filter(|p| p.kind == ParamKind::Ternary).map(Param::len).sum()
    }
}

/// One value for every parameter: weights, gradients, or an average of weights.
#[derive(Clone, Debug)]
pub struct Params {
    layout: Arc<ParamLayout>,
    data: Vec<f32>,
}

impl Params {
    /// All zero.
    pub fn zeros(layout: Arc<ParamLayout>) -> Params {
        let data = vec![0.0; layout.len()];
        Params { layout, data }
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<ParamLayout> {
        &self.layout
    }

    /// The flat buffer.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The flat buffer.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Sets all of it to 0, on the current thread pool: one thread does not use all of the memory's bandwidth.
    pub fn clear(&mut self) {
        par::for_each(self.data.chunks_mut(1 << 18).collect(), |part: &mut [f32]| part.fill(0.0));
    }
}

impl Index<Id> for Params {
    type Output = [f32];
    fn index(&self, id: Id) -> &[f32] {
        &self.data[self.layout.params[id.0].range.clone()]
    }
}

impl IndexMut<Id> for Params {
    fn index_mut(&mut self, id: Id) -> &mut [f32] {
        &mut self.data[self.layout.params[id.0].range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parameter table of the specification.
    #[test]
    fn parameter_counts() {
        for (preset, total, ternary) in [
            ("elleci-1.5b", 1_494_416_256, 1_350_303_744),
            ("small-160m", 143_358_600, 92_823_552),
            ("mini", 63_125_280, 29_720_576),
            ("nano", 5_937_672, 3_719_168),
        ] {
            let layout = ParamLayout::new(&ModelConfig::preset(preset).unwrap());
            assert_eq!((layout.len(), layout.ternary_elems()), (total, ternary), "{preset}");
        }
    }

    #[test]
    fn ranges_tile_the_buffer() {
        let layout = ParamLayout::new(&ModelConfig::preset("nano").unwrap());
        let mut next = 0;
        for p in layout.params() {
            assert_eq!(p.range.start, next, "{}", p.name);
            assert_eq!(p.len(), p.shape.iter().product::<usize>());
            next = p.range.end;
        }
        assert_eq!(next, layout.len());
    }
}
