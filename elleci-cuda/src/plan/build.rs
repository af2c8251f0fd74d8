//! The buffers of each part of a step, taken from the arena one after the other.

use elleci_core::config::{LayerKind, ModelConfig};
use elleci_core::optim::StatePrecision;
use elleci_core::optim::adamw::MIN_8BIT_ELEMS;
use elleci_core::params::{Id, Param, ParamKind, ParamLayout};

use super::buffers::{
    FfnScratch, HeadScratch, LayerSaved, MambaSaved, MambaScratch, MlaSaved, MlaScratch, ParamBufs, Tables,
};
use super::{Options, conv, scan};
use crate::arena::{Arena, Buf, Dtype, Use};
use crate::ops::product::{Gemm, Needs, Ternary, Unpacked, Workspace, library_bytes, scales_afterwards, unpacked_len};
use crate::ops::{Products, Rows, norm, optim, padded, ssd, ternary};

/// The head takes a batch's tokens in so many chunks, but no fewer than this at a time.
const CHUNKS: usize = 8;
const LEAST_CHUNK: usize = 256;

/// Whether a parameter's states are 8-bit: as in the core.
pub fn has_8bit_states(p: &Param, precision: StatePrecision) -> bool {
    let keeps_f32 = matches!(p.kind, ParamKind::Embedding | ParamKind::Norm) || p.len() < MIN_8BIT_ELEMS;
    precision == StatePrecision::Block8 && !keeps_f32
}

fn stream_dtype(o: &Options) -> Dtype {
    if o.bf16_stream { Dtype::Bf16 } else { Dtype::F32 }
}

/// Names buffers and takes them from the arena.
pub(super) struct Builder<'a> {
    pub arena: &'a mut Arena,
    pub purpose: Use,
    pub prefix: String,
    pub tokens: usize,
}

impl Builder<'_> {
    pub fn any(&mut self, name: &str, dtype: Dtype, len: usize) -> Buf {
        self.arena.buffer(self.purpose, format!("{}{name}", self.prefix), dtype, len)
    }

    pub fn floats(&mut self, name: &str, len: usize) -> Buf {
        self.any(name, Dtype::F32, len)
    }

    /// `[tokens, width]`
    pub fn rows(&mut self, name: &str, width: usize) -> Buf {
        self.floats(name, self.tokens * width)
    }

    /// Operands of ternary projections `(out, input)` of all tokens, and of dense products of the model's width, `(out, rows)`.
    pub fn workspace(
        &mut self,
        c: &ModelConfig,
        o: &Options,
        ternary: &[(usize, usize)],
        dense: &[(usize, usize)],
    ) -> Workspace {
        let (p, tokens) = (o.products, self.tokens);
        let needs = ternary.iter().fold(Needs::default(), |n, (out, input)| n.ternary(p, tokens, *out, *input));
        let needs = dense.iter().fold(needs, |n, (out, rows)| n.dense(p, *rows, *out, c.d_model, o.bf16_masters));
        let scaled = scales_afterwards(o.gemm, p, o.bf16_stream);
        Workspace {
            left: self.any("left", Dtype::U8, needs.left),
            right: self.any("right", Dtype::U8, needs.right),
            scales: (p == Products::Fp8).then(|| self.rows("left.scales", 1)),
            product: scaled.then(|| self.rows("product", c.d_model)),
            library: (o.gemm == Gemm::Library).then(|| self.any("library", Dtype::U8, library_bytes(tokens))),
        }
    }

    /// `[tokens, width]` of the residual stream
    pub fn stream(&mut self, name: &str, c: &ModelConfig, o: &Options) -> Buf {
        self.any(name, stream_dtype(o), self.tokens * c.d_model)
    }

    /// The residual stream before every segment of layers, and after the last. That before a segment is read for the last time in the
    /// backward of the segment, when the gradients of the embedding and of the layers in front are still to come: where this is the
    /// step's only backward, it lies there.
    pub fn starts(
        &mut self,
        c: &ModelConfig,
        o: &Options,
        layout: &ParamLayout,
        params: &[ParamBufs],
        (segments, segment): (usize, usize),
    ) -> Vec<Buf> {
        let grads_of = |id: Id| params[id.0].optim.grads.at;
        // In this order in memory: embedding, layers, final norm, head.
        let layers = layout.layers().iter().step_by(segment).map(|l| grads_of(l.mixer_norm));
        let ends: Vec<u64> = layers.chain([grads_of(layout.final_norm())]).collect();
        // A tied embedding has the head's gradient, which comes first of all.
        let begin = if c.tie_embeddings { ends[0] } else { grads_of(layout.tok_emb()) };
        let mut free = begin..begin;
        let mut take = |s: usize| {
            if o.whole_step {
                free.end = ends[s];
            }
            let len = self.tokens * c.d_model;
            self.arena.borrow(&mut free, self.purpose, format!("start.{s}"), stream_dtype(o), len)
        };
        (0..=segments).map(&mut take).collect()
    }

    pub fn quantized(&mut self, name: &str, width: usize) -> Rows {
        Rows {
            codes: self.any(&format!("{name}.codes"), Dtype::I8, self.tokens * padded(width)),
            scales: self.rows(&format!("{name}.scales"), 1),
            rstd: self.rows(&format!("{name}.rstd"), 1),
        }
    }
}

pub(super) fn param_buffers(arena: &mut Arena, layout: &ParamLayout, o: &Options) -> Vec<ParamBufs> {
    let dtype = |p: &Param, bf16: bool| if bf16 && p.kind.decays() { Dtype::Bf16 } else { Dtype::F32 };
    let mut each = |purpose: Use, suffix: &str, dtype_len: &dyn Fn(&Param) -> Option<(Dtype, usize)>| {
        let mut take = |p: &Param| {
            dtype_len(p).map(|(dtype, len)| arena.buffer(purpose, format!("{}{suffix}", p.name), dtype, len))
        };
        layout.params().iter().map(&mut take).collect::<Vec<Option<Buf>>>()
    };
    // One kind after the other, so that all gradients lie together: a few large ranges to reduce over several devices.
    let weights = each(Use::Weights, "", &|p| Some((dtype(p, o.bf16_masters), p.len())));
    let grads = each(Use::Gradients, ".grad", &|p| Some((dtype(p, o.bf16_gradients), p.len())));
    let is8 = |p: &Param| has_8bit_states(p, o.states);
    let moment = |p: &Param| Some((if is8(p) { Dtype::U8 } else { Dtype::F32 }, p.len()));
    let blocks = |p: &Param| is8(p).then(|| (Dtype::F32, optim::state_blocks(p.len())));
    let m = each(Use::Optimizer, ".m", &moment);
    let v = each(Use::Optimizer, ".v", &moment);
    let m_absmax = each(Use::Optimizer, ".m_absmax", &blocks);
    let v_absmax = each(Use::Optimizer, ".v_absmax", &blocks);
    let mean = each(Use::Average, ".mean", &|p| o.average.then_some((Dtype::F32, p.len())));
    let is_ternary = |p: &Param| p.kind == ParamKind::Ternary;
    let packed = each(Use::Ternary, ".packed", &|p| {
        is_ternary(p).then(|| (Dtype::U8, Ternary::packed_bytes(p.shape[0], p.shape[1])))
    });
    let gamma = each(Use::Ternary, ".gamma", &|p| is_ternary(p).then_some((Dtype::F32, 1)));
    let operand = |p: &Param, dtype: Dtype| {
        (o.unpacked && is_ternary(p)).then(|| (dtype, unpacked_len(p.shape[0], p.shape[1], dtype)))
    };
    let of_backward = match o.products {
        Products::F32 => None,
        Products::Bf16 => Some(Dtype::Bf16),
        Products::Fp8 => Some(Dtype::E4m3),
    };
    let bytes = each(Use::Ternary, ".int8", &|p| operand(p, Dtype::I8));
    let backward = each(Use::Ternary, ".backward", &|p| operand(p, of_backward?));
    let bufs = |i: usize, p: &Param| {
        let some = |buf: Option<Buf>| buf.expect("every parameter has one");
        let form = packed[i].zip(gamma[i]);
        ParamBufs {
            optim: optim::Tensor {
                weights: some(weights[i]),
                grads: some(grads[i]),
                moments: (some(m[i]), some(v[i])),
                absmax: m_absmax[i].zip(v_absmax[i]),
                mean: mean[i],
            },
            ternary: form.map(|(packed, gamma)| {
                let unpacked = bytes[i].map(|bytes| Unpacked { bytes, backward: backward[i] });
                Ternary { packed, gamma, unpacked, out: p.shape[0], input: p.shape[1] }
            }),
        }
    };
    layout.params().iter().enumerate().map(|(i, p)| bufs(i, p)).collect()
}

pub(super) fn tables(arena: &mut Arena, layout: &ParamLayout) -> Tables {
    let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
    let partials = ternary.clone().map(|p| ternary::partials(p.shape[0], p.shape[1])).sum();
    let blocks = optim::blocks(layout.params().iter().map(Param::len));
    // These two outlive a micro-batch, and with it the shape that the memory is laid out for.
    let total = arena.buffer(Use::Optimizer, "step.total", Dtype::F64, 1);
    let outcome = arena.buffer(Use::Optimizer, "step.outcome", Dtype::F64, optim::OUTCOME);
    let mut take = |name: &str, dtype, len| arena.buffer(Use::Scratch, name, dtype, len);
    Tables {
        optim: take("table.optim", Dtype::U8, layout.params().len() * optim::ENTRY),
        scalars: optim::Scalars {
            adam: take("table.adam", Dtype::U8, optim::ADAM),
            maps: take("table.maps", Dtype::F32, optim::MAPS),
            total,
            outcome,
        },
        squares: take("table.squares", Dtype::F64, blocks),
        norm: take("table.norm", Dtype::F64, 1),
        quantizer: take("table.ternary", Dtype::U8, ternary.count() * ternary::ENTRY),
        ternary_partials: take("table.partials", Dtype::F64, partials),
    }
}

pub(super) fn layer_saved(b: &mut Builder, c: &ModelConfig, o: &Options, segment: usize, slot: usize) -> LayerSaved {
    b.prefix = format!("slot.{slot}.");
    let has = |kind| c.layer_kinds().into_iter().skip(slot).step_by(segment).any(|k| k == kind);
    LayerSaved {
        mid: b.stream("mid", c, o),
        out: (slot + 1 < segment).then(|| b.stream("out", c, o)),
        mixer_norm: b.quantized("mixer_norm", c.d_model),
        mamba: has(LayerKind::Mamba).then(|| MambaSaved {
            zx: b.rows("zx", 2 * c.d_inner),
            bcdt: b.rows("bcdt", conv(c, o).bcdt_width()),
            xbc: b.rows("xbc", c.conv_channels()),
            dt: b.rows("dt", c.mamba_heads()),
            y: b.rows("y", c.d_inner),
            scan: ssd::Saved {
                states: b.floats("states", scan(c, o).states_len()),
                decay: b.floats("decay", scan(c, o).chunk_heads()),
            },
            gated: b.quantized("gated", c.d_inner),
        }),
        mla: has(LayerKind::Mla).then(|| MlaSaved {
            q: b.rows("q", c.n_heads * c.d_qk()),
            ckr: b.rows("ckr", c.kv_rank + c.d_rope),
            latent: b.quantized("latent", c.kv_rank),
            kv: b.rows("kv", c.n_heads * (c.d_nope + c.d_v)),
            o: b.rows("o", c.n_heads * c.d_v),
            lse: b.rows("lse", c.n_heads),
            out: b.quantized("attention", c.n_heads * c.d_v),
        }),
        ffn_norm: b.quantized("ffn_norm", c.d_model),
        gate: b.rows("gate", c.ffn_hidden),
        up: b.rows("up", c.ffn_hidden),
        hidden: b.quantized("hidden", c.ffn_hidden),
    }
}

pub(super) fn ffn_scratch(b: &mut Builder, c: &ModelConfig, o: &Options) -> FfnScratch {
    b.prefix = "ffn.".into();
    let f = c.ffn_hidden;
    let needs = [(f, c.d_model), (c.d_model, f)];
    let (dgate, dup) = (b.rows("dgate", f), b.rows("dup", f));
    // No product is made while partial sums are.
    let here = b.arena.here();
    let workspace = b.workspace(c, o, &needs, &[]);
    b.arena.overlay(here);
    let partials = norm::partials_len(b.tokens, f).max(norm::partials_len(b.tokens, c.d_model));
    FfnScratch { dgate, dup, workspace, partials: b.floats("partials", partials) }
}

pub(super) fn mamba_scratch(b: &mut Builder, c: &ModelConfig, o: &Options) -> MambaScratch {
    b.prefix = "mamba.".into();
    let (conv, scan) = (conv(c, o), scan(c, o));
    let (dy, dzx) = (b.rows("dy", c.d_inner), b.rows("dzx", 2 * c.d_inner));
    let dbcdt = b.rows("dbcdt", conv.bcdt_width());
    let (renormed, rstd) = (b.rows("renormed", c.d_model), b.rows("rstd", 1));
    // The scan, the convolution and the norms stand between the products.
    let here = b.arena.here();
    let needs = [(2 * c.d_inner, c.d_model), (c.d_model, c.d_inner)];
    let workspace = b.workspace(c, o, &needs, &[(conv.bcdt_width(), b.tokens)]);
    b.arena.overlay(here);
    let norms = norm::partials_len(b.tokens, c.d_inner).max(norm::partials_len(b.tokens, c.d_model));
    let partials = norms.max(conv.conv_partials_len()).max(conv.step_partials_len());
    MambaScratch {
        dy,
        workspace,
        dzx,
        dbcdt,
        dxbc: b.rows("dxbc", c.conv_channels()),
        ddt: b.rows("ddt", c.mamba_heads()),
        scan: ssd::Scratch {
            dstates: b.floats("dstates", scan.states_len()),
            dbc: b.floats("dbc", scan.dbc_len()),
            da_log: b.floats("da_log", scan.chunk_heads()),
            dskip: b.floats("dskip", scan.chunk_heads()),
        },
        partials: b.floats("partials", partials),
        renormed,
        rstd,
    }
}

pub(super) fn mla_scratch(b: &mut Builder, c: &ModelConfig, opt: &Options) -> MlaScratch {
    b.prefix = "mla.".into();
    let (o, q, kv) = (c.n_heads * c.d_v, c.n_heads * c.d_qk(), c.n_heads * (c.d_nope + c.d_v));
    let (d_o, dq, dkv) = (b.rows("d_o", o), b.rows("dq", q), b.rows("dkv", kv));
    let (dckr, dlatent) = (b.rows("dckr", c.kv_rank + c.d_rope), b.rows("dlatent", c.kv_rank));
    // Attention and the norms stand between the products.
    let here = b.arena.here();
    let needs = [(q, c.d_model), (c.kv_rank + c.d_rope, c.d_model), (kv, c.kv_rank), (c.d_model, o)];
    let workspace = b.workspace(c, opt, &needs, &[]);
    b.arena.overlay(here);
    let widths = [o, c.kv_rank, c.d_model];
    let partials = widths.map(|w| norm::partials_len(b.tokens, w)).into_iter().max().unwrap_or(0);
    MlaScratch {
        d_o,
        workspace,
        delta: b.rows("delta", c.n_heads),
        dq,
        dkv,
        dkr_heads: b.rows("dkr_heads", c.n_heads * c.d_rope),
        dckr,
        dlatent,
        partials: b.floats("partials", partials),
    }
}

pub(super) fn head_scratch(b: &mut Builder, c: &ModelConfig, o: &Options) -> HeadScratch {
    b.prefix = "head.".into();
    let chunk = (b.tokens / CHUNKS).next_multiple_of(128).max(LEAST_CHUNK).min(b.tokens);
    let (logits, dnormed) = (b.floats("logits", chunk * c.vocab_size), b.rows("dnormed", c.d_model));
    let here = b.arena.here();
    let workspace = b.workspace(c, o, &[], &[(c.vocab_size, chunk)]);
    b.arena.overlay(here);
    let partials = b.floats("partials", norm::partials_len(b.tokens, c.d_model));
    HeadScratch { logits, chunk, dnormed, workspace, partials }
}
