//! Stochastic weight averaging (Izmailov et al. 2018): the running mean of the weights from some step on.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::par;
use crate::params::{ParamLayout, Params};
use crate::simd::vectorize;

/// Values that one task averages.
const CHUNK: usize = 1 << 14;

/// The float32 mean of the weights seen so far. For ternary models the latent weights are averaged, and quantised
/// on use like any others.
#[derive(Clone, Debug)]
pub struct Swa {
    mean: Params,
    count: u64,
}

impl Swa {
    /// No weights seen.
    pub fn new(layout: Arc<ParamLayout>) -> Swa {
        Swa { mean: Params::zeros(layout), count: 0 }
    }

    /// A mean and its count, as saved.
    pub fn restore(mean: Params, count: u64) -> Swa {
        Swa { mean, count }
    }

    /// The mean of [`count`](Swa::count) weights; zero before the first.
    pub fn mean(&self) -> &Params {
        &self.mean
    }

    /// How many weights the mean is of.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Takes the weights into the mean: `mean += (w − mean) / (n + 1)`.
    ///
    /// # Panics
    /// When `weights` has another length than the mean.
    pub fn update(&mut self, weights: &Params) {
        let share = (1.0 / (self.count + 1) as f64) as f32;
        let mean = self.mean.data_mut();
        assert_eq!(mean.len(), weights.data().len(), "SWA: weights of another layout");
        let items: Vec<_> = mean.chunks_mut(CHUNK).zip(weights.data().chunks(CHUNK)).collect();
        par::for_each(items, |(mean, w)| {
            vectorize(
                #[inline(always)]
                || {
                    for (m, &w) in mean.iter_mut().zip(w) {
                        *m += share * (w - *m);
                    }
                },
            );
        });
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn mean_is_the_mean_and_continues_after_a_restore() {
        let layout = ParamLayout::new(&ModelConfig::preset("nano").unwrap());
        let weights = |k: u64| {
            let mut w = Params::zeros(layout.clone());
            for (i, w) in w.data_mut().iter_mut().enumerate() {
                *w = ((i as u64 * 31 + k * 17) % 101) as f32 / 50.0 - 1.0;
            }
            w
        };
        let mut swa = Swa::new(layout.clone());
        let mut resumed = swa.clone();
        for k in 0..10 {
            swa.update(&weights(k));
            if k == 4 {
                resumed = Swa::restore(swa.mean().clone(), swa.count());
            } else if k > 4 {
                resumed.update(&weights(k));
            }
        }
        assert_eq!((swa.count(), resumed.count()), (10, 10));
        assert_eq!(swa.mean().data(), resumed.mean().data());
        let all: Vec<Params> = (0..10).map(weights).collect();
        for i in 0..layout.len() {
            let want = all.iter().map(|w| w.data()[i] as f64).sum::<f64>() / 10.0;
            // Each of 10 updates rounds three times, on values of at most 2: 10 * 3 * 2 * 2^-24.
            assert!((swa.mean().data()[i] as f64 - want).abs() <= 60.0 * 2f64.powi(-24));
        }
    }
}
