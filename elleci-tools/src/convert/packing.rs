//! Which packing a machine multiplies faster.
//!
//! I2 takes a quarter more bytes than T5 and fewer instructions to unpack. C5 leaves out the columns whose activation is zero, which pays
//! behind the squared ReLU alone, and where the kernels for it are as good as the others. Which one wins depends on the machine's
//! bandwidth, its instruction set and whether the model fits its caches, so `--pack auto` times them, a shape at a time, over as
//! many copies of a tensor as the model has bytes, up to far more than any cache.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use elleci_core::params::{ParamKind, ParamLayout};
use elleci_core::ternary::TernaryMatrix;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing, pack};

/// Bytes of copies that a product runs over: far past the caches.
const FAR: usize = 64 << 20;
/// Time for one shape, with all its packings.
const BUDGET: Duration = Duration::from_millis(120);
/// Rounds at least, on a machine that is slow or busy.
const ROUNDS: usize = 4;
/// The others take more memory than T5: they must be faster by more than the noise of the clock.
const MARGIN: f64 = 1.05;
/// Of 256 activations behind the squared ReLU so many are not zero in a trained model (docs/LOG.md).
const NONZERO: u32 = 54;

/// Chooses a packing for every shape that it is asked for, and remembers.
pub struct Chooser {
    fixed: Option<[Packing; 2]>,
    ring_bytes: usize,
    known: HashMap<(usize, usize, bool), Packing>,
}

impl Chooser {
    /// Always the same, the second where the input is mostly zeros, or by measurement.
    pub fn new(fixed: Option<[Packing; 2]>, layout: &ParamLayout) -> Chooser {
        let ternary = layout.params().iter().filter(|p| p.kind == ParamKind::Ternary);
        let model: usize = ternary.filter_map(|p| Packing::T5.bytes(p.shape[0], p.shape[1])).sum();
        Chooser { fixed, ring_bytes: model.min(FAR), known: HashMap::new() }
    }

    /// The packing for a tensor of these values and shape. `sparse` says that its input is mostly zeros.
    pub fn choose(&mut self, values: &[f32], out: usize, input: usize, sparse: bool) -> Packing {
        if let Some(fixed) = self.fixed {
            return fixed[usize::from(sparse)];
        }
        let ring = self.ring_bytes;
        *self.known.entry((out, input, sparse)).or_insert_with(|| {
            let packings: &[Packing] = if sparse { &Packing::ALL } else { &[Packing::I2, Packing::T5] };
            let seconds = seconds(&TernaryMatrix::from_weights(values, out, input), packings, ring, sparse);
            let cost = |(packing, seconds): (&Packing, f64)| {
                (*packing, if *packing == Packing::T5 { seconds } else { seconds * MARGIN })
            };
            let best = packings.iter().zip(seconds).map(cost).min_by(|a, b| a.1.total_cmp(&b.1));
            best.map_or(Packing::T5, |(packing, _)| packing)
        })
    }
}

/// Seconds of one product with one token in each packing, the best of several rounds over a ring of copies. The rounds take turns:
/// whatever else the machine is doing meets both.
fn seconds(matrix: &TernaryMatrix, packings: &[Packing], ring_bytes: usize, sparse: bool) -> Vec<f64> {
    let (out, input) = (matrix.out_dim(), matrix.in_dim());
    let ring = |packing: &Packing| {
        let one = pack(matrix, *packing);
        let copies = (ring_bytes / (one.len() * size_of::<Line>()).max(1)).max(1);
        (*packing, one.len(), one.repeat(copies))
    };
    let rings: Vec<_> = packings.iter().map(ring).collect();
    // In no order that a machine could learn.
    let is_zero = |i: usize| sparse && (i as u32).wrapping_mul(0x9e37_79b1) >> 24 >= NONZERO;
    let q: Vec<i8> = (0..input).map(|i| if is_zero(i) { 0 } else { 3 }).collect();
    let mut y = vec![0.0; out];
    let (began, mut best, mut rounds) = (Instant::now(), vec![f64::INFINITY; packings.len()], 0);
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
