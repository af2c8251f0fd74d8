//! elleci-core without the standard library: its mathematics and its C ABI in a static library.
#![no_std]

extern crate alloc;

mod probe;
mod runtime;

/// Runs the probe; called by `main.c`.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_probe(out: &mut probe::Probe) {
    *out = probe::run();
}

/// The C ABI has its symbols in this library because it is named here.
pub use elleci_core::capi::elleci_abi_version;
