//! Files that are made by a program and committed: they must be what the program makes now.
//!
//! `ELLECI_WRITE_COMMITTED=1 cargo test --release -p elleci-core --test committed` writes them again.

use std::path::{Path, PathBuf};

use elleci_core::archive::{AlignedBytes, Archive, DenseFormat, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::init::initialise;
use elleci_core::ternary::packed::Packing;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn committed(path: &Path, made: &[u8]) {
    if std::env::var_os("ELLECI_WRITE_COMMITTED").is_some() {
        std::fs::write(path, made).unwrap();
    }
    let found = std::fs::read(path).unwrap_or_default();
    assert!(
        found == made,
        "{} is not what is made now: if the change is meant, run\n    ELLECI_WRITE_COMMITTED=1 cargo test --release -p \
         elleci-core --test committed\nand commit it",
        path.display()
    );
}

/// `include/elleci.h` declares what `src/capi` defines.
#[test]
fn the_header_of_the_c_abi() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(package.join("cbindgen.toml")).unwrap();
    // It follows the modules.
    let builder = cbindgen::Builder::new().with_config(config).with_src(package.join("src/capi/mod.rs"));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    committed(&package.join("include/elleci.h"), &made);
}

/// A model of three layers and odd sizes.
fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        d_model: 40,
        n_layers: 3,
        layer_pattern: "SAS".into(),
        max_seq_len: 32,
        n_heads: 3,
        kv_rank: 20,
        d_nope: 6,
        d_rope: 4,
        d_v: 10,
        d_inner: 48,
        head_dim: 16,
        d_state: 12,
        ffn_hidden: 88,
        ..ModelConfig::preset("nano").unwrap()
    }
}

/// What the tests in C and the program without `std` run. Weights are random and the tokenizer is a stub.
#[test]
fn the_tiny_archives() {
    let made = |seed, packing, dense| {
        let options = PackOptions { packing, sparse: packing, dense };
        to_bytes(&tiny(), &initialise(&tiny(), seed), Some(b"{\"stub\":true}"), options).unwrap()
    };
    let folder = root().join("fixtures/archive");
    committed(&folder.join("tiny-t5.elleci"), made(T5_SEED, Packing::T5, DenseFormat::Int8).as_ref());
    committed(&folder.join("tiny-i2.elleci"), made(T5_SEED + 1, Packing::I2, DenseFormat::F16).as_ref());
}

/// Of the first forty, the one whose choices below are the clearest.
const T5_SEED: u64 = 24;
/// What `tiny-t5.elleci` says, greedily, after 1 2 3: the C test and the program without `std` know it, too.
const GREEDY: [u32; 12] = [21, 35, 11, 0, 20, 58, 20, 33, 56, 58, 58, 28];

/// Builds without SIMD, and other processors, add floats in other orders. Their rounding may flip an int8 code of some
/// activation, which moves logits by a few hundredths of their spread; so that nobody's choice flips with it, every choice above is
/// clear by a tenth.
#[test]
fn the_greedy_text_of_the_tiny_archive() {
    let bytes = std::fs::read(root().join("fixtures/archive/tiny-t5.elleci")).unwrap();
    let archive = Archive::open(AlignedBytes::from(&bytes[..])).unwrap();
    let (text, lead) = greedy(&archive);
    assert_eq!(text, GREEDY);
    assert!(lead > 0.1, "{lead}");
}

/// The greedy text, and the least lead of a choice over the second best in standard deviations of the logits.
fn greedy(archive: &Archive<AlignedBytes>) -> (Vec<u32>, f32) {
    let mut session = Session::new(archive.model()).unwrap();
    let (mut text, mut least, mut feed) = (vec![], f32::INFINITY, vec![1, 2, 3]);
    for _ in 0..GREEDY.len() {
        let logits = session.extend(archive.model(), &feed).unwrap();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let n = logits.len() as f32;
        let mean = logits.iter().sum::<f32>() / n;
        let spread = (logits.iter().map(|l| (l - mean).powi(2)).sum::<f32>() / n).sqrt();
        least = least.min((logits[order[0]] - logits[order[1]]) / spread);
        feed = vec![order[0] as u32];
        text.push(order[0] as u32);
    }
    (text, least)
}
