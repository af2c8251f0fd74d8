//! PyTorch's `.pth` and `.pt` files, read without running what is in them.
//!
//! Since torch 1.6 such a file is a zip archive of uncompressed records: `NAME/data.pkl`, a pickle that says which tensors
//! there are, and `NAME/data/KEY`, the bytes of every storage. Older files are pickles followed by storages. Both are read from
//! one slice of bytes, usually a memory map: nothing is allocated on the word of the file beyond a small multiple of the pickle's
//! length, and weights are decoded into the caller's memory, a piece at a time.

mod container;
mod globals;
mod names;
mod pickle;
mod rebuild;
mod view;

use std::ops::Range;

use anyhow::{Context, ensure};

pub use names::{Root, describe_misfit};
pub use view::{Dtype, View};

use container::{Container, Record};
use pickle::Machine;

/// Elements of all tensors together, a byte of the file: at most 4 tensors of float32 may share each storage whole.
/// Without a bound, a file of a few bytes could list views of one element that take days to read.
const MAX_ELEMENTS_PER_BYTE: u64 = 1;
/// A small file's own records outweigh its tensors, whatever they share.
const FREE_ELEMENTS: u64 = 1 << 16;

/// An open file: its tensors, and the bytes they lie in.
pub struct Pth<B> {
    bytes: B,
    container: Container,
    storages: Vec<Range<usize>>,
    tensors: Vec<Tensor>,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The keys that lead to it, joined by dots.
    pub name: String,
    /// Type, shape, and where its elements are.
    pub view: View,
}

impl Tensor {
    /// Sizes, in the type that shapes have elsewhere.
    pub fn shape(&self) -> Vec<usize> {
        self.view.shape().iter().map(|&s| s as usize).collect()
    }
}

/// What checksums said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// Every record has the checksum that stands beside it.
    Match,
    /// The file carries none.
    Absent,
}

impl<B: AsRef<[u8]>> Pth<B> {
    /// Reads what tensors there are. No storage is read.
    ///
    /// # Errors
    /// A file of another kind, truncated or damaged; a pickle that asks for anything but tensors in containers; a tensor
    /// that reaches past its storage.
    pub fn open(bytes: B) -> anyhow::Result<Pth<B>> {
        let all = bytes.as_ref();
        let (container, storages, tensors) = if let Some(reason) = container::other_format(all) {
            anyhow::bail!("{reason}");
        } else if container::is_zip(all) {
            open_zip(all)?
        } else {
            open_legacy(all)?
        };
        let total = tensors.iter().fold(0u64, |n, t| n.saturating_add(t.view.elements()));
        let limit = (all.len() as u64).saturating_mul(MAX_ELEMENTS_PER_BYTE).saturating_add(FREE_ELEMENTS);
        ensure!(
            total <= limit,
            "its tensors have {total} elements in a file of {} bytes: views of the same memory over and over, which are not \
             read; save them with .contiguous()",
            all.len()
        );
        Ok(Pth { container, storages, tensors, bytes })
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// How the file is built, for people.
    pub fn format(&self) -> &'static str {
        if self.container.legacy { "PyTorch pickle (before torch 1.6)" } else { "PyTorch zip" }
    }

    /// Whether numbers are stored most significant byte first.
    pub fn is_big_endian(&self) -> bool {
        self.container.big_endian
    }

    /// Reads elements `start..start + out.len()` of a tensor, in row-major order, as float32. Doubles and integers are rounded.
    ///
    /// # Panics
    /// When the elements are past the end of the tensor, or the tensor is of another file.
    pub fn read(&self, tensor: &Tensor, start: u64, out: &mut [f32]) {
        let storage = &self.bytes.as_ref()[self.storages[tensor.view.storage()].clone()];
        tensor.view.read(storage, self.container.big_endian, start, out);
    }

    /// Whether two tensors are the same elements of the same storage, as tied weights are.
    pub fn same_memory(&self, a: &Tensor, b: &Tensor) -> bool {
        a.view == b.view
    }

    /// Compares every record with its checksum. `progress` is told how many bytes are done, and ends it with an error.
    ///
    /// # Errors
    /// The first record that differs; whatever `progress` returns.
    pub fn verify(&self, progress: &mut dyn FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<Checksums> {
        // torch.serialization.set_crc32_options(False) writes zeros throughout.
        if self.container.records.iter().all(|r| r.crc == 0) {
            return Ok(Checksums::Absent);
        }
        for record in &self.container.records {
            let mut hash = crc32fast::Hasher::new();
            for piece in self.bytes.as_ref()[record.range.clone()].chunks(1 << 20) {
                hash.update(piece);
                progress(piece.len() as u64)?;
            }
            ensure!(
                hash.finalize() == record.crc,
                "damaged: record {} does not have the checksum that the file gives it",
                record.name
            );
        }
        Ok(Checksums::Match)
    }

    /// Bytes that [`verify`](Pth::verify) reads.
    pub fn record_bytes(&self) -> u64 {
        self.container.records.iter().map(|r| r.range.len() as u64).sum()
    }
}

type Opened = (Container, Vec<Range<usize>>, Vec<Tensor>);

fn open_zip(all: &[u8]) -> anyhow::Result<Opened> {
    let container = Container::zip(all)?;
    let pickle: &Record = container.pickle()?;
    let mut machine = Machine::new(&all[pickle.range.clone()]);
    let root = machine.run().with_context(|| pickle.name.clone())?;
    let tensors = names::flatten(&machine, &root)?;
    let places = container.storages();
    let find = |storage: &view::Storage| {
        let range = places.get(storage.key.as_str());
        let range = range.with_context(|| format!("storage `{}` is missing", storage.key))?.clone();
        ensure!(
            range.len() as u64 >= storage.bytes,
            "storage `{}` has {} bytes where the pickle says {}",
            storage.key,
            range.len(),
            storage.bytes
        );
        Ok(range)
    };
    let storages = machine.storages().iter().map(find).collect::<anyhow::Result<_>>()?;
    drop(places);
    Ok((container, storages, tensors))
}

fn open_legacy(all: &[u8]) -> anyhow::Result<Opened> {
    let mut machine = Machine::new(all);
    let root = container::legacy_pickles(&mut machine)?;
    let tensors = names::flatten(&machine, &root)?;
    let storages = container::legacy_storages(&mut machine, all)?;
    Ok((Container { legacy: true, big_endian: false, records: Vec::new(), base: String::new() }, storages, tensors))
}

#[cfg(test)]
mod tests;
