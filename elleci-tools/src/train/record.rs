//! Writes every step's micro-batches, so that another framework can train on the same stream.

use std::path::{Path, PathBuf};

use anyhow::Context;
use safetensors::Dtype;

use super::batches::StepData;
use super::plan::Rates;
use crate::checkpoint::tensors::{self, Bytes, Tensor};
use crate::checkpoint::write_atomic;

/// A directory with one file a step, `batch-00000001.safetensors` (the first step is 1): for every micro-batch `i`
/// `micro.{i}.tokens` and `.targets`, int64 `[B, T]` (-100 = ignored), and `.weights`, float32; `lr`, float64, the rate of
/// every layer; `weight_decay`, float64 `[1]`. The loss of a step is `Σ w·CE / Σ w` over all its micro-batches.
pub struct Recorder {
    dir: PathBuf,
}

impl Recorder {
    /// Creates the directory.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn create(dir: &Path) -> anyhow::Result<Recorder> {
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Recorder { dir: dir.to_path_buf() })
    }

    /// Writes the data of a step, counted from 0.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn write(&mut self, step: u64, data: &StepData, rates: &Rates) -> anyhow::Result<()> {
        let mut out = Vec::new();
        for (i, micro) in data.micro.iter().enumerate() {
            let shape = [micro.rows, micro.seq];
            let targets = micro.targets.iter().zip(&micro.weights);
            let targets = targets.map(|(&t, &w)| if w == 0.0 { -100 } else { i64::from(t) });
            let tokens = micro.tokens.iter().map(|&t| i64::from(t));
            out.push(wide(format!("micro.{i}.tokens"), Dtype::I64, &shape, tokens.map(i64::to_le_bytes)));
            out.push(wide(format!("micro.{i}.targets"), Dtype::I64, &shape, targets.map(i64::to_le_bytes)));
            out.push(Tensor::f32(format!("micro.{i}.weights"), &shape, &micro.weights));
        }
        let lr = rates.by_layer.iter().map(|m| (rates.lr * m).to_le_bytes());
        out.push(wide("lr".into(), Dtype::F64, &[rates.by_layer.len()], lr));
        out.push(wide("weight_decay".into(), Dtype::F64, &[1], [rates.weight_decay.to_le_bytes()].into_iter()));
        let path = self.dir.join(format!("batch-{:08}.safetensors", step + 1));
        write_atomic(&path, |temporary| tensors::write(temporary, out).map(|_| ()))
    }
}

fn wide(name: String, dtype: Dtype, shape: &[usize], values: impl Iterator<Item = [u8; 8]>) -> Tensor<'static> {
    let bytes = Bytes::Ready(values.flatten().collect::<Vec<u8>>().into());
    Tensor { name, dtype, shape: shape.to_vec(), bytes }
}
