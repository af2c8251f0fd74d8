//! Explicit vectors, for the few loops that the compiler does not vectorise well by itself.
//!
//! Sums of a float loop are the main case: cut into sixteen interleaved sums in a plain array, LLVM 21 unrolls them
//! and then packs them two by two from the final additions backwards, at an eighth of the speed. Loops with several
//! outputs are the other: it cannot prove them apart. [`crate::simd::vectorize`] remains the first choice.

use pulp::{Simd, WithSimd};

/// Runs `op` with the vectors of the detected instruction set, and compiled for it.
#[inline(always)]
pub(crate) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        use crate::simd::Isa;
        let isa = Isa::detect();
        if isa >= Isa::Avx512
            && let Some(v4) = pulp::x86::V4::try_new()
        {
            return Simd::vectorize(v4, op);
        }
        if isa >= Isa::Avx2
            && let Some(v3) = pulp::x86::V3::try_new()
        {
            return Simd::vectorize(v3, op);
        }
    }
    #[cfg(all(feature = "std", not(target_arch = "x86_64")))]
    return pulp::Arch::new().dispatch(op);
    #[cfg(any(not(feature = "std"), target_arch = "x86_64"))]
    Simd::vectorize(pulp::Scalar::new(), op)
}

/// Whole vectors of a slice. Its length must be a multiple of 16, the longest vector.
#[inline(always)]
pub(crate) fn vectors<S: Simd>(slice: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(slice).0
}

/// See [`vectors`].
#[inline(always)]
pub(crate) fn vectors_mut<S: Simd>(slice: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(slice).0
}

/// `sum of a[i] b[i]`.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    let mut total = simd.reduce_sum_f32s(sum);
    for (a, b) in a_tail.iter().zip(b_tail) {
        total += a * b;
    }
    total
}

/// The products of `R` rows with one. `rows` are `R` runs of `x.len()`, which must be a multiple of 16. A product's order of
/// additions depends on its row alone.
#[inline(always)]
pub(crate) fn dots<S: Simd, const R: usize>(simd: S, rows: &[f32], x: &[f32]) -> [f32; R] {
    let [sums] = products::<S, R, 1>(simd, rows, x);
    sums
}

/// The products of `R` rows with each of `T` others, `[T][R]`; the same bits as [`dots`] with one after the other. Eight chains of
/// additions keep the units of multiplication busy where four wait for each other.
#[inline(always)]
pub(crate) fn products<S: Simd, const R: usize, const T: usize>(simd: S, rows: &[f32], x: &[f32]) -> [[f32; R]; T] {
    let len = x.len() / T / S::F32_LANES;
    let (rows, x) = (vectors::<S>(rows), vectors::<S>(x));
    let rows: [&[S::f32s]; R] = core::array::from_fn(|r| &rows[r * len..(r + 1) * len]);
    let x: [&[S::f32s]; T] = core::array::from_fn(|t| &x[t * len..(t + 1) * len]);
    let mut acc = [[simd.splat_f32s(0.0); R]; T];
    for k in 0..len {
        for t in 0..T {
            for r in 0..R {
                acc[t][r] = simd.mul_add_e_f32s(rows[r][k], x[t][k], acc[t][r]);
            }
        }
    }
    // `map` would leave the vectors' features behind.
    let mut sums = [[0.0; R]; T];
    for (to, sum) in sums.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
        *to = simd.reduce_sum_f32s(*sum);
    }
    sums
}

/// [`exp`](super::activation::exp) of numbers at most 0; larger ones count as 0. The same 1.5 ulp.
#[inline(always)]
pub(crate) fn exp_nonpositive<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    use super::activation::poly::*;
    // The constants come first: these return their second operand if one is NaN.
    let x = simd.min_f32s(simd.splat_f32s(0.0), simd.max_f32s(simd.splat_f32s(EXP_LOWEST), x));
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(core::f32::consts::LOG2_E), simd.splat_f32s(ROUND_MAGIC));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND_MAGIC));
    let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN2_HI), x);
    let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN2_LO), r);
    let mut p = simd.splat_f32s(EXP_POLY[0]);
    for c in &EXP_POLY[1..] {
        p = simd.mul_add_e_f32s(p, r, simd.splat_f32s(*c));
    }
    let y = simd.mul_add_e_f32s(simd.mul_f32s(r, r), p, r);
    let y = simd.add_f32s(simd.splat_f32s(1.0), y);
    let bits = simd.sub_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(ROUND_MAGIC.to_bits() - 126));
    let scale = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)));
    simd.mul_f32s(simd.add_f32s(y, y), scale)
}

/// `sigmoid(x)` and `1 - sigmoid(x)`, each within 3 ulp: from one exponential that cannot overflow.
#[inline(always)]
fn sigmoids<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let e = exp_nonpositive(simd, simd.min_f32s(simd.neg_f32s(x), x));
    let large = simd.div_f32s(simd.splat_f32s(1.0), simd.add_f32s(simd.splat_f32s(1.0), e));
    let small = simd.mul_f32s(e, large);
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    (simd.select_f32s(negative, small, large), simd.select_f32s(negative, large, small))
}

/// [`silu`](super::activation::silu), within 4 ulp.
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    simd.mul_f32s(x, sigmoids(simd, x).0)
}

/// [`silu_grad`](super::activation::silu_grad).
#[inline(always)]
pub(crate) fn silu_grad<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (s, rest) = sigmoids(simd, x);
    simd.mul_f32s(s, simd.mul_add_e_f32s(x, rest, simd.splat_f32s(1.0)))
}

/// Vector v of a row; zeros beyond the row's end, where v may lie altogether.
#[inline(always)]
pub(crate) fn load<S: Simd>(simd: S, row: &[f32], v: usize) -> S::f32s {
    let rest = &row[row.len().min(v * S::F32_LANES)..];
    S::as_simd_f32s(rest).0.first().copied().unwrap_or_else(|| simd.partial_load_f32s(rest))
}

/// Writes vector v of a row, as far as the row goes.
#[inline(always)]
pub(crate) fn store<S: Simd>(simd: S, row: &mut [f32], v: usize, value: S::f32s) {
    let first = row.len().min(v * S::F32_LANES);
    let rest = &mut row[first..];
    match rest.len() >= S::F32_LANES {
        true => S::as_mut_simd_f32s(rest).0[0] = value,
        false => simd.partial_store_f32s(rest, value),
    }
}

/// `TRIANGLE[15 - r..][..16]` is 1 in the lanes 0..=r and 0 after, for r < 16.
pub(crate) static TRIANGLE: [f32; 32] = {
    let mut table = [0.0; 32];
    let mut i = 0;
    while i < 16 {
        table[i] = 1.0;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    struct Exp<'a>(&'a mut [f32]);
    impl WithSimd for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            vectors_mut::<S>(self.0).iter_mut().for_each(|x| *x = exp_nonpositive(simd, *x));
        }
    }

    #[test]
    fn exp_keeps_its_bound_and_its_ends() {
        let x: Vec<f32> = (0..1 << 20).map(|i| -86.9 * (i as f32 / (1 << 20) as f32)).collect();
        let mut y = x.clone();
        dispatch(Exp(&mut y));
        for (x, y) in x.iter().zip(&y) {
            let want = libm::exp(*x as f64);
            let ulp = libm::exp2(libm::floor(libm::log2(want))) * 2f64.powi(-23);
            assert!((*y as f64 - want).abs() <= 1.5 * ulp, "{x}: {y} {want}");
        }
        let mut ends = [0.0f32; 16];
        ends[..4].copy_from_slice(&[f32::NEG_INFINITY, -1e30, 0.0, 5.0]);
        dispatch(Exp(&mut ends));
        assert_eq!(ends[..4], [0.0, 0.0, 1.0, 1.0]);
    }

    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl WithSimd for Dot<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            dot(simd, self.0, self.1)
        }
    }

    #[test]
    fn dot_at_every_remainder() {
        let x: Vec<f32> = (1..80).map(|i| i as f32).collect();
        for n in 0..79 {
            // Integers below 2^24: exact in any order.
            assert_eq!(dispatch(Dot(&x[..n], &x[..n])), (1..=n).map(|i| (i * i) as f32).sum::<f32>());
        }
    }
}
