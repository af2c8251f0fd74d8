//! A tensor as PyTorch has it: a type, an offset, sizes and strides over a storage that others may share.

use anyhow::{Context, ensure};
use half::{bf16, f16};

/// Element types that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the types")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// Its short name, as in safetensors files.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I16 => "I16",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::Bool => "BOOL",
        }
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }
}

/// A storage as the pickle describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    /// Its key; the name of its record.
    pub key: String,
    /// The type of its elements; `None` where each tensor says its own.
    pub dtype: Option<Dtype>,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A tensor over a storage, whose bounds have been checked against the length that the pickle gives the storage.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    storage: usize,
    dtype: Dtype,
    /// In elements.
    offset: u64,
    shape: Vec<u64>,
    /// In elements.
    strides: Vec<u64>,
    elements: u64,
}

impl View {
    /// A view of a storage that is `storage_bytes` long.
    ///
    /// # Errors
    /// Sizes and strides that do not match, overflow, or reach past the storage.
    pub fn new(
        storage: usize,
        storage_bytes: u64,
        dtype: Dtype,
        offset: u64,
        shape: Vec<u64>,
        strides: Vec<u64>,
    ) -> anyhow::Result<View> {
        ensure!(shape.len() == strides.len(), "{} sizes and {} strides", shape.len(), strides.len());
        let elements = shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s)).context("a shape past 2^64 elements")?;
        if elements > 0 {
            let last = shape
                .iter()
                .zip(&strides)
                .try_fold(offset, |last, (&size, &stride)| last.checked_add((size - 1).checked_mul(stride)?));
            let room = storage_bytes / dtype.bytes();
            let last = last.context("strides past 2^64 elements")?;
            ensure!(last < room, "a tensor that reaches element {last} of a storage of {room}");
        }
        Ok(View { storage, dtype, offset, shape, strides, elements })
    }

    /// Index of its storage.
    pub fn storage(&self) -> usize {
        self.storage
    }

    /// Type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// Whether its elements lie one after the other, in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        // No product of sizes overflows where there are elements at all.
        self.elements == 0
            || self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
                let fits = size == 1 || stride == expected;
                expected *= size;
                fits
            })
    }

    /// Reads elements `start..start + out.len()`, in row-major order. `storage` holds at least as many bytes as
    /// [`View::new`] was told.
    ///
    /// # Panics
    /// When either range is past its end.
    pub fn read(&self, storage: &[u8], big_endian: bool, start: u64, out: &mut [f32]) {
        assert!(start + out.len() as u64 <= self.elements, "elements past the end of a tensor");
        if out.is_empty() {
            // A tensor without elements may have its offset anywhere.
            return;
        }
        match self.dtype {
            Dtype::F64 => self.gather(storage, start, out, big_endian, |b| f64::from_le_bytes(b) as f32),
            Dtype::F32 => self.gather(storage, start, out, big_endian, f32::from_le_bytes),
            Dtype::F16 => self.gather(storage, start, out, big_endian, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => self.gather(storage, start, out, big_endian, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::I64 => self.gather(storage, start, out, big_endian, |b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => self.gather(storage, start, out, big_endian, |b| i32::from_le_bytes(b) as f32),
            Dtype::I16 => self.gather(storage, start, out, big_endian, |b| i16::from_le_bytes(b).into()),
            Dtype::I8 => self.gather(storage, start, out, big_endian, |b| i8::from_le_bytes(b).into()),
            Dtype::U8 => self.gather(storage, start, out, big_endian, |[b]: [u8; 1]| b.into()),
            Dtype::Bool => self.gather(storage, start, out, big_endian, |[b]: [u8; 1]| f32::from(b != 0)),
        }
    }

    fn gather<const N: usize>(
        &self,
        storage: &[u8],
        start: u64,
        out: &mut [f32],
        big_endian: bool,
        decode: impl Fn([u8; N]) -> f32,
    ) {
        let elements = storage.as_chunks::<N>().0;
        let decode = |mut bytes: [u8; N]| {
            if big_endian {
                bytes.reverse();
            }
            decode(bytes)
        };
        if self.is_contiguous() {
            let first = (self.offset + start) as usize;
            let elements = &elements[first..first + out.len()];
            for (v, b) in out.iter_mut().zip(elements) {
                *v = decode(*b);
            }
            return;
        }
        // A row (the last dimension) at a time: its elements are a fixed stride apart.
        let (Some(&row), Some(&stride)) = (self.shape.last(), self.strides.last()) else { return };
        let mut done = 0;
        while done < out.len() {
            let (index, column) = ((start + done as u64) / row, (start + done as u64) % row);
            let mut at = self.row_start(index) + column * stride;
            let count = ((row - column) as usize).min(out.len() - done);
            for v in &mut out[done..done + count] {
                *v = decode(elements[at as usize]);
                // Past the last element of the storage, perhaps, but then it is not read.
                at = at.wrapping_add(stride);
            }
            done += count;
        }
    }

    /// Where row `index` starts: rows are counted over all dimensions but the last.
    fn row_start(&self, mut index: u64) -> u64 {
        let outer = self.shape.len() - 1;
        let mut at = self.offset;
        for (&size, &stride) in self.shape[..outer].iter().zip(&self.strides[..outer]).rev() {
            at += index % size * stride;
            index /= size;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(n: u16) -> Vec<u8> {
        (0..n).flat_map(|v| f32::from(v).to_le_bytes()).collect()
    }

    fn read(view: &View, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![f32::NAN; view.elements() as usize];
        // In pieces that start and end inside rows.
        for (i, piece) in out.chunks_mut(5).enumerate() {
            view.read(bytes, false, i as u64 * 5, piece);
        }
        out
    }

    #[test]
    fn strides() {
        let bytes = storage(24);
        let view = |offset, shape: &[u64], strides: &[u64]| {
            View::new(0, bytes.len() as u64, Dtype::F32, offset, shape.to_vec(), strides.to_vec()).unwrap()
        };
        let plain = view(0, &[4, 6], &[6, 1]);
        assert!(plain.is_contiguous());
        assert_eq!(read(&plain, &bytes), (0..24u8).map(f32::from).collect::<Vec<_>>());
        let transposed = view(0, &[6, 4], &[1, 6]);
        assert!(!transposed.is_contiguous());
        let want: Vec<f32> = (0..6u8).flat_map(|i| (0..4u8).map(move |j| f32::from(j * 6 + i))).collect();
        assert_eq!(read(&transposed, &bytes), want);
        let window = view(7, &[2, 1, 3], &[6, 99, 2]);
        assert_eq!(read(&window, &bytes), [7.0, 9.0, 11.0, 13.0, 15.0, 17.0]);
        assert_eq!(read(&view(5, &[2, 3], &[0, 0]), &bytes), [5.0; 6]);
        assert_eq!(read(&view(23, &[], &[]), &bytes), [23.0]);
        assert!(read(&view(23, &[3, 0], &[1, 1]), &bytes).is_empty());
    }

    #[test]
    fn bounds() {
        let new = |offset, shape: &[u64], strides: &[u64]| {
            View::new(0, 40, Dtype::F32, offset, shape.to_vec(), strides.to_vec()).map_err(|e| e.to_string())
        };
        assert!(new(0, &[10], &[1]).is_ok());
        assert!(new(1, &[10], &[1]).unwrap_err().contains("element 10 of a storage of 10"));
        assert!(new(0, &[2, 2], &[9, 1]).is_err());
        assert!(new(0, &[2], &[1, 1]).is_err());
        for huge in [&[u64::MAX, u64::MAX][..], &[u64::MAX, 2], &[1 << 40, 1 << 40]] {
            assert!(new(0, huge, &[1, 1]).unwrap_err().contains("2^64"), "{huge:?}");
        }
        assert!(new(u64::MAX, &[2], &[u64::MAX]).unwrap_err().contains("2^64"));
    }

    #[test]
    fn types_and_byte_order() {
        let cases: [(Dtype, Vec<u8>, f32); 10] = [
            (Dtype::F64, (-2.5f64).to_le_bytes().into(), -2.5),
            (Dtype::F32, (-2.5f32).to_le_bytes().into(), -2.5),
            (Dtype::F16, f16::from_f32(-2.5).to_le_bytes().into(), -2.5),
            (Dtype::BF16, bf16::from_f32(-2.5).to_le_bytes().into(), -2.5),
            (Dtype::I64, (-70_000i64).to_le_bytes().into(), -70_000.0),
            (Dtype::I32, (-70_000i32).to_le_bytes().into(), -70_000.0),
            (Dtype::I16, (-700i16).to_le_bytes().into(), -700.0),
            (Dtype::I8, (-7i8).to_le_bytes().into(), -7.0),
            (Dtype::U8, vec![250], 250.0),
            (Dtype::Bool, vec![2], 1.0),
        ];
        for (dtype, mut bytes, want) in cases {
            assert_eq!(bytes.len() as u64, dtype.bytes());
            let view = View::new(0, dtype.bytes(), dtype, 0, vec![], vec![]).unwrap();
            let mut got = [0.0];
            view.read(&bytes, false, 0, &mut got);
            assert_eq!(got, [want], "{}", dtype.name());
            bytes.reverse();
            view.read(&bytes, true, 0, &mut got);
            assert_eq!(got, [want], "{} big-endian", dtype.name());
        }
    }
}
