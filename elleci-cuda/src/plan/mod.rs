//! The memory of a training step: every buffer of it, from shapes alone. What [`Plan`] says is what is allocated.

use std::sync::Arc;

use elleci_core::config::{LayerKind, ModelConfig};
use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_core::params::{Id, ParamLayout};

use crate::arena::{Arena, Buf, Dtype, Use};
use crate::device::DeviceError;
use crate::ops::attention::Heads;
use crate::ops::loss::Occurrences;
use crate::ops::mamba::ConvShape;
use crate::ops::product::Gemm;
use crate::ops::{Products, ssd};

mod buffers;
mod build;

pub use buffers::{
    FfnScratch, HeadScratch, Inputs, LayerSaved, MambaSaved, MambaScratch, MlaSaved, MlaScratch, ParamBufs, Tables,
};
use build::Builder;
pub use build::has_8bit_states;

/// How a step is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Whether a micro-batch is all of its step. Until the backward writes a gradient, its memory is then free for activations.
    pub whole_step: bool,
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
    /// Whether ternary codes are kept as operands of the products too; otherwise they are laid out for every product.
    pub unpacked: bool,
    /// Who multiplies the large products on tensor cores.
    pub gemm: Gemm,
    /// The residual stream as bf16; otherwise float32. Its gradient is float32.
    pub bf16_stream: bool,
    /// Whether a running mean of the weights is kept.
    pub average: bool,
    /// Bytes left unused behind every buffer; see [`Arena::new`].
    pub guard: u64,
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
        let params = build::param_buffers(&mut arena, &layout, &o);
        let tokens = o.batch * o.seq;
        let tables = build::tables(&mut arena, &layout);
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
        let starts = b.starts(&c, &o, &layout, &params, (segments, segment));
        let saved = (0..segment).map(|slot| build::layer_saved(&mut b, &c, &o, segment, slot)).collect();
        b.purpose = Use::Scratch;
        b.prefix = String::new();
        let (normed, dh) = (b.rows("normed", c.d_model), b.rows("dh", c.d_model));
        let final_rstd = b.rows("final_rstd", 1);
        // What follows is used by one part of the step at a time.
        let kinds = c.layer_kinds();
        b.arena.phase();
        let ffn = build::ffn_scratch(&mut b, &c, &o);
        b.arena.phase();
        let mamba = kinds.contains(&LayerKind::Mamba).then(|| build::mamba_scratch(&mut b, &c, &o));
        b.arena.phase();
        let mla = kinds.contains(&LayerKind::Mla).then(|| build::mla_scratch(&mut b, &c, &o));
        b.arena.phase();
        let head = build::head_scratch(&mut b, &c, &o);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(batch: usize) -> Options {
        Options {
            batch,
            seq: 1024,
            whole_step: false,
            checkpointing: Checkpointing::EveryLayer,
            bf16_masters: true,
            bf16_gradients: true,
            states: StatePrecision::Block8,
            products: Products::Bf16,
            unpacked: false,
            gemm: Gemm::Library,
            bf16_stream: false,
            average: false,
            guard: 0,
        }
    }

    fn gib(o: Options) -> f64 {
        let config = ModelConfig::preset("elleci-1.5b").unwrap();
        Plan::new(&config, o).unwrap().arena.bytes() as f64 / (1u64 << 30) as f64
    }

    /// The budgets of a 12 GB card, with and without accumulation.
    #[test]
    fn the_largest_preset_fits_its_budgets() {
        assert!(gib(options(1)) <= 11.5, "{}", gib(options(1)));
        let whole = |o| gib(Options { whole_step: true, ..o });
        assert!(whole(options(1)) <= 10.0, "{}", whole(options(1)));
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

    /// A residual stream may only lie where gradients are written after the last use of it: those of the embedding, and of the
    /// layers of earlier segments.
    #[test]
    fn activations_lie_in_gradients_that_are_written_later() {
        let nano = ModelConfig::preset("nano").unwrap();
        let tied = ModelConfig { tie_embeddings: true, ..nano.clone() };
        for (config, checkpointing) in [
            (&nano, Checkpointing::EveryLayer),
            (&nano, Checkpointing::EveryKth(4)),
            (&nano, Checkpointing::None),
            (&tied, Checkpointing::EveryLayer),
        ] {
            let o = Options { checkpointing, bf16_gradients: false, seq: 256, ..options(4) };
            let apart = Plan::new(config, o).unwrap();
            let plan = Plan::new(config, Options { whole_step: true, ..o }).unwrap();
            let lent = plan.arena.lent_to(Use::Activations);
            assert!(lent > 0 && plan.arena.bytes() + lent <= apart.arena.bytes(), "{lent} bytes are saved");
            let last_use = |s: usize| plan.starts.iter().position(|x| *x == plan.starts[s]).unwrap();
            for (s, start) in plan.starts.iter().enumerate() {
                assert_eq!(last_use(s), s, "no two streams lie in one place");
                for (p, bufs) in plan.layout.params().iter().zip(&plan.params) {
                    let g = bufs.optim.grads;
                    let apart = start.at >= g.at + g.bytes() || g.at >= start.at + start.bytes();
                    let later = match p.layer {
                        Some(layer) => layer / plan.segment() < s,
                        None => p.name == "tok_emb.weight" && !config.tie_embeddings,
                    };
                    assert!(apart || later, "{} and the stream before segment {s}", p.name);
                }
            }
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
