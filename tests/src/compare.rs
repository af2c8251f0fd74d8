//! How float results are compared: against float64, with the tolerance measured where the function is evaluated.
//!
//! The truth is the oracle in float64. How far a correct float32 program may stray from it depends on the function and
//! on its inputs (a sum that cancels loses digits whoever computes it), so that no fixed number of digits is right for
//! every shape. What can be measured is the rounding noise at these very inputs:
//!
//! - LibTorch's own float32 evaluation, in two orders of summation (sequential and chunked scan), and
//! - the float64 evaluation with every input moved by a random `|u| <= 2^-24`, as storing it in float32 would.
//!
//! The noise of a tensor is the largest deviation from the truth over these evaluations and all its elements. The core
//! rounds the same formula in another order, so its deviation is a draw from a distribution of the same width; it
//! passes while within [`NOISE_FACTOR`] times the noise, plus [`FLOOR`] of the largest element (where LibTorch happens
//! to be exact, e.g. in a sum of two terms, the core may still round once or twice, or use an exponential with
//! an error of some units in the last place).
//!
//! Why 16: for tensors of thousands of elements the maxima of two such draws agree within a factor of 2 or 3, which
//! leaves a factor of 5 for vectorised transcendental functions (up to 4 units in the last place against LibTorch's 1)
//! and for float32 where LibTorch accumulates in wider types. For a tensor with a single element the noise is the
//! largest of six draws x of unit width: the chance that all lie below 1/16 of the core's is about (0.05)^6 = 2e-8.
//! [`check_all`] counts the tensors whose tolerance could still tell a wrong formula from a right one, and tests
//! require that nearly all of them do.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::ops::Scan;

/// See the module text.
pub const NOISE_FACTOR: f64 = 16.0;
/// Four units in the last place of float32, relative to the largest element.
pub const FLOOR: f64 = 4.0 * f32::EPSILON as f64;
/// A tolerance above this share of the largest element proves little.
pub const BLUNT: f64 = 2e-3;
/// Unit roundoff of float32.
pub const ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;

/// The evaluations that make a [`Reference`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evaluation {
    /// float64
    Truth,
    /// float32; `true`: with the chunked scan where there is one.
    Single(bool),
    /// float64 with every input multiplied by `1 + ROUNDOFF * u`, from this seed.
    Perturbed(u64),
}

/// Those that show the rounding noise.
pub const NOISE_RUNS: [Evaluation; 6] = [
    Evaluation::Single(false),
    Evaluation::Single(true),
    Evaluation::Perturbed(1),
    Evaluation::Perturbed(2),
    Evaluation::Perturbed(3),
    Evaluation::Perturbed(4),
];

/// The true values of a tensor and the rounding noise of float32 around them.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Elements in row-major order.
    pub truth: Vec<f64>,
    /// The largest deviation over the float32-like evaluations.
    pub noise: f64,
}

/// Evaluates `f` in all the ways above; `f` gives tensors by name.
pub fn references(mut f: impl FnMut(Evaluation) -> BTreeMap<String, Tensor>) -> BTreeMap<String, Reference> {
    let mut out: BTreeMap<String, Reference> =
        f(Evaluation::Truth).into_iter().map(|(k, t)| (k, Reference { truth: to_f64(&t), noise: 0.0 })).collect();
    for run in NOISE_RUNS {
        for (name, tensor) in f(run) {
            let reference = out.get_mut(&name).expect("every evaluation gives the same names");
            let error = largest_difference(to_f64(&tensor), &reference.truth).0;
            reference.noise = reference.noise.max(error);
        }
    }
    out
}

/// The largest `|a - b|` and its index; infinite where either is not a number.
fn largest_difference(a: impl IntoIterator<Item = f64>, b: &[f64]) -> (f64, usize) {
    let mut worst = (0.0, 0);
    for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
        let d = (a - b).abs();
        let d = if d.is_nan() { f64::INFINITY } else { d };
        if d > worst.0 {
            worst = (d, i);
        }
    }
    worst
}

impl Evaluation {
    /// The element type and the scan. The truth follows the recurrence as it is defined; in float64 the chunked scan is
    /// the same function (tests/oracle.rs) and many times faster.
    pub fn mode(self) -> (Kind, Scan) {
        match self {
            Evaluation::Truth => (Kind::Double, Scan::Sequential),
            Evaluation::Single(false) => (Kind::Float, Scan::Sequential),
            Evaluation::Single(true) => (Kind::Float, Scan::Chunked(16)),
            Evaluation::Perturbed(_) => (Kind::Double, Scan::Chunked(16)),
        }
    }
}

impl Reference {
    /// The largest absolute element.
    pub fn scale(&self) -> f64 {
        self.truth.iter().fold(0.0, |m, x| x.abs().max(m))
    }

    /// How far a float32 evaluation may lie from the truth, any element.
    pub fn tolerance(&self) -> f64 {
        NOISE_FACTOR * self.noise + FLOOR * self.scale()
    }

    /// Holds `found` against the truth, `slack` beside the tolerance.
    ///
    /// # Errors
    /// A message with the worst element.
    pub fn check(&self, name: &str, found: &[f32], slack: f64) -> Result<(), String> {
        if found.len() != self.truth.len() {
            return Err(format!("{name}: {} elements, the oracle has {}", found.len(), self.truth.len()));
        }
        let (error, at) = largest_difference(found.iter().map(|&x| f64::from(x)), &self.truth);
        let (tolerance, scale) = (self.tolerance() + slack, self.scale());
        if std::env::var_os("ELLECI_PARITY_VERBOSE").is_some() {
            let [error, noise] = [error, self.noise].map(|x| x / scale.max(f64::MIN_POSITIVE));
            eprintln!("{name}: error {error:.1e}, noise {noise:.1e} of {scale:.1e}, ratio {:.2}", error / noise);
        }
        if error > tolerance {
            return Err(format!(
                "{name}[{at}]: {} instead of {}; off by {error:.2e}, allowed {tolerance:.2e} (noise {:.2e}, largest \
                 element {scale:.2e})",
                found[at], self.truth[at], self.noise
            ));
        }
        Ok(())
    }

    /// Whether [`Reference::check`] can tell a wrong formula from a right one: all that it allows is at most [`BLUNT`] of
    /// the largest element. It is not where the elements are what cancellation left over, such as the gradient through
    /// a norm of a single channel.
    pub fn is_sharp(&self, slack: f64) -> bool {
        self.tolerance() + slack <= BLUNT * self.scale()
    }
}

/// Tensors compared, and how many of the comparisons were sharp.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// All that were compared.
    pub total: usize,
    /// Those whose [`Reference::is_sharp`] holds.
    pub sharp: usize,
}

impl Tally {
    /// The share of sharp comparisons; 0 when there was none.
    pub fn share(&self) -> f64 {
        self.sharp as f64 / self.total.max(1) as f64
    }
}

/// Checks every named tensor. Gradients are allowed one unit in the last place of the largest element of any gradient
/// on top: a gradient that is the difference of equal terms (a query's, where one key is visible) is exactly 0 in LibTorch when both
/// terms were rounded alike, and a unit or so of the terms' last place when they were not.
///
/// # Errors
/// All that failed, a line each.
pub fn check_all(
    references: &BTreeMap<String, Reference>,
    found: &BTreeMap<String, Vec<f32>>,
    tally: &mut Tally,
) -> Result<(), String> {
    let mut failures = Vec::new();
    let is_gradient = |name: &str| name != "logits" && name != "loss";
    let gradients = references.iter().filter(|(name, _)| is_gradient(name));
    let largest = gradients.fold(0.0, |m, (_, r)| r.scale().max(m));
    for (name, reference) in references {
        let slack = if is_gradient(name) { f64::from(f32::EPSILON) * largest } else { 0.0 };
        tally.total += 1;
        tally.sharp += usize::from(reference.is_sharp(slack));
        match found.get(name) {
            Some(values) => failures.extend(reference.check(name, values, slack).err()),
            None => failures.push(format!("{name}: not computed")),
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// A tensor's elements in row-major order.
pub fn to_f64(t: &Tensor) -> Vec<f64> {
    let t = t.detach().to_kind(Kind::Double).contiguous();
    let mut out = vec![0.0; t.numel()];
    t.copy_data(&mut out, t.numel());
    out
}

/// `n` values uniform in [-1, 1], the same for a seed on every machine.
pub fn uniform(n: usize, seed: u64, kind: Kind) -> Tensor {
    let mut noise = Noise::new(seed);
    let values: Vec<f64> = (0..n).map(|_| noise.uniform()).collect();
    Tensor::from_slice(&values).to_kind(kind)
}

/// A small seeded generator (SplitMix64) for inputs and perturbations.
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// A generator; equal seeds give equal values.
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Roughly normal with unit variance (a sum of twelve uniform values), times `scale`.
    pub fn normal(&mut self, scale: f32) -> f32 {
        let sum: f64 = (0..12).map(|_| self.uniform()).sum();
        (sum / 2.0) as f32 * scale
    }

    /// A vector of [`Noise::normal`].
    pub fn normals(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal(scale)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square(run: Evaluation) -> BTreeMap<String, Tensor> {
        let kind = if matches!(run, Evaluation::Single(_)) { Kind::Float } else { Kind::Double };
        let x = Tensor::from_slice(&[0.1f32, 0.7, -1.3]).to_kind(kind);
        let x = match run {
            Evaluation::Perturbed(seed) => &x * (uniform(3, seed, kind) * ROUNDOFF + 1.0),
            _ => x,
        };
        BTreeMap::from([("y".to_string(), x.square())])
    }

    #[test]
    fn rounding_passes_and_anything_more_does_not() {
        let y = &references(square)["y"];
        let good: Vec<f32> = [0.1f32, 0.7, -1.3].iter().map(|x| x * x).collect();
        assert_eq!(y.check("y", &good, 0.0), Ok(()));
        for (i, wrong) in [(0, 1e-5), (2, -1e-5), (1, f32::NAN)] {
            let mut bad = good.clone();
            bad[i] += wrong;
            assert!(y.check("y", &bad, 0.0).unwrap_err().starts_with(&format!("y[{i}]")), "{wrong}");
        }
        assert!(y.check("y", &good[..2], 0.0).is_err());
    }

    #[test]
    fn blunt_comparisons_are_counted() {
        let reference = |noise| Reference { truth: vec![1.0], noise };
        let references = BTreeMap::from([("a".to_string(), reference(1e-3)), ("b".to_string(), reference(1e-7))]);
        let found = ["a", "b"].map(|n| (n.to_string(), vec![1.0]));
        let mut tally = Tally::default();
        assert_eq!(check_all(&references, &found.into(), &mut tally), Ok(()));
        assert_eq!((tally.total, tally.sharp), (2, 1));
        assert!(check_all(&references, &BTreeMap::new(), &mut tally).is_err());
    }

    #[test]
    fn noise_is_centred_and_reproducible() {
        let draw = || Noise::new(7).normals(20_000, 1.0);
        let v = draw();
        assert_eq!(v, draw());
        let mean = v.iter().sum::<f32>() / 2e4;
        let var = v.iter().map(|x| x * x).sum::<f32>() / 2e4;
        // Standard errors: 1/sqrt(20000) = 0.007 and sqrt(2/20000) = 0.01; five of each.
        assert!(mean.abs() < 0.035 && (var - 1.0).abs() < 0.05, "{mean} {var}");
    }
}
