//! Training checkpoints.

use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::super::cli::Weights;
use super::tensor_files::TensorFiles;
use super::{Form, Source, read_if_there};
use crate::checkpoint::{CHECKPOINTS, Checkpoint, State, Store};
use crate::exit::usage;
use crate::train::backend::Group;

/// The newest sound checkpoint of a run.
pub fn open_newest(run: &Path, weights: Weights) -> anyhow::Result<Source> {
    let remedy = "copy the run again, or name a folder with weights, as its final/";
    let found = Store::latest_or(&run.join(CHECKPOINTS), remedy, |message| crate::exit::errln!("warning: {message}"))?;
    let checkpoint = found.with_context(|| format!("{} holds no checkpoint yet", run.display()))?;
    from_checkpoint(checkpoint, weights)
}

/// One checkpoint. All its files have the hashes that it gives them, or it is refused.
pub fn open(dir: &Path, weights: Weights) -> anyhow::Result<Source> {
    from_checkpoint(Checkpoint::open(dir)?, weights)
}

fn from_checkpoint(checkpoint: Checkpoint, weights: Weights) -> anyhow::Result<Source> {
    let (dir, state) = (&checkpoint.dir, &checkpoint.state);
    let group = match weights {
        Weights::Last => Group::Weights,
        Weights::Swa => Group::Average,
    };
    if !state.files.contains_key(group.file()) {
        return Err(usage(format!(
            "--weights swa: {} has no {}; the running mean begins late in a run, take --weights last",
            dir.display(),
            group.file()
        )));
    }
    let tensors = TensorFiles::new(vec![checkpoint.tensors(group.file())?])?;
    let mut unreadable = String::new();
    let tokenizer = tokenizer(dir, state, &mut unreadable);
    let mut notes = Vec::new();
    if tokenizer.is_none() {
        let hash = &state.tokenizer.hash;
        notes.push(format!(
            "the tokenizer of this run (SHA-256 {hash:.12}…) was not found{unreadable}; give --tokenizer"
        ));
    }
    Ok(Source {
        path: dir.clone(),
        form: Form::Checkpoint,
        facts: vec![
            ("step", state.step.into()),
            ("tokens", state.tokens.into()),
            ("tokenizer_sha256", state.tokenizer.hash.clone().into()),
        ],
        config: Some(state.config.model.clone()),
        tokenizer,
        tokenizer_sha256: Some(state.tokenizer.hash.clone()),
        tensors: Box::new(tensors),
        averaged: weights == Weights::Swa,
        notes,
        problems: Vec::new(),
    })
}

/// The tokenizer that has the hash of the run's, from wherever the run may have left it. Files that are there and cannot be read are
/// added to `unreadable`.
fn tokenizer(dir: &Path, state: &State, unreadable: &mut String) -> Option<Vec<u8>> {
    let run = dir.canonicalize().ok()?.parent()?.parent()?.to_path_buf();
    let data = &state.config.data;
    let places: [PathBuf; 5] = [
        data.tokenizer.clone(),
        data.dir.join("tokenizer.json"),
        run.join("final/tokenizer.json"),
        run.join("data/tokenizer.json"),
        dir.join("tokenizer.json"),
    ];
    let sources = data.sources.values().flat_map(|set| {
        let near = [Some(set.as_path()), set.parent()];
        near.map(|d| d.unwrap_or(Path::new("")).join("tokenizer.json"))
    });
    let candidates = places.into_iter().chain(sources);
    let mut read = |path: PathBuf| {
        read_if_there(&path).unwrap_or_else(|e| {
            unreadable.push_str(&format!(", {e:#}"));
            None
        })
    };
    candidates
        .filter(|path| path.file_name().is_some())
        .filter_map(&mut read)
        .find(|json| has_hash(json, &state.tokenizer.hash))
}

/// Whether a file has a SHA-256.
pub fn has_hash(bytes: &[u8], hash: &str) -> bool {
    let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    digest == hash
}
