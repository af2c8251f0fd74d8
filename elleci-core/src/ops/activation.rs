//! Scalar functions of the model, written so that loops over them vectorise.
//!
//! Every function here is a straight line of additions, multiplications, divisions, selects and integer operations on
//! the bits: no call, no branch, no table, no `mul_add` (which is a library call on a baseline x86-64). Called in a
//! plain loop inside [`crate::simd::vectorize`] they compile to full-width vector code, and as Rust never contracts
//! `a * b + c`, they give the same bits on every instruction set.
//!
//! Error bounds are in units in the last place of the exact result (ulp) and are held by a sweep over the whole of
//! f32. Subnormal results are flushed to zero: they carry no information here and cost a hundred cycles each in the
//! products that follow. NaN gives NaN everywhere.
//!
//! The polynomials are minimax fits of this project (weighted for the relative error of the function), their
//! approximation error is below 0.08 ulp; the bounds are rounding.

/// The constants of [`exp`], which the explicit vectors in `lanes.rs` share.
pub(super) mod poly {
    /// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the significand.
    pub const ROUND_MAGIC: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has 9 trailing zero bits, so that n * LN2_HI is exact for |n| <= 128.
    pub const LN2_HI: f32 = f32::from_bits(0x3f31_7200);
    /// The rest of ln 2.
    pub const LN2_LO: f32 = 1.428_606_8e-6;
    /// Below, the result is 0.
    pub const EXP_LOWEST: f32 = -87.2;
    /// `(e^r - 1 - r) / r^2` for |r| <= ln(2) / 2, highest power first.
    pub const EXP_POLY: [f32; 5] = [0.001_381_447, 0.008_368_785_5, 0.041_668_393, 0.166_665_2, 0.499_999_94];
}
use poly::*;

/// `e^x` within 1.5 ulp; 0 below -86.9 (where `e^x` is within a factor 1.6 of the smallest normal number), infinity
/// above 88.73.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Selects in this order pass NaN through. At the ends n is -126 and 128: a scale of zero, and overflow.
    let x = if x < EXP_LOWEST { EXP_LOWEST } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * core::f32::consts::LOG2_E + ROUND_MAGIC;
    let n = shifted - ROUND_MAGIC;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    // Written out: a loop here keeps the caller's loop from being vectorised.
    let p = EXP_POLY[0] * r + EXP_POLY[1];
    let p = p * r + EXP_POLY[2];
    let p = p * r + EXP_POLY[3];
    let p = p * r + EXP_POLY[4];
    let y = 1.0 + (r + (r * r) * p);
    // 2^(n - 1), biased exponent n + 126 in 0..=254; the doubled y makes n = 128 representable.
    let n = shifted.to_bits().wrapping_sub(ROUND_MAGIC.to_bits() - 126);
    (y + y) * f32::from_bits(n.wrapping_shl(23))
}

/// `2 atanh(s)` for |s| <= 1/3, relative error below 2^-23.
#[inline(always)]
fn twice_atanh(s: f32) -> f32 {
    let z = s * s;
    let p = 0.140_129_85;
    let p = p * z + 0.139_995_95;
    let p = p * z + 0.200_108_22;
    let p = p * z + 0.333_332_06;
    let twice = s + s;
    twice + twice * (z * p)
}

/// `ln(1 + u)` for `u` in `[0, 1]`, within 3 ulp, small `u` included.
#[inline(always)]
fn ln_1p_unit(u: f32) -> f32 {
    twice_atanh(u / (2.0 + u))
}

/// `ln x` within 3 ulp, near 1 too. `-inf` at 0, NaN below; subnormal `x` counts as zero.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // x = 2^n * m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) makes the exponent field n.
    const SQRT_HALF: i32 = 0x3f35_04f3;
    let bits = x.to_bits() as i32;
    let n = bits.wrapping_sub(SQRT_HALF) >> 23;
    let m = f32::from_bits(bits.wrapping_sub(n.wrapping_shl(23)) as u32);
    let f = m - 1.0;
    let n = n as f32;
    let y = n * LN2_HI + (twice_atanh(f / (2.0 + f)) + n * LN2_LO);
    let y = if x < f32::MIN_POSITIVE { f32::NEG_INFINITY } else { y };
    let y = if x < 0.0 { f32::NAN } else { y };
    // Infinity and NaN are their own logarithms.
    if x < f32::INFINITY { y } else { x }
}

/// `1 / (1 + e^-x)` within 3 ulp (absolutely within 2^-126 below -87, where it is flushed to zero).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)` within 3 ulp. `-inf` gives NaN, as the product `-inf * 0` does.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The derivative of [`silu`], `s * (1 + x * (1 - s))` with `s = sigmoid(x)`, within 2^-21 absolutely. Infinities
/// give NaN.
#[inline(always)]
pub fn silu_grad(x: f32) -> f32 {
    // Both sigmoids from one exponential that cannot overflow: 1 - s would cancel for large x.
    let e = exp(if x < 0.0 { x } else { -x });
    let large = 1.0 / (1.0 + e);
    let small = e * large;
    let (s, rest) = if x < 0.0 { (small, large) } else { (large, small) };
    s * (1.0 + x * rest)
}

/// `ln(1 + e^x)` within 4 ulp (absolutely within 2^-125 below -86.9, where it is flushed to zero). Its derivative is
/// [`sigmoid`].
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    // The select keeps a NaN: it is in the exponential's branch.
    let above = if x > 0.0 { x } else { 0.0 };
    above + ln_1p_unit(exp(if x < 0.0 { x } else { -x }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::vectorize;

    /// Largest error over the sweep in ulp of the exact value, ulp no smaller than `2^-23 * floor`.
    fn worst(
        f: impl Fn(f32) -> f32,
        exact: impl Fn(f64) -> f64,
        floor: f64,
        range: core::ops::Range<f32>,
    ) -> (f64, f32) {
        // Every 499th float of either sign: about 8.6 million points, all exponents alike.
        let mut worst = (0.0, 0.0);
        for bits in (0..u32::MAX - 498).step_by(499) {
            let x = f32::from_bits(bits);
            if !range.contains(&x) {
                continue;
            }
            let want = exact(x as f64);
            let ulp = libm::exp2(libm::floor(libm::log2(want.abs().max(floor)))) * 2f64.powi(-23);
            let error = (f(x) as f64 - want).abs() / ulp;
            if error.is_nan() || error > worst.0 {
                worst = (error, x);
            }
        }
        worst
    }

    const TINY: f64 = f32::MIN_POSITIVE as f64;

    #[track_caller]
    fn holds(worst: (f64, f32), bound: f64) {
        assert!(worst.0 <= bound, "{} ulp at {:e}, bound {bound}", worst.0, worst.1);
    }

    /// Derivation. exp: r carries half an ulp of ln(2)/2 (2^-26), 1 + (..) rounds r + r^2 p (2^-26) and itself (2^-25
    /// to 2^-24): 1.0 + 0.25 + 0.25 ulp where y < 1. A quotient adds 1/2 for the sum and 1/2 for itself, and what the
    /// sum inherits shrinks by e/(1+e); in ulp of a result just above a power of two all of it can double.
    #[test]
    fn error_bounds_over_all_floats() {
        let sigmoid64 = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        holds(worst(exp, libm::exp, TINY, -86.9..88.72), 1.5);
        holds(worst(sigmoid, sigmoid64, TINY, -87.0..f32::MAX), 3.0);
        holds(worst(silu, |x| x * sigmoid64(x), TINY, -87.0..f32::MAX), 3.0);
        holds(worst(softplus, |x| if x > 40.0 { x } else { libm::log1p(libm::exp(x)) }, TINY, -86.9..f32::MAX), 4.0);
        holds(worst(ln, libm::log, TINY, f32::MIN_POSITIVE..f32::MAX), 3.0);
        // Absolute for the derivative, which crosses zero: 4 ulp of 1 = 2^-21.
        let grad = |x: f64| sigmoid64(x) * (1.0 + x * sigmoid64(-x));
        holds(worst(silu_grad, grad, 1.0, -1e30..1e30), 4.0);
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(88.8), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(88.72) < f32::INFINITY);
        assert_eq!((sigmoid(f32::NEG_INFINITY), sigmoid(f32::INFINITY), sigmoid(0.0)), (0.0, 1.0, 0.5));
        assert_eq!((silu(-1e30), silu(1e30), silu(f32::INFINITY)), (0.0, 1e30, f32::INFINITY));
        assert!(silu(f32::NEG_INFINITY).is_nan());
        assert_eq!((silu_grad(-1e30), silu_grad(1e30), silu_grad(0.0)), (0.0, 1.0, 0.5));
        assert_eq!((softplus(-1e30), softplus(1e30), softplus(f32::INFINITY)), (0.0, 1e30, f32::INFINITY));
        assert_eq!(softplus(f32::NEG_INFINITY), 0.0);
        assert_eq!((ln(1.0), ln(0.0), ln(f32::INFINITY)), (0.0, f32::NEG_INFINITY, f32::INFINITY));
        assert!(ln(-1.0).is_nan() && ln(f32::NEG_INFINITY).is_nan());
        for f in [exp, sigmoid, silu, silu_grad, softplus, ln] {
            assert!(f(f32::NAN).is_nan() && f(-f32::NAN).is_nan());
        }
    }

    /// The vector code must give what the scalar code gives, or the bits would depend on where a slice was cut.
    #[test]
    fn vectorised_loops_give_the_same_bits() {
        let x: alloc::vec::Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.173).collect();
        let mut y = x.clone();
        vectorize(
            #[inline(always)]
            || y.iter_mut().for_each(|v| *v = softplus(*v) + silu(*v) * silu_grad(*v)),
        );
        for (x, y) in x.iter().zip(&y) {
            let x = core::hint::black_box(*x);
            assert_eq!(y.to_bits(), (softplus(x) + silu(x) * silu_grad(x)).to_bits(), "{x}");
        }
    }
}
