//! Where pickle and storages lie in the file.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use anyhow::{Context, bail, ensure};
use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Machine, Node, Value};
use super::view::Storage;

/// Longest pickle that is read: a state dict takes about 150 bytes a tensor.
const MAX_PICKLE: usize = 64 << 20;

/// A record of a zip archive.
pub struct Record {
    /// Its name, the archive's own folder included.
    pub name: String,
    /// Its bytes in the file.
    pub range: Range<usize>,
    /// The checksum beside it.
    pub crc: u32,
}

/// The records of a file.
pub struct Container {
    /// Whether it is of the format before torch 1.6.
    pub legacy: bool,
    /// Whether numbers are stored most significant byte first.
    pub big_endian: bool,
    /// All records; none in the old format.
    pub records: Vec<Record>,
    /// The folder in the archive, with its slash.
    pub base: String,
}

/// Whether the bytes start as a zip archive does.
pub fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
}

/// Why a file of a format that is known, and is not PyTorch's, cannot be read.
pub fn other_format(bytes: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| bytes.get(offset..).is_some_and(|b| b.starts_with(magic));
    if at(257, b"ustar") {
        Some(
            "a tar archive, as torch before 0.1.10 wrote: not supported; load it in an old PyTorch and save it again with \
             torch.save(torch.load(path), path)",
        )
    } else if at(0, b"\x89HDF") {
        Some("an HDF5 file, not PyTorch's")
    } else if at(8, b"{\"") {
        Some("a safetensors file; put it into a folder as model.safetensors, with config.json beside it")
    } else if at(0, b"GGUF") {
        Some("a GGUF file, which cannot be read")
    } else if bytes.is_empty() {
        Some("an empty file")
    } else {
        None
    }
}

impl Container {
    /// The records of a zip archive. None may be compressed or overlap another: a file then never stands for more bytes than it
    /// has.
    pub fn zip(bytes: &[u8]) -> anyhow::Result<Container> {
        // The archive starts where the file starts. To look for it elsewhere, as is the default, takes some sound files for damaged
        // (zip 9.8.1: those that torch saved under a name of 21 characters).
        let config = Config { archive_offset: ArchiveOffset::Known(0) };
        let archive = ZipArchive::with_config(config, Cursor::new(bytes));
        let mut archive = archive.context("damaged or truncated zip archive")?;
        ensure!(
            !archive.file_names_raw().any(|n| n.ends_with(b"/constants.pkl")),
            "a TorchScript archive, which holds a program; save torch.save(model.state_dict(), path) instead"
        );
        let mut records = Vec::new();
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index).context("damaged zip archive")?;
            let name = entry.name().context("a record whose name is no text")?.into_owned();
            ensure!(!entry.encrypted(), "record {name} is encrypted; PyTorch does not do that");
            ensure!(
                entry.compression() == CompressionMethod::Stored && entry.size() == entry.compressed_size(),
                "record {name} is compressed ({}), which PyTorch never does; it is not unpacked",
                entry.compression()
            );
            let start = entry.data_start().and_then(|s| usize::try_from(s).ok());
            let end = start.zip(usize::try_from(entry.size()).ok()).and_then(|(s, n)| s.checked_add(n));
            let range = start.zip(end).map(|(s, e)| s..e).filter(|r| r.end <= bytes.len());
            let range = range.with_context(|| format!("record {name} reaches past the end of the file"))?;
            records.push(Record { name, range, crc: entry.crc32() });
        }
        let mut order: Vec<&Record> = records.iter().filter(|r| !r.range.is_empty()).collect();
        order.sort_by_key(|r| r.range.start);
        for pair in order.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            ensure!(a.range.end <= b.range.start, "records {} and {} share bytes of the file", a.name, b.name);
        }
        let pickles: Vec<&str> = records.iter().filter_map(|r| r.name.strip_suffix("data.pkl")).collect();
        let base = match pickles[..] {
            [base] if base.is_empty() || base.ends_with('/') => base.to_string(),
            [] => bail!("a zip archive without data.pkl: not written by torch.save"),
            _ => bail!("a zip archive with {} data.pkl: not written by torch.save", pickles.len()),
        };
        let mut container = Container { legacy: false, big_endian: false, records, base };
        container.big_endian = match container.find("byteorder").map(|r| &bytes[r.range.clone()]) {
            None | Some(b"little") => false,
            Some(b"big") => true,
            Some(_) => bail!("record byteorder is neither `little` nor `big`"),
        };
        let pickle = container.pickle()?;
        ensure!(pickle.range.len() <= MAX_PICKLE, "{} is {} bytes long", pickle.name, pickle.range.len());
        let crc = crc32fast::hash(&bytes[pickle.range.clone()]);
        ensure!(pickle.crc == 0 || pickle.crc == crc, "damaged: {} does not have its checksum", pickle.name);
        Ok(container)
    }

    fn find(&self, name: &str) -> Option<&Record> {
        self.records.iter().find(|r| r.name.strip_prefix(&self.base) == Some(name))
    }

    /// The pickle.
    pub fn pickle(&self) -> anyhow::Result<&Record> {
        self.find("data.pkl").context("a zip archive without data.pkl: not written by torch.save")
    }

    /// Records of storages, by key.
    pub fn storages(&self) -> HashMap<&str, Range<usize>> {
        let key = |r: &Record| Some(r.name.strip_prefix(&self.base)?.strip_prefix("data/")?.len());
        self.records.iter().filter_map(|r| Some((&r.name[r.name.len() - key(r)?..], r.range.clone()))).collect()
    }
}

/// The pickles that start an old file: a magic number, a version, facts about the writer, and the object, which is returned.
/// What the facts say of the byte order concerns the writer: the storages are little-endian always.
pub fn legacy_pickles(machine: &mut Machine<'_>) -> anyhow::Result<Value> {
    /// 0x1950a86a20f9469cfc6c, least significant byte first.
    const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    const VERSION: i64 = 1001;
    let magic = machine.run().context("not a PyTorch file: neither a zip archive nor a pickle that can be read")?;
    ensure!(
        machine.bytes(&magic) == Some(&MAGIC),
        "a pickle that torch.save did not write; save the weights with torch.save(model.state_dict(), path)"
    );
    let version = machine.run()?;
    ensure!(version == Value::Int(VERSION), "version {version:?} of PyTorch's old format; {VERSION} can be read");
    machine.run()?;
    machine.run()
}

/// Where the storages of an old file lie: after one more pickle, a list of keys, each has its count and its elements.
pub fn legacy_storages(machine: &mut Machine<'_>, bytes: &[u8]) -> anyhow::Result<Vec<Range<usize>>> {
    let keys = machine.run().context("the list of storages")?;
    let Value::Node(node) = keys else { bail!("no list of storages") };
    let mut at = machine.position();
    let Node::List(keys) = machine.node(node) else { bail!("no list of storages") };
    let known: HashMap<&str, &Storage> = machine.storages().iter().map(|s| (s.key.as_str(), s)).collect();
    let mut places = HashMap::new();
    for key in keys {
        let key = machine.text(key).context("a storage whose key is no text")?;
        let storage = known.get(key).with_context(|| format!("storage `{key}` belongs to no tensor"))?;
        let dtype = storage.dtype.with_context(|| format!("storage `{key}` has no type"))?;
        let count = bytes.get(at..).and_then(|b| b.first_chunk::<8>());
        let count = u64::from_le_bytes(*count.with_context(|| format!("truncated before storage `{key}`"))?);
        ensure!(
            count.checked_mul(dtype.bytes()) == Some(storage.bytes),
            "storage `{key}` has {count} elements where the pickle says {} bytes",
            storage.bytes
        );
        let start = at + 8;
        let end = usize::try_from(storage.bytes).ok().and_then(|n| start.checked_add(n)).filter(|&e| e <= bytes.len());
        let end = end.with_context(|| format!("truncated inside storage `{key}`"))?;
        ensure!(places.insert(key, start..end).is_none(), "storage `{key}` is there twice");
        at = end;
    }
    ensure!(at == bytes.len(), "{} bytes after the last storage", bytes.len() - at);
    let place =
        |s: &Storage| places.get(s.key.as_str()).cloned().with_context(|| format!("storage `{}` is missing", s.key));
    machine.storages().iter().map(place).collect()
}
