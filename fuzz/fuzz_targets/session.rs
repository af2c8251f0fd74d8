//! Saved sessions: any bytes, and a sound one that was changed by someone who then made the checksum right.
#![no_main]

use std::sync::OnceLock;

use elleci_core::archive::{AlignedBytes, Archive, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::init::initialise;
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

fn model() -> &'static (Archive<AlignedBytes>, Vec<u8>) {
    static MODEL: OnceLock<(Archive<AlignedBytes>, Vec<u8>)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let tiny = ModelConfig { vocab_size: 50, n_layers: 2, layer_pattern: "SA".into(), ..nano() };
        let bytes = to_bytes(&tiny, &initialise(&tiny, 1), None, PackOptions::default()).unwrap();
        let archive = Archive::open(bytes).unwrap();
        let mut session = Session::new(archive.model()).unwrap();
        session.extend(archive.model(), &[1, 2, 3]).unwrap();
        (archive, session.to_bytes())
    })
}

fn nano() -> ModelConfig {
    let c = ModelConfig::preset("nano").unwrap();
    ModelConfig { d_model: 16, d_inner: 32, head_dim: 16, d_state: 4, ffn_hidden: 24, n_heads: 2, kv_rank: 8, ..c }
}

fuzz_target!(|data: &[u8]| {
    let (archive, sound) = model();
    let _ = Session::from_bytes(archive.model(), data);
    let mut bytes = sound.clone();
    for patch in data.chunks_exact(3) {
        let at = u16::from_le_bytes([patch[0], patch[1]]) as usize % (bytes.len() - 8);
        bytes[at] = patch[2];
    }
    if data.len() % 5 == 4 {
        bytes.truncate(bytes.len() / 2);
    }
    let body = bytes.len() - 8;
    let sum = xxh3_64(&bytes[..body]);
    bytes[body..].copy_from_slice(&sum.to_le_bytes());
    if let Ok(mut session) = Session::from_bytes(archive.model(), &bytes) {
        let _ = session.extend(archive.model(), &[4, 5]);
    }
});
