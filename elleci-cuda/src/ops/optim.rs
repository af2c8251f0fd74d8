//! AdamW over all tensors in one launch, the norm of the gradients, and the running mean of the weights.

use elleci_core::optim::blockwise8::{BLOCK, DynamicMap};

use super::{ROOM, THREADS, exact, int};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Values that one block of threads updates.
const VALUES_EACH: usize = 4096;
/// Bytes of an entry of the table (`OptimTensor`).
pub const ENTRY: usize = 96;
/// Bytes of the scalars of a step (`Adam`).
pub const ADAM: usize = 40;
/// Float64 values of what a step came to ([`Outcome`]).
pub const OUTCOME: usize = 4;
/// Floats of the two 8-bit maps: by steps away from zero, values and limits.
pub const MAPS: usize = 2 * 512;

/// One parameter's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// float32 or bf16
    pub weights: Buf,
    /// float32 or bf16
    pub grads: Buf,
    /// First and second moment: float32, or codes
    pub moments: (Buf, Buf),
    /// Largest magnitude of each block of codes
    pub absmax: Option<(Buf, Buf)>,
    /// Running mean of the weights, float32
    pub mean: Option<Buf>,
}

/// What differs between tensors in a step.
#[derive(Clone, Copy, Debug)]
pub struct TensorRates {
    /// 1 − rate · decay
    pub keep: f32,
    /// rate / (1 − β₁ᵗ)
    pub step: f32,
}

/// What is the same for all.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// 1 − β₁
    pub rise1: f32,
    /// β₂
    pub beta2: f32,
    /// 1 − β₂
    pub rise2: f32,
    /// √(1 − β₂ᵗ)
    pub correction2: f32,
    /// Added to the root
    pub eps: f32,
    /// Of the stochastic rounding: another one each step
    pub seed: u32,
    /// Largest norm of the gradient; 0 = any
    pub clip: f64,
    /// Weight of all targets of the step: what its loss is divided by
    pub weight: f64,
}

impl Adam {
    /// As the kernel reads it.
    pub fn bytes(&self) -> Vec<u8> {
        let floats = [self.rise1, self.beta2, self.rise2, self.correction2, self.eps];
        let mut bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        bytes.extend(self.seed.to_le_bytes());
        bytes.extend([self.clip, self.weight].iter().flat_map(|d| d.to_le_bytes()));
        bytes
    }
}

/// What a step came to, as the device found it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean of `w·CE`
    pub loss: f64,
    /// Global norm of the gradient, before it was clipped
    pub norm: f64,
    /// What every gradient was multiplied by
    pub scale: f32,
    /// Whether weights and states were updated: loss and norm are finite
    pub updated: bool,
}

impl Outcome {
    /// As the kernels hold it.
    pub fn bytes(&self) -> Vec<u8> {
        let values = [self.loss, self.norm, self.scale as f64, self.updated as u32 as f64];
        values.iter().flat_map(|d| d.to_le_bytes()).collect()
    }

    /// From the bytes of a buffer of [`OUTCOME`] float64.
    pub fn read(bytes: &[u8; 8 * OUTCOME]) -> Outcome {
        let at = |i: usize| f64::from_le_bytes(bytes.as_chunks().0[i]);
        Outcome { loss: at(0), norm: at(1), scale: at(2) as f32, updated: at(3) != 0.0 }
    }
}

/// Buffers of the scalars of a step.
#[derive(Clone, Copy, Debug)]
pub struct Scalars {
    /// [`ADAM`] bytes
    pub adam: Buf,
    /// [`MAPS`] floats
    pub maps: Buf,
    /// `Σ w·CE` of the micro-batches of the step so far `[1]`, float64
    pub total: Buf,
    /// [`OUTCOME`] float64
    pub outcome: Buf,
}

/// The table that the kernels walk over.
#[derive(Clone, Debug)]
pub struct Table {
    buf: Buf,
    bytes: Vec<u8>,
    count: usize,
    blocks: usize,
}

/// Blocks of threads for tensors of these lengths.
pub fn blocks(lens: impl IntoIterator<Item = usize>) -> usize {
    lens.into_iter().map(|n| n.div_ceil(VALUES_EACH)).sum()
}

impl Table {
    /// The table of these tensors at `buf`. `base` is the address of the device's memory.
    pub fn new(tensors: &[Tensor], buf: Buf, base: u64) -> Table {
        let mut table = Table { buf, bytes: Vec::new(), count: tensors.len(), blocks: 0 };
        for t in tensors {
            let n = t.weights.len;
            assert!(t.grads.len == n && t.moments.0.len == n && t.moments.1.len == n);
            let address = |b: Option<Buf>| b.map_or(0, |b| base + b.at);
            let is_bf16 = |b: Buf| (b.dtype == Dtype::Bf16) as u64;
            for word in [
                base + t.weights.at,
                is_bf16(t.weights),
                base + t.grads.at,
                is_bf16(t.grads),
                base + t.moments.0.at,
                base + t.moments.1.at,
                address(t.absmax.map(|a| a.0)),
                address(t.absmax.map(|a| a.1)),
                address(t.mean),
                n as u64,
            ] {
                table.bytes.extend(word.to_le_bytes());
            }
            table.bytes.extend((table.blocks as u32).to_le_bytes());
            table.bytes.extend([0; 12]); // the rates, and padding
            table.blocks += n.div_ceil(VALUES_EACH);
        }
        table.bytes.resize(tensors.len() * ENTRY, 0);
        table
    }

    /// The table with the rates of a step, to be written to the device.
    pub fn with_rates(&mut self, rates: impl Iterator<Item = TensorRates>) -> &[u8] {
        for (entry, r) in self.bytes.chunks_exact_mut(ENTRY).zip(rates) {
            entry[84..88].copy_from_slice(&r.keep.to_le_bytes());
            entry[88..92].copy_from_slice(&r.step.to_le_bytes());
        }
        &self.bytes
    }

    /// Its place on the device.
    pub fn buf(&self) -> Buf {
        self.buf
    }

    fn launch(&self, shared: u32) -> Launch {
        Launch { grid: [self.blocks as u32, 1, 1], threads: THREADS, shared }
    }

    fn args(&self) -> [Arg; 2] {
        [Arg::Buf(self.buf), int(self.count)]
    }

    /// Ends a step whose [`squares`](Table::squares) are in `squares` `[1]`: what it came to goes to `outcome`.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn settle(&self, dev: &mut dyn Device, squares: Buf, s: Scalars) -> Result<()> {
        let args = [
            exact(squares, Dtype::F64, 1),
            exact(s.total, Dtype::F64, 1),
            exact(s.adam, Dtype::U8, ADAM),
            exact(s.outcome, Dtype::F64, OUTCOME),
        ];
        dev.launch("settle", Launch { grid: [1; 3], threads: 32, shared: 0 }, &args)
    }

    /// One update of every tensor by what the scalars' buffers hold, or none, by the outcome; gradients are zero afterwards.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn update(&self, dev: &mut dyn Device, s: Scalars) -> Result<()> {
        let [table, count] = self.args();
        let (adam, maps) = (exact(s.adam, Dtype::U8, ADAM), exact(s.maps, Dtype::F32, MAPS));
        let args = [table, count, adam, maps, exact(s.outcome, Dtype::F64, OUTCOME)];
        dev.launch("adamw", self.launch(ROOM), &args)
    }

    /// `out` `[1]` (float64) = Σ of the squares of all gradients; `partials` has an element a [block](blocks).
    ///
    /// # Errors
    /// A fault of the device.
    pub fn squares(&self, dev: &mut dyn Device, partials: Buf, out: Buf) -> Result<()> {
        let [table, count] = self.args();
        dev.launch("squares", self.launch(ROOM), &[table, count, exact(partials, Dtype::F64, self.blocks)])?;
        super::loss::sum(dev, partials, out, None)
    }

    /// `mean += (w − mean) · share` of every tensor.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn average(&self, dev: &mut dyn Device, share: f32) -> Result<()> {
        let [table, count] = self.args();
        dev.launch("average", self.launch(0), &[table, count, Arg::Float(share)])
    }
}

/// Blocks of 8-bit states of a tensor.
pub fn state_blocks(len: usize) -> usize {
    len.div_ceil(BLOCK)
}

/// The two maps as the kernel reads them: of each, the magnitudes by steps away from zero, then the largest magnitude
/// that belongs to each.
pub fn maps() -> Vec<f32> {
    let mut out = Vec::with_capacity(MAPS);
    for (map, zero_limit) in [(DynamicMap::signed(), None), (DynamicMap::unsigned(), Some(0.0))] {
        let magnitudes = &map.values()[map.zero_code() as usize..];
        let mut values = [1.0f32; 256];
        values[..magnitudes.len()].copy_from_slice(magnitudes);
        let mut limits = [f32::INFINITY; 256];
        for (limit, pair) in limits.iter_mut().zip(magnitudes.windows(2)) {
            // The largest float that is at most the middle; sums of two are exact in f64.
            let middle = (pair[0] as f64 + pair[1] as f64) / 2.0;
            *limit = if middle as f32 as f64 > middle { (middle as f32).next_down() } else { middle as f32 };
        }
        if let Some(limit) = zero_limit {
            limits[0] = limit; // a positive second moment never takes the code of 0
        }
        out.extend(values);
        out.extend(limits);
    }
    out
}
