//! Any text as a run configuration: refused with a message or accepted, never a panic.
#![no_main]
libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(e) = elleci_tools::train::layers::parse(text) {
        assert!(!format!("{e:#}").is_empty());
    }
});
