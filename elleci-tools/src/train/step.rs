//! `elleci-train step`: one loss, its logits and all gradients, for comparison with another implementation.

use std::path::Path;

use anyhow::{Context, ensure};
use elleci_core::config::ModelConfig;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::params::{ParamLayout, Params};
use safetensors::Dtype;
use serde_json::json;

use super::backend::{Group, param_tensors, read_params};
use super::cli::StepArgs;
use super::device::Device;
use crate::checkpoint::tensors::{self, Bytes, Tensor, TensorFile};
use crate::checkpoint::{CHECKPOINTS, Checkpoint, STATE_FILE, Store, write_atomic};
use crate::hf;

/// The target that does not count.
const IGNORED: i64 = -100;

/// Shape and weights of a model: of a Hugging Face folder, of a checkpoint, or of the newest checkpoint of a run.
///
/// # Errors
/// Whatever is missing or damaged there.
pub fn load_model(path: &Path) -> anyhow::Result<(ModelConfig, Params)> {
    let run = path.join(CHECKPOINTS);
    let checkpoint = if path.join(STATE_FILE).is_file() {
        Checkpoint::open(path)?
    } else if run.is_dir() {
        let newest = Store::latest(&run, |message| crate::exit::errln!("warning: {message}"))?;
        newest.with_context(|| format!("{} holds no checkpoint yet", run.display()))?
    } else {
        return hf::read(path);
    };
    let config = checkpoint.state.config.model.clone();
    let mut params = Params::zeros(ParamLayout::new(&config));
    read_params(&mut params, &checkpoint.tensors(Group::Weights.file())?)?;
    Ok((config, params))
}

/// Tokens and targets of a file.
struct Io {
    shape: [usize; 2],
    tokens: Vec<i64>,
    targets: Vec<i64>,
}

impl Io {
    fn read(path: &Path, vocab_size: usize) -> anyhow::Result<Io> {
        let file = TensorFile::open(path)?;
        let (shape, tokens) = file.read_integers("tokens")?;
        let (target_shape, targets) = file.read_integers("targets")?;
        let at = path.display();
        let &[rows, seq] = shape.as_slice() else {
            anyhow::bail!("{at}: `tokens` has shape {shape:?}; it must be [B, T]");
        };
        ensure!(rows > 0 && seq > 0, "{at}: `tokens` is empty: {shape:?}");
        ensure!(target_shape == shape, "{at}: `targets` has shape {target_shape:?}, `tokens` has {shape:?}");
        for (name, values) in [("tokens", &tokens), ("targets", &targets)] {
            let fits = |v: &i64| (0..vocab_size as i64).contains(v) || (name == "targets" && *v == IGNORED);
            if let Some(v) = values.iter().find(|v| !fits(v)) {
                anyhow::bail!("{at}: `{name}` holds {v}; the model's `vocab_size` is {vocab_size}");
            }
        }
        ensure!(targets.iter().any(|t| *t != IGNORED), "{at}: every target is {IGNORED}: there is no loss");
        Ok(Io { shape: [rows, seq], tokens, targets })
    }
}

/// Runs the verb.
///
/// # Errors
/// Files that are missing, damaged or do not fit; [`crate::exit::Usage`] for a device that is not there.
pub fn run(args: &StepArgs) -> anyhow::Result<()> {
    let device = Device::choose(&args.device, args.threads)?;
    crate::exit::errln!("{}", device.announcement);
    let loss = device.install(|| {
        let (config, params) = load_model(&args.init).context("--init")?;
        let io = Io::read(&args.batch, config.vocab_size).context("--batch")?;
        compute(config, params, &io, &args.out)
    })?;
    crate::exit::outln!("{}", json!({ "loss": loss, "out": args.out }));
    Ok(())
}

fn compute(config: ModelConfig, params: Params, io: &Io, out: &Path) -> anyhow::Result<f64> {
    let [rows, seq] = io.shape;
    let tokens: Vec<u32> = io.tokens.iter().map(|&t| t as u32).collect();
    let targets: Vec<u32> = io.targets.iter().map(|&t| t.max(0) as u32).collect();
    let weights: Vec<f32> = io.targets.iter().map(|&t| if t == IGNORED { 0.0 } else { 1.0 }).collect();
    let batch = Batch { batch: rows, seq, tokens: &tokens, targets: &targets, weights: &weights };
    let counted = weights.iter().map(|&w| f64::from(w)).sum::<f64>();

    let model = Model::new(config, params)?;
    let mut workspace = Workspace::new(model.config(), rows, seq, Checkpointing::None);
    let mut logits = vec![0.0; rows * seq * model.config().vocab_size];
    model.logits(&mut workspace, &batch, &mut logits)?;
    let mut grads = Params::zeros(model.layout().clone());
    let loss = model.loss_and_grad(&mut workspace, &batch, (1.0 / counted) as f32, &mut grads)? / counted;

    std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let integers = |name: &str, values: &[i64]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor { name: name.into(), dtype: Dtype::I64, shape: vec![rows, seq], bytes: Bytes::Ready(bytes.into()) }
    };
    let results = vec![
        integers("tokens", &io.tokens),
        integers("targets", &io.targets),
        Tensor::f32("logits", &[rows, seq, model.config().vocab_size], &logits),
        Tensor {
            dtype: Dtype::F64,
            bytes: Bytes::Ready(loss.to_le_bytes().to_vec().into()),
            ..Tensor::f32("loss", &[], &[])
        },
    ];
    write_atomic(&out.join("io.safetensors"), |path| tensors::write(path, results).map(|_| ()))?;
    write_atomic(&out.join("grads.safetensors"), |path| tensors::write(path, param_tensors(&grads)).map(|_| ()))?;
    Ok(loss)
}
