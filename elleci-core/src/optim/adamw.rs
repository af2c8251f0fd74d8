//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019), its moments in float32 or in 8-bit blocks.
//!
//! One step of one value, as `torch.optim.AdamW` computes it in float32, with the clip factor folded in:
//!
//! ```text
//! g = clip · g;               p = p · (1 − lr·wd)                        (wd only where the parameter decays)
//! m = m + (1−β₁)(g − m);      v = β₂·v + (1−β₂)·g²
//! p = p − lr/(1−β₁ᵗ) · m / (√v / √(1−β₂ᵗ) + eps)
//! ```
//!
//! 8-bit states are dequantised, updated in float32, used for the step, and quantised again, block by block; weights
//! never see the rounding of the same step's states.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use super::blockwise8::{BLOCK, DynamicMap};
use super::state::{StateData, StateError, StateTensor, StateType, check, copy_f32};
use crate::par;
use crate::params::{Id, Param, ParamKind, ParamLayout, Params};
use crate::simd::vectorize;

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamWConfig {
    /// The values of the reference run.
    fn default() -> AdamWConfig {
        AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

/// How the two moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum StatePrecision {
    /// 8 bytes a parameter.
    F32,
    /// 2 + 1/32 bytes a parameter; float32 for embeddings, norms and tensors under [`MIN_8BIT_ELEMS`] values.
    Block8,
}

/// Tensors with fewer values keep float32 states.
pub const MIN_8BIT_ELEMS: usize = 4096;

/// Values that one task updates: a multiple of [`BLOCK`], so that blocks never straddle tasks.
const CHUNK: usize = 64 * BLOCK;

/// What a step needs beside the gradients.
pub struct StepRates<'a> {
    /// The learning rate of every parameter (by layer, under LeRaC).
    pub lr_of: &'a dyn Fn(Id) -> f64,
    /// Decoupled weight decay, before it is multiplied by the rate.
    pub weight_decay: f64,
    /// Multiplies every gradient: the clip factor, or an average over micro-batches.
    pub grad_scale: f32,
}

enum State {
    F32 { m: Vec<f32>, v: Vec<f32> },
    Block8 { m: Vec<u8>, v: Vec<u8>, m_absmax: Vec<f32>, v_absmax: Vec<f32> },
}

/// The optimiser: a state for every parameter, and the number of steps made.
pub struct AdamW {
    layout: Arc<ParamLayout>,
    cfg: AdamWConfig,
    precision: StatePrecision,
    states: Vec<State>,
    steps: u64,
    signed: Box<DynamicMap>,
    unsigned: Box<DynamicMap>,
}

fn is_8bit(param: &Param, precision: StatePrecision) -> bool {
    let keeps_f32 = matches!(param.kind, ParamKind::Embedding | ParamKind::Norm) || param.len() < MIN_8BIT_ELEMS;
    precision == StatePrecision::Block8 && !keeps_f32
}

/// Bytes that the states of a model take.
pub fn state_bytes(layout: &ParamLayout, precision: StatePrecision) -> usize {
    let bytes = |p: &Param| match is_8bit(p, precision) {
        true => 2 * (p.len() + 4 * p.len().div_ceil(BLOCK)),
        false => 8 * p.len(),
    };
    layout.params().iter().map(bytes).sum()
}

impl AdamW {
    /// All states zero, no step made.
    pub fn new(layout: Arc<ParamLayout>, cfg: AdamWConfig, precision: StatePrecision) -> AdamW {
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        let state = |p: &Param| {
            let (n, blocks) = (p.len(), p.len().div_ceil(BLOCK));
            match is_8bit(p, precision) {
                false => State::F32 { m: vec![0.0; n], v: vec![0.0; n] },
                true => State::Block8 {
                    m: vec![signed.zero_code(); n],
                    v: vec![unsigned.zero_code(); n],
                    m_absmax: vec![0.0; blocks],
                    v_absmax: vec![0.0; blocks],
                },
            }
        };
        let states = layout.params().iter().map(state).collect();
        AdamW { layout, cfg, precision, states, steps: 0, signed, unsigned }
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the step count, when states have been [loaded](AdamW::load) one by one.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// How the states are stored.
    pub fn precision(&self) -> StatePrecision {
        self.precision
    }

    /// Bytes of all states.
    pub fn bytes(&self) -> usize {
        state_bytes(&self.layout, self.precision)
    }

    /// One update of every parameter. Gradients must be finite: the caller skips a step whose norm is not.
    ///
    /// # Panics
    /// When `params` or `grads` have another length than the layout.
    pub fn step(&mut self, params: &mut Params, grads: &Params, rates: &StepRates<'_>) {
        let len = self.layout.len();
        assert!(params.data().len() == len && grads.data().len() == len, "AdamW: parameters of another layout");
        self.steps += 1;
        let maps = (&*self.signed, &*self.unsigned);
        let mut items = Vec::with_capacity(len / CHUNK + self.states.len());
        let (mut p_rest, mut g_rest) = (params.data_mut(), grads.data());
        for (i, (param, state)) in self.layout.params().iter().zip(&mut self.states).enumerate() {
            let decay = if param.kind.decays() { rates.weight_decay } else { 0.0 };
            let k = Coefficients::new(&self.cfg, self.steps, (rates.lr_of)(Id(i)), decay, rates.grad_scale);
            // Ranges tile the buffer in order, so the pieces can be split off its front.
            let (p, g);
            (p, p_rest) = p_rest.split_at_mut(param.len());
            (g, g_rest) = g_rest.split_at(param.len());
            let chunks = p.chunks_mut(CHUNK).zip(g.chunks(CHUNK)).zip(state.chunks());
            items.extend(chunks.map(|((p, g), state)| (p, g, state, k)));
        }
        par::for_each(items, |(p, g, state, k)| match state {
            StateChunk::F32 { m, v } => vectorize(
                #[inline(always)]
                || update(&k, p, g, m, v),
            ),
            StateChunk::Block8 { m, v, m_absmax, v_absmax } => {
                let blocks = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
                for ((((p, g), m), v), (ma, va)) in blocks.zip(m_absmax.iter_mut().zip(v_absmax)) {
                    vectorize(
                        #[inline(always)]
                        || update_block8(&k, maps, (p, g), (m, ma), (v, va)),
                    );
                }
            }
        });
    }

    /// All states by name, in the order of the layout: `{parameter}.m` and `.v` of the parameter's shape, and for
    /// 8-bit states `.m_absmax` and `.v_absmax` of shape `[blocks]`.
    pub fn tensors(&self) -> Vec<StateTensor<'_>> {
        let mut out = Vec::new();
        for (param, state) in self.layout.params().iter().zip(&self.states) {
            for (suffix, data) in state.parts() {
                let shape = part_shape(param, suffix, &data);
                out.push(StateTensor { name: format!("{}.{suffix}", param.name), shape, data });
            }
        }
        out
    }

    /// Fills one state from the little-endian bytes of a file.
    ///
    /// # Errors
    /// [`StateError`]; the state is then unchanged.
    pub fn load(&mut self, name: &str, dtype: StateType, shape: &[usize], bytes: &[u8]) -> Result<(), StateError> {
        let unknown = || StateError::Unknown(name.to_string());
        let (param_name, suffix) = name.rsplit_once('.').ok_or_else(unknown)?;
        let id = self.layout.by_name(param_name).ok_or_else(unknown)?;
        let data = self.states[id.0].parts().into_iter().find(|(s, _)| *s == suffix).ok_or_else(unknown)?.1;
        let expected = part_shape(self.layout.param(id), suffix, &data);
        check(name, (data.dtype(), &expected), (dtype, shape, bytes))?;
        self.states[id.0].fill(suffix, bytes);
        Ok(())
    }

    /// Fills every state from `find`, which gives a tensor's type, shape and bytes by name, and sets the step count.
    ///
    /// # Errors
    /// [`StateError::Missing`] for the first that is not found, else as [`load`](AdamW::load). Part of the states may then
    /// have been replaced.
    pub fn restore<'f>(
        &mut self,
        steps: u64,
        mut find: impl FnMut(&str) -> Option<(StateType, &'f [usize], &'f [u8])>,
    ) -> Result<(), StateError> {
        let names: Vec<_> = self.tensors().into_iter().map(|t| t.name).collect();
        for name in names {
            let Some((dtype, shape, bytes)) = find(&name) else { return Err(StateError::Missing(name)) };
            self.load(&name, dtype, shape, bytes)?;
        }
        self.steps = steps;
        Ok(())
    }
}

/// The shape of one of a parameter's states.
fn part_shape(param: &Param, suffix: &str, data: &StateData<'_>) -> Vec<usize> {
    match (suffix, data) {
        ("m_absmax" | "v_absmax", StateData::F32(blocks)) => vec![blocks.len()],
        _ => param.shape.clone(),
    }
}

impl State {
    /// The tensors of which it consists, by suffix.
    fn parts(&self) -> Vec<(&'static str, StateData<'_>)> {
        match self {
            State::F32 { m, v } => vec![("m", StateData::F32(m)), ("v", StateData::F32(v))],
            State::Block8 { m, v, m_absmax, v_absmax } => vec![
                ("m", StateData::U8(m)),
                ("m_absmax", StateData::F32(m_absmax)),
                ("v", StateData::U8(v)),
                ("v_absmax", StateData::F32(v_absmax)),
            ],
        }
    }

    /// Replaces the tensor of a suffix by checked bytes.
    fn fill(&mut self, suffix: &str, bytes: &[u8]) {
        match (self, suffix) {
            (State::F32 { m, .. }, "m") => copy_f32(bytes, m),
            (State::F32 { v, .. }, _) => copy_f32(bytes, v),
            (State::Block8 { m, .. }, "m") => m.copy_from_slice(bytes),
            (State::Block8 { v, .. }, "v") => v.copy_from_slice(bytes),
            (State::Block8 { m_absmax, .. }, "m_absmax") => copy_f32(bytes, m_absmax),
            (State::Block8 { v_absmax, .. }, _) => copy_f32(bytes, v_absmax),
        }
    }

    /// Pieces of [`CHUNK`] values.
    fn chunks(&mut self) -> Box<dyn Iterator<Item = StateChunk<'_>> + '_> {
        match self {
            State::F32 { m, v } => {
                Box::new(m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK)).map(|(m, v)| StateChunk::F32 { m, v }))
            }
            State::Block8 { m, v, m_absmax, v_absmax } => {
                let codes = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
                let absmax = m_absmax.chunks_mut(CHUNK / BLOCK).zip(v_absmax.chunks_mut(CHUNK / BLOCK));
                let chunk = |((m, v), (m_absmax, v_absmax))| StateChunk::Block8 { m, v, m_absmax, v_absmax };
                Box::new(codes.zip(absmax).map(chunk))
            }
        }
    }
}

enum StateChunk<'a> {
    F32 { m: &'a mut [f32], v: &'a mut [f32] },
    Block8 { m: &'a mut [u8], v: &'a mut [u8], m_absmax: &'a mut [f32], v_absmax: &'a mut [f32] },
}

/// The scalars of a step, computed in f64 and rounded once.
#[derive(Clone, Copy)]
struct Coefficients {
    grad_scale: f32,
    /// 1 − lr·wd
    keep: f32,
    /// 1 − β₁
    rise1: f32,
    beta2: f32,
    /// 1 − β₂
    rise2: f32,
    /// lr / (1 − β₁ᵗ)
    step_size: f32,
    /// √(1 − β₂ᵗ)
    correction2: f32,
    eps: f32,
}

impl Coefficients {
    fn new(cfg: &AdamWConfig, step: u64, lr: f64, weight_decay: f64, grad_scale: f32) -> Coefficients {
        let t = step as f64;
        Coefficients {
            grad_scale,
            keep: (1.0 - lr * weight_decay) as f32,
            rise1: (1.0 - cfg.beta1) as f32,
            beta2: cfg.beta2 as f32,
            rise2: (1.0 - cfg.beta2) as f32,
            step_size: (lr / (1.0 - libm::pow(cfg.beta1, t))) as f32,
            correction2: libm::sqrt(1.0 - libm::pow(cfg.beta2, t)) as f32,
            eps: cfg.eps as f32,
        }
    }
}

/// Correctly rounded either way; the `std` one becomes a vector instruction.
#[inline(always)]
fn sqrt(x: f32) -> f32 {
    #[cfg(feature = "std")]
    return x.sqrt();
    #[cfg(not(feature = "std"))]
    return libm::sqrtf(x);
}

/// The update of the module's head, on float32 states. No fused multiply-add: the bits are those of every machine.
#[inline(always)]
fn update(k: &Coefficients, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let n = p.len();
    let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
    for i in 0..n {
        let gi = k.grad_scale * g[i];
        m[i] += k.rise1 * (gi - m[i]);
        v[i] = k.beta2 * v[i] + k.rise2 * (gi * gi);
        let denominator = sqrt(v[i]) / k.correction2 + k.eps;
        p[i] = p[i] * k.keep - k.step_size * (m[i] / denominator);
    }
}

/// [`update`] on one block of 8-bit states and their absmax.
#[inline(always)]
fn update_block8(
    k: &Coefficients,
    (signed, unsigned): (&DynamicMap, &DynamicMap),
    (p, g): (&mut [f32], &[f32]),
    (m_codes, m_absmax): (&mut [u8], &mut f32),
    (v_codes, v_absmax): (&mut [u8], &mut f32),
) {
    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
    let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
    signed.dequantise(m_codes, *m_absmax, m);
    unsigned.dequantise(v_codes, *v_absmax, v);
    update(k, p, g, m, v);
    *m_absmax = signed.quantise(m, m_codes);
    *v_absmax = unsigned.quantise(v, v_codes);
}

#[cfg(test)]
mod tests;
