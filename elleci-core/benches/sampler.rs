//! Time to choose a token from the logits of small and larger vocabularies: `cargo bench -p elleci-core --bench sampler`.

use std::time::Instant;

use elleci_core::sampler::{Sampler, SamplerOptions};

/// Of `nano` and of `elleci-1.5b`.
const VOCABULARIES: [usize; 2] = [4096, 32_128];

fn main() {
    // As a trained model's: most tokens far below a few, here by an exponential law.
    let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32;
    let logits: Vec<f32> = (0..32_128).map(|i| -3.0 * (noise(i) + 1e-7).ln() - 8.0).collect();
    println!("{:>22} {:>8} {:>8}", "µs; vocabulary", VOCABULARIES[0], VOCABULARIES[1]);
    let off = SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() };
    for (name, options) in [
        ("greedy", SamplerOptions::greedy()),
        ("defaults", SamplerOptions::default()),
        ("defaults and penalty", SamplerOptions { repetition_penalty: 1.1, ..SamplerOptions::default() }),
        ("temperature alone", off),
        ("top-k 1000", SamplerOptions { top_k: 1000, ..off }),
        ("top-p 0.95", SamplerOptions { top_p: 0.95, ..off }),
        ("min-p 0.05", SamplerOptions { min_p: 0.05, ..off }),
    ] {
        let times = VOCABULARIES.map(|vocabulary| {
            let mut sampler = Sampler::new(options).expect("options have a meaning");
            let logits = &logits[..vocabulary];
            let mut scratch = logits.to_vec();
            let best = (0..50).map(|_| {
                let start = Instant::now();
                for _ in 0..20 {
                    scratch.copy_from_slice(logits);
                    sampler.sample(&mut scratch, &[1, 2, 3, 1]).expect("logits are finite");
                }
                start.elapsed().as_secs_f64() / 20.0
            });
            best.fold(f64::INFINITY, f64::min) * 1e6
        });
        println!("{name:>22} {:8.1} {:8.1}", times[0], times[1]);
    }
}
