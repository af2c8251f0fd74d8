//! The whole model in `tch`, equation by equation after the specification.

use std::cell::RefCell;
use std::collections::BTreeMap;

use elleci_core::config::{LayerKind, ModelConfig};
use elleci_core::params::{ParamKind, Params};
use tch::{Device, Kind, Tensor};

use crate::ops::{self, Scan, Ssd};

/// The integer codes that the core computed: `activations` by the name of the norm gain that precedes the quantiser
/// (`layers.0.mixer_norm.weight`), `[tokens, channels]`; `weights` by tensor name, `[out, in]`.
///
/// Rounding to codes is the one step of the model that is not continuous: two correct programs differ by a whole code
/// wherever a value lies within their rounding noise of a tie. With the core's codes given, the rest of the oracle is
/// a smooth function and can be compared tightly; that the codes are themselves right is checked beside it.
#[derive(Debug, Default)]
pub struct Codes {
    /// int8 codes after a norm.
    pub activations: BTreeMap<String, Vec<i8>>,
    /// ternary codes of a projection.
    pub weights: BTreeMap<String, Vec<i8>>,
}

/// How given codes differ from those that the oracle would have chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct CodeReport {
    /// Codes looked at.
    pub total: usize,
    /// Codes that differ from the oracle's.
    pub flips: usize,
    /// Over all codes: the largest `|value before rounding - code|` past one half. Right codes give at most 0; a
    /// flip within rounding noise of a tie gives that noise.
    pub past_tie: f64,
}

impl CodeReport {
    fn add(&mut self, value: &Tensor, given: &Tensor, own: &Tensor, low: f64, high: f64) {
        self.total += given.numel();
        self.flips += given.ne_tensor(own).sum(Kind::Int64).int64_value(&[]) as usize;
        // Saturated values are compared with the end of the range that they are clamped to.
        let distance = (value.clamp(low, high) - given).abs().max().double_value(&[]) - 0.5;
        self.past_tie = self.past_tie.max(distance);
    }
}

/// One batch as the oracle takes it.
#[derive(Debug)]
pub struct OracleBatch {
    /// int64 `[batch, time]`
    pub tokens: Tensor,
    /// int64 `[batch * time]`, all within the vocabulary
    pub targets: Tensor,
    /// `[batch * time]`
    pub weights: Tensor,
}

/// The model with its parameters as autograd leaves.
#[derive(Debug)]
pub struct Oracle<'a> {
    config: ModelConfig,
    kind: Kind,
    scan: Scan,
    codes: Option<&'a Codes>,
    report: RefCell<CodeReport>,
    params: BTreeMap<String, Tensor>,
}

impl<'a> Oracle<'a> {
    /// The oracle at the given weights. `codes`: see [`Codes`]; without them the oracle rounds for itself.
    pub fn new(config: &ModelConfig, params: &Params, kind: Kind, scan: Scan, codes: Option<&'a Codes>) -> Oracle<'a> {
        let named = params.layout().params().iter().map(|p| {
            let shape: Vec<i64> = p.shape.iter().map(|&n| n as i64).collect();
            let leaf = Tensor::from_slice(&params.data()[p.range.clone()]).view(shape.as_slice()).to_kind(kind);
            (p.name.clone(), leaf.set_requires_grad(true))
        });
        Oracle::with_leaves(config, named.collect(), kind, scan, codes)
    }

    /// The oracle at weights that are already autograd leaves of type `kind`, by parameter name.
    pub fn with_leaves(
        config: &ModelConfig,
        params: BTreeMap<String, Tensor>,
        kind: Kind,
        scan: Scan,
        codes: Option<&'a Codes>,
    ) -> Oracle<'a> {
        Oracle { config: config.clone(), kind, scan, codes, report: RefCell::default(), params }
    }

    /// Multiplies every weight by `1 + amount * u`, `u` uniform in [-1, 1]: what a rounding of the inputs would do.
    /// LibTorch's generator is global, so `u` is made here from `seed`.
    pub fn perturb(&mut self, amount: f64, seed: u64) {
        for (i, tensor) in self.params.values_mut().enumerate() {
            let u = crate::compare::uniform(tensor.numel(), seed.wrapping_add(i as u64), self.kind).view_as(tensor);
            let moved = (tensor.detach() * (u * amount + 1.0)).set_requires_grad(true);
            *tensor = moved;
        }
    }

    /// What was noticed about the given codes, over all forward passes so far.
    pub fn code_report(&self) -> CodeReport {
        *self.report.borrow()
    }

    /// A parameter by name.
    pub fn param(&self, name: &str) -> &Tensor {
        &self.params[name]
    }

    /// All parameters by name.
    pub fn params(&self) -> &BTreeMap<String, Tensor> {
        &self.params
    }

    fn norm(&self, x: &Tensor, gain: &str) -> Tensor {
        ops::rms_norm(x, self.param(gain), f64::from(self.config.norm_eps))
    }

    /// The norm's output, quantised.
    fn quantise(&self, n: &Tensor, gain: &str) -> Tensor {
        let steps = ops::activation_steps(&n.detach()).0;
        let own = steps.round().clamp(-128.0, 127.0);
        let codes = match self.codes {
            None => own,
            Some(codes) => {
                let given = self.given(codes.activations.get(gain), gain, n);
                self.report.borrow_mut().add(&steps, &given, &own, -128.0, 127.0);
                given
            }
        };
        ops::quantise_activation(n, &codes)
    }

    fn ternary(&self, quantised: &Tensor, name: &str) -> Tensor {
        let w = self.param(name);
        let own = ops::weight_codes(&w.detach());
        let codes = match self.codes {
            None => own,
            Some(codes) => {
                let given = self.given(codes.weights.get(name), name, w);
                let value = w.detach() / ops::gamma(&w.detach());
                self.report.borrow_mut().add(&value, &given, &own, -1.0, 1.0);
                given
            }
        };
        ops::linear(quantised, &ops::quantise_weight(w, &codes))
    }

    fn given(&self, codes: Option<&Vec<i8>>, name: &str, like: &Tensor) -> Tensor {
        let codes = codes.unwrap_or_else(|| panic!("the core gave no codes for {name}"));
        assert_eq!(codes.len(), like.numel(), "codes of {name}");
        Tensor::from_slice(codes).view_as(like).to_kind(self.kind)
    }

    fn mla(&self, n: &Tensor, quantised: &Tensor, layer: usize) -> Tensor {
        let c = &self.config;
        let name = |tail: &str| format!("layers.{layer}.mla.{tail}.weight");
        let (batch, time) = (n.size()[0], n.size()[1]);
        let [heads, nope, rot, value, rank] = [c.n_heads, c.d_nope, c.d_rope, c.d_v, c.kv_rank].map(|n| n as i64);
        let base = f64::from(c.rope_base);
        let q = self.ternary(quantised, &name("q")).view([batch, time, heads, nope + rot]);
        let down = self.ternary(quantised, &name("kv_down"));
        let (latent, k_rope) = (down.narrow(-1, 0, rank), down.narrow(-1, rank, rot));
        let latent = self.quantise(&self.norm(&latent, &name("kv_norm")), &name("kv_norm"));
        let kv = self.ternary(&latent, &name("kv_up")).view([batch, time, heads, nope + value]);
        let (k_nope, v) = (kv.narrow(-1, 0, nope), kv.narrow(-1, nope, value));
        let q = Tensor::cat(&[q.narrow(-1, 0, nope), ops::rope(&q.narrow(-1, nope, rot), base)], -1);
        let k_rope = ops::rope(&k_rope.unsqueeze(2), base).expand([batch, time, heads, rot], false);
        let k = Tensor::cat(&[k_nope, k_rope], -1);
        let o = ops::attention(&q, &k, &v).reshape([batch, time, heads * value]);
        let o = self.quantise(&self.norm(&o, &name("out_norm")), &name("out_norm"));
        self.ternary(&o, &name("out"))
    }

    fn mamba(&self, n: &Tensor, quantised: &Tensor, layer: usize) -> Tensor {
        let c = &self.config;
        let name = |tail: &str| format!("layers.{layer}.mamba.{tail}");
        let (batch, time) = (n.size()[0], n.size()[1]);
        let [inner, width, state, heads] = [c.d_inner, c.head_dim, c.d_state, c.mamba_heads()].map(|n| n as i64);
        let zx = self.ternary(quantised, &name("in.weight"));
        let (z, x) = (zx.narrow(-1, 0, inner), zx.narrow(-1, inner, inner));
        let bcdt = ops::linear(n, self.param(&name("bcdt.weight")));
        let conv_in = Tensor::cat(&[x, bcdt.narrow(-1, 0, 2 * state)], -1);
        let conv = ops::causal_conv(&conv_in, self.param(&name("conv.weight")), self.param(&name("conv.bias"))).silu();
        let dt = (bcdt.narrow(-1, 2 * state, heads) + self.param(&name("dt_bias"))).softplus();
        let x = conv.narrow(-1, 0, inner).reshape([batch, time, heads, width]);
        let a = -self.param(&name("a_log")).exp();
        let (b, c) = (conv.narrow(-1, inner, state), conv.narrow(-1, inner + state, state));
        let y = ops::ssd(&Ssd { x: &x, dt: &dt, a: &a, b: &b, c: &c }, self.scan);
        let y = (y + self.param(&name("d")).unsqueeze(-1) * &x).reshape([batch, time, inner]);
        let gated = self.norm(&(y * z.silu()), &name("gate_norm.weight"));
        self.ternary(&self.quantise(&gated, &name("gate_norm.weight")), &name("out.weight"))
    }

    fn ffn(&self, quantised: &Tensor, layer: usize) -> Tensor {
        let name = |tail: &str| format!("layers.{layer}.ffn.{tail}.weight");
        let hidden = self.ternary(quantised, &name("gate")).relu().square() * self.ternary(quantised, &name("up"));
        let hidden = self.quantise(&self.norm(&hidden, &name("sub_norm")), &name("sub_norm"));
        self.ternary(&hidden, &name("down"))
    }

    /// Logits `[batch, time, vocab]` of int64 tokens `[batch, time]`.
    pub fn logits(&self, tokens: &Tensor) -> Tensor {
        let mut h = Tensor::embedding(self.param("tok_emb.weight"), tokens, -1, false, false);
        for (i, kind) in self.config.layer_kinds().into_iter().enumerate() {
            let gain = format!("layers.{i}.mixer_norm.weight");
            let n = self.norm(&h, &gain);
            let quantised = self.quantise(&n, &gain);
            // Never in place: autograd still needs the old value.
            let mixed = match kind {
                LayerKind::Mla => self.mla(&n, &quantised, i),
                LayerKind::Mamba => self.mamba(&n, &quantised, i),
            };
            let middle = h + mixed;
            let gain = format!("layers.{i}.ffn_norm.weight");
            let quantised = self.quantise(&self.norm(&middle, &gain), &gain);
            h = middle + self.ffn(&quantised, i);
        }
        let head = if self.config.tie_embeddings { "tok_emb.weight" } else { "lm_head.weight" };
        ops::linear(&self.norm(&h, "final_norm.weight"), self.param(head))
    }

    /// Logits `[tokens, vocab]` and the loss `sum(w * CE)`, with their graph.
    pub fn loss(&self, batch: &OracleBatch) -> (Tensor, Tensor) {
        let logits = self.logits(&batch.tokens).view([-1, self.config.vocab_size as i64]);
        let loss = ops::weighted_cross_entropy(&logits, &batch.targets, &batch.weights.to_kind(self.kind));
        (logits, loss)
    }

    /// Logits, the loss, and the gradient of `scale * loss` by name.
    pub fn run(&self, batch: &OracleBatch, scale: f64) -> Run {
        let (logits, loss) = self.loss(batch);
        (&loss * scale).backward();
        let grads = self.params.iter().map(|(name, p)| {
            let grad = p.grad();
            let grad = if grad.defined() { grad } else { p.zeros_like() };
            (name.clone(), grad.to_kind(Kind::Double))
        });
        Run {
            grads: grads.collect(),
            logits: logits.detach().to_kind(Kind::Double),
            loss: loss.detach().to_kind(Kind::Double),
        }
    }
}

/// What one evaluation gives, in float64.
#[derive(Debug)]
pub struct Run {
    /// `[tokens, vocab]`
    pub logits: Tensor,
    /// scalar
    pub loss: Tensor,
    /// By parameter name.
    pub grads: BTreeMap<String, Tensor>,
}

impl Run {
    /// All quantities by name: `logits`, `loss`, and the gradients under the names of their parameters.
    pub fn into_named(self) -> BTreeMap<String, Tensor> {
        let mut named = self.grads;
        named.insert("logits".into(), self.logits);
        named.insert("loss".into(), self.loss);
        named
    }
}

/// Tokens, targets and weights as tensors. A position of weight 0 may carry any target.
pub fn oracle_batch(batch: usize, tokens: &[u32], targets: &[u32], weights: &[f32], vocab: usize) -> OracleBatch {
    let long = |v: &[u32]| Tensor::from_slice(&v.iter().map(|&t| i64::from(t)).collect::<Vec<_>>());
    OracleBatch {
        tokens: long(tokens).view([batch as i64, -1]),
        targets: long(targets).clamp_max(vocab as i64 - 1),
        weights: Tensor::from_slice(weights).to_device(Device::Cpu),
    }
}

/// Whether a parameter decays, as the specification says: matrices only.
pub fn decays(kind: ParamKind) -> bool {
    matches!(kind, ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding)
}
