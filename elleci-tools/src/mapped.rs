//! Files as memory.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use memmap2::Mmap;

/// Maps a file into memory, to be read.
///
/// # Errors
/// A file that is missing, no file, or cannot be mapped.
pub fn map(path: &Path) -> anyhow::Result<Mmap> {
    open(path).map(|(map, _)| map)
}

/// As [`map`], with the file itself.
///
/// # Errors
/// As [`map`].
pub fn open(path: &Path) -> anyhow::Result<(Mmap, File)> {
    let open = || -> std::io::Result<(Mmap, File)> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        // SAFETY: the map is only read. Another process that shortens the file while it is mapped would end this one with a
        // bus error, and one that writes to it would change what is read: files of models are replaced by renaming, not
        // written to, by this program and by every other that we know.
        let map = unsafe { Mmap::map(&file) }?;
        Ok((map, file))
    };
    open().with_context(|| path.display().to_string())
}

/// Fills `to` with a file's bytes from `offset` on; `false` if it cannot.
pub fn read_at(file: &File, offset: usize, to: &mut [u8]) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, to, offset as u64).is_ok();
    #[cfg(not(unix))]
    return {
        _ = (file, offset, to);
        false
    };
}
