use alloc::format;
use alloc::vec;

use super::*;
use crate::init::initialise;
use crate::params::Params;

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 37,
        d_model: 24,
        n_layers: 4,
        n_heads: 2,
        kv_rank: 10,
        d_nope: 6,
        d_rope: 4,
        d_v: 5,
        d_inner: 36,
        head_dim: 12,
        d_state: 7,
        ffn_hidden: 22,
        max_seq_len: 32,
        ..ModelConfig::preset("nano").unwrap()
    }
}

fn params() -> Params {
    initialise(&tiny(), 3)
}

fn archive(options: PackOptions) -> AlignedBytes {
    to_bytes(&tiny(), &params(), Some(b"{\"tok\": 1}"), options).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let params = params();
    for packing in Packing::ALL {
        for dense in DenseFormat::ALL {
            let options = PackOptions { packing, sparse: packing, dense };
            let archive = Archive::open(archive(options)).unwrap();
            let model = archive.model();
            let planned = ArchiveWriter::new(&tiny(), Some(b"{\"tok\": 1}"), options).unwrap().file_bytes();
            assert_eq!(planned, Some(model.archive_bytes()), "the size is known before");
            assert_eq!(model.config(), &tiny());
            assert_eq!(model.tokenizer(), Some(&b"{\"tok\": 1}"[..]));
            assert_eq!(model.tensors().count(), params.layout().params().len());
            for (i, (p, info)) in params.layout().params().iter().zip(model.tensors()).enumerate() {
                assert_eq!((info.name, info.shape), (&p.name[..], &p.shape[..]));
                assert_eq!(info.offset % ALIGNMENT, 0);
                let (mut read, trained) = (vec![0.0; p.len()], &params[Id(i)]);
                model.read(Id(i), &mut read).unwrap();
                match info.format {
                    Format::Ternary(_) => {
                        let gamma = info.gamma.unwrap();
                        let code = |w: f32| gamma * crate::ternary::ternary_code(w, gamma) as f32;
                        assert!(read.iter().zip(trained).all(|(a, w)| *a == code(*w)), "{}", p.name);
                    }
                    Format::Dense(DenseFormat::F32) | Format::Floats => assert_eq!(read, trained, "{}", p.name),
                    Format::Dense(_) => {
                        // Half a step of int8 is amax/254; binary16 and bf16 are finer.
                        let amax = trained.iter().fold(0.0f32, |a, w| a.max(w.abs()));
                        assert!(read.iter().zip(trained).all(|(a, w)| (a - w).abs() <= amax / 250.0), "{}", p.name);
                    }
                }
            }
        }
    }
}

#[test]
fn tied_embeddings_are_stored_once() {
    let config = ModelConfig { tie_embeddings: true, ..tiny() };
    let bytes = to_bytes(&config, &initialise(&config, 3), None, PackOptions::default()).unwrap();
    let archive = Archive::open(&bytes).unwrap();
    assert!(archive.model().tokenizer().is_none());
    let planned = ArchiveWriter::new(&config, None, PackOptions::default()).unwrap().file_bytes();
    assert_eq!(planned, Some(bytes.as_ref().len()));
    assert!(archive.model().tensors().all(|t| t.name != "lm_head.weight"));
}

#[test]
fn the_same_model_gives_the_same_bytes() {
    assert_eq!(archive(PackOptions::default()).as_ref(), archive(PackOptions::default()).as_ref());
}

/// A file of two halves of one model's archive, cut anywhere.
#[test]
fn every_truncation_and_extension_is_refused() {
    let whole = archive(PackOptions::default());
    let len = whole.as_ref().len();
    for cut in 0..len {
        let error = Archive::open(AlignedBytes::from(&whole.as_ref()[..cut])).unwrap_err();
        let expected = if cut < 64 { 64 } else { len as u64 };
        match cut {
            0 => assert_eq!(error, ArchiveError::NotAnArchive),
            _ => assert_eq!(error, ArchiveError::Truncated { expected, found: cut as u64 }, "{cut}"),
        }
    }
    let mut longer = whole.clone();
    longer.extend_from_slice(&[0]);
    let sizes = ArchiveError::TrailingBytes { expected: len as u64, found: len as u64 + 1 };
    assert_eq!(Archive::open(longer).unwrap_err(), sizes);
}

/// Any flipped bit is found: on opening, or when the row of the embedding that it is in is used.
#[test]
fn every_flipped_bit_is_found() {
    let mut bytes = archive(PackOptions { dense: DenseFormat::F16, ..PackOptions::default() });
    let embedding = {
        let archive = Archive::open(&bytes).unwrap();
        let section = &archive.index.sections[archive.index.layout.tok_emb().0];
        section.data.start..section.data.start + 37 * 24 * 2
    };
    let mut row = vec![0.0; 24];
    for at in 0..bytes.as_ref().len() {
        let bit = 1 << (at % 8);
        bytes.as_mut_slice()[at] ^= bit;
        match Archive::open(&bytes) {
            Err(_) => assert!(!embedding.contains(&at)),
            Ok(archive) => {
                assert!(embedding.contains(&at), "a flipped bit at {at} was not found");
                let (token, model) = ((at - embedding.start) / 48, archive.model());
                let tensor = String::from("tok_emb.weight");
                let error = model.row(model.layout().tok_emb(), token, &mut Vec::new(), &mut row).unwrap_err();
                assert_eq!(error, ArchiveError::DamagedRow { tensor, row: token });
            }
        }
        bytes.as_mut_slice()[at] ^= bit;
    }
}

/// A reader of rows gives what the bytes hold, is verified like them, and may fail.
#[test]
fn rows_that_are_read() {
    for dense in DenseFormat::ALL {
        let bytes = archive(PackOptions { dense, ..PackOptions::default() });
        let plain = Archive::open(&bytes).unwrap();
        let id = plain.model().layout().tok_emb();
        let section = plain.index.sections[id.0].data.clone();
        let row_of = |archive: &Archive<&AlignedBytes>, row| {
            let mut to = vec![0.0; 24];
            archive.model().row(id, row, &mut Vec::new(), &mut to).map(|()| to)
        };
        let calls = Arc::new(core::sync::atomic::AtomicUsize::new(0));
        let (copy, counter) = (bytes.as_ref().to_vec(), calls.clone());
        let read = Archive::open(&bytes).unwrap().with_row_reader(move |at, to| {
            counter.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
            assert!(section.contains(&at) && to.len() <= section.end - at);
            to.copy_from_slice(&copy[at..at + to.len()]);
            true
        });
        let fails = Archive::open(&bytes).unwrap().with_row_reader(|_, _| false);
        let wrong = Archive::open(&bytes).unwrap().with_row_reader(|_, to| {
            to.fill(1);
            true
        });
        for row in [0, 5, 36] {
            let want = row_of(&plain, row).unwrap();
            assert_eq!(row_of(&read, row).unwrap(), want, "{dense:?}");
            assert_eq!(row_of(&fails, row).unwrap(), want, "{dense:?}");
            let tensor = String::from("tok_emb.weight");
            assert_eq!(row_of(&wrong, row).unwrap_err(), ArchiveError::DamagedRow { tensor, row });
        }
        assert_eq!(calls.load(core::sync::atomic::Ordering::Relaxed), 6);
    }
}

/// Rewrites the header's checksum and the prelude's, as someone who means harm would.
fn forge(bytes: &mut AlignedBytes, change: impl FnOnce(&mut [u8])) {
    let prelude = Prelude::read(bytes.as_ref()).unwrap();
    let file = bytes.as_mut_slice();
    change(&mut file[PRELUDE_BYTES..prelude.sections_start()]);
    let header_checksum = checksum(&file[PRELUDE_BYTES..prelude.sections_start()]);
    file[..PRELUDE_BYTES].copy_from_slice(&Prelude { header_checksum, ..prelude }.to_bytes());
}

/// With checksums made right again, a changed header byte is refused for what it says, or says something harmless.
#[test]
fn forged_headers_never_panic() {
    let whole = archive(PackOptions::default());
    let header = Prelude::read(whole.as_ref()).unwrap().sections_start() - PRELUDE_BYTES;
    let mut refused = 0;
    for at in 0..header {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = whole.clone();
            forge(&mut bytes, |h| h[at] ^= flip);
            match Archive::open(&bytes) {
                Err(_) => refused += 1,
                Ok(archive) => archive.model().tensors().for_each(|t| assert!(t.bytes > 0)),
            }
        }
    }
    // Most of the header is names, sizes and offsets; the rest is padding, the tokenizer's text, γ and eps.
    assert!(refused > header, "{refused} of {}", 3 * header);
}

#[test]
fn faults_are_named() {
    let whole = archive(PackOptions::default());
    let text = |e: ArchiveError| format!("{e}");
    let mut other = whole.clone();
    other.as_mut_slice()[8] = 9;
    assert_eq!(Archive::open(&other).unwrap_err(), ArchiveError::Version(9));
    assert!(text(ArchiveError::Version(9)).contains("version 9"));
    for at in [12, 15, 40, 55] {
        let mut other = whole.clone();
        other.as_mut_slice()[at] = 1;
        let sum = checksum(&other.as_ref()[..56]);
        other.as_mut_slice()[56..64].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Archive::open(&other).unwrap_err(), ArchiveError::Reserved, "{at}");
    }
    assert_eq!(Archive::open(b"not an archive of ours".to_vec().leak()).err().map(|_| ()), Some(()));
    let mut shifted = AlignedBytes::zeroed(8);
    shifted.extend_from_slice(whole.as_ref());
    assert_eq!(Archive::open(&shifted.as_ref()[8..]).unwrap_err(), ArchiveError::Misaligned);
    let mut bytes = whole.clone();
    let last = bytes.as_ref().len() - 64;
    bytes.as_mut_slice()[last] ^= 1;
    assert_eq!(Archive::open(&bytes).unwrap_err(), ArchiveError::Damaged("lm_head.weight".into()));
}
