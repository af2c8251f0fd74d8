//! A training step on a device: forward, loss in chunks of tokens, backward with checkpointing. It reads like
//! `elleci_core::model`, which it is held against.

use elleci_core::params::{FfnIds, Id, LayerIds, MambaIds, MixerIds, MlaIds};

use crate::arena::Buf;
use crate::device::{Device, Result};
use crate::ops::attention::{self, Rotated};
use crate::ops::loss::{self, Targets};
use crate::ops::mamba::{self, Filters};
use crate::ops::norm::{self, Source};
use crate::ops::product::{self, Dense, Engine, Gradient, Workspace};
use crate::ops::{Columns, Rows, ssd};
use crate::plan::{LayerSaved, MambaSaved, MlaSaved, Plan, conv, heads, scan};

/// A plan whose buffers hold a model and a batch, and the device that they are on.
pub(crate) struct Step<'a> {
    pub plan: &'a Plan,
    pub dev: &'a mut dyn Device,
}

/// A layer: its parameters, the residual stream before and after it, and what it keeps.
#[derive(Clone, Copy)]
struct Layer<'a> {
    ids: &'a LayerIds,
    input: Buf,
    output: Buf,
    saved: &'a LayerSaved,
}

fn set(buf: Buf) -> Gradient {
    Gradient { buf, add: false }
}

fn added(buf: Buf) -> Gradient {
    Gradient { buf, add: true }
}

impl<'a> Step<'a> {
    /// Adds the gradient of `scale · Σ w·CE` to the gradients, leaves `Σ w·CE` in `plan.losses.1`, and adds it to that of the step.
    pub fn loss_and_grad(&mut self) -> Result<()> {
        let plan = self.plan;
        let layout = &plan.layout;
        self.forward()?;
        self.claim([layout.lm_head(), layout.final_norm()])?;
        self.head(true)?;
        self.final_norm_backward()?;
        let segments = plan.starts.len() - 1;
        for s in (0..segments).rev() {
            if s + 1 < segments {
                self.segment_forward(s)?;
            }
            let layers = s * plan.segment()..(s + 1) * plan.segment();
            let of_segment = |id: &Id| layout.param(*id).layer.is_some_and(|l| layers.contains(&l));
            self.claim((0..layout.params().len()).map(Id).filter(of_segment))?;
            for layer in self.layers(s).into_iter().rev() {
                self.layer_backward(layer)?;
            }
        }
        if !plan.config.tie_embeddings {
            self.claim([layout.tok_emb()])?;
        }
        let (d, grad) = (plan.config.d_model, self.grad(layout.tok_emb()));
        loss::embed_backward(self.dev, plan.inputs.tokens, plan.inputs.occurrences, plan.dh, d, grad)
    }

    /// Takes back the memory of gradients, which was lent in a step of one micro-batch: they begin at zero.
    fn claim(&mut self, ids: impl IntoIterator<Item = Id>) -> Result<()> {
        for id in ids {
            if self.plan.options.whole_step {
                self.dev.zero(self.grad(id))?;
            }
        }
        Ok(())
    }

    /// Leaves `Σ w·CE` in `plan.losses.1`.
    pub fn loss(&mut self) -> Result<()> {
        self.forward()?;
        self.head(false)
    }

    fn weight(&self, id: Id) -> Buf {
        self.plan.param(id).optim.weights
    }

    fn grad(&self, id: Id) -> Buf {
        self.plan.param(id).optim.grads
    }

    fn tokens(&self) -> usize {
        self.plan.inputs.tokens.len
    }

    /// The products of a part of the step, whose operands lie in its workspace.
    fn engine(&self, workspace: Workspace) -> Engine {
        let o = &self.plan.options;
        Engine { products: o.products, gemm: o.gemm, workspace }
    }

    /// `y` = the projection of quantised rows, plus `addend`.
    fn project(&mut self, at: Workspace, id: Id, x: Rows, addend: Option<Buf>, y: Buf) -> Result<()> {
        let w = self.plan.param(id).ternary.expect("the layout marks this parameter ternary");
        let engine = self.engine(at);
        product::ternary_forward(self.dev, &engine, x, w, addend, y)
    }

    /// Both gradients of a projection that read `x`: `dx`, and its weight's, added.
    fn project_backward(&mut self, at: Workspace, id: Id, x: Rows, dy: Buf, dx: Gradient) -> Result<()> {
        let w = self.plan.param(id).ternary.expect("the layout marks this parameter ternary");
        let (engine, dw) = (self.engine(at), self.grad(id));
        product::ternary_backward(self.dev, &engine, dy, x, w, dw, dx)
    }

    fn dense(&self, id: Id) -> Dense {
        let shape = &self.plan.layout.param(id).shape;
        Dense { weights: self.weight(id), out: shape[0], input: shape[1] }
    }

    fn stream(&self, x: Buf) -> Source {
        Source::Plain(Columns::all(x, self.plan.config.d_model))
    }

    /// The layers of a segment.
    fn layers(&self, segment: usize) -> Vec<Layer<'a>> {
        let plan = self.plan;
        let first = segment * plan.segment();
        let ids = &plan.layout.layers()[first..(first + plan.segment()).min(plan.config.n_layers)];
        let mut input = plan.starts[segment];
        let layer = |(slot, l): (usize, &'a LayerIds)| {
            let saved = &plan.saved[slot];
            let last = slot + 1 == ids.len();
            let output = saved.out.filter(|_| !last).unwrap_or(plan.starts[segment + 1]);
            let layer = Layer { ids: l, input, output, saved };
            input = output;
            layer
        };
        ids.iter().enumerate().map(layer).collect()
    }

    /// Embedding, all layers, final norm: its output is left in `plan.normed`.
    fn forward(&mut self) -> Result<()> {
        let plan = self.plan;
        let c = &plan.config;
        let emb = self.weight(plan.layout.tok_emb());
        loss::embed(self.dev, plan.inputs.tokens, emb, c.d_model, plan.starts[0])?;
        for s in 0..plan.starts.len() - 1 {
            self.segment_forward(s)?;
        }
        let last = self.stream(plan.starts[plan.starts.len() - 1]);
        let gain = self.weight(plan.layout.final_norm());
        norm::normalize(self.dev, last, gain, c.norm_eps, plan.final_rstd, plan.normed)
    }

    fn segment_forward(&mut self, segment: usize) -> Result<()> {
        for layer in self.layers(segment) {
            self.layer_forward(layer)?;
        }
        Ok(())
    }

    /// Logits, losses and, with `grad`, the gradients of the head and of the final norm's output, chunk by chunk.
    fn head(&mut self, grad: bool) -> Result<()> {
        let plan = self.plan;
        let (d, vocab) = (plan.config.d_model, plan.config.vocab_size);
        let (h, id) = (plan.head, plan.layout.lm_head());
        let engine = self.engine(h.workspace);
        let (head, dhead) = (self.dense(id), self.grad(id));
        for first in (0..self.tokens()).step_by(h.chunk) {
            let n = h.chunk.min(self.tokens() - first);
            let normed = plan.normed.part(first * d, n * d);
            let targets = Targets {
                targets: plan.inputs.targets.part(first, n),
                weights: plan.inputs.weights.part(first, n),
                scale: plan.inputs.scale,
            };
            product::dense_forward(self.dev, &engine, normed, n, head, h.logits)?;
            loss::cross_entropy(self.dev, h.logits, vocab, targets, grad, plan.losses.0.part(first, n))?;
            if grad {
                let dnormed = Gradient { buf: h.dnormed.part(first * d, n * d), add: false };
                product::dense_backward(self.dev, &engine, h.logits, (normed, n), head, dhead, dnormed)?;
            }
        }
        let total = grad.then_some(plan.tables.scalars.total);
        loss::sum(self.dev, plan.losses.0, plan.losses.1, total)
    }

    fn final_norm_backward(&mut self) -> Result<()> {
        let plan = self.plan;
        let id = plan.layout.final_norm();
        let last = self.stream(plan.starts[plan.starts.len() - 1]);
        let to = Columns::all(plan.dh, plan.config.d_model);
        let (gain, dgain, h) = (self.weight(id), self.grad(id), plan.head);
        norm::backward(self.dev, last, gain, plan.final_rstd, h.dnormed, (to, None), false, h.partials, dgain)
    }

    /// `mid = input + mixer(norm(input))`, `output = mid + ffn(norm(mid))`.
    fn layer_forward(&mut self, layer: Layer<'a>) -> Result<()> {
        let Layer { ids, input, output, saved } = layer;
        let eps = self.plan.config.norm_eps;
        // The mixer's bcdt projection reads the norm itself, not its codes.
        let normed = matches!(ids.mixer, MixerIds::Mamba(_)).then_some(self.plan.normed);
        let (source, gain) = (self.stream(input), self.weight(ids.mixer_norm));
        norm::quantize(self.dev, source, gain, eps, saved.mixer_norm, normed)?;
        match (&ids.mixer, &saved.mamba, &saved.mla) {
            (MixerIds::Mamba(m), Some(mamba), _) => self.mamba_forward(m, layer, mamba)?,
            (MixerIds::Mla(m), _, Some(mla)) => self.mla_forward(m, layer, mla)?,
            _ => unreachable!("a slot has room for every kind of layer that passes through it"),
        }
        let (source, gain) = (self.stream(saved.mid), self.weight(ids.ffn_norm));
        norm::quantize(self.dev, source, gain, eps, saved.ffn_norm, None)?;
        self.ffn_forward(&ids.ffn, saved, output)
    }

    /// From `plan.dh`, the gradient of the layer's output, to that of its input, in place.
    fn layer_backward(&mut self, layer: Layer<'a>) -> Result<()> {
        let plan = self.plan;
        let Layer { ids, input, saved, .. } = layer;
        let partials = self.ffn_backward(&ids.ffn, saved)?;
        self.norm_backward(ids.ffn_norm, saved.mid, saved.ffn_norm.rstd, partials)?;
        let partials = match (&ids.mixer, &saved.mamba, &saved.mla) {
            (MixerIds::Mamba(m), Some(mamba), _) => self.mamba_backward(m, layer, mamba)?,
            (MixerIds::Mla(m), _, Some(mla)) => self.mla_backward(m, layer, mla)?,
            _ => unreachable!("a slot has room for every kind of layer that passes through it"),
        };
        debug_assert_eq!(plan.dh.len, input.len);
        self.norm_backward(ids.mixer_norm, input, saved.mixer_norm.rstd, partials)
    }

    /// Adds to `plan.dh` what `plan.normed`, the gradient of a norm's output, is for its input `x`.
    fn norm_backward(&mut self, id: Id, x: Buf, rstd: Buf, partials: Buf) -> Result<()> {
        let to = Columns::all(self.plan.dh, self.plan.config.d_model);
        let (source, gain, dgain) = (self.stream(x), self.weight(id), self.grad(id));
        norm::backward(self.dev, source, gain, rstd, self.plan.normed, (to, None), true, partials, dgain)
    }

    fn hidden(&self, saved: &LayerSaved) -> Source {
        let f = self.plan.config.ffn_hidden;
        Source::Squared(Columns::all(saved.gate, f), Columns::all(saved.up, f))
    }

    fn ffn_forward(&mut self, ids: &FfnIds, saved: &LayerSaved, output: Buf) -> Result<()> {
        let at = self.plan.ffn.workspace;
        self.project(at, ids.gate, saved.ffn_norm, None, saved.gate)?;
        self.project(at, ids.up, saved.ffn_norm, None, saved.up)?;
        let (source, gain) = (self.hidden(saved), self.weight(ids.sub_norm));
        norm::quantize(self.dev, source, gain, self.plan.config.norm_eps, saved.hidden, None)?;
        self.project(at, ids.down, saved.hidden, Some(saved.mid), output)
    }

    /// Leaves the gradient of the norm's output in `plan.normed`; returns room for its backward's partial sums.
    fn ffn_backward(&mut self, ids: &FfnIds, saved: &LayerSaved) -> Result<Buf> {
        let plan = self.plan;
        let (s, f) = (plan.ffn, plan.config.ffn_hidden);
        self.project_backward(s.workspace, ids.down, saved.hidden, plan.dh, set(s.dgate))?;
        let to = (Columns::all(s.dgate, f), Some(Columns::all(s.dup, f)));
        let (source, gain, dgain) = (self.hidden(saved), self.weight(ids.sub_norm), self.grad(ids.sub_norm));
        norm::backward(self.dev, source, gain, saved.hidden.rstd, s.dgate, to, false, s.partials, dgain)?;
        self.project_backward(s.workspace, ids.gate, saved.ffn_norm, s.dgate, set(plan.normed))?;
        self.project_backward(s.workspace, ids.up, saved.ffn_norm, s.dup, added(plan.normed))?;
        Ok(s.partials)
    }

    fn filters(&self, ids: &MambaIds, of: impl Fn(Id) -> Buf) -> Filters {
        Filters { weight: of(ids.conv_weight), bias: of(ids.conv_bias) }
    }

    fn scan_input(&self, ids: &MambaIds, saved: &MambaSaved) -> ssd::Input {
        ssd::Input { xbc: saved.xbc, dt: saved.dt, a_log: self.weight(ids.a_log), skip: self.weight(ids.d) }
    }

    /// `y ⊙ silu(z)`; z is the first half of zx.
    fn gated(&self, saved: &MambaSaved) -> Source {
        let inner = self.plan.config.d_inner;
        Source::Gated(Columns::all(saved.y, inner), Columns { buf: saved.zx, from: 0, stride: 2 * inner })
    }

    fn mamba_forward(&mut self, ids: &MambaIds, layer: Layer, saved: &MambaSaved) -> Result<()> {
        let plan = self.plan;
        let (c, products, tokens) = (&plan.config, plan.options.products, self.tokens());
        let at = plan.mamba.expect("planned for a config with Mamba layers").workspace;
        let shape = conv(c, &plan.options);
        self.project(at, ids.input, layer.saved.mixer_norm, None, saved.zx)?;
        let (bcdt, bias, engine) = (self.dense(ids.bcdt), self.weight(ids.dt_bias), self.engine(at));
        product::dense_forward(self.dev, &engine, plan.normed, tokens, bcdt, saved.bcdt)?;
        mamba::step_sizes(self.dev, shape, saved.bcdt, bias, saved.dt)?;
        let filters = self.filters(ids, |id| self.weight(id));
        mamba::conv_silu(self.dev, shape, saved.zx, saved.bcdt, filters, saved.xbc)?;
        let input = self.scan_input(ids, saved);
        ssd::forward(self.dev, products, scan(c, &plan.options), input, saved.scan, saved.y)?;
        let (source, gain) = (self.gated(saved), self.weight(ids.gate_norm));
        norm::quantize(self.dev, source, gain, c.norm_eps, saved.gated, None)?;
        self.project(at, ids.out, saved.gated, Some(layer.input), layer.saved.mid)
    }

    fn mamba_backward(&mut self, ids: &MambaIds, layer: Layer, saved: &MambaSaved) -> Result<Buf> {
        let plan = self.plan;
        let s = plan.mamba.expect("planned for a config with Mamba layers");
        let (c, products, tokens) = (&plan.config, plan.options.products, self.tokens());
        let inner = c.d_inner;

        // out projection, gate and its norm: dz goes straight to its half of dzx
        self.project_backward(s.workspace, ids.out, saved.gated, plan.dh, set(s.dy))?;
        let to = (Columns::all(s.dy, inner), Some(Columns { buf: s.dzx, from: 0, stride: 2 * inner }));
        let (source, gain, dgain) = (self.gated(saved), self.weight(ids.gate_norm), self.grad(ids.gate_norm));
        norm::backward(self.dev, source, gain, saved.gated.rstd, s.dy, to, false, s.partials, dgain)?;

        // scan, step sizes, convolution
        let towards = ssd::Towards { dxbc: s.dxbc, ddt: s.ddt, a_log: self.grad(ids.a_log), skip: self.grad(ids.d) };
        let (shape, input) = (scan(c, &plan.options), self.scan_input(ids, saved));
        ssd::backward(self.dev, products, shape, input, saved.scan, s.dy, s.scan, towards)?;
        let shape = conv(c, &plan.options);
        let (bias, dbias) = (self.weight(ids.dt_bias), self.grad(ids.dt_bias));
        mamba::step_sizes_backward(self.dev, shape, saved.bcdt, bias, s.ddt, s.dbcdt, s.partials, dbias)?;
        let filters = self.filters(ids, |id| self.weight(id));
        let dfilters = self.filters(ids, |id| self.grad(id));
        let to = (s.dzx, s.dbcdt);
        mamba::conv_backward(self.dev, shape, saved.zx, saved.bcdt, filters, s.dxbc, to, s.partials, dfilters)?;

        // in and bcdt projections; the latter read the norm itself
        self.project_backward(s.workspace, ids.input, layer.saved.mixer_norm, s.dzx, set(plan.normed))?;
        let (source, gain) = (self.stream(layer.input), self.weight(layer.ids.mixer_norm));
        norm::normalize(self.dev, source, gain, c.norm_eps, s.rstd, s.renormed)?;
        let (bcdt, dw, engine) = (self.dense(ids.bcdt), self.grad(ids.bcdt), self.engine(s.workspace));
        product::dense_backward(self.dev, &engine, s.dbcdt, (s.renormed, tokens), bcdt, dw, added(plan.normed))?;
        Ok(s.partials)
    }

    fn latent(&self, saved: &MlaSaved) -> Columns {
        let c = &self.plan.config;
        Columns { buf: saved.ckr, from: 0, stride: c.kv_rank + c.d_rope }
    }

    /// The rotated channels of queries, and of the shared key.
    fn rotated(&self) -> (Rotated, Rotated) {
        let c = &self.plan.config;
        let queries = Rotated { groups: c.n_heads, group: c.d_qk(), offset: c.d_nope };
        (queries, Rotated { groups: 1, group: c.kv_rank + c.d_rope, offset: c.kv_rank })
    }

    fn mla_forward(&mut self, ids: &MlaIds, layer: Layer, saved: &MlaSaved) -> Result<()> {
        let plan = self.plan;
        let (c, h) = (&plan.config, heads(&plan.config, &plan.options));
        let at = plan.mla.expect("planned for a config with MLA layers").workspace;
        self.project(at, ids.q, layer.saved.mixer_norm, None, saved.q)?;
        self.project(at, ids.kv_down, layer.saved.mixer_norm, None, saved.ckr)?;
        let (source, gain) = (Source::Plain(self.latent(saved)), self.weight(ids.kv_norm));
        norm::quantize(self.dev, source, gain, c.norm_eps, saved.latent, None)?;
        self.project(at, ids.kv_up, saved.latent, None, saved.kv)?;
        let (queries, key) = self.rotated();
        attention::rotate(self.dev, h, saved.q, queries, plan.rope, false)?;
        attention::rotate(self.dev, h, saved.ckr, key, plan.rope, false)?;
        let input = attention::Input { q: saved.q, kv: saved.kv, ckr: saved.ckr };
        attention::forward(self.dev, plan.options.products, h, input, saved.o, saved.lse)?;
        let source = Source::Plain(Columns::all(saved.o, c.n_heads * c.d_v));
        let gain = self.weight(ids.out_norm);
        norm::quantize(self.dev, source, gain, c.norm_eps, saved.out, None)?;
        self.project(at, ids.out, saved.out, Some(layer.input), layer.saved.mid)
    }

    fn mla_backward(&mut self, ids: &MlaIds, layer: Layer, saved: &MlaSaved) -> Result<Buf> {
        let plan = self.plan;
        let s = plan.mla.expect("planned for a config with MLA layers");
        let (c, h) = (&plan.config, heads(&plan.config, &plan.options));
        let width = c.n_heads * c.d_v;

        // out projection and its norm
        self.project_backward(s.workspace, ids.out, saved.out, plan.dh, set(s.d_o))?;
        let source = Source::Plain(Columns::all(saved.o, width));
        let (gain, dgain) = (self.weight(ids.out_norm), self.grad(ids.out_norm));
        let to = (Columns::all(s.d_o, width), None);
        norm::backward(self.dev, source, gain, saved.out.rstd, s.d_o, to, false, s.partials, dgain)?;

        // attention and rotation
        let input = attention::Input { q: saved.q, kv: saved.kv, ckr: saved.ckr };
        let out = attention::Output { lse: saved.lse, o: saved.o, d_o: s.d_o, delta: s.delta };
        let towards = attention::Towards { dq: s.dq, dkv: s.dkv, dkr_heads: s.dkr_heads };
        attention::backward(self.dev, plan.options.products, h, input, out, towards)?;
        attention::sum_heads(self.dev, h, s.dkr_heads, s.dckr)?;
        let (queries, key) = self.rotated();
        attention::rotate(self.dev, h, s.dq, queries, plan.rope, true)?;
        // Only the key's columns of dckr are defined yet, and only they are turned.
        attention::rotate(self.dev, h, s.dckr, key, plan.rope, true)?;

        // latent
        self.project_backward(s.workspace, ids.kv_up, saved.latent, s.dkv, set(s.dlatent))?;
        let (gain, dgain) = (self.weight(ids.kv_norm), self.grad(ids.kv_norm));
        let to = (Columns { buf: s.dckr, ..self.latent(saved) }, None);
        let source = Source::Plain(self.latent(saved));
        norm::backward(self.dev, source, gain, saved.latent.rstd, s.dlatent, to, false, s.partials, dgain)?;

        // projections of the norm
        self.project_backward(s.workspace, ids.q, layer.saved.mixer_norm, s.dq, set(plan.normed))?;
        self.project_backward(s.workspace, ids.kv_down, layer.saved.mixer_norm, s.dckr, added(plan.normed))?;
        Ok(s.partials)
    }
}
