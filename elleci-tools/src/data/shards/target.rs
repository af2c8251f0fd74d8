//! The directory that a shard set is to become: what may be replaced there, and how it is removed.
//!
//! Nothing is removed but the files of a shard set: whoever mistypes a path must not lose what lies there.

use super::reader::read_index;
use super::{INDEX_FILE, Split, TOKEN_BYTES_FILE};
use crate::exit::usage;
use anyhow::{Context, Result};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Whether a shard set may be put at `target`: nothing is there, an empty directory, or, with `overwrite`, a shard set and nothing else.
///
/// # Errors
/// Wrong usage: what is there is to stay.
pub fn check(target: &Path, overwrite: bool) -> Result<()> {
    let shown = target.display();
    let Ok(meta) = fs::symlink_metadata(target) else { return Ok(()) };
    if meta.is_symlink() {
        return Err(usage(format!("{shown}: a symbolic link; name the directory that it leads to, or another one")));
    }
    // An empty directory holds nothing to lose; a rename replaces it on every Unix.
    if meta.is_dir() && names(target)?.is_empty() {
        return Ok(());
    }
    if !target.join(INDEX_FILE).is_file() {
        return Err(usage(format!(
            "{shown}: exists and is not a shard set (no {INDEX_FILE}); choose another directory"
        )));
    }
    own_files(target)?;
    if overwrite {
        return Ok(());
    }
    Err(usage(format!("{shown}: a shard set is already there; pass --overwrite to replace it")))
}

/// Removes the shard set `dir`, or what an earlier removal left of it.
///
/// # Errors
/// It holds anything else, or the file system refuses.
pub fn remove(dir: &Path) -> Result<()> {
    let mut files = own_files(dir)?;
    // The index last: without it, what a killed removal leaves would be nobody's.
    files.sort_by_key(|file| file.ends_with(INDEX_FILE));
    for file in files {
        fs::remove_file(&file).with_context(|| format!("{}: cannot remove", file.display()))?;
    }
    fs::remove_dir(dir).with_context(|| format!("{}: cannot remove", dir.display()))
}

/// The files of the shard set `dir`.
///
/// # Errors
/// Wrong usage: `dir` is not surely a shard set, or holds something besides.
pub fn own_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let found = names(dir)?;
    if found.is_empty() {
        return Ok(found);
    }
    let (index, _) = read_index(dir).map_err(|e| {
        usage(format!(
            "{}: not surely a shard set, so it is not replaced; remove it yourself or choose another directory: {e:#}",
            dir.display()
        ))
    })?;
    let shards = [Split::Train, Split::Val].into_iter().flat_map(|split| &index.split(split).shards);
    let named = shards.flat_map(|s| [Some(&s.bin), Some(&s.idx), s.mask.as_ref()]).flatten();
    let own: HashSet<&str> = named.map(|entry| entry.file.as_str()).chain([INDEX_FILE, TOKEN_BYTES_FILE]).collect();
    for path in &found {
        let is_own = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| own.contains(n));
        let is_dir = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
        if !is_own || is_dir {
            return Err(usage(format!(
                "{}: not a file of the shard set {}, which is therefore not replaced; move it away or choose another directory",
                path.display(),
                dir.display()
            )));
        }
    }
    Ok(found)
}

/// What lies in a directory, in order.
fn names(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect() };
    let mut found = list().with_context(|| format!("{}: cannot read the directory", dir.display()))?;
    found.sort();
    Ok(found)
}
