//! Bytes a second of the packed matrix-vector product, far out of cache.
use elleci_core::simd::Isa;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing};
use std::time::Instant;
fn main() {
    let threads: usize = std::env::args().nth(1).map_or(2, |a| a.parse().unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (out, input) = (5632usize, 2048usize);
    let n = 1_000_000_000 / (out * input) + 1;
    for packing in Packing::ALL {
        let per = packing.bytes(out, input).unwrap() / 64;
        let lines: Vec<Line> = (0..n * per).map(|i| Line([(i * 7 % 243) as u8; 64])).collect();
        let q = vec![3i8; input];
        let mut y = vec![0.0f32; out];
        let views: Vec<_> =
            lines.chunks(per).map(|l| PackedTernary::new(packing, out, input, 0.1, l).unwrap()).collect();
        let mut best = f64::MAX;
        for _ in 0..8 {
            let t = Instant::now();
            pool.install(|| {
                for v in &views {
                    v.forward(&q, &[0.1], &mut y);
                }
            });
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!(
            "{} {:?}: {:.1} Gweight/s, {:.2} GB/s ({:?})",
            packing.name(),
            threads,
            (n * out * input) as f64 / best / 1e9,
            lines.len() as f64 * 64.0 / best / 1e9,
            Isa::detect()
        );
    }
    let v: Vec<u64> = vec![1; 100_000_000 / 2];
    let mut best = f64::MAX;
    for _ in 0..8 {
        let t = Instant::now();
        let s: u64 = pool.install(|| {
            use rayon::prelude::*;
            v.par_chunks(1 << 16).map(|c| c.iter().fold(0u64, |a, b| a ^ b)).sum()
        });
        std::hint::black_box(s);
        best = best.min(t.elapsed().as_secs_f64());
    }
    println!("read {:.2} GB/s", v.len() as f64 * 8.0 / best / 1e9);
}
