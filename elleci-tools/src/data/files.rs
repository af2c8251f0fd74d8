//! Small helpers for files that are whole or not there.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The directory that a path lies in.
pub fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Makes the names in a directory durable (a no-op where directories cannot be opened).
///
/// # Errors
/// The file system refuses.
pub fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("{}: cannot sync", dir.display()))?;
    }
    Ok(())
}

/// Writes a file under a temporary name, syncs it and renames it; creates the directory.
///
/// # Errors
/// The file system refuses; the old file is then untouched.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = parent_of(path);
    fs::create_dir_all(&parent).with_context(|| format!("{}: cannot create", parent.display()))?;
    let name = path.file_name().with_context(|| format!("{}: not a file name", path.display()))?;
    let temporary = parent.join(format!(".{}.partial", name.to_string_lossy()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    let written = write();
    if written.is_err() {
        // Best effort: the error below is what matters.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("{}: cannot write", path.display()))?;
    sync_dir(&parent)
}
