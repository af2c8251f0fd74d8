//! Quantisers: activations to int8 a token, weights to {-1, 0, 1} a tensor.

use alloc::vec;
use alloc::vec::Vec;

use crate::ops::rows::rne_bits;
use crate::{par, simd};

/// Smallest `amax` and `γ`: keeps the scales finite and positive for rows and tensors of zeros.
const FLOOR: f32 = 1e-5;
/// Lanes that [`absmean`] keeps apart, so that it vectorises: part of the definition of its order.
const LANES: usize = 16;
/// Weights in one partial sum of [`absmean`].
const BLOCK: usize = 1 << 15;

/// Quantises a token: `amax = max(|x|, 1e-5)`, `q = clamp(rne(x · (127/amax)), -128, 127)`. Returns the
/// dequantisation scale `amax/127`, which is NaN when any `x` is. Vectorised when called inside
/// [`simd::vectorize`]. Equal to [`quantize_row_reference`] bit for bit.
///
/// # Panics
/// When `q` is shorter than `x`.
#[inline(always)]
pub fn quantize_row(x: &[f32], q: &mut [i8]) -> f32 {
    // The bits of non-negative floats order like the floats, and an integer maximum has no NaN rules to obey, so that
    // it vectorises. NaN sorts above infinity: it reaches the scale.
    let amax = f32::from_bits(x.iter().fold(FLOOR.to_bits(), |amax, v| amax.max(v.abs().to_bits())));
    let scale = 127.0 / amax;
    // |x · scale| <= 127 · (1 + 2^-24)^2, which rounds to 127: the clamp has nothing to do.
    for (q, v) in q[..x.len()].iter_mut().zip(x) {
        let v = v * scale;
        *q = if v.is_nan() { 0 } else { rne_bits(v) as i8 };
    }
    amax / 127.0
}

/// The definition of [`quantize_row`], one value at a time.
pub fn quantize_row_reference(x: &[f32], q: &mut [i8]) -> f32 {
    let mut amax = FLOOR;
    for v in x {
        if v.abs() > amax || v.is_nan() {
            amax = v.abs(); // and stays, if NaN: nothing compares greater
        }
    }
    for (q, v) in q.iter_mut().zip(x) {
        *q = libm::rintf(v * (127.0 / amax)).clamp(-128.0, 127.0) as i8;
    }
    amax / 127.0
}

/// γ of a weight tensor: `max(mean |W|, 1e-5)`, summed in float64 over fixed blocks, so that the bits do not depend on
/// the number of threads. An empty tensor gives 1e-5.
pub fn absmean(w: &[f32]) -> f32 {
    let mut partial = vec![0.0f64; w.len().div_ceil(BLOCK)];
    let items: Vec<_> = w.chunks(BLOCK).zip(partial.iter_mut()).collect();
    par::for_each(items, |(w, sum)| {
        *sum = simd::vectorize(
            #[inline(always)]
            || abs_sum(w),
        )
    });
    let mean = partial.iter().sum::<f64>() / w.len().max(1) as f64;
    // Not `max`: a NaN weight must not hide behind the floor.
    if (mean as f32) < FLOOR { FLOOR } else { mean as f32 }
}

#[inline(always)]
fn abs_sum(w: &[f32]) -> f64 {
    let (head, tail) = w.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in head {
        for (s, v) in lanes.iter_mut().zip(chunk) {
            *s += v.abs() as f64;
        }
    }
    for (s, v) in lanes.iter_mut().zip(tail) {
        *s += v.abs() as f64;
    }
    lanes.iter().sum()
}

/// The ternary code of a weight: `clamp(rne(w/γ), -1, 1)`; 0 for NaN.
#[inline(always)]
pub fn ternary_code(w: f32, gamma: f32) -> i8 {
    libm::rintf(w / gamma).clamp(-1.0, 1.0) as i8
}

/// [`ternary_code`] + 1 without the division: the code leaves 0 where `|w| > γ/2`.
///
/// Exact: γ/2 is a float (γ >= 1e-5) with a significand m < 2, so the next float above is 1 + 2^-23/m > 1 + 2^-24 times
/// as large; then `w/γ` is past the midpoint between 0.5 and its successor, and rounds to more than 0.5 exactly when
/// `w > γ/2`. And 0.5 itself goes to the even 0.
#[inline(always)]
pub(super) fn biased_code(w: f32, half_gamma: f32) -> u8 {
    1 + (w > half_gamma) as u8 - (w < -half_gamma) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(x: &[f32]) -> (Vec<i8>, f32) {
        let (mut fast, mut slow) = (vec![7; x.len()], vec![9; x.len()]);
        let scale = simd::vectorize(
            #[inline(always)]
            || quantize_row(x, &mut fast),
        );
        let want = quantize_row_reference(x, &mut slow);
        assert_eq!(fast, slow, "{x:?}");
        assert!(scale.to_bits() == want.to_bits() || scale.is_nan() && want.is_nan(), "{scale} {want}");
        (fast, scale)
    }

    #[test]
    fn rows_of_known_value() {
        // amax 127 makes the scale exactly 1: halves go to even, both signs.
        let (q, scale) = check(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0, 0.499_999_97]);
        assert_eq!(q, [127, 0, 2, 2, 0, -2, -2, 126, -127, 0]);
        assert_eq!(scale, 1.0);
        // Zeros and denormals meet the floor.
        assert_eq!(check(&[0.0, -0.0, 1e-40, -1e-45]), (vec![0; 4], 1e-5 / 127.0));
        assert_eq!(check(&[1e-6]).0, [13]);
        assert_eq!(check(&[]), (vec![], 1e-5 / 127.0));
        // What is not finite poisons the scale, so that the loss shows it.
        assert!(check(&[1.0, f32::NAN, 3.0]).1.is_nan());
        assert_eq!(check(&[1.0, f32::INFINITY]).1, f32::INFINITY);
    }

    proptest! {
        #[test]
        fn every_row_equals_the_definition(
            x in prop::collection::vec(prop_oneof![
                4 => -3.0f32..3.0,
                1 => (-254i32..254).prop_map(|i| i as f32 / 2.0),
                1 => any::<f32>().prop_filter("finite", |v| v.is_finite()),
            ], 0..200),
        ) {
            check(&x);
        }

        #[test]
        fn codes_without_division_equal_the_definition(gamma in 1e-5f32..10.0, ulps in -3i32..4, w in -20.0f32..20.0) {
            let near = f32::from_bits((gamma.to_bits() as i32 + ulps) as u32) / 2.0;
            for w in [near, -near, w, w * 1e-4, 0.0, f32::MAX, f32::MIN_POSITIVE, f32::NAN] {
                prop_assert_eq!(biased_code(w, gamma / 2.0) as i8 - 1, ternary_code(w, gamma), "{} {}", w, gamma);
            }
        }
    }

    #[test]
    fn absmean_is_the_mean_at_every_thread_count() {
        let w: Vec<f32> = (0..100_003).map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 512.0).collect();
        let want = w.iter().map(|v| v.abs() as f64).sum::<f64>() / w.len() as f64;
        // Float64 sums of 1e5 values below 2: the order changes them by < 1e5 · 2^-53 · 2e5, far below half a ulp.
        let alone = absmean(&w);
        assert!((alone as f64 - want).abs() <= want * 2f64.powi(-24));
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| absmean(&w)).to_bits(), alone.to_bits());
        }
        assert_eq!(absmean(&[0.0; 5]), 1e-5);
        assert_eq!(absmean(&[]), 1e-5);
        assert!(absmean(&[1.0, f32::NAN]).is_nan());
    }
}
