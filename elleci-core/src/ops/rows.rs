//! Row-wise helpers shared by the operations: sums in a fixed order that vectorise, and the cut of rows into tasks.

/// Independent partial sums of a row reduction: enough for one AVX-512 vector, and the same order on every machine.
const LANES: usize = 16;

/// Rows a task takes: at most 16 tasks, each of 8 rows or more. Depends on the number of rows alone.
pub fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(16).max(8)
}

/// `Σ f(i)` over `0..len`, in [`LANES`] interleaved partial sums added in order.
#[inline(always)]
fn reduce(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, j) in (whole..len).enumerate() {
        lanes[l] += f(j);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ x²`
#[inline(always)]
pub fn sum_squares(x: &[f32]) -> f32 {
    reduce(x.len(), |i| x[i] * x[i])
}

/// `Σ x·y`
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let y = &y[..x.len()];
    reduce(x.len(), |i| x[i] * y[i])
}

/// `Σ x`
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce(x.len(), |i| x[i])
}

/// The largest element; `-inf` for an empty row.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for l in 0..LANES {
            lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
        }
    }
    for (l, &v) in chunks.remainder().iter().enumerate() {
        lanes[l] = if v > lanes[l] { v } else { lanes[l] };
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
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
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let y: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
            // n additions of terms at most 1: error <= n^2 * 2^-24
            let bound = (n * n) as f64 * 2f64.powi(-24) + 1e-9;
            let want = |f: fn(f64, f64) -> f64| x.iter().zip(&y).map(|(&a, &b)| f(a as f64, b as f64)).sum::<f64>();
            assert!((sum(&x) as f64 - want(|a, _| a)).abs() <= bound);
            assert!((dot(&x, &y) as f64 - want(|a, b| a * b)).abs() <= bound);
            assert!((sum_squares(&x) as f64 - want(|a, _| a * a)).abs() <= bound);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
