//! TensorBoard event files: TFRecord framing around a handful of protobuf fields, written by hand.
//!
//! A record is the payload's length (u64), the masked CRC-32C of these eight bytes, the payload, and its masked CRC-32C, all
//! little-endian. A payload is an `Event` message; the field numbers below are those of `event.proto`,
//! `summary.proto` and `tensor.proto` in TensorFlow. Every record is one `write`, so a killed process leaves at most one
//! torn record, at which TensorBoard stops reading that file. Every process writes a file of its own.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

/// Writes one event file.
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

/// Seconds since 1970, the wall time of events.
pub fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

impl EventWriter {
    /// Starts a new event file in `dir`, which is created. `resumed_at` is the first step that a resumed run will write again: TensorBoard
    /// then drops what earlier files of the directory say about it and later steps.
    ///
    /// # Errors
    /// When the directory or the file cannot be created or written.
    pub fn create(dir: &Path, resumed_at: Option<u64>) -> Result<EventWriter> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create the directory {}", dir.display()))?;
        let now = wall_time();
        let (file, path) = new_file(dir, now as u64)?;
        let mut writer = EventWriter { file, path };
        writer.event(now, 0, |event| event.bytes(3, b"brain.Event:2"))?;
        if let Some(step) = resumed_at {
            // SessionLog { status: START }
            writer.event(now, step, |event| event.message(7, |log| log.varint(1, 1)))?;
        }
        Ok(writer)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One point of the curve `tag`. TensorBoard groups tags by what precedes the first `/`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64, wall_time: f64) -> Result<()> {
        self.event(wall_time, step, |event| {
            event.message(5, |summary| {
                summary.message(1, |v| {
                    v.bytes(1, tag.as_bytes());
                    v.fixed32(2, (value as f32).to_bits());
                });
            });
        })
    }

    /// A text (Markdown) at a step, shown under TensorBoard's tab of that name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn text(&mut self, tag: &str, step: u64, text: &str, wall_time: f64) -> Result<()> {
        const DATA_CLASS_TENSOR: u64 = 2;
        const DT_STRING: u64 = 7;
        self.event(wall_time, step, |event| {
            event.message(5, |summary| {
                summary.message(1, |v| {
                    v.bytes(1, tag.as_bytes());
                    v.message(9, |metadata| {
                        metadata.message(1, |plugin| plugin.bytes(1, b"text"));
                        metadata.varint(4, DATA_CLASS_TENSOR);
                    });
                    v.message(8, |tensor| {
                        tensor.varint(1, DT_STRING);
                        // An empty shape message: a scalar.
                        tensor.message(2, |_| ());
                        tensor.bytes(8, text.as_bytes());
                    });
                });
            });
        })
    }

    fn event(&mut self, wall_time: f64, step: u64, fill: impl FnOnce(&mut Message)) -> Result<()> {
        let mut event = Message::default();
        event.fixed64(1, wall_time.to_bits());
        event.varint(2, step);
        fill(&mut event);
        self.file.write_all(&frame(&event.0)).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// A file name that TensorBoard recognises (by `tfevents`) and orders by time; a number is added until it is new.
fn new_file(dir: &Path, seconds: u64) -> Result<(File, PathBuf)> {
    let process = std::process::id();
    for n in 0..10_000 {
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.elleci.{process}.{n}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(e).with_context(|| format!("cannot create {}", path.display())),
        }
    }
    bail!("{} holds too many event files of this second; remove the old ones", dir.display())
}

/// A TFRecord.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&masked_crc(payload).to_le_bytes());
    out
}

/// CRC-32C, rotated and offset: a checksum of data that holds its own checksum would be weak.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn fixed64(&mut self, field: u64, bits: u64) {
        self.key(field, 1);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }

    fn fixed32(&mut self, field: u64, bits: u32) {
        self.key(field, 5);
        self.0.extend_from_slice(&bits.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, data: &[u8]) {
        self.key(field, 2);
        self.raw_varint(data.len() as u64);
        self.0.extend_from_slice(data);
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Bit by bit, from the polynomial.
    fn crc_reference(data: &[u8]) -> u32 {
        !data.iter().fold(!0, |crc, &byte| {
            (0..8).fold(crc ^ byte as u32, |c, _| if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 })
        })
    }

    fn masked(crc: u32) -> u32 {
        // The low 15 bits move to the top.
        (crc / 0x8000 + crc % 0x8000 * 0x2_0000).wrapping_add(0xa282_ead8)
    }

    /// The payloads of a file, every checksum verified.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut out = vec![];
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(file[8..12].try_into().unwrap()), masked(crc_reference(&file[..8])));
            let (payload, rest) = file[12..].split_at(length);
            assert_eq!(u32::from_le_bytes(rest[..4].try_into().unwrap()), masked(crc_reference(payload)));
            out.push(payload.to_vec());
            file = &rest[4..];
        }
        out
    }

    /// Fields of a message by number: the value of a varint or fixed field as its bits, or the bytes of a nested one.
    fn fields(mut m: &[u8]) -> BTreeMap<u64, (u64, Vec<u8>)> {
        fn varint(m: &mut &[u8]) -> u64 {
            let n = m.iter().position(|b| b & 0x80 == 0).unwrap() + 1;
            let value = m[..n].iter().rev().fold(0, |v, b| v << 7 | (b & 0x7f) as u64);
            *m = &m[n..];
            value
        }
        let mut out = BTreeMap::new();
        while !m.is_empty() {
            let key = varint(&mut m);
            let value = match key & 7 {
                0 => (varint(&mut m), vec![]),
                wire => {
                    let n = match wire {
                        1 => 8,
                        5 => 4,
                        2 => varint(&mut m) as usize,
                        other => panic!("wire type {other}"),
                    };
                    let (data, rest) = m.split_at(n);
                    m = rest;
                    (data.iter().take(8).rev().fold(0, |v, &b| v << 8 | b as u64), data.to_vec())
                }
            };
            assert!(out.insert(key >> 3, value).is_none(), "field {} twice", key >> 3);
        }
        out
    }

    #[test]
    fn crc_is_castagnolis() {
        assert_eq!(crc_reference(b"123456789"), 0xe306_9283, "the check value of CRC-32C");
        assert_eq!(masked_crc(b"123456789"), masked(0xe306_9283));
    }

    #[test]
    fn an_independent_reader_sees_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::create(&dir.path().join("tb"), Some(300)).unwrap();
        w.scalar("train/loss", 300, 4.25, 1.5).unwrap();
        w.text("samples/perché", 1 << 40, &"città ".repeat(100), 2.5).unwrap();
        let events: Vec<_> = records(&std::fs::read(w.path()).unwrap()).iter().map(|e| fields(e)).collect();
        assert_eq!(events.len(), 4);
        assert_eq!(events[0][&3].1, b"brain.Event:2");
        assert_eq!((events[1][&2].0, fields(&events[1][&7].1)[&1].0), (300, 1), "START at the resumed step");
        assert_eq!((f64::from_bits(events[2][&1].0), events[2][&2].0), (1.5, 300));
        let scalar = fields(&fields(&events[2][&5].1)[&1].1);
        assert_eq!(scalar[&1].1, b"train/loss");
        assert_eq!(f32::from_bits(scalar[&2].0 as u32), 4.25);
        assert_eq!(events[3][&2].0, 1 << 40);
        let text = fields(&fields(&events[3][&5].1)[&1].1);
        assert_eq!(text[&1].1, "samples/perché".as_bytes());
        let tensor = fields(&text[&8].1);
        assert_eq!((tensor[&1].0, &tensor[&2].1[..]), (7, &[][..]));
        assert_eq!(tensor[&8].1, "città ".repeat(100).as_bytes());
        assert_eq!(fields(&fields(&text[&9].1)[&1].1)[&1].1, b"text");
    }

    #[test]
    fn every_start_has_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (EventWriter::create(dir.path(), None).unwrap(), EventWriter::create(dir.path(), None).unwrap());
        assert_ne!(a.path(), b.path());
        let blocked = dir.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        let error = format!("{:#}", EventWriter::create(&blocked, None).err().unwrap());
        assert!(error.contains("cannot create the directory") && error.contains("file"), "{error}");
    }
}
