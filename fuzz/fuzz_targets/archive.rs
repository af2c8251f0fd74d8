//! The archive reader: any bytes, and a sound archive whose header was changed by someone who then made the checksums right.
#![no_main]

use std::sync::OnceLock;

use elleci_core::archive::{AlignedBytes, Archive, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::Id;
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

fn sound() -> &'static AlignedBytes {
    static ARCHIVE: OnceLock<AlignedBytes> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let tiny = ModelConfig {
            vocab_size: 19,
            d_model: 8,
            n_layers: 2,
            layer_pattern: "SA".into(),
            n_heads: 2,
            kv_rank: 6,
            d_nope: 4,
            d_rope: 2,
            d_v: 3,
            d_inner: 12,
            head_dim: 6,
            d_state: 5,
            ffn_hidden: 10,
            max_seq_len: 16,
            ..ModelConfig::preset("nano").unwrap()
        };
        to_bytes(&tiny, &initialise(&tiny, 1), Some(b"{}"), PackOptions::default()).unwrap()
    })
}

fn open(bytes: AlignedBytes) {
    let Ok(archive) = Archive::open(bytes) else { return };
    let model = archive.model();
    for (i, param) in model.layout().params().iter().enumerate() {
        let _ = model.read(Id(i), &mut vec![0.0; param.len()]);
    }
}

fuzz_target!(|data: &[u8]| {
    open(AlignedBytes::from(data));
    // Patches of three bytes each: place and value.
    let mut bytes = sound().clone();
    let file = bytes.as_mut_slice();
    let header = 64 + u64::from_le_bytes(file[16..24].try_into().unwrap()) as usize;
    let header = header.next_multiple_of(64);
    for patch in data.chunks_exact(3) {
        let at = u16::from_le_bytes([patch[0], patch[1]]) as usize % header;
        file[at] = patch[2];
    }
    let sum = xxh3_64(&file[64..header]);
    file[32..40].copy_from_slice(&sum.to_le_bytes());
    let sum = xxh3_64(&file[..56]);
    file[56..64].copy_from_slice(&sum.to_le_bytes());
    open(bytes);
});
