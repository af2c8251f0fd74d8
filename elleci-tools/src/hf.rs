//! Hugging Face folders: `model.safetensors` (one file or shards with an index), a flat `config.json`, and
//! `tokenizer.json`, which may be absent. Weights are read from float32, float16 or bfloat16 and written as float32.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use elleci_core::config::ModelConfig;
use elleci_core::params::{ParamLayout, Params};
use serde_json::{Map, Value, json};

use crate::checkpoint::tensors::{self, Tensor, TensorFile};
use crate::checkpoint::write_atomic;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
/// The tokenizer of a folder.
pub const TOKENIZER: &str = "tokenizer.json";
/// What `elleci-data tokenizer` writes beside a tokenizer.
pub const TOKENIZER_CONFIG: &str = "tokenizer.config.json";

/// Reads `config.json`. Keys that are not ours (`architectures`, `torch_dtype`, …) are left alone.
///
/// # Errors
/// A file that is missing or not JSON, another `model_type`, and the first field that is missing or does not fit.
pub fn read_config(dir: &Path) -> anyhow::Result<ModelConfig> {
    read_config_file(&dir.join(CONFIG))
}

/// Whether there is a `config.json`.
pub fn has_config(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// Whether a directory has the files of a folder, complete or not.
pub fn is_folder(dir: &Path) -> bool {
    [WEIGHTS, INDEX, CONFIG].iter().any(|name| dir.join(name).is_file())
}

/// Whether a file of this name belongs to a folder that [`write()`] or `elleci-data tokenizer` wrote.
pub fn is_own_file(name: &str) -> bool {
    let shard = name.starts_with("model-") && name.ends_with(".safetensors");
    shard || [WEIGHTS, INDEX, CONFIG, TOKENIZER, TOKENIZER_CONFIG].contains(&name)
}

/// Reads a file with the contents of `config.json`.
///
/// # Errors
/// As [`read_config`].
pub fn read_config_file(path: &Path) -> anyhow::Result<ModelConfig> {
    let at = || path.display().to_string();
    parse_config(&fs::read_to_string(path).with_context(at)?).with_context(at)
}

/// The configuration in the text of `config.json`.
///
/// # Errors
/// As [`read_config`].
pub fn parse_config(text: &str) -> anyhow::Result<ModelConfig> {
    let value: Value = serde_json::from_str(text).context("not JSON")?;
    let Value::Object(all) = value else { bail!("must be a JSON object") };
    match all.get("model_type") {
        Some(Value::String(kind)) if kind == "elleci" => {}
        Some(other) => bail!("`model_type` is {other}; only \"elleci\" can be read"),
        None => bail!("`model_type` is missing; it must be \"elleci\""),
    }
    let known = serde_json::to_value(ModelConfig::preset("nano")?)?;
    let mut ours: Map<String, Value> = all.into_iter().filter(|(key, _)| known.get(key.as_str()).is_some()).collect();
    ours.entry("tie_embeddings").or_insert(json!(false));
    let config: ModelConfig = serde_path_to_error::deserialize(Value::Object(ours))
        .map_err(|e| anyhow::anyhow!("{}", e.to_string().trim_start_matches(".: ")))?;
    config.validate()?;
    Ok(config)
}

/// Reads a whole folder.
///
/// # Errors
/// A config that does not hold together; files that are missing or damaged; all tensors that are missing, superfluous
/// or of another shape, by name.
pub fn read(dir: &Path) -> anyhow::Result<(ModelConfig, Params)> {
    ensure!(dir.is_dir(), "{} is no directory", dir.display());
    let config = read_config(dir)?;
    let layout = ParamLayout::new(&config);
    // Memory for the weights is taken once the files are known to hold them.
    let weights = Weights::open(dir, &layout)?;
    let mut params = Params::zeros(layout);
    weights.read(&mut params)?;
    Ok((config, params))
}

/// Fills `params` from the weights of a folder.
///
/// # Errors
/// As [`read`].
pub fn read_weights(dir: &Path, params: &mut Params) -> anyhow::Result<()> {
    Weights::open(dir, params.layout())?.read(params)
}

/// The files of a folder that hold exactly the tensors of a model.
struct Weights {
    files: Vec<TensorFile>,
    /// The file of every parameter.
    place: Vec<usize>,
}

impl Weights {
    fn open(dir: &Path, layout: &ParamLayout) -> anyhow::Result<Weights> {
        let files = weight_files(dir)?;
        let mut place = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.entries().keys() {
                if let Some(first) = place.insert(name.as_str(), index) {
                    let (a, b) = (files[first].path().display(), file.path().display());
                    bail!("tensor `{name}` is both in {a} and in {b}");
                }
            }
        }
        let found = place.iter().map(|(&n, &i)| (n, files[i].entries()[n].shape.as_slice())).collect();
        let expected = layout.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
        check_tensors(expected, &found).with_context(|| dir.display().to_string())?;
        let place = layout.params().iter().map(|p| place[p.name.as_str()]).collect();
        Ok(Weights { files, place })
    }

    fn read(&self, params: &mut Params) -> anyhow::Result<()> {
        let layout = params.layout().clone();
        for (p, &file) in layout.params().iter().zip(&self.place) {
            self.files[file].read_floats(&p.name, &p.shape, &mut params.data_mut()[p.range.clone()])?;
        }
        Ok(())
    }
}

/// The one file, or all shards that the index names.
///
/// # Errors
/// A file that is missing or damaged, or does not hold what the index says.
pub fn weight_files(dir: &Path) -> anyhow::Result<Vec<TensorFile>> {
    let single = dir.join(WEIGHTS);
    if single.is_file() {
        return Ok(vec![TensorFile::open(&single)?]);
    }
    let index = dir.join(INDEX);
    ensure!(index.is_file(), "{}: neither {WEIGHTS} nor {INDEX} is there", dir.display());
    let at = || index.display().to_string();
    let value: Value = serde_json::from_str(&fs::read_to_string(&index).with_context(at)?).with_context(at)?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.with_context(|| format!("{}: `weight_map` is missing", at()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().with_context(|| format!("{}: `{tensor}`: not a file name", at()))?;
        let plain = Path::new(shard).file_name().is_some_and(|n| n == shard);
        ensure!(plain, "{}: `{tensor}`: {shard} is not the name of a file in this folder", at());
        shards.entry(shard).or_default().push(tensor);
    }
    let open = |(shard, tensors): (&str, Vec<&str>)| {
        let file = TensorFile::open(&dir.join(shard))?;
        for tensor in tensors {
            ensure!(
                file.entries().contains_key(tensor),
                "{}: `{tensor}` is not in {shard}, as {INDEX} says",
                dir.display()
            );
        }
        Ok(file)
    };
    shards.into_iter().map(open).collect()
}

/// Compares the tensors of a file with those of a model.
///
/// # Errors
/// One message with all that are missing, superfluous or of another shape (the first twenty of each).
pub fn check_tensors<'a>(
    expected: impl Iterator<Item = (&'a str, &'a [usize])>,
    found: &BTreeMap<&str, &[usize]>,
) -> anyhow::Result<()> {
    let expected: BTreeMap<&str, &[usize]> = expected.collect();
    let missing: Vec<String> =
        expected.iter().filter(|(n, _)| !found.contains_key(*n)).map(|(n, s)| format!("{n} {s:?}")).collect();
    let extra: Vec<String> =
        found.iter().filter(|(n, _)| !expected.contains_key(*n)).map(|(n, s)| format!("{n} {s:?}")).collect();
    let differ = |(n, s): (&&str, &&[usize])| {
        let got = found.get(n)?;
        (got != s).then(|| format!("{n} is {got:?}, must be {s:?}"))
    };
    let wrong: Vec<String> = expected.iter().filter_map(differ).collect();
    let mut parts = Vec::new();
    for (what, names) in [("missing", missing), ("not of this model", extra), ("of another shape", wrong)] {
        if !names.is_empty() {
            let more = if names.len() > 20 { format!(", and {} more", names.len() - 20) } else { String::new() };
            parts.push(format!("{} {what}: {}{more}", names.len(), names[..names.len().min(20)].join(", ")));
        }
    }
    ensure!(parts.is_empty(), "the tensors do not fit the model: {}", parts.join("; "));
    Ok(())
}

/// `config.json` of a model.
///
/// # Errors
/// When a value has no JSON form.
pub fn config_json(config: &ModelConfig) -> anyhow::Result<String> {
    let mut value = json!({ "architectures": ["ElleciForCausalLM"], "model_type": "elleci", "torch_dtype": "float32" });
    if let (Value::Object(all), Value::Object(ours)) = (&mut value, serde_json::to_value(config)?) {
        all.extend(ours);
    }
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

/// Writes a folder, file by file, each whole or not at all.
///
/// # Errors
/// Whatever the file system reports.
pub fn write(
    dir: &Path,
    config: &ModelConfig,
    weights: Vec<Tensor<'_>>,
    tokenizer: Option<&Path>,
) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let weights = |path: &Path| {
        let written = tensors::write(path, weights)?;
        ensure!(tensors::digest(path)? == written, "what was written does not read back");
        Ok(())
    };
    write_atomic(&dir.join(WEIGHTS), weights)?;
    if let Some(tokenizer) = tokenizer {
        let copy = |path: &Path| {
            fs::copy(tokenizer, path).with_context(|| format!("copying {}", tokenizer.display())).map(|_| ())
        };
        write_atomic(&dir.join(TOKENIZER), copy)?;
    }
    write_atomic(&dir.join(CONFIG), |path| Ok(fs::write(path, config_json(config)?)?))?;
    Ok(dir.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tensors::Bytes;
    use crate::train::backend::param_tensors;
    use elleci_core::init::initialise;
    use half::{bf16, f16};
    use safetensors::Dtype;

    /// Odd sizes that fit together.
    fn tiny() -> ModelConfig {
        ModelConfig {
            vocab_size: 37,
            d_model: 24,
            n_layers: 4,
            n_heads: 2,
            kv_rank: 10,
            d_nope: 6,
            d_rope: 4,
            d_v: 5,
            d_inner: 36,
            head_dim: 12,
            d_state: 7,
            ffn_hidden: 22,
            max_seq_len: 32,
            ..ModelConfig::preset("nano").unwrap()
        }
    }

    #[test]
    fn round_trip_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        for config in [tiny(), ModelConfig { tie_embeddings: true, ..tiny() }] {
            let params = initialise(&config, 3);
            write(dir.path(), &config, param_tensors(&params), None).unwrap();
            let (read_config, read_params) = read(dir.path()).unwrap();
            assert_eq!(read_config, config);
            assert_eq!(read_params.data(), params.data());
        }
    }

    /// Shards of three precisions.
    #[test]
    fn shards_and_half_precision() {
        let dir = tempfile::tempdir().unwrap();
        let config = tiny();
        let params = initialise(&config, 3);
        let mut shards: [Vec<Tensor<'_>>; 3] = [vec![], vec![], vec![]];
        let (mut want, mut map) = (params.clone(), Map::new());
        for (i, p) in params.layout().params().iter().enumerate() {
            let values = &params.data()[p.range.clone()];
            let (dtype, bytes): (Dtype, Vec<u8>) = match i % 3 {
                0 => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
                1 => (Dtype::F16, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
                _ => (Dtype::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
            };
            for v in &mut want.data_mut()[p.range.clone()] {
                *v = match i % 3 {
                    0 => *v,
                    1 => f16::from_f32(*v).to_f32(),
                    _ => bf16::from_f32(*v).to_f32(),
                };
            }
            let bytes = Bytes::Ready(bytes.into());
            shards[i % 3].push(Tensor { name: p.name.clone(), dtype, shape: p.shape.clone(), bytes });
            map.insert(p.name.clone(), json!(format!("model-{}.safetensors", i % 3)));
        }
        for (i, shard) in shards.into_iter().enumerate() {
            tensors::write(&dir.path().join(format!("model-{i}.safetensors")), shard).unwrap();
        }
        fs::write(dir.path().join(INDEX), json!({ "weight_map": map }).to_string()).unwrap();
        fs::write(dir.path().join(CONFIG), config_json(&config).unwrap()).unwrap();
        assert_eq!(read(dir.path()).unwrap().1.data(), want.data());
        fs::remove_file(dir.path().join("model-1.safetensors")).unwrap();
        assert!(format!("{:#}", read(dir.path()).unwrap_err()).contains("model-1.safetensors"));
    }

    #[test]
    fn faults_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = tiny();
        let params = initialise(&config, 3);
        let fault = |tensors: Vec<Tensor<'_>>| {
            write(dir.path(), &config, tensors, None).unwrap();
            format!("{:#}", read(dir.path()).unwrap_err())
        };
        let mut missing = param_tensors(&params);
        missing.retain(|t| t.name != "layers.3.mla.q.weight");
        assert!(fault(missing).contains("1 missing: layers.3.mla.q.weight [20, 24]"));
        let mut extra = param_tensors(&params);
        extra.push(Tensor::f32("layers.9.more", &[1], &[0.0]));
        assert!(fault(extra).contains("1 not of this model: layers.9.more [1]"));
        let mut wrong = param_tensors(&params);
        let at = wrong.iter().position(|t| t.name == "final_norm.weight").unwrap();
        wrong[at] = Tensor::f32("final_norm.weight", &[2], &[0.0, 1.0]);
        assert!(fault(wrong).contains("final_norm.weight is [2], must be [24]"));

        write(dir.path(), &config, param_tensors(&params), None).unwrap();
        let text = config_json(&config).unwrap();
        for (from, to, message) in [
            ("\"elleci\"", "\"llama\"", "model_type"),
            ("\"d_rope\": 4", "\"d_rope\": 3", "d_rope"),
            ("\"kv_rank\"", "\"kv_rang\"", "kv_rank"),
            ("\"d_v\": 5", "\"d_v\": \"five\"", "d_v"),
            ("{", "[", "JSON"),
        ] {
            fs::write(dir.path().join(CONFIG), text.replacen(from, to, 1)).unwrap();
            let error = format!("{:#}", read(dir.path()).unwrap_err());
            assert!(error.contains(message) && error.contains("config.json"), "{error}");
        }
        fs::remove_file(dir.path().join(CONFIG)).unwrap();
        assert!(format!("{:#}", read(dir.path()).unwrap_err()).contains("config.json"));
    }
}
