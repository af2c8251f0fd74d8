//! Prints the memory plan of a preset: `cargo run --release -p elleci-cuda --example plan -- elleci-1.5b 1 1024`.
//! The arguments are the preset, sequences of a micro-batch, and tokens of a sequence.

use elleci_core::config::ModelConfig;
use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_cuda::arena::Use;
use elleci_cuda::ops::Products;
use elleci_cuda::ops::product::Gemm;
use elleci_cuda::plan::{Options, Plan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let preset = args.next().unwrap_or_else(|| "elleci-1.5b".into());
    let mut size = |default: usize| args.next().map_or(Ok(default), |a| a.parse::<usize>());
    let (batch, seq) = (size(1)?, size(1024)?);
    let config = ModelConfig::preset(&preset)?;
    println!("{preset}, {batch} x {seq}, checkpointing of every layer, 8-bit states; GiB");
    let uses = [Use::Weights, Use::Ternary, Use::Gradients, Use::Optimizer, Use::Activations, Use::Scratch];
    for bf16_masters in [true, false] {
        let options = Options {
            batch,
            seq,
            whole_step: true,
            checkpointing: Checkpointing::EveryLayer,
            bf16_masters,
            bf16_gradients: true,
            states: StatePrecision::Block8,
            products: Products::Bf16,
            unpacked: false,
            gemm: Gemm::Library,
            bf16_stream: false,
            average: false,
            guard: 0,
        };
        let plan = Plan::new(&config, options)?;
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let parts: Vec<String> = uses.map(|u| format!("{u:?} {:.3}", gib(plan.arena.bytes_of(u)))).into();
        let masters = if bf16_masters { "bf16" } else { "float32" };
        println!("{masters} masters: {:.3} = {}", gib(plan.arena.bytes()), parts.join(" + "));
    }
    Ok(())
}
