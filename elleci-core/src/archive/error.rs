use alloc::string::String;
use core::fmt;

use super::{ALIGNMENT, VERSION};
use crate::config::ConfigError;

/// Why bytes are refused as an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArchiveError {
    /// The bytes do not start with the magic.
    NotAnArchive,
    /// Another version of the format.
    Version(u32),
    /// The prelude says something where this version says nothing.
    Reserved,
    /// Fewer bytes than the archive says it has, or than a prelude has.
    Truncated {
        /// Bytes that should be there.
        expected: u64,
        /// Bytes that are.
        found: u64,
    },
    /// More bytes than the archive says it has.
    TrailingBytes {
        /// Bytes that should be there.
        expected: u64,
        /// Bytes that are.
        found: u64,
    },
    /// A checksum does not match: the part with this name has changed since it was written.
    Damaged(String),
    /// A row of an embedding table does not match its checksum.
    DamagedRow {
        /// The table.
        tensor: String,
        /// The row, which is a token.
        row: usize,
    },
    /// The header is no valid structure, though its checksum is right.
    Header,
    /// The header's configuration does not hold together.
    Config(ConfigError),
    /// The tensor table does not have as many entries as the configuration has parameters.
    TensorCount {
        /// Entries.
        found: usize,
    },
    /// Name, shape, format, scale or place of this tensor's entry is wrong.
    Tensor(String),
    /// The sections do not fill the archive.
    Sections,
    /// The start of the bytes is not aligned.
    Misaligned,
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let again = "make it again with elleci-convert";
        match self {
            ArchiveError::NotAnArchive => write!(f, "this is no .elleci archive"),
            ArchiveError::Version(v) => {
                write!(f, "the archive has format version {v}, this program reads version {VERSION}; {again}")
            }
            ArchiveError::Reserved => {
                write!(
                    f,
                    "the archive uses what format version {VERSION} leaves empty: a later program wrote it; {again}"
                )
            }
            ArchiveError::Truncated { expected, found } => {
                write!(f, "the archive is cut off: {found} bytes of {expected}; copy it again")
            }
            ArchiveError::TrailingBytes { expected, found } => {
                write!(f, "the archive has {expected} bytes, but {found} are here; copy it again")
            }
            ArchiveError::Damaged(part) => write!(f, "the archive is damaged in `{part}`; copy it again"),
            ArchiveError::DamagedRow { tensor, row } => {
                write!(f, "the archive is damaged in `{tensor}`, row {row}; copy it again")
            }
            ArchiveError::Header => write!(f, "the archive's header is malformed; {again}"),
            ArchiveError::Config(error) => write!(f, "the archive's configuration is unusable: {error}"),
            ArchiveError::TensorCount { found } => {
                write!(f, "the archive's {found} tensors are not those of its configuration; {again}")
            }
            ArchiveError::Tensor(name) => write!(f, "the archive's entry for `{name}` is malformed; {again}"),
            ArchiveError::Sections => write!(f, "the archive's tensors do not fill it; {again}"),
            ArchiveError::Misaligned => {
                write!(f, "the archive must start at a multiple of {ALIGNMENT} bytes in memory; see AlignedBytes")
            }
        }
    }
}

impl core::error::Error for ArchiveError {}
