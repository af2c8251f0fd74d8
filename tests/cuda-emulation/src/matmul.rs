//! What a device's library of products does, on the host: each sum in float32 (int8: in integers) by k from the first to the last.

use elleci_cuda::arena::{Buf, Dtype};
use elleci_cuda::device::{DeviceError, Matmul, Operand, Order, Result};

use crate::{Emulated, emulated_defined, emulated_mark};

fn float(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16),
        Dtype::E4m3 => e4m3(bytes[0]),
        _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

/// The value of an e4m3: 1.mmm · 2^(e − 7), or m · 2^-9 where e is 0; the highest code of either sign is no number.
pub fn e4m3(code: u8) -> f32 {
    let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (e, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => m * 2.0f32.powi(-9),
        _ => (8.0 + m) * 2.0f32.powi(e - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Nearest even, as the kernels round.
fn bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    if v.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

impl Emulated {
    /// An operand as floats `[rows, k]`, every element of it defined.
    fn operand(&self, o: &Operand, rows: usize, k: usize) -> Result<Vec<f32>> {
        self.check(o.buf)?;
        let (lines, along) = if o.order == Order::K { (rows, k) } else { (k, rows) };
        let size = o.buf.dtype.bytes() as usize;
        let mut out = vec![0.0; rows * k];
        for line in 0..lines {
            let part = o.buf.part(line * o.pitch, along);
            let bytes = self.bytes_of(part)?;
            for (i, element) in bytes.chunks_exact(size).enumerate() {
                let (row, col) = if o.order == Order::K { (line, i) } else { (i, line) };
                out[row * k + col] = match o.buf.dtype {
                    Dtype::I8 => f32::from(element[0] as i8),
                    other => float(other, element),
                };
            }
        }
        Ok(out)
    }

    /// A buffer's bytes, all of which must have been written.
    fn bytes_of(&self, buf: Buf) -> Result<&[u8]> {
        let (at, len) = (buf.at as usize, buf.bytes() as usize);
        // SAFETY: the buffer lies in a region of the plan, which lies in the memory.
        unsafe {
            if emulated_defined(at, len) == 0 {
                return Err(refused(format!("not all of `{}` was written", self.region_at(buf.at))));
            }
            Ok(std::slice::from_raw_parts(self.base.add(at), len))
        }
    }

    pub(crate) fn multiply(&mut self, p: &Matmul, workspace: Buf) -> Result<()> {
        self.products += 1;
        self.check(p.out)?;
        self.check(workspace)?;
        let by_k = p.a.order == Order::K && p.b.order == Order::K;
        let taken = match (p.a.buf.dtype, p.b.buf.dtype, p.out.dtype) {
            (Dtype::Bf16, Dtype::Bf16, Dtype::F32 | Dtype::Bf16) => true,
            (Dtype::I8, Dtype::I8, Dtype::I32) => by_k && !p.add && p.alpha.is_none() && p.n.is_multiple_of(4),
            (Dtype::E4m3, Dtype::E4m3, Dtype::F32) => {
                by_k && !p.add && p.alpha.is_none() && p.n.is_multiple_of(16) && p.k.is_multiple_of(16)
            }
            _ => false,
        };
        let aligned = [p.a.buf, p.b.buf, p.out, workspace].iter().all(|b| b.at.is_multiple_of(256));
        if !taken || !aligned || p.out.len != p.m * p.n {
            return Err(refused(format!("the library does not take {p:?}")));
        }
        let (a, b) = (self.operand(&p.a, p.m, p.k)?, self.operand(&p.b, p.n, p.k)?);
        let alpha = match p.alpha {
            Some(buf) => float(Dtype::F32, self.bytes_of(buf)?),
            None => 1.0,
        };
        let old = if p.add { self.bytes_of(p.out)?.to_vec() } else { Vec::new() };
        let size = p.out.dtype.bytes() as usize;
        let mut out = Vec::with_capacity(p.out.bytes() as usize);
        for i in 0..p.m * p.n {
            let (x, y) = (&a[i / p.n * p.k..][..p.k], &b[i % p.n * p.k..][..p.k]);
            if p.out.dtype == Dtype::I32 {
                let sum: i32 = x.iter().zip(y).map(|(x, y)| *x as i32 * *y as i32).sum();
                out.extend(sum.to_le_bytes());
                continue;
            }
            let mut sum = x.iter().zip(y).fold(0.0f32, |sum, (x, y)| sum + x * y) * alpha;
            if p.add {
                sum += float(p.out.dtype, &old[i * size..]);
            }
            match p.out.dtype {
                Dtype::Bf16 => out.extend(bf16(sum).to_le_bytes()),
                _ => out.extend(sum.to_le_bytes()),
            }
        }
        // SAFETY: the buffer lies in the memory and has the size of the bytes; so does the workspace, whose contents the library
        // leaves undefined.
        unsafe {
            std::ptr::copy_nonoverlapping(out.as_ptr(), self.base.add(p.out.at as usize), out.len());
            emulated_mark(p.out.at as usize, out.len(), 1, 1);
            emulated_mark(workspace.at as usize, workspace.len, 1, 0);
        }
        Ok(())
    }
}

fn refused(reason: String) -> DeviceError {
    DeviceError::Driver { action: "multiply", reason }
}
