//! The machine's float32 peak, measured: the denominator of model FLOPs utilisation.
//!
//! Every thread repeats fused multiply-adds on values that stay in registers: as many independent chains as hide
//! the latency of two units, as wide as the instruction set. So the figure is what the arithmetic units can do, at the
//! clock that the machine holds under such a load and with the neighbours it has; a program that also moves data stays below it.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use elleci_core::simd::{Isa, multiply_adds};

/// A measured peak.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Billions of float32 operations a second, all threads together; a fused multiply-add is two.
    pub gflops: f64,
    /// Threads that ran.
    pub threads: usize,
    /// The instruction set in use.
    pub isa: Isa,
}

/// Rounds of the measurement. The best counts, because other load only ever slows one down, and many short ones find a gap in it.
const ROUNDS: usize = 30;
/// Length of a round.
const ROUND: Duration = Duration::from_millis(10);
/// No round starts later than this, on a machine so busy that threads wait for each other.
const LONGEST: Duration = Duration::from_millis(450);
/// Multiply-adds of every chain between two looks at the clock.
const REPEATS: usize = 10_000;

impl Peak {
    /// Measures with `threads` threads (at least one), in about a third of a second, and at most half of one.
    pub fn measure(threads: usize) -> Peak {
        let threads = threads.max(1);
        let isa = Isa::detect();
        let start = Instant::now();
        let in_time = |n: &usize| *n < 1 || start.elapsed() < LONGEST;
        let gflops = (0..ROUNDS).take_while(in_time).map(|_| round(threads)).fold(0.0, f64::max);
        Peak { gflops, threads, isa }
    }

    /// The share of the peak that `flops` operations in `seconds` are, 0 to 1.
    pub fn utilisation(&self, flops: f64, seconds: f64) -> f64 {
        flops / seconds / (self.gflops * 1e9)
    }
}

/// GFLOP/s of all threads over one round: each one's own rate, summed.
fn round(threads: usize) -> f64 {
    let barrier = Barrier::new(threads);
    let work = || {
        barrier.wait();
        let start = Instant::now();
        let mut flops = 0;
        while start.elapsed() < ROUND {
            flops += multiply_adds(REPEATS);
        }
        flops as f64 / start.elapsed().as_secs_f64()
    };
    let total: f64 = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        // A thread that panicked did nothing.
        handles.into_iter().map(|h| h.join().unwrap_or(0.0)).sum()
    });
    total / 1e9
}

#[cfg(test)]
mod tests {
    use elleci_core::ops::matmul::{Out, mat, mat_mut, matmul_serial};

    use super::*;

    #[test]
    fn the_peak_is_plausible() {
        let peak = Peak::measure(2);
        assert_eq!((peak.threads, peak.isa), (2, Isa::detect()));
        // From an emulated core to a thousand-core machine: this catches a wrong unit or an optimised-away loop, no more.
        assert!((0.01..1e6).contains(&peak.gflops), "{} GFLOP/s", peak.gflops);
        assert_eq!(Peak { gflops: 100.0, ..peak }.utilisation(25e9, 0.5), 0.5);
    }

    /// A product that moves data stays below what registers alone allow; a peak below it is no peak.
    #[test]
    fn no_product_is_faster_than_the_peak() {
        const SIZE: usize = 256;
        let (a, b) = (vec![0.5; SIZE * SIZE], vec![0.25; SIZE * SIZE]);
        let mut c = vec![0.0; SIZE * SIZE];
        let mut least = f64::INFINITY;
        for _ in 0..20 {
            let start = Instant::now();
            let out = mat_mut(&mut c, SIZE, SIZE);
            matmul_serial(mat(&a, SIZE, SIZE), mat(&b, SIZE, SIZE), out, Out::Store);
            least = least.min(start.elapsed().as_secs_f64());
        }
        let (product, peak) = (2.0 * (SIZE * SIZE * SIZE) as f64 / least / 1e9, Peak::measure(1).gflops);
        // A neighbour may slow one of the two. Products use what the machine has, whatever ELLECI_ISA says, and vectors where the
        // portable level counts single values.
        let comparable = Isa::detect() == Isa::machine() && Isa::detect() != Isa::Portable;
        assert!(!comparable || product < 2.0 * peak, "a product at {product} GFLOP/s, a peak of {peak}");
    }
}
