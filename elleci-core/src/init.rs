//! Initial weights (SPEC §1.5), from one seed: every parameter draws from its own stream of the generator.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::config::ModelConfig;
use crate::params::{ParamKind, ParamLayout, Params};

/// Uniform in `[0, 1)` with 53 random bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// A pair of standard normals (Box–Muller), in float64 so that the tail is not cut.
fn normals(rng: &mut ChaCha8Rng) -> (f64, f64) {
    let radius = libm::sqrt(-2.0 * libm::log(1.0 - uniform(rng)));
    let angle = core::f64::consts::TAU * uniform(rng);
    (radius * libm::cos(angle), radius * libm::sin(angle))
}

/// Fresh weights of a validated config. The same seed gives the same bits on every machine with the same `libm`.
pub fn initialise(c: &ModelConfig, seed: u64) -> Params {
    let layout = ParamLayout::new(c);
    let mut params = Params::zeros(layout.clone());
    for (index, p) in layout.params().iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64 + 1);
        let values = &mut params.data_mut()[p.range.clone()];
        match p.kind {
            ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding => {
                let residual = p.name.ends_with(".out.weight") || p.name.ends_with("ffn.down.weight");
                let std = if residual { 0.02 / libm::sqrt(2.0 * c.n_layers as f64) } else { 0.02 };
                for pair in values.chunks_mut(2) {
                    let (a, b) = normals(&mut rng);
                    pair[0] = (a * std) as f32;
                    if let Some(second) = pair.get_mut(1) {
                        *second = (b * std) as f32;
                    }
                }
            }
            ParamKind::Norm | ParamKind::Skip => values.fill(1.0),
            ParamKind::ConvWeight => {
                let bound = 1.0 / libm::sqrt(c.d_conv as f64);
                values.fill_with(|| ((2.0 * uniform(&mut rng) - 1.0) * bound) as f32);
            }
            ParamKind::ConvBias => values.fill(0.0),
            ParamKind::ALog => values.fill_with(|| libm::log(1.0 + 15.0 * uniform(&mut rng)) as f32),
            ParamKind::DtBias => {
                let (low, high) = (libm::log(1e-3), libm::log(1e-1));
                values.fill_with(|| {
                    let dt = libm::exp(low + uniform(&mut rng) * (high - low));
                    // the inverse of softplus
                    (dt + libm::log(-libm::expm1(-dt))) as f32
                });
            }
        }
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_ranges_are_those_of_the_specification() {
        let c = ModelConfig::preset("nano").unwrap();
        let params = initialise(&c, 7);
        for (i, p) in params.layout().params().iter().enumerate() {
            let values = &params[crate::params::Id(i)];
            let n = values.len() as f64;
            let mean = values.iter().map(|&v| v as f64).sum::<f64>() / n;
            let std = (values.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n).sqrt();
            match p.kind {
                ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding => {
                    let residual = p.name.ends_with(".out.weight") || p.name.ends_with(".ffn.down.weight");
                    let want = if residual { 0.02 / 8f64.sqrt() } else { 0.02 };
                    // Standard errors: mean std/√n, std std/√2n; five of each.
                    assert!(mean.abs() < 5.0 * want / n.sqrt(), "{} mean {mean}", p.name);
                    assert!((std - want).abs() < 5.0 * want / (2.0 * n).sqrt(), "{} std {std}", p.name);
                }
                ParamKind::Norm | ParamKind::Skip => assert!(values.iter().all(|&v| v == 1.0)),
                ParamKind::ConvBias => assert!(values.iter().all(|&v| v == 0.0)),
                ParamKind::ConvWeight => assert!(values.iter().all(|v| v.abs() <= 0.5) && std > 0.25),
                ParamKind::ALog => assert!(values.iter().all(|&v| (0.0..=16f32.ln()).contains(&v))),
                ParamKind::DtBias => assert!(values.iter().all(|&v| {
                    let dt = (v as f64).exp().ln_1p();
                    (0.99e-3..=0.101).contains(&dt)
                })),
            }
        }
    }

    #[test]
    fn a_seed_is_a_set_of_weights() {
        let c = ModelConfig::preset("nano").unwrap();
        assert_eq!(initialise(&c, 1).data(), initialise(&c, 1).data());
        assert_ne!(initialise(&c, 1).data(), initialise(&c, 2).data());
    }
}
