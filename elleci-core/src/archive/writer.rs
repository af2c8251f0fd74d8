//! Writing an archive: a tensor at a time in the order of the layout, the start of the file last.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use rkyv::rancor::Failure;

use super::schema::{Config, Header, PRELUDE_BYTES, Prelude, Tensor};
use super::{ALIGNMENT, AlignedBytes, DenseFormat, DenseMatrix, Format, checksum, hashes_rows, section_checksum};
use crate::config::{ConfigError, ModelConfig};
use crate::params::{Id, Param, ParamKind, ParamLayout, Params};
use crate::ternary::TernaryMatrix;
use crate::ternary::packed::{Packing, pack};

/// How tensors are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackOptions {
    /// Ternary projections.
    pub packing: Packing,
    /// The one of them whose input is mostly zeros: `ffn.down`, behind the squared ReLU. [`Packing::C5`] pays in trained models.
    pub sparse: Packing,
    /// Embedding and head. `mamba.bcdt` is stored so as well, but not below 16 bits: its rows decide the time steps.
    pub dense: DenseFormat,
}

impl Default for PackOptions {
    fn default() -> PackOptions {
        PackOptions { packing: Packing::T5, sparse: Packing::T5, dense: DenseFormat::Int8 }
    }
}

impl PackOptions {
    fn format(self, layout: &ParamLayout, id: Id) -> Format {
        match (layout.param(id).kind, self.dense) {
            (ParamKind::Ternary, _) if layout.layers().iter().any(|l| l.ffn.down == id) => Format::Ternary(self.sparse),
            (ParamKind::Ternary, _) => Format::Ternary(self.packing),
            (ParamKind::Embedding, dense) => Format::Dense(dense),
            (ParamKind::Matrix, DenseFormat::Int8) => Format::Dense(DenseFormat::F16),
            (ParamKind::Matrix, dense) => Format::Dense(dense),
            _ => Format::Floats,
        }
    }
}

/// Writes an archive in one pass over the tensors.
#[derive(Debug)]
pub struct ArchiveWriter {
    config: ModelConfig,
    layout: Arc<ParamLayout>,
    options: PackOptions,
    tokenizer: Option<Vec<u8>>,
    tensors: Vec<Tensor>,
    start: usize,
    offset: usize,
    clamped: usize,
}

impl ArchiveWriter {
    /// A writer for a model with this config, and the `tokenizer.json` that shall travel with it.
    ///
    /// # Errors
    /// A config that does not hold together.
    pub fn new(
        config: &ModelConfig,
        tokenizer: Option<&[u8]>,
        options: PackOptions,
    ) -> Result<ArchiveWriter, ConfigError> {
        config.validate()?;
        let layout = ParamLayout::new(config);
        let (config, tokenizer) = (config.clone(), tokenizer.map(<[u8]>::to_vec));
        let mut writer =
            ArchiveWriter { config, layout, options, tokenizer, tensors: Vec::new(), start: 0, offset: 0, clamped: 0 };
        // The header's size does not depend on what is in its records, only on their number and names.
        let blank = |p: &Param| record(p, Format::Floats, 0.0);
        writer.tensors = writer.layout.params().iter().map(blank).collect();
        writer.start = writer.header().len();
        writer.tensors.clear();
        writer.offset = writer.start;
        Ok(writer)
    }

    /// Bytes before the first section: the size of what [`ArchiveWriter::finish`] returns.
    pub fn header_bytes(&self) -> usize {
        self.start
    }

    /// Bytes of the whole file, if all parameters are stored with the options of the writer. `None` where an address does not hold
    /// them.
    pub fn file_bytes(&self) -> Option<usize> {
        let params = self.layout.params().iter().enumerate();
        let section = |(i, p): (usize, &Param)| {
            self.options.format(&self.layout, Id(i)).bytes(&p.shape, hashes_rows(&self.layout, Id(i)))
        };
        params.map(section).try_fold(self.start, |sum, bytes| sum.checked_add(bytes?))
    }

    /// The parameter whose values [`ArchiveWriter::pack`] takes next.
    pub fn next(&self) -> Option<&Param> {
        self.layout.params().get(self.tensors.len())
    }

    /// Stores the next parameter with the options of the writer; returns its section.
    ///
    /// # Panics
    /// When all parameters have been stored, or `values` does not have the size of the next.
    pub fn pack(&mut self, values: &[f32]) -> Vec<u8> {
        self.pack_as(values, self.options)
    }

    /// [`ArchiveWriter::pack`] with options for this parameter alone.
    ///
    /// # Panics
    /// As [`ArchiveWriter::pack`].
    pub fn pack_as(&mut self, values: &[f32], options: PackOptions) -> Vec<u8> {
        let id = Id(self.tensors.len());
        let param = &self.layout.params()[id.0];
        assert_eq!(values.len(), param.len(), "{}", param.name);
        let (shape, mut gamma) = (&param.shape, 0.0);
        let format = options.format(&self.layout, id);
        let hashed = hashes_rows(&self.layout, id);
        let data = format.bytes(shape, false).expect("values of this shape are in memory");
        let mut section = vec![0u8; data];
        match format {
            Format::Ternary(packing) => {
                let matrix = TernaryMatrix::from_weights(values, shape[0], shape[1]);
                gamma = matrix.gamma();
                section.copy_from_slice(bytemuck::cast_slice(&pack(&matrix, packing)));
            }
            Format::Dense(format) => {
                self.clamped += values.iter().filter(|v| v.abs() > format.largest()).count();
                format.encode(values, shape[1], &mut section);
            }
            Format::Floats => {
                for (bytes, v) in section.chunks_exact_mut(4).zip(values) {
                    bytes.copy_from_slice(&v.to_le_bytes());
                }
            }
        }
        let mut tensor = record(param, format, gamma);
        tensor.checksum = match format {
            Format::Dense(dense) if hashed => {
                let aligned = AlignedBytes::from(&section[..]);
                let matrix = DenseMatrix::new(dense, shape[0], shape[1], aligned.as_ref());
                section.extend((0..shape[0]).flat_map(|row| matrix.row_hash(row).to_le_bytes()));
                section.resize(section.len().next_multiple_of(ALIGNMENT), 0);
                section_checksum(&section[data..])
            }
            _ => section_checksum(&section),
        };
        (tensor.offset, tensor.bytes) = (self.offset as u64, section.len() as u64);
        self.offset += section.len();
        self.tensors.push(tensor);
        section
    }

    /// Values so far that are too large for binary16 or bf16, and became its largest number.
    pub fn clamped(&self) -> usize {
        self.clamped
    }

    /// The start of the file, once all parameters have been stored.
    ///
    /// # Panics
    /// When parameters are missing.
    pub fn finish(self) -> Vec<u8> {
        assert!(self.next().is_none(), "{} of {} tensors", self.tensors.len(), self.layout.params().len());
        self.header()
    }

    fn header(&self) -> Vec<u8> {
        let (tensors, tokenizer) = (self.tensors.clone(), self.tokenizer.clone());
        let header = Header { config: Config::new(&self.config), tensors, tokenizer };
        let header = rkyv::to_bytes::<Failure>(&header).expect("plain data of less than 4 GiB always serialises");
        let mut file = vec![0; PRELUDE_BYTES];
        file.extend_from_slice(&header);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        let header_checksum = checksum(&file[PRELUDE_BYTES..]);
        let prelude = Prelude { header_bytes: header.len(), file_bytes: self.offset as u64, header_checksum };
        file[..PRELUDE_BYTES].copy_from_slice(&prelude.to_bytes());
        file
    }
}

fn record(param: &Param, format: Format, gamma: f32) -> Tensor {
    let shape = param.shape.iter().map(|d| *d as u32).collect();
    Tensor { name: param.name.to_string(), shape, format: format.code(), gamma, offset: 0, bytes: 0, checksum: 0 }
}

/// A whole archive in memory.
///
/// # Errors
/// A config that does not hold together.
///
/// # Panics
/// When `params` are not those of `config`.
pub fn to_bytes(
    config: &ModelConfig,
    params: &Params,
    tokenizer: Option<&[u8]>,
    options: PackOptions,
) -> Result<AlignedBytes, ConfigError> {
    let mut writer = ArchiveWriter::new(config, tokenizer, options)?;
    // Room for all of it at once: growing would copy what is there, and need the memory twice.
    let mut file = AlignedBytes::with_capacity(writer.file_bytes().unwrap_or(0));
    file.extend_from_slice(&vec![0; writer.header_bytes()]);
    for p in params.layout().params() {
        file.extend_from_slice(&writer.pack(&params.data()[p.range.clone()]));
    }
    let header = writer.finish();
    file.as_mut_slice()[..header.len()].copy_from_slice(&header);
    Ok(file)
}
