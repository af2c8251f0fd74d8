//! The global norm of the gradients, and clipping by it.

use alloc::vec;
use alloc::vec::Vec;

use crate::par;
use crate::params::Params;
use crate::simd::vectorize;

/// Values that one task sums. A partial sum a chunk, added in order: the same bits at every thread count.
const CHUNK: usize = 1 << 14;
/// Independent sums inside a chunk; fixed, so that the instruction set does not change the order of additions.
const LANES: usize = 16;

/// The Euclidean norm of all values, in f64. It is not finite if and only if one of the values is not.
pub fn global_norm(grads: &Params) -> f64 {
    let data = grads.data();
    let mut partial: Vec<f64> = vec![0.0; data.len().div_ceil(CHUNK)];
    let items: Vec<_> = data.chunks(CHUNK).zip(&mut partial).collect();
    par::for_each(items, |(chunk, sum)| {
        *sum = vectorize(
            #[inline(always)]
            || sum_of_squares(chunk),
        );
    });
    libm::sqrt(partial.iter().sum())
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    let (groups, rest) = x.as_chunks::<LANES>();
    for group in groups {
        for (sum, &v) in sums.iter_mut().zip(group) {
            *sum += v as f64 * v as f64;
        }
    }
    for (sum, &v) in sums.iter_mut().zip(rest) {
        *sum += v as f64 * v as f64;
    }
    sums.iter().sum()
}

/// What gradients of this norm are multiplied by so that their norm is at most `clip`: `min(1, clip / (norm + 1e-6))`, as
/// `torch.nn.utils.clip_grad_norm_`.
pub fn clip_factor(norm: f64, clip: f64) -> f32 {
    (clip / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::params::ParamLayout;

    #[test]
    fn norm_is_that_of_the_definition_and_sees_every_value() {
        let layout = ParamLayout::new(&ModelConfig::preset("nano").unwrap());
        let mut grads = Params::zeros(layout);
        assert_eq!(global_norm(&grads), 0.0);
        let n = grads.data().len();
        for (i, g) in grads.data_mut().iter_mut().enumerate() {
            *g = ((i * 7919) % 1009) as f32 / 512.0 - 1.0;
        }
        let want = libm::sqrt(grads.data().iter().map(|&g| g as f64 * g as f64).sum());
        // Squares are exact in f64; n additions of at most n*2^-53 relative error each way, halved by the root.
        assert!((global_norm(&grads) - want).abs() <= want * n as f64 * 2f64.powi(-53));
        for (i, bad) in [(0, f32::NAN), (n - 1, f32::INFINITY), (CHUNK + 3, f32::NEG_INFINITY)] {
            let old = core::mem::replace(&mut grads.data_mut()[i], bad);
            assert!(!global_norm(&grads).is_finite(), "{bad} at {i}");
            grads.data_mut()[i] = old;
        }
        grads.data_mut().fill(f32::MAX);
        assert!(global_norm(&grads).is_finite());
    }

    #[test]
    #[cfg(feature = "std")]
    fn norm_has_the_same_bits_on_any_number_of_threads() {
        let mut grads = Params::zeros(ParamLayout::new(&ModelConfig::preset("nano").unwrap()));
        for (i, g) in grads.data_mut().iter_mut().enumerate() {
            *g = libm::sinf(i as f32);
        }
        let alone = global_norm(&grads);
        for threads in [2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| global_norm(&grads)).to_bits(), alone.to_bits());
        }
    }

    #[test]
    fn clip_factor_is_torchs() {
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(1.0, 1.0), (1.0 / 1.000001) as f32);
        assert_eq!(clip_factor(4.0, 1.0), (1.0 / 4.000001) as f32);
    }
}
