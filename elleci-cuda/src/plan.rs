//! The memory of a training step: every buffer of it, from shapes alone. What [`Plan`] says is what is allocated.

use elleci_core::config::{LayerKind, ModelConfig};
use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_core::optim::adamw::MIN_8BIT_ELEMS;
use elleci_core::params::{Id, Param, ParamKind, ParamLayout};
use std::sync::Arc;

use crate::arena::{Arena, Buf, Dtype, Use};
use crate::device::DeviceError;
use crate::ops::attention::Heads;
use crate::ops::loss::Occurrences;
use crate::ops::mamba::ConvShape;
use crate::ops::product::Ternary;
use crate::ops::{Products, Rows, norm, optim, padded, ssd, ternary};

/// Elements of the logits that stand in memory at a time.
const LOGITS: usize = 16 << 20;

/// How a step is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Which activations are kept.
    pub checkpointing: Checkpointing,
    /// Matrices as bf16, updated with stochastic rounding; otherwise float32.
    pub bf16_masters: bool,
    /// Gradients of matrices as bf16; otherwise float32.
    pub bf16_gradients: bool,
    /// Optimizer states.
    pub states: StatePrecision,
    /// Arithmetic of the products.
    pub products: Products,
    /// Whether a running mean of the weights is kept.
    pub average: bool,
    /// Bytes left unused behind every buffer; see [`Arena::new`].
    pub guard: u64,
}

/// Buffers of one parameter.
#[derive(Clone, Copy, Debug)]
pub struct ParamBufs {
    /// Weights, gradients, states, mean
    pub optim: optim::Tensor,
    /// The ternary form, where it has one
    pub ternary: Option<Ternary>,
}

/// What a Mamba mixer keeps for its backward.
#[derive(Clone, Copy, Debug)]
pub struct MambaSaved {
    /// Gate and x `[tokens, 2 inner]`
    pub zx: Buf,
    /// B, C and raw step sizes `[tokens, 2 d_state + heads]`
    pub bcdt: Buf,
    /// After the convolution `[tokens, inner + 2 d_state]`
    pub xbc: Buf,
    /// Step sizes `[tokens, heads]`
    pub dt: Buf,
    /// Output of the scan `[tokens, inner]`
    pub y: Buf,
    /// States at the chunks' entries, and decays
    pub scan: ssd::Saved,
    /// Quantised gated rows
    pub gated: Rows,
}

/// What an MLA mixer keeps for its backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names of elleci_core::layers::mla")]
pub struct MlaSaved {
    pub q: Buf,
    pub ckr: Buf,
    pub latent: Rows,
    pub kv: Buf,
    pub o: Buf,
    pub lse: Buf,
    pub out: Rows,
}

/// What a layer keeps for its backward; a slot serves every k-th layer under checkpointing.
#[derive(Clone, Copy, Debug)]
pub struct LayerSaved {
    /// Residual stream after the mixer `[tokens, d_model]`
    pub mid: Buf,
    /// Residual stream after the layer, where it is not the start of the next segment
    pub out: Option<Buf>,
    /// Rows of the mixer's norm
    pub mixer_norm: Rows,
    /// A Mamba layer's
    pub mamba: Option<MambaSaved>,
    /// An MLA layer's
    pub mla: Option<MlaSaved>,
    /// Rows of the feed-forward's norm
    pub ffn_norm: Rows,
    /// `[tokens, ffn_hidden]`
    pub gate: Buf,
    /// `[tokens, ffn_hidden]`
    pub up: Buf,
    /// Rows of the product of both
    pub hidden: Rows,
}

/// Scratch of a feed-forward's backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what LayerSaved names")]
pub struct FfnScratch {
    pub dhidden: Buf,
    pub dgate: Buf,
    pub dup: Buf,
    pub partials: Buf,
}

/// Scratch of a Mamba mixer's backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what MambaSaved names")]
pub struct MambaScratch {
    pub dgated: Buf,
    pub dy: Buf,
    pub dzx: Buf,
    pub dbcdt: Buf,
    pub dxbc: Buf,
    pub ddt: Buf,
    pub scan: ssd::Scratch,
    pub partials: Buf,
    pub renormed: Buf,
    pub rstd: Buf,
}

/// Scratch of an MLA mixer's backward.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "gradients of what MlaSaved names")]
pub struct MlaScratch {
    pub dout: Buf,
    pub d_o: Buf,
    pub delta: Buf,
    pub dq: Buf,
    pub dkv: Buf,
    pub dkr_heads: Buf,
    pub dckr: Buf,
    pub dlatent: Buf,
    pub partials: Buf,
}

/// Scratch of the head.
#[derive(Clone, Copy, Debug)]
pub struct HeadScratch {
    /// `[chunk, vocab]`
    pub logits: Buf,
    /// Tokens of a chunk
    pub chunk: usize,
    /// Gradient of the final norm's output
    pub dnormed: Buf,
    /// Of the final norm's backward
    pub partials: Buf,
}

/// The batch and the scalars of a step.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[tokens]`
    pub tokens: Buf,
    /// `[tokens]`
    pub targets: Buf,
    /// `[tokens]`
    pub weights: Buf,
    /// Factor of the gradients
    pub scale: Buf,
    /// Positions by token
    pub occurrences: Occurrences,
}

/// Tables of the kernels that walk over all tensors.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the arguments of ops::optim and ops::ternary")]
pub struct Tables {
    pub optim: Buf,
    pub adam: Buf,
    pub maps: Buf,
    pub squares: Buf,
    pub norm: Buf,
    pub quantizer: Buf,
    pub ternary_partials: Buf,
}

/// Every buffer of a training step.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The shapes.
    pub config: ModelConfig,
    /// How it is run.
    pub options: Options,
    /// Names and shapes of the parameters.
    pub layout: Arc<ParamLayout>,
    /// All memory.
    pub arena: Arena,
    /// By parameter.
    pub params: Vec<ParamBufs>,
    /// The batch.
    pub inputs: Inputs,
    /// Rotations `[2, seq, d_rope / 2]`
    pub rope: Buf,
    /// Residual stream at the start of every segment, then that after the last layer
    pub starts: Vec<Buf>,
    /// By slot
    pub saved: Vec<LayerSaved>,
    /// Output of a norm, or its gradient `[tokens, d_model]`
    pub normed: Buf,
    /// Of the final norm
    pub final_rstd: Buf,
    /// Gradient of the residual stream
    pub dh: Buf,
    /// `[tokens]` and `[1]`, float64
    pub losses: (Buf, Buf),
    /// Scratch by what uses it
    pub ffn: FfnScratch,
    /// Of Mamba layers
    pub mamba: Option<MambaScratch>,
    /// Of MLA layers
    pub mla: Option<MlaScratch>,
    /// Of the head
    pub head: HeadScratch,
    /// Tables
    pub tables: Tables,
}

/// Refuses what the kernels do not cover.
fn check(c: &ModelConfig, o: &Options) -> Result<(), DeviceError> {
    let unsupported = |what: String| Err(DeviceError::Unsupported(what));
    if let Err(e) = c.validate() {
        return unsupported(e.to_string());
    }
    let tokens = o.batch.saturating_mul(o.seq);
    if tokens == 0 || tokens > 65_535 {
        return unsupported(format!("a micro-batch of {tokens} tokens; 1 to 65535 are covered"));
    }
    let kinds = c.layer_kinds();
    if kinds.contains(&LayerKind::Mla) && heads(c, o).width().is_none() {
        return unsupported(format!(
            "`d_nope` + `d_rope` is {} and `d_v` {}; up to {} are covered",
            c.d_qk(),
            c.d_v,
            crate::ops::attention::WIDTHS[1]
        ));
    }
    if kinds.contains(&LayerKind::Mamba) && scan(c, o).compiled_states().is_none() {
        return unsupported(format!(
            "`head_dim` is {} and `d_state` {}; up to {} and {} are covered",
            c.head_dim,
            c.d_state,
            ssd::MAX_HEAD,
            ssd::STATES[1]
        ));
    }
    // Sizes are 32-bit in kernels where they count elements of a row or rows; the largest products are 64-bit.
    if c.vocab_size > i32::MAX as usize {
        return unsupported(format!("`vocab_size` is {}", c.vocab_size));
    }
    Ok(())
}

/// The sizes of attention.
pub fn heads(c: &ModelConfig, o: &Options) -> Heads {
    Heads {
        batch: o.batch,
        seq: o.seq,
        heads: c.n_heads,
        d_nope: c.d_nope,
        d_rope: c.d_rope,
        d_v: c.d_v,
        kv_rank: c.kv_rank,
    }
}

/// The sizes of the scan.
pub fn scan(c: &ModelConfig, o: &Options) -> ssd::Shape {
    ssd::Shape { batch: o.batch, seq: o.seq, heads: c.mamba_heads(), head_dim: c.head_dim, d_state: c.d_state }
}

/// The sizes of the convolution.
pub fn conv(c: &ModelConfig, o: &Options) -> ConvShape {
    ConvShape {
        tokens: o.batch * o.seq,
        seq: o.seq,
        inner: c.d_inner,
        d_state: c.d_state,
        heads: c.mamba_heads(),
        taps: c.d_conv,
    }
}

/// Whether a parameter's states are 8-bit: as in the core.
pub fn has_8bit_states(p: &Param, precision: StatePrecision) -> bool {
    let keeps_f32 = matches!(p.kind, ParamKind::Embedding | ParamKind::Norm) || p.len() < MIN_8BIT_ELEMS;
    precision == StatePrecision::Block8 && !keeps_f32
}

/// Names buffers and takes them from the arena.
struct Builder<'a> {
    arena: &'a mut Arena,
    purpose: Use,
    prefix: String,
    tokens: usize,
}

impl Builder<'_> {
    fn any(&mut self, name: &str, dtype: Dtype, len: usize) -> Buf {
        self.arena.buffer(self.purpose, format!("{}{name}", self.prefix), dtype, len)
    }

    fn floats(&mut self, name: &str, len: usize) -> Buf {
        self.any(name, Dtype::F32, len)
    }

    /// `[tokens, width]`
    fn rows(&mut self, name: &str, width: usize) -> Buf {
        self.floats(name, self.tokens * width)
    }

    fn quantized(&mut self, name: &str, width: usize) -> Rows {
        Rows {
            codes: self.any(&format!("{name}.codes"), Dtype::I8, self.tokens * padded(width)),
            scales: self.rows(&format!("{name}.scales"), 1),
            rstd: self.rows(&format!("{name}.rstd"), 1),
        }
    }
}

impl Plan {
    /// The plan of a step.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for sizes that the kernels do not cover.
    pub fn new(config: &ModelConfig, options: Options) -> Result<Plan, DeviceError> {
        check(config, &options)?;
        let (c, o) = (config.clone(), options);
        let layout = ParamLayout::new(&c);
        let mut arena = Arena::new(o.guard);
        let params = param_buffers(&mut arena, &layout, &o);
        let tokens = o.batch * o.seq;
        let tables = tables(&mut arena, &layout);
        let mut b = Builder { arena: &mut arena, purpose: Use::Scratch, prefix: String::new(), tokens };
        let inputs = Inputs {
            tokens: b.any("tokens", Dtype::U32, tokens),
            targets: b.any("targets", Dtype::U32, tokens),
            weights: b.rows("weights", 1),
            scale: b.floats("scale", 1),
            occurrences: Occurrences {
                positions: b.any("positions", Dtype::U32, tokens),
                starts: b.any("starts", Dtype::U32, tokens + 1),
                count: b.any("count", Dtype::U32, 1),
            },
        };
        let rope = b.floats("rope", o.seq * c.d_rope);
        let losses = (b.any("losses", Dtype::F64, tokens), b.any("loss", Dtype::F64, 1));
        b.purpose = Use::Activations;
        let segment = o.checkpointing.segment(c.n_layers);
        let segments = c.n_layers.div_ceil(segment);
        let starts = (0..=segments).map(|s| b.rows(&format!("start.{s}"), c.d_model)).collect();
        let saved = (0..segment).map(|slot| layer_saved(&mut b, &c, &o, segment, slot)).collect();
        b.purpose = Use::Scratch;
        b.prefix = String::new();
        let (normed, dh) = (b.rows("normed", c.d_model), b.rows("dh", c.d_model));
        let final_rstd = b.rows("final_rstd", 1);
        // What follows is used by one part of the step at a time.
        let kinds = c.layer_kinds();
        b.arena.phase();
        let ffn = ffn_scratch(&mut b, &c);
        b.arena.phase();
        let mamba = kinds.contains(&LayerKind::Mamba).then(|| mamba_scratch(&mut b, &c, &o));
        b.arena.phase();
        let mla = kinds.contains(&LayerKind::Mla).then(|| mla_scratch(&mut b, &c));
        b.arena.phase();
        let head = head_scratch(&mut b, &c);
        b.arena.end_phases();
        Ok(Plan {
            config: c,
            options: o,
            layout,
            arena,
            params,
            inputs,
            rope,
            starts,
            saved,
            normed,
            final_rstd,
            dh,
            losses,
            ffn,
            mamba,
            mla,
            head,
            tables,
        })
    }

    /// Layers whose activations stand in memory together.
    pub fn segment(&self) -> usize {
        self.saved.len()
    }

    /// A parameter's buffers.
    pub fn param(&self, id: Id) -> &ParamBufs {
        &self.params[id.0]
    }
}

fn param_buffers(arena: &mut Arena, layout: &ParamLayout, o: &Options) -> Vec<ParamBufs> {
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
            ternary: form.map(|(packed, gamma)| Ternary { packed, gamma, out: p.shape[0], input: p.shape[1] }),
        }
    };
    layout.params().iter().enumerate().map(|(i, p)| bufs(i, p)).collect()
}

fn tables(arena: &mut Arena, layout: &ParamLayout) -> Tables {
    let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
    let partials = ternary.clone().map(|p| ternary::partials(p.shape[0], p.shape[1])).sum();
    let blocks = optim::blocks(layout.params().iter().map(Param::len));
    let mut take = |name: &str, dtype, len| arena.buffer(Use::Scratch, name, dtype, len);
    Tables {
        optim: take("table.optim", Dtype::U8, layout.params().len() * optim::ENTRY),
        adam: take("table.adam", Dtype::U8, optim::ADAM),
        maps: take("table.maps", Dtype::F32, optim::MAPS),
        squares: take("table.squares", Dtype::F64, blocks),
        norm: take("table.norm", Dtype::F64, 1),
        quantizer: take("table.ternary", Dtype::U8, ternary.count() * ternary::ENTRY),
        ternary_partials: take("table.partials", Dtype::F64, partials),
    }
}

fn layer_saved(b: &mut Builder, c: &ModelConfig, o: &Options, segment: usize, slot: usize) -> LayerSaved {
    b.prefix = format!("slot.{slot}.");
    let has = |kind| c.layer_kinds().into_iter().skip(slot).step_by(segment).any(|k| k == kind);
    LayerSaved {
        mid: b.rows("mid", c.d_model),
        out: (slot + 1 < segment).then(|| b.rows("out", c.d_model)),
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

fn ffn_scratch(b: &mut Builder, c: &ModelConfig) -> FfnScratch {
    b.prefix = "ffn.".into();
    let f = c.ffn_hidden;
    let partials = norm::partials_len(b.tokens, f).max(norm::partials_len(b.tokens, c.d_model));
    FfnScratch {
        dhidden: b.rows("dhidden", f),
        dgate: b.rows("dgate", f),
        dup: b.rows("dup", f),
        partials: b.floats("partials", partials),
    }
}

fn mamba_scratch(b: &mut Builder, c: &ModelConfig, o: &Options) -> MambaScratch {
    b.prefix = "mamba.".into();
    let (conv, scan) = (conv(c, o), scan(c, o));
    let norms = norm::partials_len(b.tokens, c.d_inner).max(norm::partials_len(b.tokens, c.d_model));
    let partials = norms.max(conv.conv_partials_len()).max(conv.step_partials_len());
    MambaScratch {
        dgated: b.rows("dgated", c.d_inner),
        dy: b.rows("dy", c.d_inner),
        dzx: b.rows("dzx", 2 * c.d_inner),
        dbcdt: b.rows("dbcdt", conv.bcdt_width()),
        dxbc: b.rows("dxbc", c.conv_channels()),
        ddt: b.rows("ddt", c.mamba_heads()),
        scan: ssd::Scratch {
            dstates: b.floats("dstates", scan.states_len()),
            dbc: b.floats("dbc", scan.dbc_len()),
            da_log: b.floats("da_log", scan.chunk_heads()),
            dskip: b.floats("dskip", scan.chunk_heads()),
        },
        partials: b.floats("partials", partials),
        renormed: b.rows("renormed", c.d_model),
        rstd: b.rows("rstd", 1),
    }
}

fn mla_scratch(b: &mut Builder, c: &ModelConfig) -> MlaScratch {
    b.prefix = "mla.".into();
    let o = c.n_heads * c.d_v;
    let widths = [o, c.kv_rank, c.d_model];
    let partials = widths.map(|w| norm::partials_len(b.tokens, w)).into_iter().max().unwrap_or(0);
    MlaScratch {
        dout: b.rows("dout", o),
        d_o: b.rows("d_o", o),
        delta: b.rows("delta", c.n_heads),
        dq: b.rows("dq", c.n_heads * c.d_qk()),
        dkv: b.rows("dkv", c.n_heads * (c.d_nope + c.d_v)),
        dkr_heads: b.rows("dkr_heads", c.n_heads * c.d_rope),
        dckr: b.rows("dckr", c.kv_rank + c.d_rope),
        dlatent: b.rows("dlatent", c.kv_rank),
        partials: b.floats("partials", partials),
    }
}

fn head_scratch(b: &mut Builder, c: &ModelConfig) -> HeadScratch {
    b.prefix = "head.".into();
    let chunk = (LOGITS / c.vocab_size).max(128).min(b.tokens);
    HeadScratch {
        logits: b.floats("logits", chunk * c.vocab_size),
        chunk,
        dnormed: b.rows("dnormed", c.d_model),
        partials: b.floats("partials", norm::partials_len(b.tokens, c.d_model)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(batch: usize) -> Options {
        Options {
            batch,
            seq: 1024,
            checkpointing: Checkpointing::EveryLayer,
            bf16_masters: true,
            bf16_gradients: true,
            states: StatePrecision::Block8,
            products: Products::Bf16,
            average: false,
            guard: 0,
        }
    }

    fn gib(o: Options) -> f64 {
        let config = ModelConfig::preset("elleci-1.5b").unwrap();
        Plan::new(&config, o).unwrap().arena.bytes() as f64 / (1u64 << 30) as f64
    }

    /// The budgets of a 12 GB card. Gradients stand for all parameters at once with and without accumulation: clipping
    /// by the global norm needs them all, and 2-bit codes leave the room for them.
    #[test]
    fn the_largest_preset_fits_its_budgets() {
        assert!(gib(options(1)) <= 10.0, "{}", gib(options(1)));
        let masters = gib(Options { bf16_masters: false, ..options(1) });
        assert!(masters <= 14.0, "{masters}");
        assert!(gib(options(16)) <= 40.0, "{}", gib(options(16)));
    }

    #[test]
    fn purposes_add_up_and_no_two_persistent_buffers_overlap() {
        let config = ModelConfig::preset("nano").unwrap();
        for guard in [0, 64] {
            let plan = Plan::new(&config, Options { seq: 100, guard, average: true, ..options(2) }).unwrap();
            let all = [
                Use::Weights,
                Use::Ternary,
                Use::Gradients,
                Use::Optimizer,
                Use::Average,
                Use::Activations,
                Use::Scratch,
            ];
            assert_eq!(all.map(|u| plan.arena.bytes_of(u)).iter().sum::<u64>(), plan.arena.bytes());
            let mut spans: Vec<_> = plan.arena.regions().iter().map(|r| (r.buf.at, r.buf.at + r.buf.bytes())).collect();
            spans.sort_unstable();
            let overlaps = spans.windows(2).filter(|w| w[1].0 < w[0].1).count();
            assert_eq!(overlaps > 0, guard == 0, "phases share memory, unless accesses are to be checked");
        }
    }

    #[test]
    fn what_the_kernels_do_not_cover_is_refused_by_name() {
        let base = ModelConfig::preset("nano").unwrap();
        let refusal = |change: fn(&mut ModelConfig)| {
            let mut c = base.clone();
            change(&mut c);
            Plan::new(&c, options(1)).unwrap_err().to_string()
        };
        assert!(refusal(|c| c.d_state = 200).contains("`d_state` 200"));
        assert!(refusal(|c| c.d_v = 130).contains("`d_v` 130"));
        assert!(Plan::new(&base, options(100)).unwrap_err().to_string().contains("102400 tokens"));
    }
}
