//! Times of the SSD recurrence and the short convolution at the shapes of the presets.
//!
//! `cargo bench -p elleci-core --bench ssd [-- THREADS]`. GFLOP/s counts the multiplications and
//! additions of the matrix products that the chunked form executes (the whole of every square, twice a multiply-add)
//! and sets them against the peak of a loop of fused multiply-adds on the same threads.

use std::hint::black_box;
use std::time::Instant;

use elleci_core::ops::conv::{ConvShape, conv_silu_backward, conv_silu_forward};
use elleci_core::ops::ssd::{CHUNK, Recent, ScanState, SsdScratch, SsdShape, ssd_backward, ssd_forward, ssd_steps};
use elleci_core::simd::{Isa, multiply_adds};

/// CPU time of this thread in seconds, from Linux; it leaves out what other programs take of a shared machine.
fn cpu_seconds() -> Option<f64> {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    line.split(' ').next()?.parse::<f64>().ok().map(|ns| ns * 1e-9)
}

/// Seconds of one call, the least of several batches: CPU time where one thread works and Linux tells, else wall.
fn seconds(batch: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut least = f64::INFINITY;
    for _ in 0..6 {
        let (cpu, wall) = (cpu_seconds(), Instant::now());
        (0..batch).for_each(|_| f());
        let wall = wall.elapsed().as_secs_f64();
        let spent = match (cpu, cpu_seconds()) {
            // The kernel brings its count up to date every few milliseconds only.
            (Some(before), Some(after)) if rayon::current_num_threads() == 1 && wall > 0.03 => after - before,
            _ => wall,
        };
        least = least.min(spent / batch as f64);
    }
    least
}

/// FLOP/s of multiply-adds in registers, on every thread at once.
fn peak(threads: usize) -> f64 {
    const STEPS: usize = 200_000;
    let work = || multiply_adds(STEPS);
    let flop = work() * threads;
    let seconds = seconds(30, || {
        rayon::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|_| {
                    black_box(work());
                });
            }
        })
    });
    flop as f64 / seconds
}

/// (forward, backward) FLOP of the products.
fn flops(s: SsdShape) -> (f64, f64) {
    let (mut forward, mut backward) = (0, 0);
    for chunk in 0..s.chunks() {
        let q = CHUNK.min(s.seq - chunk * CHUNK);
        let state = q * s.d_inner() * s.d_state;
        let square = q * q * (s.d_inner() + s.d_state);
        let (first, last) = ((chunk == 0) as usize, (chunk + 1 == s.chunks()) as usize);
        forward += square + state * (2 - first - last);
        backward += 2 * square + q * q * s.d_state + state * (5 - 3 * first - 2 * last);
    }
    ((2 * s.batch * forward) as f64, (2 * s.batch * backward) as f64)
}

fn ssd(name: &str, shape: SsdShape, peak: f64, batch: usize) {
    let noise = |n: usize, low: f32, high: f32| -> Vec<f32> {
        (0..n as u32)
            .map(|i| low + (high - low) * (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32)
            .collect()
    };
    let xbc = noise(shape.tokens() * shape.width(), -1.0, 1.0);
    let dt = noise(shape.tokens() * shape.heads, 0.001, 0.1);
    let (a, d) = (noise(shape.heads, -16.0, -1.0), noise(shape.heads, 0.5, 1.5));
    let dy = noise(shape.tokens() * shape.d_inner(), -1.0, 1.0);
    let (mut y, mut states) = (vec![0.0; dy.len()], vec![0.0; shape.states_len()]);
    let (mut dxbc, mut ddt) = (vec![0.0; xbc.len()], vec![0.0; dt.len()]);
    let (mut da, mut dd) = (vec![0.0; shape.heads], vec![0.0; shape.heads]);
    let mut scratch = SsdScratch::new();
    let forward = seconds(batch, || ssd_forward(shape, &xbc, &dt, &a, &d, &mut y, &mut states, &mut scratch));
    let backward = seconds(batch, || {
        ssd_backward(shape, &xbc, &dt, &a, &d, &states, &dy, &mut dxbc, &mut ddt, &mut da, &mut dd, &mut scratch);
    });
    let (ff, fb) = flops(shape);
    let line = |what, seconds: f64, flop: f64| {
        let rate = flop / seconds;
        println!(
            "{name:24} {what:9} {:8.3} ms {:7.1} GFLOP/s {:4.0} %",
            seconds * 1e3,
            rate / 1e9,
            100.0 * rate / peak
        );
    };
    line("forward", forward, ff);
    line("backward", backward, fb);

    for seq in [1, 2, 3, 4, 5, 6, 8, 16, 64] {
        let run = SsdShape { batch: 1, seq, ..shape };
        let (mut state, mut y) = (vec![0.0; run.state_len()], vec![0.0; run.tokens() * run.d_inner()]);
        let (xbc, dt) = (&xbc[..run.tokens() * run.width()], &dt[..run.tokens() * run.heads]);
        let recent = Recent::new(run.d_inner(), run.d_state).expect("memory");
        let (mut kept, mut room) = (recent.clone(), Vec::new());
        let steps = seconds(400 / seq, || {
            ssd_steps(run, xbc, dt, &a, &d, ScanState::Kept(&mut state), &mut kept, &mut y, &mut room)
        });
        let mut passing = recent.clone();
        let passed = seconds(400 / seq, || {
            passing.clone_from(&recent);
            ssd_steps(run, xbc, dt, &a, &d, ScanState::Passed(&state), &mut passing, &mut y, &mut room);
        });
        for (what, seconds) in [("steps", steps), ("passed", passed)] {
            let what = format!("{what} {seq}");
            let (each, rate) = (seconds * 1e3 / seq as f64, 4.0 * run.state_len() as f64 / seconds / 1e9);
            println!("{name:24} {what:9} {each:8.3} ms a step {rate:7.1} GB/s of state read");
        }
    }

    let conv = ConvShape { batch: shape.batch, seq: shape.seq, channels: shape.width(), taps: 4 };
    let input = noise(conv.batch * conv.seq * conv.channels, -1.0, 1.0);
    let (weight, bias) = (noise(conv.channels * 4, -0.5, 0.5), noise(conv.channels, -0.1, 0.1));
    let (mut out, mut dinput) = (vec![0.0; input.len()], vec![0.0; input.len()]);
    let (mut dweight, mut dbias) = (vec![0.0; weight.len()], vec![0.0; bias.len()]);
    let gb = 4e-9 * input.len() as f64;
    let forward = seconds(batch, || conv_silu_forward(conv, &input, &weight, &bias, &mut out));
    println!("{name:24} {:9} {:8.3} ms {:7.1} GB/s", "conv fwd", forward * 1e3, 2.0 * gb / forward);
    let backward = seconds(batch, || {
        conv_silu_backward(conv, &input, &weight, &bias, &out, &mut dinput, &mut dweight, &mut dbias);
    });
    println!("{name:24} {:9} {:8.3} ms {:7.1} GB/s", "conv bwd", backward * 1e3, 3.0 * gb / backward);
}

fn main() {
    let threads = std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    pool.install(|| {
        let peak = peak(threads);
        println!("{threads} threads, {}, FMA peak {:.1} GFLOP/s", Isa::detect().name(), peak / 1e9);
        let shape = |batch, seq, heads, d_state| SsdShape { batch, seq, heads, head_dim: 64, d_state };
        ssd("nano 8x256", shape(8, 256, 8, 64), peak, 12);
        ssd("mini 4x256", shape(4, 256, 16, 64), peak, 12);
        ssd("elleci-1.5b 1x1024", shape(1, 1024, 64, 128), peak, 2);
    });
}
