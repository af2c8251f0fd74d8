//! Which packing a machine multiplies faster.
//!
//! I2 takes a quarter more bytes than T5 and fewer instructions to unpack. Which of the two wins depends on the machine's
//! bandwidth, its instruction set and whether the model fits its caches, so `--pack auto` times both, a shape at a time, over as
//! many copies of a tensor as the model has bytes, up to far more than any cache.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use elleci_core::params::{ParamKind, ParamLayout};
use elleci_core::ternary::TernaryMatrix;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing, pack};

/// Bytes of copies that a product runs over: far past the caches.
const FAR: usize = 64 << 20;
/// Time for one shape, with both packings.
const BUDGET: Duration = Duration::from_millis(120);
/// Rounds at least, on a machine that is slow or busy.
const ROUNDS: usize = 4;
/// I2 takes 25 % more memory: it must be faster by more than the noise of the clock.
const MARGIN: f64 = 1.05;

/// Chooses a packing for every shape that it is asked for, and remembers.
pub struct Chooser {
    fixed: Option<Packing>,
    ring_bytes: usize,
    known: HashMap<(usize, usize), Packing>,
}

impl Chooser {
    /// Always the same, or by measurement.
    pub fn new(fixed: Option<Packing>, layout: &ParamLayout) -> Chooser {
        let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
        let model: usize = ternary.filter_map(|p| Packing::T5.bytes(p.shape[0], p.shape[1])).sum();
        Chooser { fixed, ring_bytes: model.min(FAR), known: HashMap::new() }
    }

    /// The packing for a tensor of these values and shape.
    pub fn choose(&mut self, values: &[f32], out: usize, input: usize) -> Packing {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let ring = self.ring_bytes;
        *self.known.entry((out, input)).or_insert_with(|| {
            let [i2, t5] = seconds(&TernaryMatrix::from_weights(values, out, input), ring);
            if i2 * MARGIN < t5 { Packing::I2 } else { Packing::T5 }
        })
    }
}

/// Seconds of one product with one token in each packing, the best of several rounds over a ring of copies. The rounds take turns:
/// whatever else the machine is doing meets both.
fn seconds(matrix: &TernaryMatrix, ring_bytes: usize) -> [f64; 2] {
    let (out, input) = (matrix.out_dim(), matrix.in_dim());
    let rings = [Packing::I2, Packing::T5].map(|packing| {
        let one = pack(matrix, packing);
        let copies = (ring_bytes / (one.len() * size_of::<Line>()).max(1)).max(1);
        (packing, one.len(), one.repeat(copies))
    });
    let (q, mut y) = (vec![3i8; input], vec![0.0; out]);
    let (began, mut best, mut rounds) = (Instant::now(), [f64::INFINITY; 2], 0);
    while rounds < ROUNDS || began.elapsed() < BUDGET {
        for ((packing, lines, ring), best) in rings.iter().zip(&mut best) {
            let copies = ring.chunks(*lines).filter_map(|l| PackedTernary::new(*packing, out, input, 1.0, l));
            let (round, mut products) = (Instant::now(), 0);
            for view in copies {
                view.forward(black_box(&q), &[1.0], &mut y);
                products += 1;
            }
            *best = best.min(round.elapsed().as_secs_f64() / f64::from(products));
        }
        rounds += 1;
    }
    black_box(&y);
    best
}
