//! The reader against files that PyTorch wrote (fixtures/pth, made by make.py there) and against hostile ones.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::PathBuf;

use serde_json::Value;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/pth").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn open(bytes: &[u8]) -> Result<Pth<&[u8]>, String> {
    Pth::open(bytes).map_err(|e| format!("{e:#}"))
}

fn refusal(bytes: &[u8]) -> String {
    open(bytes).err().expect("must be refused")
}

fn values<B: AsRef<[u8]>>(file: &Pth<B>, tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.view.elements() as usize];
    file.read(tensor, 0, &mut out);
    out
}

fn expected_values(value: &Value) -> Vec<f32> {
    let number = |v: &Value| match v.as_str() {
        Some(text) => text.parse().unwrap(),
        None => v.as_f64().unwrap() as f32,
    };
    value["values"].as_array().unwrap().iter().map(number).collect()
}

/// Every name, type, shape and value is what PyTorch says.
#[test]
fn files_that_torch_wrote() {
    let all: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(&fixture("expected.json")).unwrap();
    assert_eq!(all.len(), 12);
    for (name, tensors) in all {
        let bytes = fixture(&name);
        let file = open(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(file.tensors().len(), tensors.len(), "{name}");
        for tensor in file.tensors() {
            let want = &tensors[&tensor.name];
            assert_eq!(tensor.view.dtype().name(), want["dtype"], "{name} {}", tensor.name);
            let shape: Vec<u64> = want["shape"].as_array().unwrap().iter().map(|s| s.as_u64().unwrap()).collect();
            assert_eq!(tensor.view.shape(), shape, "{name} {}", tensor.name);
            let bits =
                |v: Vec<f32>| v.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect::<Vec<_>>();
            assert_eq!(bits(values(&file, tensor)), bits(expected_values(want)), "{name} {}", tensor.name);
        }
        let sums = file.verify(&mut |_| Ok(())).unwrap();
        assert_eq!(sums == Checksums::Absent, name == "no_crc.pth" || name.starts_with("legacy"), "{name}");
        assert_eq!(file.is_big_endian(), name == "big_endian.pth");
    }
}

#[test]
fn models_in_files() {
    let weights: BTreeMap<String, Value> = serde_json::from_slice(&fixture("model.json")).unwrap();
    for (name, averaged, extra) in [
        ("model.pth", &[false][..], 0.0),
        ("model_reference.pth", &[false], 0.0),
        ("model_average.pth", &[true], 0.0),
        // The running mean of this file is the weights plus one.
        ("training.pth", &[false, true], 1.0),
    ] {
        let bytes = fixture(name);
        let file = open(&bytes).unwrap();
        let roots = Root::all(file.tensors()).unwrap();
        assert_eq!(roots.iter().map(|r| r.averaged).collect::<Vec<_>>(), averaged, "{name}");
        for root in roots {
            assert_eq!(root.tensors.keys().collect::<Vec<_>>(), weights.keys().collect::<Vec<_>>(), "{name}");
            let add = if root.averaged { extra } else { 0.0 };
            for (tensor, &index) in &root.tensors {
                let want: Vec<f32> = expected_values(&weights[tensor]).iter().map(|v| v + add).collect();
                assert_eq!(values(&file, &file.tensors()[index]), want, "{name} {tensor}");
            }
        }
    }
}

#[test]
fn other_formats_are_named() {
    for (bytes, reason) in [
        (fixture("refused_module.pth"), "torch.nn.modules.linear.Linear"),
        (fixture("refused_script.pth"), "TorchScript"),
        (fixture("refused_tar.pth"), "tar archive"),
        (vec![], "empty"),
        (b"\x10\0\0\0\0\0\0\0{\"a\":{}}".to_vec(), "safetensors"),
        (b"GGUF....".to_vec(), "GGUF"),
        (b"hello".to_vec(), "not a PyTorch file"),
        (b"\x80\x02}.".to_vec(), "torch.save did not write"),
    ] {
        let message = refusal(&bytes);
        assert!(message.contains(reason), "{message}");
    }
}

/// Whatever opens must also read and verify or be refused, without a panic.
fn exercise(bytes: &[u8]) -> bool {
    let Ok(file) = Pth::open(bytes) else { return false };
    let mut out = vec![0.0; 64];
    for tensor in file.tensors() {
        let n = (tensor.view.elements() as usize).min(out.len());
        file.read(tensor, 0, &mut out[..n]);
        file.read(tensor, tensor.view.elements() - n as u64, &mut out[..n]);
    }
    let _ = Root::all(file.tensors());
    assert!(!describe_misfit(file.tensors()).is_empty());
    file.verify(&mut |_| Ok(())).is_ok()
}

#[test]
fn every_truncation_is_refused() {
    for name in ["views.pth", "legacy_views.pth", "nested.pth", "model.pth"] {
        let bytes = fixture(name);
        for length in 0..bytes.len() {
            assert!(open(&bytes[..length]).is_err(), "{name} cut to {length}");
        }
        assert!(exercise(&bytes));
    }
}

/// Every byte with every bit, and all of them, flipped: refused, or the same tensors with a checksum that matches (padding, dates),
/// never a panic. Old files carry no checksums: there only the panic is excluded.
#[test]
fn every_flipped_byte() {
    for name in ["views.pth", "legacy_views.pth", "nested.pth"] {
        let whole = fixture(name);
        let original = open(&whole).unwrap();
        let before: Vec<_> = original.tensors().iter().map(|t| (t.name.clone(), values(&original, t))).collect();
        let mut bytes = whole.clone();
        for at in 0..bytes.len() {
            for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
                bytes[at] ^= flip;
                if exercise(&bytes) && !name.starts_with("legacy") {
                    let file = open(&bytes).unwrap();
                    let after: Vec<_> = file.tensors().iter().map(|t| (t.name.clone(), values(&file, t))).collect();
                    assert_eq!(after, before, "{name}: byte {at} ^ {flip:#x}");
                }
                bytes[at] ^= flip;
            }
        }
    }
}

/// A zip archive of records, each stored or, for a bomb, deflated by someone else's words.
fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in records {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn pickle(program: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", &[b"\x80\x02", program].concat()), ("a/data/0", &[0; 16])])
}

/// `{"w": tensor}` with a given storage length, offset, sizes and strides.
fn tensor_pickle(storage: i32, offset: i32, size: &[i32], stride: &[i32]) -> Vec<u8> {
    let int = |n: i32| [&b"J"[..], &n.to_le_bytes()].concat();
    let tuple = |items: &[i32]| [&b"("[..], &items.iter().flat_map(|&n| int(n)).collect::<Vec<_>>(), b"t"].concat();
    let mut p =
        b"}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu".to_vec();
    p.extend([int(storage), b"tQ".to_vec(), int(offset), tuple(size), tuple(stride), b"\x89}tRs.".to_vec()].concat());
    p
}

#[test]
fn small_pickles_by_hand() {
    let bytes = pickle(&tensor_pickle(4, 1, &[3], &[1]));
    let file = open(&bytes).unwrap();
    assert_eq!(file.tensors()[0].name, "w");
    assert_eq!(values(&file, &file.tensors()[0]), [0.0; 3]);
    for (program, reason) in [
        (tensor_pickle(4, 2, &[3], &[1]), "element 4 of a storage of 4"),
        (tensor_pickle(5, 0, &[3], &[1]), "has 16 bytes where the pickle says 20"),
        (tensor_pickle(-4, 0, &[3], &[1]), "negative length"),
        (tensor_pickle(4, -1, &[3], &[1]), "negative offset"),
        (tensor_pickle(4, 0, &[-3], &[1]), "negative size"),
        (tensor_pickle(4, 0, &[3], &[1, 1]), "1 sizes and 2 strides"),
        (tensor_pickle(4, 0, &[i32::MAX; 3], &[0; 3]), "2^64"),
        (tensor_pickle(4, 0, &[1; 17], &[1; 17]), "17 dimensions"),
        // A view of one element, two thousand million times.
        (tensor_pickle(4, 0, &[i32::MAX], &[0]), "over and over"),
    ] {
        let message = refusal(&pickle(&program));
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn hostile_pickles_are_refused() {
    let deep = [vec![b']'; 300_000], vec![b'a'; 299_999], b".".to_vec()].concat();
    // Each dictionary holds the one before twice: 2^40 ways to the innermost.
    let mut laughs = b"}q\x00".to_vec();
    for level in 1..40u8 {
        laughs.extend([b"0}(U\x01ah", &[level - 1][..], b"U\x01bh", &[level - 1], b"uq", &[level]].concat());
    }
    let laughs = [laughs, b".".to_vec()].concat();
    // One list of many pairs, made into a dictionary again and again.
    let pair = b"U\x01aN\x86";
    let pairs = [&b"]("[..], &pair.repeat(100_000), b"eq\x00"].concat();
    let pairs =
        [pairs, b"ccollections\nOrderedDict\nq\x01".to_vec(), b"h\x01h\x00\x85R".repeat(100_000), b".".to_vec()]
            .concat();
    for (program, reason) in [
        (&b"cos\nsystem\nU\x08touch /xx\x85R."[..], "`os.system`"),
        (b"cposix\nsystem\nU\x02ls\x85R.", "`posix.system`"),
        (b"c__builtin__\neval\nU\x011\x85R.", "`__builtin__.eval`"),
        (b"cbuiltins\nexec\nU\x011\x85R.", "`builtins.exec`"),
        (b"cbuiltins\ngetattr\n.", "`builtins.getattr`"),
        (b"ctorch.hub\nload\n.", "`torch.hub.load`"),
        (b"ctorch\nload\n.", "`torch.load`"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "does not take"),
        (b"c__main__\nModel\n)\x81.", "code that is not run"),
        // STACK_GLOBAL.
        (b"\x8c\x02os\x8c\x06system\x93.", "`os.system`"),
        (b"ios\nsystem\n.", "INST"),
        (b"(ctorch\nSize\no.", "OBJ"),
        (b"\x82\x01.", "EXT"),
        (b"Pos.system\n.", "PERSID"),
        (b"I1\n.", "text protocols"),
        (b"\x97.", "out-of-band"),
        (b"N)R.", "no function"),
        (b"U\x01a)R.", "no function"),
        (b"}}}.", "left on the stack"),
        (b".", "missing on the stack"),
        (b"(.", "missing on the stack"),
        (b"h\x05.", "memo 5 is empty"),
        (b"X\xff\xff\xff\xffabc.", "ends early"),
        (b"B\xff\xff\xff\x7fabc.", "ends early"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "ends early"),
        (b"\x8b\xff\xff\xff\x7f.", "ends early"),
        (b"U\x01aQ.", "persistent id"),
        (b"}U\x01as.", "missing on the stack"),
        (b"}(U\x01au.", "without a value"),
        (b"NNa.", "items for something"),
        (b"]NNs.", "no dictionary"),
        (b"N]b.", "BUILD"),
        (b"NNNN", "ends early"),
        (&deep, "nested more than"),
        (&laughs, "nested more than"),
        (&pairs, "objects"),
        (&b"0".repeat(10), "missing on the stack"),
        (&b"]".repeat(1_200_000), "objects"),
    ] {
        let message = refusal(&pickle(program));
        let shown = String::from_utf8_lossy(&program[..program.len().min(40)]);
        assert!(message.contains(reason), "{shown:?}: {message}");
        // The same program at the start of an old file.
        assert!(open(&[b"\x80\x02", program].concat()).is_err());
    }
    // Shallow, but wide: each level holds the one before a thousand times.
    let mut wide = b"]q\x00".to_vec();
    for level in 1..10u8 {
        wide.extend([&b"0]("[..], &[b'h', level - 1].repeat(1000), b"eq", &[level]].concat());
    }
    let message = refusal(&pickle(&[wide, b".".to_vec()].concat()));
    assert!(message.contains("too often"), "{message}");
}

#[test]
fn hostile_archives_are_refused() {
    let good = tensor_pickle(4, 0, &[4], &[1]);
    let program = [b"\x80\x02", &good[..]].concat();
    let whole = archive(&[("a/data.pkl", &program), ("a/data/0", &[0; 16])]);
    assert!(exercise(&whole));
    for (records, reason) in [
        (vec![("a/data/0", &[0; 16][..])], "without data.pkl"),
        (vec![("a/data.pkl", &program[..]), ("b/data.pkl", &program)], "2 data.pkl"),
        (vec![("a/data.pkl", &program[..])], "storage `0` is missing"),
        (vec![("a/data.pkl", &program[..]), ("b/data/0", &[0; 16])], "storage `0` is missing"),
        (vec![("a/data.pkl", &program[..]), ("a/data/0", &[0; 15])], "has 15 bytes"),
        (vec![("a/data.pkl", &program[..]), ("a/data/0", &[0; 16]), ("a/byteorder", b"middle")], "byteorder"),
    ] {
        let message = refusal(&archive(&records));
        assert!(message.contains(reason), "{message}");
    }
    // Compression, by the method that the central directory names: deflate in place of stored.
    let central = whole.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    let mut deflated = whole.clone();
    deflated[central + 10] = 8;
    assert!(refusal(&deflated).contains("compressed"), "{}", refusal(&deflated));
    // A record said to be larger than the file, and one that claims another's bytes.
    let mut huge = whole.clone();
    huge[central + 20..central + 28].fill(0x7f);
    assert!(open(&huge).is_err());
    let mut overlap = whole.clone();
    let first = whole.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let start: Vec<u8> = whole[first + 42..first + 46].to_vec();
    overlap[central + 42..central + 46].copy_from_slice(&start);
    assert!(open(&overlap).is_err());
}
