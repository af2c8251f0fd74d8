//! Training checkpoints: a directory that is written whole or not at all, and found again only when it is sound.
//!
//! `step-00001000/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and, while weights are being
//! averaged, `swa.safetensors`. Everything is written under a temporary name and synced to the disk, then the
//! directory is renamed: whatever moment the process dies at, each `step-*` is complete. `state.json` carries the
//! hash of every other file and of itself, so that later damage is found before it is trained on.

mod state;
pub mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::data::files::sync_dir;
pub use crate::data::files::write_atomic;
pub use state::{FORMAT, RngState, State, TokenizerId};
use tensors::{HashedFile, Tensor, TensorFile, digest};

/// The file of a checkpoint that holds everything but tensors.
pub const STATE_FILE: &str = "state.json";
/// The folder of a run that holds its checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// The checkpoints of a run.
pub struct Store {
    dir: PathBuf,
}

/// A checkpoint that has been found sound.
pub struct Checkpoint {
    /// Its directory.
    pub dir: PathBuf,
    /// Its `state.json`.
    pub state: State,
}

impl Store {
    /// The checkpoints under `dir`, which is created. What a killed process left half-written is removed.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn open(dir: &Path) -> anyhow::Result<Store> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if is_temporary(&path) {
                fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
            }
        }
        Ok(Store { dir: dir.to_path_buf() })
    }

    /// Step numbers and directories, oldest first, sound or not.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn list(dir: &Path) -> anyhow::Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        if dir.is_dir() {
            for entry in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
                let path = entry?.path();
                let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
                if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                    found.push((step, path));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Step and directory of the newest checkpoint, sound or not; `None` too where that cannot be found out.
    pub fn newest(&self) -> Option<(u64, PathBuf)> {
        Store::list(&self.dir).ok()?.pop()
    }

    /// The newest sound checkpoint under `dir`, for a run that goes on from it; every damaged one that is passed over goes to
    /// `report`.
    ///
    /// # Errors
    /// As [`Store::latest_or`].
    pub fn latest(dir: &Path, report: impl FnMut(String)) -> anyhow::Result<Option<Checkpoint>> {
        Store::latest_or(dir, "--resume never with another --out starts afresh", report)
    }

    /// As [`Store::latest`]; `remedy` is what the user may do where none is sound.
    ///
    /// # Errors
    /// When the directory cannot be listed, or when there are checkpoints but none is sound.
    pub fn latest_or(dir: &Path, remedy: &str, mut report: impl FnMut(String)) -> anyhow::Result<Option<Checkpoint>> {
        let found = Store::list(dir)?;
        for (_, path) in found.iter().rev() {
            match Checkpoint::open(path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(e) => report(format!("checkpoint {} is damaged and passed over: {e:#}", path.display())),
            }
        }
        ensure!(found.is_empty(), "none of the {} checkpoints in {} is sound; {remedy}", found.len(), dir.display());
        Ok(None)
    }

    /// Writes a checkpoint: whole, or not at all. Fills in `state.files`.
    ///
    /// # Errors
    /// Whatever the file system reports. The temporary files are gone then, and older checkpoints untouched.
    pub fn save(&self, state: &mut State, groups: Vec<(&str, Vec<Tensor<'_>>)>) -> anyhow::Result<PathBuf> {
        let name = format!("step-{:08}", state.step);
        let temporary = self.dir.join(format!(".{name}.tmp"));
        let target = self.dir.join(&name);
        let result = write_all(&temporary, state, groups).and_then(|()| publish(&temporary, &target));
        if result.is_err() {
            // The first error is the one to report; an orphan is removed at the next start.
            let _ = fs::remove_dir_all(&temporary);
        }
        result.with_context(|| {
            format!("checkpoint of step {} not saved to {}; earlier ones are untouched", state.step, self.dir.display())
        })?;
        Ok(target)
    }

    /// Removes all but the newest `keep` checkpoints; 0 keeps all.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn prune(&self, keep: usize) -> anyhow::Result<()> {
        let found = Store::list(&self.dir)?;
        let surplus = if keep == 0 { 0 } else { found.len().saturating_sub(keep) };
        for (_, path) in &found[..surplus] {
            remove(path)?;
        }
        Ok(())
    }
}

impl Checkpoint {
    /// Opens a checkpoint and checks all of it.
    ///
    /// # Errors
    /// What is missing or damaged.
    pub fn open(dir: &Path) -> anyhow::Result<Checkpoint> {
        let path = dir.join(STATE_FILE);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let state = State::from_json(&text).with_context(|| format!("{}", path.display()))?;
        for (name, expected) in &state.files {
            let found = digest(&dir.join(name))?;
            ensure!(
                found == *expected,
                "{} is damaged: {} bytes, BLAKE3 {}; {STATE_FILE} says {} bytes, {}",
                dir.join(name).display(),
                found.bytes,
                found.blake3,
                expected.bytes,
                expected.blake3
            );
        }
        Ok(Checkpoint { dir: dir.to_path_buf(), state })
    }

    /// One of its tensor files.
    ///
    /// # Errors
    /// When the checkpoint has no such file, or it cannot be opened.
    pub fn tensors(&self, file: &str) -> anyhow::Result<TensorFile> {
        ensure!(self.state.files.contains_key(file), "{} has no {file}", self.dir.display());
        TensorFile::open(&self.dir.join(file))
    }
}

fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.starts_with(".step-") && name.ends_with(".tmp")
}

fn write_all(dir: &Path, state: &mut State, groups: Vec<(&str, Vec<Tensor<'_>>)>) -> anyhow::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir(dir).with_context(|| format!("creating {}", dir.display()))?;
    let mut files = BTreeMap::new();
    for (name, tensors) in groups {
        files.insert(name.to_string(), tensors::write(&dir.join(name), tensors)?);
    }
    state.files = files;
    let path = dir.join(STATE_FILE);
    let mut file = HashedFile::create(&path)?;
    file.write_all(state.to_json()?.as_bytes())
        .and_then(|()| file.finish())
        .with_context(|| format!("writing {}", path.display()))?;
    sync_dir(dir)
}

/// Renames `temporary` to `target`, and makes the new name durable.
fn publish(temporary: &Path, target: &Path) -> anyhow::Result<()> {
    if target.exists() {
        // Only a damaged checkpoint is ever reached again; the new one replaces it.
        remove(target)?;
    }
    fs::rename(temporary, target).with_context(|| format!("renaming {}", temporary.display()))?;
    match target.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Removes a checkpoint so that no half of it can be taken for a whole: it loses its name first.
fn remove(path: &Path) -> anyhow::Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let doomed = path.with_file_name(format!(".{name}.old.tmp"));
    fs::rename(path, &doomed)
        .and_then(|()| fs::remove_dir_all(&doomed))
        .with_context(|| format!("removing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tensors::Tensor;

    fn tensors(value: &[f32]) -> Vec<Tensor<'_>> {
        vec![Tensor::f32("w", &[value.len()], value)]
    }

    fn save(store: &Store, step: u64) -> PathBuf {
        let value = [step as f32, 0.5];
        let mut state = State::sample(step);
        store
            .save(&mut state, vec![("model.safetensors", tensors(&value)), ("optimizer.safetensors", tensors(&value))])
            .unwrap()
    }

    #[test]
    fn the_newest_is_found_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(Store::latest(dir.path(), |m| panic!("{m}")).unwrap().is_none());
        for step in [9, 10, 100] {
            save(&store, step);
        }
        let newest = Store::latest(dir.path(), |m| panic!("{m}")).unwrap().unwrap();
        assert_eq!(newest.state.step, 100);
        let mut state = newest.state.clone();
        state.files.clear();
        assert_eq!(state, State::sample(100));
        let mut w = [0.0; 2];
        newest.tensors("model.safetensors").unwrap().read_floats("w", &[2], &mut w).unwrap();
        assert_eq!(w, [100.0, 0.5]);
        store.prune(2).unwrap();
        let steps: Vec<u64> = Store::list(dir.path()).unwrap().into_iter().map(|(s, _)| s).collect();
        assert_eq!(steps, [10, 100]);
    }

    /// Any flipped byte of any file, and any missing file, makes the checkpoint before it the latest.
    #[test]
    fn damage_is_reported_and_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        save(&store, 1);
        let newest = save(&store, 2);
        for name in ["model.safetensors", "optimizer.safetensors", STATE_FILE] {
            let path = newest.join(name);
            let whole = fs::read(&path).unwrap();
            for at in [0, whole.len() / 2, whole.len() - 1] {
                let mut flipped = whole.clone();
                flipped[at] ^= 1;
                fs::write(&path, &flipped).unwrap();
                let mut reports = Vec::new();
                let found = Store::latest(dir.path(), |m| reports.push(m)).unwrap().unwrap();
                assert_eq!((found.state.step, reports.len()), (1, 1), "{name} {at}");
                assert!(reports[0].contains("step-00000002"), "{}", reports[0]);
            }
            fs::remove_file(&path).unwrap();
            assert_eq!(Store::latest(dir.path(), |_| ()).unwrap().unwrap().state.step, 1, "{name} missing");
            fs::write(&path, &whole).unwrap();
        }
        assert_eq!(Store::latest(dir.path(), |m| panic!("{m}")).unwrap().unwrap().state.step, 2);
        // A damaged one is replaced when its step is reached again.
        fs::write(newest.join(STATE_FILE), "{}").unwrap();
        save(&store, 2);
        assert_eq!(Store::latest(dir.path(), |m| panic!("{m}")).unwrap().unwrap().state.step, 2);
    }

    #[test]
    fn none_sound_is_an_error_not_a_fresh_start() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::remove_file(save(&store, 3).join("model.safetensors")).unwrap();
        assert!(Store::latest(dir.path(), |_| ()).is_err());
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_harms_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        save(&store, 1);
        let failing = Tensor {
            bytes: tensors::Bytes::Later(Box::new(
                || Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into()),
            )),
            ..Tensor::f32("w", &[1], &[])
        };
        let error = store.save(&mut State::sample(2), vec![("model.safetensors", vec![failing])]).unwrap_err();
        assert!(format!("{error:#}").contains("step 2 not saved"), "{error:#}");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["step-00000001"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".step-00000007.tmp")).unwrap();
        fs::write(dir.path().join(".step-00000007.tmp/model.safetensors"), "half").unwrap();
        Store::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
