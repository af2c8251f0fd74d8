//! Speed of the products beside the machine's measured peaks, at the shapes of `nano` and `mini` and at the small ones
//! of the chunked scan and of attention. `cargo bench -p elleci-core --bench products [-- FILTER]`
//!
//! Best of several runs; the peaks are measured in the same process, with the same clock.

use std::hint::black_box;
use std::time::Instant;

use elleci_core::ops::head::Int16Head;
use elleci_core::ops::loss::{HeadInput, chunk_tokens, head_loss_grad};
use elleci_core::ops::matmul::{Out, mat, mat_mut, matmul, matmul_serial};
use elleci_core::simd::{self, Isa};
use elleci_core::ternary::{Activations, GradPrecision, GradScratch, TernaryMatrix, quantize_row, weight_grad};

/// Least wall time over repeated runs, for about 0.15 s.
fn best(mut f: impl FnMut()) -> f64 {
    let (start, mut least) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < 0.15 {
        let t = Instant::now();
        f();
        least = least.min(t.elapsed().as_secs_f64());
    }
    least
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 1024.0).collect()
}

/// GFLOP/s of independent fused multiply-adds on one core, at the width that the kernels use; 0 where there are none.
fn float_peak() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() >= Isa::Avx512 {
        use std::arch::x86_64::*;
        const CHAINS: usize = 24;
        const ROUNDS: usize = 100_000;
        #[target_feature(enable = "avx512f")]
        fn spin() -> __m512 {
            let (a, b) = (black_box(_mm512_set1_ps(0.999)), black_box(_mm512_set1_ps(1e-3)));
            let mut sums = [_mm512_setzero_ps(); CHAINS];
            for _ in 0..ROUNDS {
                for s in &mut sums {
                    *s = _mm512_fmadd_ps(*s, a, b);
                }
            }
            sums.into_iter().fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b))
        }
        // SAFETY: the level has just been detected.
        let seconds = best(|| _ = black_box(unsafe { spin() }));
        return (2 * 16 * CHAINS * ROUNDS) as f64 / seconds * 1e-9;
    }
    0.0
}

/// Giga multiply-adds a second of int8 products in registers, on one core; 0 without VNNI.
fn int_peak() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() >= Isa::Avx512Vnni {
        use std::arch::x86_64::*;
        const CHAINS: usize = 12;
        const ROUNDS: usize = 100_000;
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn spin() -> __m512i {
            let (a, b) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(-1)));
            let mut sums = [_mm512_setzero_si512(); CHAINS];
            for _ in 0..ROUNDS {
                for s in &mut sums {
                    *s = _mm512_dpbusd_epi32(*s, a, b);
                }
            }
            sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b))
        }
        // SAFETY: the level has just been detected.
        let seconds = best(|| _ = black_box(unsafe { spin() }));
        return (64 * CHAINS * ROUNDS) as f64 / seconds * 1e-9;
    }
    0.0
}

struct Report {
    filter: String,
    float_peak: f64,
    int_peak: f64,
    threads: usize,
}

impl Report {
    fn float(&self, name: &str, macs: usize, run: impl FnMut()) {
        self.line(name, 2.0 * macs as f64, "GFLOP/s", self.float_peak, run);
    }

    fn int(&self, name: &str, macs: usize, run: impl FnMut()) {
        self.line(name, macs as f64, "GMAC/s", self.int_peak, run);
    }

    fn line(&self, name: &str, work: f64, unit: &str, peak: f64, run: impl FnMut()) {
        if name.contains(&self.filter) {
            let rate = work / best(run) * 1e-9;
            let share = 100.0 * rate / (peak * self.threads as f64);
            println!("{name:44} {} threads {rate:8.1} {unit:8} {share:4.0} % of peak", self.threads);
        }
    }
}

fn dense(r: &Report) {
    for (tokens, out, input) in [
        (2048, 1024, 256),
        (2048, 256, 512),
        (2048, 768, 256),
        (2048, 256, 768),
        (512, 4096, 256),
        (1024, 2048, 512),
        (1024, 512, 1024),
        (1024, 1536, 512),
        (256, 32_128, 512),
    ] {
        let (w, x, dy) = (values(out * input), values(tokens * input), values(tokens * out));
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
        let macs = tokens * out * input;
        let shape = format!("[{tokens}, {out}, {input}]");
        r.float(&format!("forward      {shape}"), macs, || {
            matmul(mat(&x, tokens, input), mat(&w, out, input).t(), mat_mut(&mut y, tokens, out), Out::Store);
        });
        r.float(&format!("input grad   {shape}"), macs, || {
            matmul(mat(&dy, tokens, out), mat(&w, out, input), mat_mut(&mut dx, tokens, input), Out::Store);
        });
        r.float(&format!("weight grad  {shape}"), macs, || {
            matmul(mat(&dy, tokens, out).t(), mat(&x, tokens, input), mat_mut(&mut dw, out, input), Out::Add);
        });
    }
}

fn ternary(r: &Report) {
    for (tokens, out, input) in
        [(2048, 1024, 256), (2048, 256, 768), (1024, 2048, 512), (1, 2048, 512), (1, 11_264, 2048)]
    {
        let (w, x, dy) = (values(out * input), values(tokens * input), values(tokens * out));
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
        let (mut q, mut scales) = (vec![0i8; tokens * input], vec![0.0; tokens]);
        for ((x, q), s) in x.chunks(input).zip(q.chunks_mut(input)).zip(&mut scales) {
            *s = simd::vectorize(
                #[inline(always)]
                || quantize_row(x, q),
            );
        }
        let mut m = TernaryMatrix::from_weights(&w, out, input);
        let macs = tokens * out * input;
        let shape = format!("[{tokens}, {out}, {input}]");
        let mut scratch = Vec::new();
        r.int(&format!("ternary forward     {shape}"), macs, || m.forward(&q, &scales, tokens, &mut y));
        r.float(&format!("ternary input grad  {shape}"), macs, || {
            m.input_grad(&dy, tokens, &mut dx, Out::Store, &mut scratch);
        });
        r.float(&format!("ternary weight grad {shape}"), macs, || {
            weight_grad(&dy, &q, &scales, tokens, out, input, &mut dw, Out::Add, &mut scratch);
        });
        let mut int16 = GradScratch::new(GradPrecision::Int16);
        r.float(&format!("ternary both grads  {shape}"), 2 * macs, || {
            m.input_grad(&dy, tokens, &mut dx, Out::Store, &mut scratch);
            weight_grad(&dy, &q, &scales, tokens, out, input, &mut dw, Out::Add, &mut scratch);
        });
        r.float(&format!("ternary both, int16 {shape}"), 2 * macs, || {
            let x = Activations { codes: &q, scales: &scales };
            m.gradients(&dy, x, (&mut dx, Out::Store), &mut dw, &mut int16);
        });
        r.line(&format!("ternary update      {shape}"), (w.len() * 4) as f64, "GB/s", f64::INFINITY, || m.update(&w));
        r.line(&format!("quantise rows       {shape}"), (x.len() * 4) as f64, "GB/s", f64::INFINITY, || {
            for (x, q) in x.chunks(input).zip(q.chunks_mut(input)) {
                black_box(simd::vectorize(
                    #[inline(always)]
                    || quantize_row(x, q),
                ));
            }
        });
    }
}

/// Head, loss and both gradients, in float32 and in int16, logits in chunks of 32 MiB as a training step has them.
fn heads(r: &Report) {
    for (tokens, vocab, d) in [(2048, 4096, 256), (1024, 32_128, 512)] {
        let (head, normed) = (values(vocab * d), values(tokens * d));
        let targets: Vec<u32> = (0..tokens).map(|t| (t * 7919 % vocab) as u32).collect();
        let input = HeadInput { normed: &normed, head: &head, targets: &targets, weights: &vec![1.0; tokens] };
        let floats = chunk_tokens(tokens, vocab) * vocab;
        let mut logits = vec![0.0; floats.max(Int16Head::logits_len(tokens, vocab))];
        let (mut dx, mut dw) = (normed.clone(), head.clone());
        let (macs, shape) = (3 * tokens * vocab * d, format!("[{tokens}, {vocab}, {d}]"));
        r.float(&format!("head, float32 {shape}"), macs, || {
            black_box(head_loss_grad(input, 1e-3, &mut logits, &mut dx, &mut dw));
        });
        let mut int16 = Int16Head::default();
        r.float(&format!("head, int16   {shape}"), macs, || {
            black_box(int16.loss_grad(Isa::detect(), input, 1e-3, &mut logits, &mut dx, &mut dw));
        });
    }
}

/// The products inside a chunk or a head: on one thread, rows of a wider buffer on both sides.
fn small(r: &Report) {
    const WIDE: usize = 640;
    for (m, k, n) in
        [(64, 64, 64), (64, 64, 512), (256, 64, 64), (256, 64, 256), (256, 256, 64), (64, 512, 64), (24, 40, 24)]
    {
        let (a, b, mut c) = (values(WIDE * WIDE), values(WIDE * WIDE), values(WIDE * WIDE));
        let wide = |v, r: usize, c: usize| mat(v, WIDE, WIDE).slice_move(ndarray::s![..r, ..c]);
        for kind in ["nn", "nt", "tn"] {
            r.float(&format!("small {kind} [{m}, {k}, {n}]"), m * k * n, || {
                let a = if kind == "tn" { wide(&a, k, m).reversed_axes() } else { wide(&a, m, k) };
                let b = if kind == "nt" { wide(&b, n, k).reversed_axes() } else { wide(&b, k, n) };
                let c = mat_mut(&mut c, WIDE, WIDE);
                matmul_serial(a, b, c.slice_move(ndarray::s![..m, ..n]), Out::Store);
            });
        }
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    let (float_peak, int_peak) = (float_peak(), int_peak());
    println!("{}: {float_peak:.0} GFLOP/s and {int_peak:.0} int8 GMAC/s a core", Isa::detect().name());
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let report = Report { filter: filter.clone(), float_peak, int_peak, threads };
        pool.install(|| {
            dense(&report);
            ternary(&report);
            heads(&report);
            if threads == 1 {
                small(&report);
            }
        });
    }
}
