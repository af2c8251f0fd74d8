//! The deployment archive (`.elleci`): a model in one block of bytes that is used where it lies (SPEC §3.2).
//!
//! ```text
//! 0      prelude, 64 bytes: magic, format version, sizes, checksums
//! 64     header: an rkyv structure (configuration, tensor table, tokenizer), padded with zeros to a multiple of 64
//! ..     one section a tensor, in the order of the layout, each a multiple of 64 bytes
//! ```
//!
//! `docs/archive.md` is the byte-level specification. [`Archive::open`] borrows or owns the bytes (`&[u8]`, a memory map, ..), checks
//! them and copies no weight. Every byte is under a checksum: a section's is verified on opening, except that of an embedding
//! table that only serves look-ups, whose rows are verified one by one when they are looked up, so that opening does not read
//! what a session never needs. Offsets beside the header are 64-bit; rkyv's own are 32-bit and stay inside of the header.

mod aligned;
mod dense;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod dense_avx2;
#[cfg(all(feature = "std", target_arch = "x86_64"))]
mod dense_avx512;
mod error;
mod int8;
mod schema;
mod writer;

#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use rkyv::rancor::Failure;

use crate::config::ModelConfig;
use crate::par;
use crate::params::{Id, Param, ParamKind, ParamLayout};
use crate::ternary::packed::{Line, PackedTernary, Packing};

pub use aligned::{AlignedBytes, StaticBytes};
pub use dense::{DenseFormat, DenseMatrix};
pub use error::ArchiveError;
use schema::{ArchivedHeader, PRELUDE_BYTES, Prelude};
pub use writer::{ArchiveWriter, PackOptions, to_bytes};

/// Alignment of the bytes in memory and of every section.
pub const ALIGNMENT: usize = 64;
/// The format version that this library reads and writes.
pub const VERSION: u32 = 1;

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// A ternary projection: packed codes, and γ in the tensor table.
    Ternary(Packing),
    /// A full-precision matrix or table `[rows, cols]`.
    Dense(DenseFormat),
    /// Norm gains, convolution taps, biases and scalars: float32.
    Floats,
}

impl Format {
    /// The name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Format::Ternary(packing) => packing.name(),
            Format::Dense(format) => format.name(),
            Format::Floats => "f32",
        }
    }

    fn code(self) -> u8 {
        match self {
            Format::Floats => 0,
            Format::Ternary(Packing::I2) => 1,
            Format::Ternary(Packing::T5) => 2,
            Format::Ternary(Packing::C5) => 3,
            Format::Dense(DenseFormat::F32) => 16,
            Format::Dense(DenseFormat::F16) => 17,
            Format::Dense(DenseFormat::Bf16) => 18,
            Format::Dense(DenseFormat::Int8) => 19,
        }
    }

    fn from_code(code: u8) -> Option<Format> {
        let all = Packing::ALL.map(Format::Ternary).into_iter();
        let all = all.chain(DenseFormat::ALL.map(Format::Dense)).chain([Format::Floats]);
        all.into_iter().find(|f| f.code() == code)
    }

    /// Whether a parameter of this kind may be stored so.
    fn suits(self, kind: ParamKind) -> bool {
        match self {
            Format::Ternary(_) => kind == ParamKind::Ternary,
            Format::Dense(_) => matches!(kind, ParamKind::Matrix | ParamKind::Embedding),
            Format::Floats => !matches!(kind, ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding),
        }
    }

    /// Bytes of the section, padding included; `None` when they do not fit an address. `hashed_rows` adds a checksum a row.
    fn bytes(self, shape: &[usize], hashed_rows: bool) -> Option<usize> {
        let (rows, cols) = (*shape.first()?, shape.iter().skip(1).try_fold(1usize, |n, d| n.checked_mul(*d))?);
        let data = match self {
            Format::Ternary(packing) => packing.bytes(rows, cols)?,
            Format::Dense(format) => format.bytes(rows, cols)?,
            Format::Floats => rows.checked_mul(cols)?.checked_mul(4)?.checked_next_multiple_of(ALIGNMENT)?,
        };
        let hashes = if hashed_rows { rows.checked_mul(8)?.checked_next_multiple_of(ALIGNMENT)? } else { 0 };
        data.checked_add(hashes)
    }
}

/// What one tensor is and where it lies.
#[derive(Clone, Debug)]
struct Section {
    format: Format,
    /// The tensor's data, padding included, in the archive
    data: Range<usize>,
    /// One hash a row, where rows are verified on use
    row_hashes: Option<Range<usize>>,
    gamma: f32,
    checksum: u64,
}

/// Everything that opening works out.
#[derive(Debug)]
struct Index {
    config: ModelConfig,
    layout: Arc<ParamLayout>,
    /// By parameter index
    sections: Vec<Section>,
    tokenizer: Option<Range<usize>>,
    fingerprint: u64,
}

/// One tensor of an archive, for listings.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo<'a> {
    /// Its name in files.
    pub name: &'a str,
    /// Its shape, `[out, in]` for matrices.
    pub shape: &'a [usize],
    /// How it is stored.
    pub format: Format,
    /// Where its section begins.
    pub offset: usize,
    /// Bytes of its section.
    pub bytes: usize,
    /// The scale γ of a ternary tensor.
    pub gamma: Option<f32>,
}

/// Copies the bytes of an archive from an offset on; `false` if it cannot.
type ReadAt = dyn Fn(usize, &mut [u8]) -> bool + Send + Sync;

/// How rows of the embedding table are read, if not from the archive's bytes.
struct RowReader(Box<ReadAt>);

impl fmt::Debug for RowReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RowReader")
    }
}

/// A checked archive over bytes that it owns or borrows.
#[derive(Debug)]
pub struct Archive<B> {
    bytes: B,
    index: Index,
    rows: Option<RowReader>,
}

impl<B: AsRef<[u8]>> Archive<B> {
    /// Checks `bytes` and makes them usable as a model. Checksums are computed on the caller's thread pool, if it runs in one.
    ///
    /// # Errors
    /// The first thing that is wrong with the bytes, by name. Their start must be aligned to [`ALIGNMENT`], as a memory map,
    /// [`AlignedBytes`] and [`StaticBytes`] are.
    pub fn open(bytes: B) -> Result<Archive<B>, ArchiveError> {
        let index = read_index(bytes.as_ref())?;
        verify_sections(bytes.as_ref(), &index)?;
        Ok(Archive { bytes, index, rows: None })
    }

    /// Has rows of an embedding table that only serves look-ups read by `read(offset, to)`, which copies the archive's bytes from an
    /// offset on, or returns `false` if it cannot. For a file that is mapped: where one page of a map is touched, the system maps
    /// those around it (Linux sixteen), and after some text most of the table counts as the process's memory.
    pub fn with_row_reader(mut self, read: impl Fn(usize, &mut [u8]) -> bool + Send + Sync + 'static) -> Archive<B> {
        self.rows = Some(RowReader(Box::new(read)));
        self
    }

    /// The model in the archive.
    pub fn model(&self) -> PackedModel<'_> {
        PackedModel { bytes: self.bytes.as_ref(), index: &self.index, rows: self.rows.as_ref() }
    }

    /// Gives the bytes back.
    pub fn into_bytes(self) -> B {
        self.bytes
    }
}

/// The weights of an archive, where they lie.
#[derive(Clone, Copy, Debug)]
pub struct PackedModel<'a> {
    bytes: &'a [u8],
    index: &'a Index,
    rows: Option<&'a RowReader>,
}

impl<'a> PackedModel<'a> {
    /// Shapes.
    pub fn config(&self) -> &'a ModelConfig {
        &self.index.config
    }

    /// Names and order of the parameters.
    pub fn layout(&self) -> &'a ParamLayout {
        &self.index.layout
    }

    /// The `tokenizer.json` that travels with the model.
    pub fn tokenizer(&self) -> Option<&'a [u8]> {
        self.index.tokenizer.clone().map(|range| &self.bytes[range])
    }

    /// Bytes of the archive.
    pub fn archive_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// A number that differs between models: a hash of all weights' hashes and the configuration.
    pub fn fingerprint(&self) -> u64 {
        self.index.fingerprint
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'a>> {
        let layout: &'a ParamLayout = &self.index.layout;
        layout.params().iter().zip(&self.index.sections).map(|(p, s)| TensorInfo {
            name: &p.name,
            shape: &p.shape,
            format: s.format,
            offset: s.data.start,
            bytes: s.data.len() + s.row_hashes.as_ref().map_or(0, |r| r.len()),
            gamma: matches!(s.format, Format::Ternary(_)).then_some(s.gamma),
        })
    }

    /// Reads one tensor as float32: γ·W₃ for a ternary one.
    ///
    /// # Errors
    /// A damaged row of an embedding table that is verified on use.
    ///
    /// # Panics
    /// When `id` is of another layout, or `values` does not have the tensor's size.
    pub fn read(&self, id: Id, values: &mut [f32]) -> Result<(), ArchiveError> {
        let param = self.layout().param(id);
        assert_eq!(values.len(), param.len(), "{}", param.name);
        match self.index.sections[id.0].format {
            Format::Ternary(_) => {
                let matrix = self.ternary(id);
                let mut codes = Vec::new();
                for (panel, values) in values.chunks_mut(64 * matrix.in_dim()).enumerate() {
                    codes.resize(values.len(), 0);
                    matrix.panel_codes(panel, &mut codes);
                    values.iter_mut().zip(&codes).for_each(|(v, c)| *v = matrix.gamma() * *c as f32);
                }
            }
            Format::Dense(_) => {
                let (cols, mut scratch) = (param.shape[1], Vec::new());
                for (row, values) in values.chunks_exact_mut(cols).enumerate() {
                    self.row(id, row, &mut scratch, values)?;
                }
            }
            Format::Floats => values.copy_from_slice(self.floats(id)),
        }
        Ok(())
    }

    /// A ternary projection.
    pub(crate) fn ternary(&self, id: Id) -> PackedTernary<'a> {
        let (section, shape) = (&self.index.sections[id.0], &self.layout().param(id).shape);
        let Format::Ternary(packing) = section.format else { unreachable!("the index has checked the formats") };
        let lines: &[Line] = bytemuck::cast_slice(&self.bytes[section.data.clone()]);
        PackedTernary::new(packing, shape[0], shape[1], section.gamma, lines).expect("the index has checked the sizes")
    }

    /// Gains, taps, biases.
    pub(crate) fn floats(&self, id: Id) -> &'a [f32] {
        let section = &self.index.sections[id.0];
        &bytemuck::cast_slice(&self.bytes[section.data.clone()])[..self.layout().param(id).len()]
    }

    /// A full-precision matrix.
    pub(crate) fn dense(&self, id: Id) -> DenseMatrix<'a> {
        let (section, shape) = (&self.index.sections[id.0], &self.layout().param(id).shape);
        let Format::Dense(format) = section.format else { unreachable!("the index has checked the formats") };
        DenseMatrix::new(format, shape[0], shape[1], &self.bytes[section.data.clone()])
    }

    /// One row of a full-precision matrix, verified where that is left to its use. `scratch` is kept between calls.
    fn row(&self, id: Id, row: usize, scratch: &mut Vec<Line>, to: &mut [f32]) -> Result<(), ArchiveError> {
        self.verify_row(id, row, scratch)?;
        self.stored_row(id, row, scratch).row(0, to);
        Ok(())
    }

    /// Verifies a row, where that is left to its use.
    pub(crate) fn verify_row(&self, id: Id, row: usize, scratch: &mut Vec<Line>) -> Result<(), ArchiveError> {
        if let Some(hashes) = &self.index.sections[id.0].row_hashes {
            let hash = hashes.start + 8 * row;
            if self.bytes[hash..hash + 8] != self.stored_row(id, row, scratch).row_hash(0).to_le_bytes() {
                return Err(ArchiveError::DamagedRow { tensor: self.layout().param(id).name.clone(), row });
            }
        }
        Ok(())
    }

    /// A full-precision matrix of one row, read where a reader is for that.
    pub(crate) fn stored_row<'s>(&'s self, id: Id, row: usize, scratch: &'s mut Vec<Line>) -> DenseMatrix<'s> {
        self.dense(id).only(row, self.read_row(id, row, scratch))
    }

    /// The values of a row as they are stored, where a reader gives them.
    fn read_row<'s>(&self, id: Id, row: usize, scratch: &'s mut Vec<Line>) -> Option<&'s [u8]> {
        let (reader, section, shape) = (self.rows?, &self.index.sections[id.0], &self.layout().param(id).shape);
        section.row_hashes.as_ref()?;
        let Format::Dense(format) = section.format else { return None };
        let range = format.row_bytes(shape[0], shape[1], row)?;
        scratch.resize(range.len().div_ceil(size_of::<Line>()), Line([0; 64]));
        let to = &mut bytemuck::cast_slice_mut(scratch)[..range.len()];
        (reader.0)(section.data.start + range.start, to).then_some(&*to)
    }
}

/// The checksum of the format: XXH3, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

/// Whether a parameter's rows are verified when they are used: the embedding table, unless it is the head as well.
fn hashes_rows(layout: &ParamLayout, id: Id) -> bool {
    id == layout.tok_emb() && id != layout.lm_head()
}

fn read_index(bytes: &[u8]) -> Result<Index, ArchiveError> {
    if !(bytes.as_ptr() as usize).is_multiple_of(ALIGNMENT) {
        return Err(ArchiveError::Misaligned);
    }
    let prelude = Prelude::read(bytes)?;
    let header = &bytes[PRELUDE_BYTES..PRELUDE_BYTES + prelude.header_bytes];
    let padded = prelude.sections_start();
    if checksum(&bytes[PRELUDE_BYTES..padded]) != prelude.header_checksum {
        return Err(ArchiveError::Damaged(String::from("header")));
    }
    let header = rkyv::access::<ArchivedHeader, Failure>(header).map_err(|_| ArchiveError::Header)?;
    let config = header.config.to_config();
    config.validate().map_err(ArchiveError::Config)?;
    // What follows allocates: as much as the config has parameters, which the table must then have, too.
    if header.tensors.len() < config.n_layers {
        return Err(ArchiveError::TensorCount { found: header.tensors.len() });
    }
    let layout = ParamLayout::new(&config);
    if header.tensors.len() != layout.params().len() {
        return Err(ArchiveError::TensorCount { found: header.tensors.len() });
    }
    let mut sections = Vec::with_capacity(layout.params().len());
    let mut offset = padded;
    for (i, (param, record)) in layout.params().iter().zip(header.tensors.iter()).enumerate() {
        let section = read_section(&layout, Id(i), param, record, offset)?;
        offset = section.row_hashes.as_ref().map_or(section.data.end, |r| r.end);
        if offset > bytes.len() {
            return Err(ArchiveError::Truncated { expected: prelude.file_bytes, found: bytes.len() as u64 });
        }
        sections.push(section);
    }
    if offset != bytes.len() {
        return Err(ArchiveError::Sections);
    }
    let tokenizer = header.tokenizer.as_ref().map(|t| {
        let start = t.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + t.len()
    });
    Ok(Index { config, layout, sections, tokenizer, fingerprint: prelude.header_checksum })
}

fn read_section(
    layout: &ParamLayout,
    id: Id,
    param: &Param,
    record: &schema::ArchivedTensor,
    offset: usize,
) -> Result<Section, ArchiveError> {
    let bad = || ArchiveError::Tensor(param.name.clone());
    let format = Format::from_code(record.format).ok_or_else(bad)?;
    let same_shape = param.shape.iter().copied().eq(record.shape.iter().map(|d| d.to_native() as usize));
    let gamma = record.gamma.to_native();
    let sound_gamma = gamma.is_finite() && (gamma > 0.0 || !matches!(format, Format::Ternary(_)));
    if record.name != param.name || !same_shape || !format.suits(param.kind) || !sound_gamma {
        return Err(bad());
    }
    let hashed = hashes_rows(layout, id);
    let data = format.bytes(&param.shape, false).ok_or_else(bad)?;
    let whole = format.bytes(&param.shape, hashed).ok_or_else(bad)?;
    let end = offset.checked_add(whole).ok_or_else(bad)?;
    if record.offset.to_native() != offset as u64 || record.bytes.to_native() != whole as u64 {
        return Err(bad());
    }
    Ok(Section {
        format,
        data: offset..offset + data,
        row_hashes: hashed.then_some(offset + data..end),
        gamma,
        checksum: record.checksum.to_native(),
    })
}

/// Bytes of one hash: enough that the hash's start and end do not count, few enough to spread a tensor over threads.
const HASH_BLOCK: usize = 1 << 20;

/// What is hashed for itself of a section.
fn hash_blocks(section: &[u8]) -> impl Iterator<Item = &[u8]> {
    section.chunks(HASH_BLOCK)
}

/// The hashes of blocks, which threads share.
fn hash_all(blocks: Vec<&[u8]>) -> Vec<[u8; 8]> {
    let mut hashes = alloc::vec![[0u8; 8]; blocks.len()];
    par::for_each(blocks.into_iter().zip(&mut hashes).collect(), |(block, hash): (&[u8], &mut [u8; 8])| {
        *hash = checksum(block).to_le_bytes();
    });
    hashes
}

/// The checksum of a section: of the hashes of its blocks.
fn section_checksum(bytes: &[u8]) -> u64 {
    checksum(hash_all(hash_blocks(bytes).collect()).as_flattened())
}

fn verify_sections(bytes: &[u8], index: &Index) -> Result<(), ArchiveError> {
    // Where rows have hashes, those are what is verified now. All sections at once, so that small ones do not leave threads idle.
    let ranges = || index.sections.iter().map(|s| s.row_hashes.clone().unwrap_or(s.data.clone()));
    let hashes = hash_all(ranges().flat_map(|range| hash_blocks(&bytes[range])).collect());
    let mut rest = &hashes[..];
    for ((range, section), param) in ranges().zip(&index.sections).zip(index.layout.params()) {
        let (own, later) = rest.split_at(hash_blocks(&bytes[range]).count());
        if checksum(own.as_flattened()) != section.checksum {
            return Err(ArchiveError::Damaged(param.name.clone()));
        }
        rest = later;
        // The one part that neither a row's hash nor the section's covers.
        if let (Format::Dense(format), Some(_)) = (section.format, &section.row_hashes) {
            let padding = format.padding(param.shape[0], param.shape[1]).into_iter().flatten();
            if padding.flat_map(|range| &bytes[section.data.start..][range]).any(|b| *b != 0) {
                return Err(ArchiveError::Damaged(param.name.clone()));
            }
        }
    }
    Ok(())
}
