//! Safetensors files, one tensor at a time in both directions: neither writing nor reading holds a second copy of
//! the weights. The format is that of the `safetensors` crate, which parses and checks every header read here.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Serialize;

/// A named tensor to be written. `bytes` are little-endian.
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes come from.
    pub bytes: Bytes<'a>,
}

/// The bytes of a tensor.
pub enum Bytes<'a> {
    /// In memory as the file holds them.
    Ready(Cow<'a, [u8]>),
    /// Made when their turn comes, as by a copy from an accelerator.
    Later(Box<dyn FnOnce() -> anyhow::Result<Vec<u8>> + 'a>),
}

impl<'a> Tensor<'a> {
    /// A float32 tensor.
    pub fn f32(name: impl Into<String>, shape: &[usize], data: &'a [f32]) -> Tensor<'a> {
        Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), bytes: Bytes::Ready(f32_bytes(data)) }
    }

    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Little-endian bytes of floats; borrowed where memory holds them so.
pub fn f32_bytes(data: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(data))
    } else {
        Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

/// Size and BLAKE3 hash of a written file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Digest {
    /// Length of the file.
    pub bytes: u64,
    /// Hexadecimal BLAKE3.
    pub blake3: String,
}

/// Writes a file through a hash, and onto the disk itself before it returns.
pub struct HashedFile {
    out: BufWriter<File>,
    hash: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    /// Creates `path`, which must not exist, or be a device or a pipe.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn create(path: &Path) -> std::io::Result<HashedFile> {
        let file = crate::data::files::create(path)?;
        Ok(HashedFile { out: BufWriter::with_capacity(1 << 20, file), hash: blake3::Hasher::new(), bytes: 0 })
    }

    /// Flushes, syncs to the disk, and returns what was written.
    ///
    /// # Errors
    /// Whatever the file system reports, a full disk above all.
    pub fn finish(self) -> std::io::Result<Digest> {
        let file = self.out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        if file.metadata()?.is_file() {
            file.sync_all()?;
        }
        Ok(Digest { bytes: self.bytes, blake3: self.hash.finalize().to_hex().to_string() })
    }
}

impl Write for HashedFile {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.out.write_all(buf)?;
        self.hash.update(buf);
        self.bytes += buf.len() as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Writes tensors in the order given, wider elements first, so that every tensor is aligned to its elements.
///
/// # Errors
/// Whatever the file system reports; a tensor whose bytes do not fit its shape.
pub fn write(path: &Path, mut tensors: Vec<Tensor<'_>>) -> anyhow::Result<Digest> {
    tensors.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
    let at = || format!("writing {}", path.display());
    let mut file = HashedFile::create(path).with_context(at)?;
    let header = header(&tensors)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).with_context(at)?;
    for tensor in tensors {
        let (expected, name) = (tensor.len(), tensor.name);
        let bytes = match tensor.bytes {
            Bytes::Ready(bytes) => bytes,
            Bytes::Later(make) => make().with_context(|| format!("tensor {name}"))?.into(),
        };
        ensure!(bytes.len() == expected, "tensor {name} has {} bytes; its shape needs {expected}", bytes.len());
        file.write_all(&bytes).with_context(at)?;
    }
    file.finish().with_context(at)
}

/// The JSON header, padded with blanks to a multiple of 8 bytes.
fn header(tensors: &[Tensor<'_>]) -> anyhow::Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Entry<'a> {
        dtype: Dtype,
        shape: &'a [usize],
        data_offsets: [usize; 2],
    }
    let mut text = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut start = 0;
    for tensor in tensors {
        let data_offsets = [start, start + tensor.len()];
        start = data_offsets[1];
        let entry = Entry { dtype: tensor.dtype, shape: &tensor.shape, data_offsets };
        text += &format!(",{}:{}", serde_json::to_string(&tensor.name)?, serde_json::to_string(&entry)?);
    }
    text.push('}');
    let mut header = text.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// What a file says about one of its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub range: Range<u64>,
}

/// An open safetensors file with a checked header.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
}

/// The safetensors crate refuses longer headers too.
const MAX_HEADER: u64 = 100_000_000;

impl TensorFile {
    /// Opens a file and checks its header and its length.
    ///
    /// # Errors
    /// A file that is missing, truncated, too long or not safetensors.
    pub fn open(path: &Path) -> anyhow::Result<TensorFile> {
        TensorFile::open_checked(path).with_context(|| format!("{}", path.display()))
    }

    fn open_checked(path: &Path) -> anyhow::Result<TensorFile> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        ensure!(length >= 8, "not a safetensors file: {length} bytes long");
        let mut size = [0; 8];
        file.read_exact(&mut size)?;
        let header_len = u64::from_le_bytes(size);
        ensure!(
            header_len <= MAX_HEADER && header_len <= length - 8,
            "not a safetensors file, or truncated: its header claims {header_len} bytes of {length}"
        );
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header)?;
        // Reading the metadata checks it: sizes that fit shapes, no gap, no overlap.
        let metadata: Metadata = serde_json::from_slice(&header).context("damaged header")?;
        let start = 8 + header_len;
        let end = start + metadata.data_len() as u64;
        ensure!(length == end, "damaged: {length} bytes long where its header describes {end}");
        let entries = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let range = start + info.data_offsets.0 as u64..start + info.data_offsets.1 as u64;
                (name, Entry { dtype: info.dtype, shape: info.shape.clone(), range })
            })
            .collect();
        Ok(TensorFile { path: path.to_path_buf(), file, entries })
    }

    /// Its tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn entry(&self, name: &str) -> anyhow::Result<&Entry> {
        self.entries.get(name).with_context(|| format!("{}: no tensor `{name}`", self.path.display()))
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// No such tensor, or the file cannot be read.
    pub fn bytes(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let range = self.entry(name)?.range.clone();
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> anyhow::Result<()> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.read_exact(out))
            .with_context(|| format!("reading {}", self.path.display()))
    }

    /// Reads an f32, f16 or bf16 tensor of a given shape into floats.
    ///
    /// # Errors
    /// No such tensor, another shape, another type, or the file cannot be read.
    pub fn read_floats(&self, name: &str, shape: &[usize], out: &mut [f32]) -> anyhow::Result<()> {
        let entry = self.entry(name)?;
        let at = || self.path.display();
        ensure!(entry.shape == shape, "{}: `{name}` has shape {:?}; the model needs {shape:?}", at(), entry.shape);
        let width = match entry.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => bail!("{}: `{name}` has type {other}; f32, f16 and bf16 can be read", at()),
        };
        let dtype = entry.dtype;
        let mut offset = entry.range.start;
        let mut buffer = vec![0; (out.len() * width).min(1 << 20)];
        for chunk in out.chunks_mut((1 << 20) / width) {
            let bytes = &mut buffer[..chunk.len() * width];
            self.read_at(offset, bytes)?;
            offset += bytes.len() as u64;
            decode(dtype, bytes, chunk);
        }
        Ok(())
    }

    /// Reads an i64 or i32 tensor with its shape.
    ///
    /// # Errors
    /// No such tensor, another type, or the file cannot be read.
    pub fn read_integers(&self, name: &str) -> anyhow::Result<(Vec<usize>, Vec<i64>)> {
        let entry = self.entry(name)?;
        let (dtype, shape) = (entry.dtype, entry.shape.clone());
        let bytes = self.bytes(name)?;
        let values = match dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
            other => bail!("{}: `{name}` has type {other}; it must be int64 or int32", self.path.display()),
        };
        Ok((shape, values))
    }
}

fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *v = f32::from_le_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = f16::from_le_bytes(*b).to_f32();
            }
        }
        _ => {
            for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// The digest of a file on the disk.
///
/// # Errors
/// When it cannot be read.
pub fn digest(path: &Path) -> anyhow::Result<Digest> {
    let at = || format!("reading {}", path.display());
    let mut hash = blake3::Hasher::new();
    let mut file = File::open(path).with_context(at)?;
    let bytes = std::io::copy(&mut file, &mut hash).with_context(at)?;
    Ok(Digest { bytes, blake3: hash.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn sample(path: &Path) -> Digest {
        let codes = Bytes::Ready(Cow::Owned(vec![7, 8, 9]));
        let tensors = vec![
            Tensor { name: "codes".into(), dtype: Dtype::U8, shape: vec![3], bytes: codes },
            Tensor::f32("a \"quoted\" name", &[2, 2], &[1.0, -2.5, 3.25, f32::MIN_POSITIVE]),
            Tensor {
                name: "half".into(),
                dtype: Dtype::BF16,
                shape: vec![2],
                bytes: Bytes::Later(Box::new(|| Ok(vec![0x80, 0x3f, 0x00, 0xc0]))),
            },
        ];
        write(path, tensors).unwrap()
    }

    #[test]
    fn the_crate_reads_what_is_written_and_wider_elements_come_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let written = sample(&path);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(written.bytes, bytes.len() as u64);
        assert_eq!(written, digest(&path).unwrap());
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("codes").unwrap().data(), [7, 8, 9]);
        assert_eq!(parsed.tensor("a \"quoted\" name").unwrap().data()[..4], 1.0f32.to_le_bytes());
        let file = TensorFile::open(&path).unwrap();
        let start = |name: &str| file.entries()[name].range.start;
        assert!(start("a \"quoted\" name") < start("half") && start("half") < start("codes"));
        assert_eq!(start("a \"quoted\" name") % 8, 0);
        let mut half = [0.0; 2];
        file.read_floats("half", &[2], &mut half).unwrap();
        assert_eq!(half, [1.0, -2.0]);
        let mut floats = [0.0; 4];
        file.read_floats("a \"quoted\" name", &[2, 2], &mut floats).unwrap();
        assert_eq!(floats, [1.0, -2.5, 3.25, f32::MIN_POSITIVE]);
        assert!(file.read_floats("half", &[3], &mut [0.0; 3]).unwrap_err().to_string().contains("[3]"));
        assert!(file.read_floats("codes", &[3], &mut [0.0; 3]).unwrap_err().to_string().contains("U8"));
        assert!(file.bytes("none").unwrap_err().to_string().contains("`none`"));
    }

    #[test]
    fn every_truncation_and_extension_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        sample(&path);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(TensorFile::open(&path).is_err(), "{length} of {} bytes", whole.len());
        }
        let mut longer = whole.clone();
        longer.push(0);
        std::fs::write(&path, &longer).unwrap();
        assert!(TensorFile::open(&path).is_err());
        let mut huge = whole;
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, &huge).unwrap();
        assert!(TensorFile::open(&path).is_err());
    }

    #[test]
    fn writing_never_replaces_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        std::fs::write(&path, "mine").unwrap();
        assert!(write(&path, vec![]).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
