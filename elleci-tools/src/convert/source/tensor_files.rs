//! Safetensors: Hugging Face folders, and files alone.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{bail, ensure};
use safetensors::Dtype;

use super::{Form, Options, Source, TensorInfo, Tensors, tokenizer_in};
use crate::checkpoint::tensors::TensorFile;
use crate::hf;

/// Tensors of one or more safetensors files.
pub struct TensorFiles {
    files: Vec<TensorFile>,
    list: Vec<TensorInfo>,
    place: Vec<usize>,
}

impl TensorFiles {
    /// All tensors of all files.
    ///
    /// # Errors
    /// A name that comes twice.
    pub fn new(files: Vec<TensorFile>) -> anyhow::Result<TensorFiles> {
        let (mut list, mut place, mut first) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (index, file) in files.iter().enumerate() {
            for (name, entry) in file.entries() {
                if let Some(other) = first.insert(name.clone(), index) {
                    let (a, b): (&TensorFile, _) = (&files[other], file);
                    bail!("tensor `{name}` is both in {} and in {}", a.path().display(), b.path().display());
                }
                place.push(index);
                list.push(TensorInfo {
                    name: name.clone(),
                    stored_as: None,
                    shape: entry.shape.clone(),
                    format: entry.dtype.to_string(),
                    bytes: entry.range.end - entry.range.start,
                    gamma: None,
                });
            }
        }
        Ok(TensorFiles { files, list, place })
    }

    /// Tensors whose type is no float that can be read.
    fn unreadable(&self) -> Vec<String> {
        let floats = [Dtype::F32, Dtype::F16, Dtype::BF16].map(|d| d.to_string());
        let odd = self.list.iter().filter(|t| !floats.contains(&t.format));
        odd.map(|t| format!("`{}` has type {}; f32, f16 and bf16 can be read", t.name, t.format)).collect()
    }
}

impl Tensors for TensorFiles {
    fn list(&self) -> &[TensorInfo] {
        &self.list
    }

    fn read(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()> {
        let info = &self.list[index];
        ensure!(values.len() == info.elements(), "room for another tensor than `{}`", info.name);
        self.files[self.place[index]].read_floats(&info.name, &info.shape, values)
    }
}

/// A Hugging Face folder.
pub fn open_folder(dir: &Path, options: &Options) -> anyhow::Result<Source> {
    let files = hf::weight_files(dir)?;
    let shards = files.len();
    from_files((dir, dir), Form::Folder, files, vec![("shards", shards.into())], options)
}

/// A safetensors file; configuration and tokenizer may stand beside it.
pub fn open_file(path: &Path, options: &Options) -> anyhow::Result<Source> {
    let dir = path.parent().unwrap_or(Path::new("."));
    from_files((path, dir), Form::Safetensors, vec![TensorFile::open(path)?], Vec::new(), options)
}

fn from_files(
    (path, dir): (&Path, &Path),
    form: Form,
    files: Vec<TensorFile>,
    facts: Vec<(&'static str, serde_json::Value)>,
    options: &Options,
) -> anyhow::Result<Source> {
    let tensors = TensorFiles::new(files)?;
    let mut problems = tensors.unreadable();
    let config = if form == Form::Folder || hf::has_config(dir) {
        hf::read_config(dir).map_err(|e| problems.push(format!("{e:#}"))).ok()
    } else {
        None
    };
    let tokenizer = tokenizer_in(dir, options, &mut problems);
    Ok(Source {
        path: path.to_path_buf(),
        form,
        facts,
        config,
        tokenizer,
        tokenizer_sha256: None,
        tensors: Box::new(tensors),
        averaged: false,
        notes: Vec::new(),
        problems,
    })
}
