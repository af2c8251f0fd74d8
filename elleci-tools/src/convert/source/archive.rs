//! Deployment archives.

use std::path::Path;

use anyhow::Context;
use elleci_core::archive::Archive;
use elleci_core::params::Id;
use memmap2::Mmap;

use super::{Form, Source, TensorInfo, Tensors};

/// The first bytes of every archive.
const MAGIC: &[u8] = b"\x93ELLECI\n";

/// Whether bytes claim to be an archive.
pub fn is_archive(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

struct ArchiveTensors {
    archive: Archive<Mmap>,
    list: Vec<TensorInfo>,
}

impl Tensors for ArchiveTensors {
    fn list(&self) -> &[TensorInfo] {
        &self.list
    }

    fn read(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()> {
        Ok(self.archive.model().read(Id(index), values)?)
    }

    fn read_latent(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()> {
        self.read(index, values)?;
        if let Some(gamma) = self.list[index].gamma {
            requantisable(gamma, values);
        }
        Ok(())
    }
}

/// Turns γ·W₃ into values that the quantiser takes back to exactly γ and W₃.
///
/// Quantising γ·W₃ itself gives the scale p·γ, p the share of values that are not 0. Values of ±γ/p have the mean γ, but for the
/// rounding of γ/p, which is downwards here. What is missing in the sum, less than 2^-23·γ/p a value, goes to some of the
/// values, by at most a 64th of each, and what is too small for them to one of the zeros: `rne(v/γ)` stays what it was.
fn requantisable(gamma: f32, values: &mut [f32]) {
    let nonzero = values.iter().filter(|v| **v != 0.0).count();
    if nonzero == 0 {
        return;
    }
    // Products of 24-bit numbers: exact.
    let sum = f64::from(gamma) * values.len() as f64;
    let magnitude = f64::from(round_down(sum / nonzero as f64));
    let mut missing = sum - magnitude * nonzero as f64;
    for v in values.iter_mut().filter(|v| **v != 0.0) {
        let more = round_down(magnitude + missing.min(magnitude / 64.0));
        missing -= f64::from(more) - magnitude;
        *v = more.copysign(*v);
    }
    // Where there is no zero, p is 1 and nothing is missing.
    if let Some(zero) = values.iter_mut().find(|v| **v == 0.0) {
        *zero = missing as f32;
    }
}

/// The largest float32 that is not above `x`.
fn round_down(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) > x { nearest.next_down() } else { nearest }
}

/// Opens an archive and verifies all checksums that opening verifies.
pub fn open(path: &Path, map: Mmap) -> anyhow::Result<Source> {
    let archive = Archive::open(map).with_context(|| path.display().to_string())?;
    let model = archive.model();
    let list = model
        .tensors()
        .map(|t| TensorInfo {
            name: t.name.to_string(),
            stored_as: None,
            shape: t.shape.to_vec(),
            format: t.format.name().to_string(),
            bytes: t.bytes as u64,
            gamma: t.gamma,
        })
        .collect();
    let (config, tokenizer) = (model.config().clone(), model.tokenizer().map(<[u8]>::to_vec));
    let facts = vec![("fingerprint", format!("{:016x}", model.fingerprint()).into())];
    Ok(Source {
        path: path.to_path_buf(),
        form: Form::Archive,
        facts,
        config: Some(config),
        tokenizer,
        tokenizer_sha256: None,
        tensors: Box::new(ArchiveTensors { archive, list }),
        averaged: false,
        notes: Vec::new(),
        problems: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use elleci_core::ternary::TernaryMatrix;

    /// The same scale to the bit and the same codes, for shares from a few values to all of them.
    #[test]
    fn what_is_requantised_is_what_was_packed() {
        for (rows, cols) in [(1, 1), (3, 5), (64, 80), (512, 300)] {
            for keep in [1, 2, 3, 7] {
                for gamma in [1e-5f32, 0.019_531_25, 0.012_345_679, 1.0, 7.7e3] {
                    let code = |i: usize| match (i * 2_654_435_761) >> 7 {
                        h if i > 0 && !h.is_multiple_of(keep) => 0.0,
                        h if h & 8 == 0 => gamma,
                        _ => -gamma,
                    };
                    let packed: Vec<f32> = (0..rows * cols).map(code).collect();
                    let mut latent = packed.clone();
                    requantisable(gamma, &mut latent);
                    let matrix = TernaryMatrix::from_weights(&latent, rows, cols);
                    assert_eq!(matrix.gamma(), gamma, "{rows}x{cols}, one in {keep}");
                    for (i, v) in packed.iter().enumerate() {
                        assert_eq!(f32::from(matrix.code(i / cols, i % cols)) * gamma, *v, "{rows}x{cols} {i}");
                    }
                }
            }
        }
    }
}
