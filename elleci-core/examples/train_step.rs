//! Times the CPU backend's training step: forward, backward, clip and AdamW, on random tokens.
//!
//! ```text
//! cargo run --release -p elleci-core --example train_step -- --preset nano --batch 8 --seq 256 --threads 2 --steps 5
//! ```
//! Prints one JSON line like the `bench` verb of `reference/elleci_torch.py`.

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::memory::work_per_token;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::ops::head::HeadPrecision;
use elleci_core::optim::{AdamW, AdamWConfig, StatePrecision, StepRates, norm};
use elleci_core::params::Params;
use elleci_core::ternary::GradPrecision;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str, default: &str| {
        let at = args.iter().position(|a| a == name);
        at.and_then(|i| args.get(i + 1).cloned()).unwrap_or_else(|| default.to_string())
    };
    let number = |name: &str, default: &str| value(name, default).parse::<usize>().expect(name);
    let mut config = ModelConfig::preset(&value("--preset", "nano")).expect("--preset");
    config.layer_pattern = value("--pattern", &config.layer_pattern);
    let (batch, seq, threads, steps) =
        (number("--batch", "8"), number("--seq", "256"), number("--threads", "2"), number("--steps", "5"));
    let checkpointing =
        if args.iter().any(|a| a == "--checkpoint") { Checkpointing::EveryLayer } else { Checkpointing::None };
    let gradients = match value("--gradients", "int16").as_str() {
        "int16" => GradPrecision::Int16,
        "f32" => GradPrecision::Float32,
        other => panic!("--gradients {other}: int16 or f32"),
    };
    let head = match value("--head", "int16").as_str() {
        "int16" => HeadPrecision::Int16,
        "f32" => HeadPrecision::Float32,
        other => panic!("--head {other}: int16 or f32"),
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    pool.install(|| {
        let mut model = Model::new(config.clone(), initialise(&config, 0)).expect("a preset");
        let layout = model.layout().clone();
        let mut ws = Workspace::new(&config, batch, seq, checkpointing).with_grad_precision(gradients).with_head_precision(head);
        let mut grads = Params::zeros(layout.clone());
        let mut adamw = AdamW::new(layout.clone(), AdamWConfig::default(), StatePrecision::F32);
        let n = batch * seq;
        let token = |i: usize| ((i as u64).wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 33) as u32 % config.vocab_size as u32;
        let tokens: Vec<u32> = (0..n + 1).map(token).collect();
        let weights = vec![1.0f32; n];
        let batch = Batch { batch, seq, tokens: &tokens[..n], targets: &tokens[1..], weights: &weights };
        let mut times = Vec::new();
        let mut loss = 0.0;
        for step in 0..steps + 2 {
            let start = Instant::now();
            grads.clear();
            loss = model.loss_and_grad(&mut ws, &batch, 1.0 / n as f32, &mut grads).expect("a fitting batch") / n as f64;
            let t1 = start.elapsed();
            let factor = norm::clip_factor(norm::global_norm(&grads), 1.0);
            let rates = StepRates { lr_of: &|_| 1e-3, weight_decay: 0.1, grad_scale: factor };
            model.update(|params| adamw.step(params, &grads, &rates));
            if step >= 2 {
                times.push(start.elapsed().as_secs_f64());
            }
            if std::env::var("VERBOSE").is_ok() { eprintln!("grad {t1:?} total {:?}", start.elapsed()); }
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let gflops = work_per_token(&config, seq).float_macs * 2e-9 * n as f64 / median;
        println!(
            "{{\"tokens_per_s\": {:.1}, \"step_s\": {median:.5}, \"best_s\": {:.5}, \"float_gflop_s\": {gflops:.1}, \"loss\": {loss:.4}, \"threads\": {threads}}}",
            n as f64 / median, times[0]
        );
    });
}
