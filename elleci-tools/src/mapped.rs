//! Files as memory.

use std::fs::File;
use std::io::{self, Write};
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
        // What is not in the page cache yet is read in blocks of that size, where the file system can. A kernel that knows nothing of
        // it maps the file all the same.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok((map, file))
    };
    open().with_context(|| path.display().to_string())
}

/// What one entry of a page table can map: 2 MiB on x86-64, and on ARM with pages of 4 KiB.
const BLOCK: usize = 2 << 20;

/// Writes a file that will be mapped, in whole blocks from its beginning on. The page cache keeps what is written at once in one piece
/// of memory where it can (seen: ext4 of Linux 6.18), and maps it as such: a core reads a matrix from there a tenth to a third faster than
/// from pages of 4 KiB that lie anywhere, and has fewer page faults (docs/LOG.md).
#[derive(Debug)]
pub struct BlockWriter<W> {
    to: W,
    block: Vec<u8>,
}

impl<W: Write> BlockWriter<W> {
    /// Writes to `to`, which stands at the beginning of the file.
    pub fn new(to: W) -> BlockWriter<W> {
        BlockWriter { to, block: Vec::with_capacity(BLOCK) }
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// What writing says.
    pub fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK {
                self.to.write_all(&self.block)?;
                self.block.clear();
            }
        }
        Ok(())
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// What writing says.
    pub fn finish(mut self) -> io::Result<W> {
        self.to.write_all(&self.block)?;
        Ok(self.to)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers how long each write was.
    #[derive(Default)]
    struct Writes(Vec<u8>, Vec<usize>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.push(bytes.len());
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whole_blocks_whatever_the_pieces() {
        let bytes: Vec<u8> = (0..3 * BLOCK + 7).map(|i| (i % 251) as u8).collect();
        for piece in [1000, BLOCK - 1, BLOCK, BLOCK + 1, bytes.len()] {
            let mut writer = BlockWriter::new(Writes::default());
            bytes.chunks(piece).for_each(|piece| writer.append(piece).unwrap());
            let Writes(written, lengths) = writer.finish().unwrap();
            assert!(written == bytes, "pieces of {piece}");
            assert_eq!(lengths, [BLOCK, BLOCK, BLOCK, 7], "pieces of {piece}");
        }
    }
}
