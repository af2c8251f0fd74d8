//! Weights to their ternary forms: packed ones in three launches for all tensors, and from these the operands that are kept.

use super::product::{Ternary, unpack};
use super::{ROOM, THREADS, int};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Weights that one block sums.
const SUM_EACH: usize = 1 << 15;
/// Packed bytes that one block writes.
const PACK_EACH: usize = 1 << 12;
/// Bytes of an entry of the table (`TernaryTensor`).
pub const ENTRY: usize = 56;

/// Partial sums of an `[out, input]` matrix.
pub fn partials(out: usize, input: usize) -> usize {
    (out * input).div_ceil(SUM_EACH)
}

/// The table that the kernels walk over, and their launches.
#[derive(Clone, Debug)]
pub struct Quantizer {
    table: Buf,
    forms: Vec<Ternary>,
    sum_blocks: usize,
    pack_blocks: usize,
}

impl Quantizer {
    /// The table's bytes for tensors of these weights and forms; `partial` has room for the [`partials`] of all. `base` is the
    /// address of the device's memory.
    pub fn new(tensors: &[(Buf, Ternary)], table: Buf, partial: Buf, base: u64) -> (Quantizer, Vec<u8>) {
        let forms = tensors.iter().map(|(_, form)| *form).collect();
        let mut q = Quantizer { table, forms, sum_blocks: 0, pack_blocks: 0 };
        let mut bytes = Vec::with_capacity(ENTRY * tensors.len());
        for (weights, form) in tensors {
            let sums = partials(form.out, form.input);
            assert_eq!(weights.len, form.out * form.input);
            bytes.extend((base + weights.at).to_le_bytes());
            bytes.extend(((weights.dtype == Dtype::Bf16) as u64).to_le_bytes());
            bytes.extend((base + form.packed.at).to_le_bytes());
            bytes.extend((base + form.gamma.at).to_le_bytes());
            bytes.extend((base + partial.part(q.sum_blocks, sums).at).to_le_bytes());
            for value in [form.out, form.input, q.sum_blocks, q.pack_blocks] {
                bytes.extend(u32::try_from(value).expect("sizes are checked when a plan is made").to_le_bytes());
            }
            q.sum_blocks += sums;
            q.pack_blocks += form.packed.len.div_ceil(PACK_EACH);
        }
        assert_eq!(bytes.len(), table.len);
        (q, bytes)
    }

    /// Derives γ, codes and kept operands of all tensors.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn run(&self, dev: &mut dyn Device) -> Result<()> {
        let (table, count) = (Arg::Buf(self.table), self.forms.len());
        let launch = |blocks: usize, threads, shared| Launch { grid: [blocks as u32, 1, 1], threads, shared };
        dev.launch("ternary_sum", launch(self.sum_blocks, THREADS, ROOM), &[table, int(count)])?;
        dev.launch("ternary_gamma", launch(count, 32, 0), &[table])?;
        dev.launch("ternary_pack", launch(self.pack_blocks, THREADS, 0), &[table, int(count)])?;
        for form in &self.forms {
            let kept = form.unpacked.map(|u| [Some(u.bytes), u.backward]);
            for operand in kept.into_iter().flatten().flatten() {
                unpack(dev, *form, operand)?;
            }
        }
        Ok(())
    }
}
