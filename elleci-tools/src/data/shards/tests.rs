use super::*;
use std::fs;
use std::path::Path;

const HASH: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn options(shard_tokens: u64) -> ShardOptions {
    ShardOptions {
        tokenizer_sha256: HASH.to_string(),
        token_bytes: (0..300).map(|t| if t < 4 { 0 } else { 1 + t % 5 }).collect(),
        end_of_text: 0,
        shard_tokens,
        overwrite: false,
    }
}

/// Document `i`: between 1 and 41 tokens, every third one with a mask.
fn document(i: u32) -> (Vec<u32>, Option<Vec<bool>>) {
    let len = (i * 7) % 41;
    let mut tokens: Vec<u32> = (0..len).map(|j| 4 + (i * 31 + j * 17) % 296).collect();
    tokens.push(0);
    let mask = i.is_multiple_of(3).then(|| (0..tokens.len()).map(|j| !(j + i as usize).is_multiple_of(4)).collect());
    (tokens, mask)
}

fn write(dir: &Path, documents: u32, shard_tokens: u64) -> Index {
    let mut w = ShardWriter::create(dir, options(shard_tokens)).unwrap();
    for i in 0..documents {
        let (tokens, mask) = document(i);
        let split = if i % 10 == 9 { Split::Val } else { Split::Train };
        w.push(split, &tokens, mask.as_deref()).unwrap();
    }
    w.finish().unwrap()
}

#[test]
fn documents_come_back_as_they_went_in() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("set");
    let index = write(&dir, 100, 64);
    assert!(index.train.shards.len() > 10, "several shards");
    assert!(index.train.shards.iter().any(|s| s.mask.is_none()), "a shard without any masked token has no mask");
    let set = ShardSet::open(&dir).unwrap();
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    let mut numbers = [0u64; 2];
    let mut totals = [(0, 0, 0, 0); 2];
    for i in 0..100 {
        let which = usize::from(i % 10 == 9);
        let split = [Split::Train, Split::Val][which];
        set.document(split, numbers[which], &mut tokens, &mut mask).unwrap();
        numbers[which] += 1;
        let (want, want_mask) = document(i);
        assert_eq!(tokens.iter().map(|t| u32::from(*t)).collect::<Vec<_>>(), want);
        assert_eq!(mask, want_mask.unwrap_or(vec![true; want.len()]));
        let bytes = |t: &u16| u64::from(set.token_bytes()[*t as usize]);
        let t = &mut totals[which];
        t.0 += tokens.len() as u64;
        t.1 += mask.iter().filter(|m| **m).count() as u64;
        t.2 += tokens.iter().map(bytes).sum::<u64>();
        t.3 += tokens.iter().zip(&mask).filter(|(_, m)| **m).map(|(t, _)| bytes(t)).sum::<u64>();
    }
    for (split, t) in [Split::Train, Split::Val].into_iter().zip(totals) {
        let s = set.index().split(split);
        assert_eq!((s.tokens, s.target_tokens, s.bytes, s.target_bytes), t);
    }
    let end = set.document(Split::Val, 10, &mut tokens, &mut mask).unwrap_err();
    assert!(end.to_string().contains("no document 10 in split val"), "{end}");
}

#[test]
fn the_same_documents_give_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
    assert_eq!(write(&a, 50, 100), write(&b, 50, 100));
    for file in fs::read_dir(&a).unwrap() {
        let name = file.unwrap().file_name();
        assert_eq!(fs::read(a.join(&name)).unwrap(), fs::read(b.join(&name)).unwrap(), "{name:?}");
    }
    let left: Vec<_> = fs::read_dir(tmp.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "no temporary files stay: {left:?}");
}

#[test]
fn an_abandoned_writer_leaves_nothing_and_a_target_is_not_overwritten_unasked() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("set");
    let mut w = ShardWriter::create(&dir, options(64)).unwrap();
    w.push(Split::Train, &[5, 0], None).unwrap();
    let second = ShardWriter::create(&dir, options(64)).err().unwrap().to_string();
    assert!(second.contains("another process is writing"), "{second}");
    drop(w);
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);

    let old = write(&dir, 3, 64);
    let refused = ShardWriter::create(&dir, options(64)).err().unwrap().to_string();
    assert!(refused.contains("--overwrite"), "{refused}");
    let mut w = ShardWriter::create(&dir, ShardOptions { overwrite: true, ..options(64) }).unwrap();
    w.push(Split::Train, &[5, 0], None).unwrap();
    assert_eq!(ShardSet::open(&dir).unwrap().index(), &old, "the old set stays until the new one is complete");
    w.finish().unwrap();
    assert_eq!(ShardSet::open(&dir).unwrap().index().train.documents, 1);
    fs::write(tmp.path().join("other"), "x").unwrap();
    let other = ShardWriter::create(&tmp.path().join("other"), ShardOptions { overwrite: true, ..options(64) });
    assert!(other.err().unwrap().to_string().contains("not a shard set"));
}

#[test]
fn the_writer_refuses_bad_documents() {
    let tmp = tempfile::tempdir().unwrap();
    let mut w = ShardWriter::create(&tmp.path().join("set"), options(64)).unwrap();
    for (tokens, mask, why) in [
        (vec![5, 300, 0], None, "token 300 is not below vocab_size 300"),
        (vec![5, 6], None, "must end with token 0"),
        (vec![], None, "must end with token 0"),
        (vec![5, 0], Some(vec![true]), "mask of 1 for 2 tokens"),
    ] {
        let e = w.push(Split::Train, &tokens, mask.as_deref()).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    }
    let big = ShardOptions { token_bytes: vec![1; 65_537], ..options(64) };
    let e = ShardWriter::create(&tmp.path().join("big"), big).err().unwrap().to_string();
    assert!(e.contains("vocab_size is 65537"), "{e}");
}

/// Applies `fault` to a good set and expects a message that contains every one of `parts`.
fn expect_fault(fault: impl Fn(&Path), parts: &[&str]) {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("set");
    write(&dir, 40, 64);
    fault(&dir);
    let message = format!("{:#}", ShardSet::open(&dir).unwrap_err());
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

fn edit_index(dir: &Path, from: &str, to: &str) {
    let path = dir.join(INDEX_FILE);
    let json = fs::read_to_string(&path).unwrap();
    assert!(json.contains(from), "{from}");
    fs::write(path, json.replacen(from, to, 1)).unwrap();
}

fn edit_bytes(path: &Path, edit: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn every_fault_is_named() {
    expect_fault(|d| fs::remove_dir_all(d).unwrap(), &["no such directory"]);
    expect_fault(|d| fs::remove_file(d.join(INDEX_FILE)).unwrap(), &["index.json", "cannot read"]);
    let cut = |d: &Path| edit_bytes(&d.join(INDEX_FILE), |b| b.truncate(b.len() / 2));
    expect_fault(cut, &["index.json", "not valid JSON"]);
    expect_fault(|d| edit_index(d, "elleci-shards", "other"), &["index.json", "`format` is other"]);
    expect_fault(|d| edit_index(d, "\"version\": 1", "\"version\": 2"), &["`version` is 2", "version 1"]);
    expect_fault(|d| edit_index(d, "\"vocab_size\": 300", "\"vocab_size\": 70000"), &["`vocab_size` is 70000"]);
    expect_fault(|d| edit_index(d, "\"vocab_size\": 300", "\"vocab_size\": 299"), &["token-bytes.bin", "vocab_size"]);
    expect_fault(|d| edit_index(d, "\"end_of_text\": 0", "\"end_of_text\": 300"), &["`end_of_text` is 300"]);
    expect_fault(|d| edit_index(d, HASH, "abc"), &["tokenizer_sha256"]);
    expect_fault(|d| edit_index(d, "\"tokens\": ", "\"tokens\": 1"), &["index.json", "`train.tokens`"]);
    expect_fault(|d| edit_index(d, "\"documents\"", "\"documented\""), &["index.json", "documented"]);
    expect_fault(|d| edit_index(d, "train-00000.bin", "../train-0.bin"), &["not a plain file name"]);
    expect_fault(|d| fs::remove_file(d.join("val-00000.idx")).unwrap(), &["val-00000.idx", "cannot read"]);
    let cut = |d: &Path| edit_bytes(&d.join("train-00001.bin"), |b| b.truncate(b.len() - 2));
    expect_fault(cut, &["train-00001.bin", "truncated"]);
    for file in ["train-00000.bin", "train-00002.idx", "train-00000.mask", "token-bytes.bin"] {
        let flip = |d: &Path| edit_bytes(&d.join(file), |b| b[9] ^= 0x10);
        expect_fault(flip, &[file, "checksum `xxh3`"]);
    }
}

/// A fault behind a checksum that was made to agree, as a faulty writer would leave it.
fn expect_fault_with_checksum(file: &str, edit: impl Fn(&mut Vec<u8>), parts: &[&str]) {
    let hash = |d: &Path| format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&fs::read(d.join(file)).unwrap()));
    let fault = |d: &Path| {
        let before = hash(d);
        edit_bytes(&d.join(file), &edit);
        edit_index(d, &before, &hash(d));
    };
    expect_fault(fault, parts);
}

#[test]
fn contents_are_checked_beyond_the_checksum() {
    expect_fault_with_checksum(
        "train-00000.bin",
        |b| b[1] = 0xff,
        &["train-00000.bin", "is not below `vocab_size` 300"],
    );
    expect_fault_with_checksum("train-00000.idx", |b| b[0] = 1, &["train-00000.idx", "offsets must grow from 0"]);
    expect_fault_with_checksum("train-00000.idx", |b| b[15] = 1, &["train-00000.idx", "offsets must grow"]);
    let last = |b: &mut Vec<u8>| {
        let n = b.len() - 8;
        b[n] += 1;
    };
    expect_fault_with_checksum("val-00000.idx", last, &["val-00000.idx", "last offset"]);
}

#[test]
fn only_a_shard_set_and_nothing_else_is_replaced() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("set");
    let overwrite = || ShardOptions { overwrite: true, ..options(64) };
    let refused = |parts: &[&str]| {
        let e = ShardWriter::create(&dir, overwrite()).err().unwrap();
        assert!(e.is::<crate::exit::Usage>(), "{e:#}");
        parts.iter().for_each(|part| assert!(e.to_string().contains(part), "`{part}` is not in: {e}"));
    };
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(INDEX_FILE), "{\"weight_map\":{}}").unwrap();
    refused(&["set: not surely a shard set", "`format` is missing"]);
    fs::remove_file(dir.join(INDEX_FILE)).unwrap();

    write(&dir, 30, 64);
    fs::write(dir.join("thesis.txt"), "x").unwrap();
    refused(&["thesis.txt: not a file of the shard set"]);
    fs::remove_file(dir.join("thesis.txt")).unwrap();
    fs::create_dir(dir.join("more")).unwrap();
    refused(&["more: not a file of the shard set"]);
    fs::remove_dir(dir.join("more")).unwrap();

    // What comes while the new set is being made stays, too.
    let mut w = ShardWriter::create(&dir, overwrite()).unwrap();
    w.push(Split::Train, &[5, 0], None).unwrap();
    fs::write(dir.join("thesis.txt"), "x").unwrap();
    assert!(w.finish().unwrap_err().to_string().contains("thesis.txt"));
    fs::remove_file(dir.join("thesis.txt")).unwrap();

    // A removal that was killed is completed by the next writer; what is not a set's is not.
    let old = tmp.path().join(".set.replaced");
    write(&old, 3, 64);
    fs::remove_file(old.join("train-00000.bin")).unwrap();
    let mut w = ShardWriter::create(&dir, overwrite()).unwrap();
    w.push(Split::Train, &[5, 0], None).unwrap();
    w.finish().unwrap();
    assert_eq!(ShardSet::open(&dir).unwrap().index().train.documents, 1);
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    fs::create_dir(&old).unwrap();
    fs::write(old.join("thesis.txt"), "x").unwrap();
    refused(&[".set.replaced: not surely a shard set"]);
}

#[cfg(unix)]
#[test]
fn a_link_is_no_place_for_a_shard_set() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, link) = (tmp.path().join("set"), tmp.path().join("link"));
    write(&dir, 3, 64);
    std::os::unix::fs::symlink(&dir, &link).unwrap();
    let e = ShardWriter::create(&link, ShardOptions { overwrite: true, ..options(64) }).err().unwrap().to_string();
    assert!(e.contains("link: a symbolic link"), "{e}");
    ShardSet::open(&dir).unwrap();
}
