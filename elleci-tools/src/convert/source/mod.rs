//! Where models come from: every form, told by what is there, behind one struct.

mod archive;
mod checkpoint;
mod pth;
mod tensor_files;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use elleci_core::config::{ModelConfig, PRESETS};
use elleci_core::params::ParamLayout;
use serde_json::Value;

use super::cli::{CompareArgs, ConvertArgs, InspectArgs, Weights};
use super::job::Job;
use crate::checkpoint::{CHECKPOINTS, STATE_FILE};
use crate::data::tokenizer::Tokenizer;
use crate::exit::usage;
use crate::hf;
use crate::mapped;
use crate::train::layers::{self, Layer};

/// One tensor of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name in Elleci's files.
    pub name: String,
    /// Its name in this file, where that is another.
    pub stored_as: Option<String>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Type of its elements, or its packing.
    pub format: String,
    /// Bytes that it takes in the file.
    pub bytes: u64,
    /// The scale of a packed ternary tensor.
    pub gamma: Option<f32>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors that are read one at a time.
pub trait Tensors: Send + Sync {
    /// All, in the order of the file.
    fn list(&self) -> &[TensorInfo];

    /// Reads the values of a tensor; γ·W₃ for a packed ternary one.
    ///
    /// # Errors
    /// A type that cannot be read, a damaged file, or whatever the file system reports.
    ///
    /// # Panics
    /// When `values` does not have the tensor's size.
    fn read(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()>;

    /// Reads values whose quantisation is what the file holds: the same as [`read`](Tensors::read), but for packed ternary
    /// tensors, as γ·W₃ has another mean than γ.
    ///
    /// # Errors
    /// As [`read`](Tensors::read).
    fn read_latent(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()> {
        self.read(index, values)
    }
}

/// The forms that models come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A training checkpoint.
    Checkpoint,
    /// A Hugging Face folder.
    Folder,
    /// A safetensors file alone.
    Safetensors,
    /// A PyTorch file.
    Pth,
    /// A deployment archive.
    Archive,
}

impl Form {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Form::Checkpoint => "training checkpoint",
            Form::Folder => "Hugging Face folder",
            Form::Safetensors => "safetensors file",
            Form::Pth => "PyTorch file",
            Form::Archive => "deployment archive",
        }
    }
}

/// What a command line adds to what a source says itself.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A preset, or a file with sizes.
    pub config: Option<String>,
    /// A tokenizer.
    pub tokenizer: Option<PathBuf>,
    /// Which weights.
    pub weights: Weights,
}

impl From<&ConvertArgs> for Options {
    fn from(args: &ConvertArgs) -> Options {
        Options { config: args.config.clone(), tokenizer: args.tokenizer.clone(), weights: args.weights }
    }
}

impl From<&InspectArgs> for Options {
    fn from(args: &InspectArgs) -> Options {
        Options { config: args.config.clone(), tokenizer: None, weights: args.weights }
    }
}

impl From<&CompareArgs> for Options {
    fn from(args: &CompareArgs) -> Options {
        Options { config: args.config.clone(), tokenizer: args.tokenizer.clone(), weights: args.weights }
    }
}

/// An open source.
pub struct Source {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub form: Form,
    /// More about it, by name.
    pub facts: Vec<(&'static str, Value)>,
    /// Sizes of the model; `None` where nobody knows them.
    pub config: Option<ModelConfig>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// SHA-256 of the `tokenizer.json` that the model was trained with, where the source says it.
    pub tokenizer_sha256: Option<String>,
    /// The tensors.
    pub tensors: Box<dyn Tensors>,
    /// Whether the weights are a running mean.
    pub averaged: bool,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Why it cannot be used as it is; empty = sound.
    pub problems: Vec<String>,
}

/// A sound source's sizes, and which of its tensors is which parameter.
pub struct SourceModel {
    /// Sizes.
    pub config: ModelConfig,
    /// Parameters.
    pub layout: Arc<ParamLayout>,
    /// For every parameter, the index of its tensor.
    pub index: Vec<usize>,
}

impl Source {
    /// Opens whatever is at `path`.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] where nothing is, or nothing that is known; anything so damaged that its tensors cannot be told.
    /// What is wrong with a source whose tensors can be listed goes to [`Source::problems`].
    pub fn open(path: &Path, options: &Options, job: &Job) -> anyhow::Result<Source> {
        let mut source = if path.is_dir() {
            open_dir(path, options)?
        } else if path.is_file() {
            open_file(path, options, job)?
        } else {
            return Err(usage(format!("{}: {}", path.display(), unusable(path))));
        };
        if options.weights == Weights::Swa && !source.averaged {
            let form = source.form.name();
            return Err(usage(format!("--weights swa: {} is a {form} with one set of weights", path.display())));
        }
        if let Some(given) = &options.config {
            let given = named_config(given)?;
            if source.config.as_ref().is_some_and(|own| *own != given) {
                return Err(usage(format!("--config: {} says its own sizes, and they are others", path.display())));
            }
            source.config = Some(given);
        }
        if let Some(tokenizer) = &options.tokenizer {
            let json = fs::read(tokenizer).map_err(|e| usage(format!("--tokenizer {}: {e}", tokenizer.display())))?;
            if let Some(hash) = source.tokenizer_sha256.as_ref().filter(|hash| !checkpoint::has_hash(&json, hash)) {
                return Err(usage(format!(
                    "--tokenizer {}: {} was trained with another tokenizer (SHA-256 {hash}); give that one",
                    tokenizer.display(),
                    path.display()
                )));
            }
            source.tokenizer = Some(json);
        }
        source.check();
        Ok(source)
    }

    /// Holds tensors and tokenizer against the configuration.
    fn check(&mut self) {
        let found: BTreeMap<&str, &[usize]> =
            self.tensors.list().iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
        if let Some(config) = &self.config {
            let layout = ParamLayout::new(config);
            let expected = layout.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
            if let Err(e) = hf::check_tensors(expected, &found) {
                self.problems.push(format!("{e:#}"));
            }
            match self.tokenizer.as_ref().map(|json| tokens_that_fit(json, config)) {
                Some(Err(e)) => self.problems.push(format!("{e:#}")),
                Some(Ok(tokens))
                    if self.tokenizer_sha256.is_none() && config.vocab_size.saturating_sub(tokens) >= PADDING =>
                {
                    self.notes.push(format!(
                        "the tokenizer has {tokens} tokens and the model {}: if it is another model's, give --tokenizer the \
                         right one",
                        config.vocab_size
                    ));
                }
                _ => {}
            }
        } else if self.problems.is_empty() {
            self.problems.push(format!(
                "it does not say the sizes of its model, and no preset has them; give --config ({}, a config.json, or the \
                 config.toml of a run)",
                PRESETS.join(", ")
            ));
        }
    }

    /// A line about it.
    pub fn title(&self) -> String {
        let facts: String = self.facts.iter().map(|(name, value)| format!(", {name} {}", plain(value))).collect();
        format!("{}{facts}{}", self.form.name(), if self.averaged { ", running mean of the weights" } else { "" })
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// All problems.
    pub fn must_be_sound(&self) -> anyhow::Result<()> {
        ensure!(self.problems.is_empty(), "{}: {}", self.path.display(), printable(&self.problems.join("; ")));
        Ok(())
    }

    /// What is lost when the values are written as floats.
    pub fn lossy_note(&self) -> Option<String> {
        (self.form == Form::Archive).then(|| {
            "ternary projections are γ·W₃, the values that the archive computes with, and embedding, head and mamba.bcdt are as \
             its --dense has rounded them; the trained float weights are not in it. Quantised again, the projections' scale comes out as γ times the share of weights that are not 0: train or pack from \
             a checkpoint instead"
                .to_string()
        })
    }

    /// Sizes and parameters of a source that is sound.
    ///
    /// # Errors
    /// When it is not.
    pub fn model(&self) -> anyhow::Result<SourceModel> {
        self.must_be_sound()?;
        let config = self.config.clone().context("a model without sizes")?;
        let layout = ParamLayout::new(&config);
        let by_name: BTreeMap<&str, usize> =
            self.tensors.list().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let place = |name: &str| by_name.get(name).copied().with_context(|| format!("no tensor `{name}`"));
        let index = layout.params().iter().map(|p| place(&p.name)).collect::<anyhow::Result<_>>()?;
        Ok(SourceModel { config, layout, index })
    }
}

/// Text from a file for a terminal, which would obey its control characters.
pub fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// A fact without the quotes of JSON.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Why a path is neither a directory nor a file.
fn unusable(path: &Path) -> String {
    match path.metadata() {
        Ok(_) => "a device or a pipe; models are read from files and directories".into(),
        Err(e) if e.kind() == ErrorKind::NotFound => "there is no such file or directory".into(),
        Err(e) => e.to_string(),
    }
}

fn open_dir(path: &Path, options: &Options) -> anyhow::Result<Source> {
    fs::read_dir(path).with_context(|| format!("listing {}", path.display()))?;
    if path.join(STATE_FILE).is_file() {
        checkpoint::open(path, options.weights)
    } else if path.join(CHECKPOINTS).is_dir() {
        checkpoint::open_newest(path, options.weights)
    } else if hf::is_folder(path) {
        tensor_files::open_folder(path, options)
    } else {
        Err(usage(format!(
            "{}: neither a training checkpoint ({STATE_FILE}), nor a run ({CHECKPOINTS}/), nor a Hugging Face folder \
             (config.json, model.safetensors)",
            path.display()
        )))
    }
}

fn open_file(path: &Path, options: &Options, job: &Job) -> anyhow::Result<Source> {
    let map = mapped::map(path)?;
    match &*extension(path) {
        "elleci" => archive::open(path, map),
        "safetensors" => tensor_files::open_file(path, options),
        _ if archive::is_archive(&map) => archive::open(path, map),
        _ => pth::open(path, map, options, job),
    }
}

/// What a file name ends in, in lower case: some systems do not tell `.ELLECI` from `.elleci`.
pub fn extension(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

/// The bytes of a file; `None` only where there is none.
///
/// # Errors
/// A file that is there and cannot be read.
pub fn read_if_there(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// The sizes that `--config` names.
fn named_config(given: &str) -> anyhow::Result<ModelConfig> {
    if PRESETS.contains(&given) {
        return Ok(ModelConfig::preset(given)?);
    }
    let path = Path::new(given);
    if !path.is_file() {
        return Err(usage(format!("--config {given}: neither a file nor a preset ({})", PRESETS.join(", "))));
    }
    let config = match path.extension().is_some_and(|e| e == "toml") {
        true => layers::load(None, &[Layer::file(path)?])?.model,
        false => hf::read_config_file(path).context("--config")?,
    };
    Ok(config)
}

/// Vocabularies are padded to a multiple of this at most.
const PADDING: usize = 256;

/// The number of a tokenizer's tokens, if it is one and they fit the embedding.
fn tokens_that_fit(json: &[u8], config: &ModelConfig) -> anyhow::Result<usize> {
    let tokenizer = Tokenizer::from_json(json.to_vec(), None)
        .context("the tokenizer is unusable (--tokenizer gives another in its place)")?;
    let tokens = tokenizer.vocab_size();
    if tokens > config.vocab_size {
        bail!(
            "the tokenizer does not match the model: it has {tokens} tokens and the model's `vocab_size` is {}; give \
             --tokenizer the one that the model was trained with",
            config.vocab_size
        );
    }
    Ok(tokens)
}

/// The tokenizer that lies in a directory, unless the command line gives another. One that is there and cannot be read is a problem, and
/// not the same as none.
fn tokenizer_in(dir: &Path, options: &Options, problems: &mut Vec<String>) -> Option<Vec<u8>> {
    if options.tokenizer.is_some() {
        return None;
    }
    read_if_there(&dir.join(hf::TOKENIZER)).unwrap_or_else(|e| {
        problems.push(format!("{e:#}; mend it, or give --tokenizer another in its place"));
        None
    })
}
