//! Holds the Rust oracle against the PyTorch one: reads what `reference/elleci_torch.py dump --out DIR` wrote.
//!
//! ```text
//! python reference/elleci_torch.py dump --preset nano --batch 2 --seq 100 --out dump
//! cargo run --release -p elleci-tests --example reference -- dump
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use elleci_core::config::ModelConfig;
use elleci_core::params::{ParamLayout, Params};
use elleci_tests::compare::to_f64;
use elleci_tests::ops::Scan;
use elleci_tests::oracle::{Oracle, OracleBatch};
use tch::{Kind, Tensor};

fn config(dir: &std::path::Path) -> Result<ModelConfig> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let mut config = json["config"].clone();
    config["tie_embeddings"] = false.into();
    Ok(serde_json::from_value(config)?)
}

fn main() -> Result<()> {
    let dir = PathBuf::from(std::env::args().nth(1).context("usage: reference DIR")?);
    let config = config(&dir)?;
    let read = |file: &str| -> Result<BTreeMap<String, Tensor>> {
        Ok(Tensor::read_safetensors(dir.join(file))?.into_iter().collect())
    };
    let (weights, grads, io) = (read("weights.safetensors")?, read("grads.safetensors")?, read("io.safetensors")?);
    let mut params = Params::zeros(ParamLayout::new(&config));
    for p in params.layout().clone().params() {
        let tensor = weights.get(&p.name).with_context(|| format!("{} is not in the dump", p.name))?;
        ensure!(tensor.numel() == p.len(), "{}: {:?} instead of {:?}", p.name, tensor.size(), p.shape);
        tensor.view(-1).copy_data(&mut params.data_mut()[p.range.clone()], p.len());
    }
    let oracle = Oracle::new(&config, &params, Kind::Float, Scan::Chunked(64), None);
    let targets = io["targets"].view(-1);
    let weights = targets.ones_like().to_kind(Kind::Float) / targets.numel() as f64;
    let run = oracle.run(&OracleBatch { tokens: io["tokens"].shallow_clone(), targets, weights }, 1.0);
    let mut found = run.into_named();
    println!("loss {:.7}", found["loss"].double_value(&[]));
    found.remove("loss");
    let mut worst = (0.0, String::new());
    for (name, tensor) in &found {
        let want = to_f64(if name == "logits" { &io["logits"] } else { &grads[name] });
        let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = to_f64(tensor).iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / norm;
        println!("{name}: relative error {error:.1e}");
        if error.is_nan() || error > worst.0 {
            worst = (error, name.clone());
        }
    }
    // Both round for themselves, so that a few codes differ and gradients move by some hundredths at most.
    ensure!(worst.0 < 0.05, "{} differs by {:.1e}", worst.1, worst.0);
    println!("ok: largest relative error {:.1e} ({})", worst.0, worst.1);
    Ok(())
}
