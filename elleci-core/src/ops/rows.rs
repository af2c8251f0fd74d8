//! Row-wise helpers shared by the operations: sums in a fixed order that vectorise, and the cut of rows into tasks.

use super::activation::exp;
use crate::simd::vectorize;

/// Independent partial sums of a row reduction, kept in memory. So many that the compiler leaves the loop over them a loop
/// and vectorises it (sixteen, one vector, it unrolls and packs two by two at an eighth of the speed); the order of the
/// additions is the same on every machine.
pub const LANES: usize = 128;

/// Rows a task takes: at most 16 tasks, each of 8 rows or more. Depends on the number of rows alone.
pub fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(16).max(8)
}

/// `rne(v)`, halves to even, in two's complement in the low bits, for `|v| < 2^22`: adding 1.5 · 2^23 leaves one unit in the last place.
#[inline(always)]
pub(crate) fn rne_bits(v: f32) -> u32 {
    (v + 12_582_912.0).to_bits()
}

/// `Σ f(x_i, y_i, ..)` over the elements of `N` rows of one length, in [`LANES`] interleaved partial sums.
#[inline(always)]
fn reduce<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = rows[0].len();
    let rows = rows.map(|row| &row[..len]);
    let mut lanes = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let blocks = rows.map(|row| &row[start..start + LANES]);
        for l in 0..LANES {
            lanes[l] += f(core::array::from_fn(|k| blocks[k][l]));
        }
    }
    for (l, lane) in lanes[..len - whole].iter_mut().enumerate() {
        *lane += f(core::array::from_fn(|k| rows[k][whole + l]));
    }
    halve(&mut lanes, |a, b| a + b)
}

/// Combines the lanes pairwise, the upper half into the lower, until one is left.
#[inline(always)]
fn halve(lanes: &mut [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low = combine(*low, *high);
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ x²`
#[inline(always)]
pub fn sum_squares(x: &[f32]) -> f32 {
    reduce([x], |[x]| x * x)
}

/// `Σ x·y`
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    reduce([x, y], |[x, y]| x * y)
}

/// `Σ x·y·z`
#[inline(always)]
pub fn dot3(x: &[f32], y: &[f32], z: &[f32]) -> f32 {
    reduce([x, y, z], |[x, y, z]| x * y * z)
}

/// `Σ x`
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce([x], |[x]| x)
}

/// The largest element; `-inf` for an empty row.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    halve(&mut lanes, |a, b| if b > a { b } else { a })
}

/// The largest element m of a row, and `Σ exp(x - m)`. Not to be called inside of [`vectorize`]: it is compiled here, for whoever calls.
pub fn max_and_exp_sum(x: &[f32]) -> (f32, f32) {
    vectorize(
        #[inline(always)]
        || {
            let max = max(x);
            (max, reduce([x], |[x]| exp(x - max)))
        },
    )
}

/// `y += a · x`
#[inline(always)]
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Adds the rows of `partials` `[n, width]` to `total` `[width]`, first to last.
pub fn add_partials(total: &mut [f32], partials: &[f32]) {
    for row in partials.chunks_exact(total.len()) {
        add_scaled(total, 1.0, row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn sums_match_f64_at_every_remainder() {
        for n in (0..70).chain([127, 128, 129, 300]) {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let y: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
            // n additions of terms at most 1: error <= n^2 * 2^-24
            let bound = (n * n) as f64 * 2f64.powi(-24) + 1e-9;
            let want = |f: fn(f64, f64) -> f64| x.iter().zip(&y).map(|(&a, &b)| f(a as f64, b as f64)).sum::<f64>();
            assert!((sum(&x) as f64 - want(|a, _| a)).abs() <= bound);
            assert!((dot(&x, &y) as f64 - want(|a, b| a * b)).abs() <= bound);
            assert!((dot3(&x, &y, &y) as f64 - want(|a, b| a * b * b)).abs() <= bound);
            assert!((sum_squares(&x) as f64 - want(|a, _| a * a)).abs() <= bound);
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&x), largest);
            let (found, sum) = max_and_exp_sum(&x);
            let exact: f64 = x.iter().map(|x| f64::from(x - largest).exp()).sum();
            // The same, with 1.5 ulp of each term on top.
            assert!(found == largest && (f64::from(sum) - exact).abs() <= bound + n as f64 * 2f64.powi(-22), "{n}");
        }
    }
}
