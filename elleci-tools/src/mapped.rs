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
    let open = || -> std::io::Result<Mmap> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        // SAFETY: the map is only read. Another process that shortens the file while it is mapped would end this one with a
        // bus error, and one that writes to it would change what is read: files of models are replaced by renaming, not
        // written to, by this program and by every other that we know.
        unsafe { Mmap::map(&file) }
    };
    open().with_context(|| path.display().to_string())
}
