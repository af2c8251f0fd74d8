//! What goes from a trainer to a checkpoint and back: weights, gradients, optimizer states, the running mean.

use elleci_core::params::{Id, Param, Params};
use half::bf16;

use super::{Error, Trainer, floats};
use crate::arena::{Buf, Dtype};
use crate::device::DeviceError;
use crate::ops::optim;
use crate::plan::ParamBufs;

/// An optimizer state, named and shaped as `elleci_core::optim::AdamW::tensors` has it.
#[derive(Clone, Debug)]
pub struct StateBuf {
    /// The parameter's name and which of its states this is.
    pub name: String,
    /// The parameter's shape, or `[blocks]` for an absmax.
    pub shape: Vec<usize>,
    /// float32, or 8-bit codes.
    pub buf: Buf,
}

impl Trainer {
    /// The gradients, as float32.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn gradients(&mut self) -> Result<Params, Error> {
        self.params(|t| Some(t.grads))
    }

    /// The weights, as float32.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn weights(&mut self) -> Result<Params, Error> {
        self.params(|t| Some(t.weights))
    }

    /// All optimizer states, in the core's order: what a checkpoint holds of them.
    pub fn states(&self) -> Vec<StateBuf> {
        let plan = self.plan();
        let of = |(p, bufs): (&Param, &ParamBufs)| {
            let ((m, v), absmax) = (bufs.optim.moments, bufs.optim.absmax);
            let blocks = absmax.map(|(m, v)| [("m_absmax", m), ("v_absmax", v)]);
            let state = |suffix: &str, buf: Buf, shape| StateBuf { name: format!("{}.{suffix}", p.name), shape, buf };
            let of_blocks = |i: usize| blocks.map(|b| state(b[i].0, b[i].1, vec![b[i].1.len]));
            let moment = |suffix, buf| Some(state(suffix, buf, p.shape.clone()));
            [moment("m", m), of_blocks(0), moment("v", v), of_blocks(1)].into_iter().flatten().collect::<Vec<_>>()
        };
        plan.layout.params().iter().zip(&plan.params).flat_map(of).collect()
    }

    /// The running mean, where one is kept.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn mean(&mut self) -> Result<Option<Params>, Error> {
        match self.averaged {
            0 => Ok(None),
            _ => self.params(|t| t.mean).map(Some),
        }
    }

    fn params(&mut self, of: impl Fn(&optim::Tensor) -> Option<Buf>) -> Result<Params, Error> {
        let mut out = Params::zeros(self.plan().layout.clone());
        for i in 0..self.plan().params.len() {
            if let Some(buf) = of(&self.plan().params[i].optim) {
                let values = self.read_floats(buf)?;
                out[Id(i)].copy_from_slice(&values);
            }
        }
        Ok(out)
    }

    /// A buffer of float32 or bf16 as float32.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn read_floats(&mut self, buf: Buf) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.read_bytes(buf)?;
        Ok(match buf.dtype {
            Dtype::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        })
    }

    /// A buffer's bytes, little-endian: an optimizer state, for a checkpoint.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn read_bytes(&mut self, buf: Buf) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; buf.bytes() as usize];
        self.device.read(buf, &mut bytes)?;
        Ok(bytes)
    }

    /// Replaces a buffer's bytes.
    ///
    /// # Errors
    /// Bytes of another number, or a fault of the device.
    pub fn write_bytes(&mut self, buf: Buf, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() as u64 != buf.bytes() {
            return Err(Error::Batch(format!("{} bytes for a buffer of {}", bytes.len(), buf.bytes())));
        }
        Ok(self.device.write(buf, bytes)?)
    }

    fn write_floats(&mut self, buf: Buf, values: &[f32]) -> Result<(), DeviceError> {
        match buf.dtype {
            Dtype::Bf16 => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
                self.device.write(buf, &bytes)
            }
            _ => self.device.write(buf, &floats(values)),
        }
    }

    /// Replaces the weights (rounded where masters are bf16) and derives their ternary forms.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn set_weights(&mut self, weights: &Params) -> Result<(), Error> {
        for i in 0..self.plan().params.len() {
            let buf = self.plan().params[i].optim.weights;
            self.write_floats(buf, &weights[Id(i)])?;
        }
        Ok(self.quantizer.run(self.device.as_mut())?)
    }

    /// Replaces the running mean.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn set_mean(&mut self, mean: &Params) -> Result<(), Error> {
        for i in 0..self.plan().params.len() {
            if let Some(buf) = self.plan().params[i].optim.mean {
                self.write_floats(buf, &mean[Id(i)])?;
            }
        }
        Ok(())
    }
}
