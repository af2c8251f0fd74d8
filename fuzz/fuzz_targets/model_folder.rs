//! Any text as `config.json` and any bytes as `model.safetensors`: what stands before the first zero byte is the one, the rest the
//! other. Refused with a message, or a config that every size fits and tensors that can be read.
#![no_main]
use std::path::PathBuf;
use std::sync::OnceLock;

use elleci_tools::checkpoint::tensors::TensorFile;
use elleci_tools::hf;

/// A file that only this process uses, in memory where the system has such a place.
fn scratch() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let shm = PathBuf::from("/dev/shm");
        let dir = if shm.is_dir() { shm } else { std::env::temp_dir() };
        dir.join(format!("elleci-fuzz-{}.safetensors", std::process::id()))
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let cut = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    if let Ok(text) = std::str::from_utf8(&bytes[..cut]) {
        match hf::parse_config(text) {
            Ok(config) => {
                assert_eq!(config.validate(), Ok(()));
                let text = hf::config_json(&config).expect("a config has a JSON form");
                assert_eq!(hf::parse_config(&text).expect("what is written reads back"), config);
            }
            Err(e) => assert!(!format!("{e:#}").is_empty()),
        }
    }
    let Some(file) = bytes.get(cut + 1..) else { return };
    std::fs::write(scratch(), file).expect("a scratch file");
    let file = match TensorFile::open(scratch()) {
        Ok(file) => file,
        Err(e) => return assert!(!format!("{e:#}").is_empty()),
    };
    for (name, entry) in file.entries() {
        let elements: usize = entry.shape.iter().product();
        // Sizes come from the length of the file: what they allocate is bounded by it.
        assert!(elements <= 8 * bytes.len());
        let _ = file.read_floats(name, &entry.shape, &mut vec![0.0; elements]);
        let _ = file.read_integers(name);
        file.bytes(name).expect("a checked range");
    }
});
