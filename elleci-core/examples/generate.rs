//! The lines that an application needs: open, session, generate with a callback, cancel.
//!
//! `cargo run --release -p elleci-core --example generate -- model.elleci 17 204 9`
//!
//! Core knows no text: tokens go in and come out. `elleci_tools::data::tokenizer` turns text into them and back.

use std::error::Error;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use elleci_core::archive::{AlignedBytes, Archive};
use elleci_core::generate::{GenerateOptions, generate};
use elleci_core::inference::Session;
use elleci_core::sampler::{Sampler, SamplerOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: generate MODEL.elleci TOKEN..")?;
    let prompt = args.map(|t| t.parse()).collect::<Result<Vec<u32>, _>>()?;

    let archive = Archive::open(AlignedBytes::from(&std::fs::read(path)?[..]))?;
    let model = archive.model();
    let mut session = Session::new(model)?;
    let mut sampler = Sampler::new(SamplerOptions { seed: 1, ..SamplerOptions::default() })?;
    let options = GenerateOptions { max_tokens: 64, stop: &[&[0], &[3]], hook: None };
    let deadline = Instant::now() + Duration::from_secs(10);
    let text = generate(model, &mut session, &mut sampler, options, &prompt, |token| {
        println!("{token}");
        // Any condition of the application's own ends the text.
        if Instant::now() < deadline { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    println!("{} tokens: {:?}", text.tokens.len(), text.reason);
    Ok(())
}
