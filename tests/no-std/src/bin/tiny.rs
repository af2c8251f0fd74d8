//! A program without the standard library that runs the model in its own read-only data: what an appliance would do.
//!
//! Exits with 0 when the text is the one that every build gives, and with the number of the step that failed otherwise.
#![no_std]
#![no_main]

extern crate alloc;

#[path = "../runtime.rs"]
mod runtime;

use core::ops::ControlFlow;

use elleci_core::archive::{Archive, StaticBytes};
use elleci_core::generate::{GenerateOptions, generate};
use elleci_core::inference::Session;
use elleci_core::sampler::{Sampler, SamplerOptions};

// The three libraries that a bare machine would replace: start-up and `abort`, `sqrt` and friends, and what the shipped
// `alloc` names for unwinding.
#[link(name = "c")]
#[link(name = "m")]
#[link(name = "gcc_s")]
unsafe extern "C" {}

static MODEL: StaticBytes<{ include_bytes!("../../../../fixtures/archive/tiny-t5.elleci").len() }> =
    StaticBytes(*include_bytes!("../../../../fixtures/archive/tiny-t5.elleci"));

/// As in elleci-core/tests/committed.rs, where it says why every machine chooses these.
const GREEDY: [u32; 12] = [21, 35, 11, 0, 20, 58, 20, 33, 56, 58, 58, 28];

fn run() -> Result<(), i32> {
    let archive = Archive::open(&MODEL).map_err(|_| 1)?;
    let mut session = Session::new(archive.model()).map_err(|_| 2)?;
    let mut sampler = Sampler::new(SamplerOptions::greedy()).map_err(|_| 3)?;
    let options = GenerateOptions { max_tokens: GREEDY.len(), ..GenerateOptions::default() };
    let mut seen = 0;
    let text = generate(archive.model(), &mut session, &mut sampler, options, &[1, 2, 3], |_| {
        seen += 1;
        ControlFlow::Continue(())
    });
    let text = text.map_err(|_| 4)?;
    if text.tokens == GREEDY && seen == GREEDY.len() { Ok(()) } else { Err(5) }
}

/// Where the C library starts the program.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    run().err().unwrap_or(0)
}
