//! Dense float32 products, cut into fixed tiles so that the bits do not depend on the number of threads.

use alloc::vec::Vec;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use crate::par;

/// What happens to the old contents of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// `C = A · B`
    Store,
    /// `C += A · B`
    Add,
}

/// `C = A · B` or `C += A · B`, on the calling thread. Any strides.
///
/// # Panics
/// When the shapes do not fit: A is [m, k], B [k, n], C [m, n].
pub fn matmul_serial(a: ArrayView2<f32>, b: ArrayView2<f32>, c: ArrayViewMut2<f32>, out: Out) {
    let ((m, k), n) = (a.dim(), b.dim().1);
    assert!(b.dim().0 == k && c.dim() == (m, n), "matmul: {:?} x {:?} -> {:?}", a.dim(), b.dim(), c.dim());
    product(a, b, c, out);
}

/// [`matmul_serial`] of shapes that fit.
#[cfg(feature = "std")]
fn product(a: ArrayView2<f32>, b: ArrayView2<f32>, c: ArrayViewMut2<f32>, out: Out) {
    // The kernels want the output's strides positive, and prefer its columns contiguous: the transposed product has them so.
    let (mut a, mut b, mut c) = match c.strides() {
        [rows, columns] if columns.abs() < rows.abs() => (b.reversed_axes(), a.reversed_axes(), c.reversed_axes()),
        _ => (a, b, c),
    };
    if c.strides()[0] < 0 {
        c.invert_axis(Axis(0));
        a.invert_axis(Axis(0));
    }
    if c.strides()[1] < 0 {
        c.invert_axis(Axis(1));
        b.invert_axis(Axis(1));
    }
    if a.strides()[1] < 0 {
        a.invert_axis(Axis(1));
        b.invert_axis(Axis(0));
    }
    let ((m, k), n) = (a.dim(), b.dim().1);
    let (sa, sb, sc) = (a.strides(), b.strides(), [c.strides()[0], c.strides()[1]]);
    // SAFETY: the views cover the [m, k], [k, n] and [m, n] elements that the product touches, at their own strides;
    // `c` is borrowed mutably, so it overlaps neither `a` nor `b`. With `read_dst` false the old `c` is not read.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            c.as_mut_ptr(),
            sc[1],
            sc[0],
            out == Out::Add,
            a.as_ptr(),
            sa[1],
            sa[0],
            b.as_ptr(),
            sb[1],
            sb[0],
            1.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

/// [`matmul_serial`] of shapes that fit.
#[cfg(not(feature = "std"))]
fn product(a: ArrayView2<f32>, b: ArrayView2<f32>, mut c: ArrayViewMut2<f32>, out: Out) {
    let ((m, k), n) = (a.dim(), b.dim().1);
    let (sa, sb, sc) = (a.strides(), b.strides(), [c.strides()[0], c.strides()[1]]);
    let beta = if out == Out::Add { 1.0 } else { 0.0 };
    // SAFETY: the views cover the [m, k], [k, n] and [m, n] elements that the product touches, at their own strides;
    // `c` is borrowed mutably, so it overlaps neither `a` nor `b`. With beta 0 the old `c` is not read.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            a.as_ptr(),
            sa[0],
            sa[1],
            b.as_ptr(),
            sb[0],
            sb[1],
            beta,
            c.as_mut_ptr(),
            sc[0],
            sc[1],
        );
    }
}

/// Multiply-adds in a tile worth a task of its own.
const TILE_MACS: usize = 1 << 22;
/// Tiles at most: enough for the cores of a large machine, few enough to share the packed operand.
const MAX_TILES: usize = 16;

/// [`matmul_serial`] spread over the current thread pool, by shared packed panels where the machine and the shape allow.
/// The bits depend on shapes and strides alone.
///
/// # Panics
/// When the shapes do not fit.
pub fn matmul(a: ArrayView2<f32>, b: ArrayView2<f32>, c: ArrayViewMut2<f32>, out: Out) {
    let ((m, k), n) = (a.dim(), b.dim().1);
    assert!(b.dim().0 == k && c.dim() == (m, n), "matmul: {:?} x {:?} -> {:?}", a.dim(), b.dim(), c.dim());
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    if let Some(kernel) = super::avx512::Avx512::detect() {
        use super::packed::{fits, multiply, pays};
        if fits(&a, &c) {
            if pays(&a, b.strides()[1] != 1, n) {
                return multiply(kernel, a, &b, c, out);
            }
        } else {
            // A column-major output: the transposed product.
            let (at, bt, ct) = (b.reversed_axes(), a.reversed_axes(), c.reversed_axes());
            if fits(&at, &ct) && pays(&at, bt.strides()[1] != 1, m) {
                return multiply(kernel, at, &bt, ct, out);
            }
            return matmul_tiled(bt.reversed_axes(), at.reversed_axes(), ct.reversed_axes(), out);
        }
    }
    matmul_tiled(a, b, c, out);
}

/// The product by whatever [`matmul_serial`] is, in tiles.
fn matmul_tiled(a: ArrayView2<f32>, b: ArrayView2<f32>, c: ArrayViewMut2<f32>, out: Out) {
    let ((m, k), n) = (a.dim(), b.dim().1);
    let tiles = (m * n * k / TILE_MACS).clamp(1, MAX_TILES);
    if tiles == 1 {
        return matmul_serial(a, b, c, out);
    }
    if m >= n {
        let rows = m.div_ceil(tiles).next_multiple_of(16);
        let mut c = c;
        let items: Vec<_> = a.axis_chunks_iter(Axis(0), rows).zip(c.axis_chunks_iter_mut(Axis(0), rows)).collect();
        par::for_each(items, |(a, c)| matmul_serial(a, b, c, out));
    } else {
        let cols = n.div_ceil(tiles).next_multiple_of(16);
        let mut c = c;
        let items: Vec<_> = b.axis_chunks_iter(Axis(1), cols).zip(c.axis_chunks_iter_mut(Axis(1), cols)).collect();
        par::for_each(items, |(b, c)| matmul_serial(a, b, c, out));
    }
}

/// A row-major `[rows, cols]` view of a slice.
///
/// # Panics
/// When the slice does not have `rows * cols` elements.
pub fn mat<T>(data: &[T], rows: usize, cols: usize) -> ArrayView2<'_, T> {
    assert_eq!(data.len(), rows * cols, "mat: {} elements for [{rows}, {cols}]", data.len());
    ArrayView2::from_shape((rows, cols), data).expect("length was just checked")
}

/// A mutable row-major `[rows, cols]` view of a slice.
///
/// # Panics
/// When the slice does not have `rows * cols` elements.
pub fn mat_mut<T>(data: &mut [T], rows: usize, cols: usize) -> ArrayViewMut2<'_, T> {
    assert_eq!(data.len(), rows * cols, "mat_mut: {} elements for [{rows}, {cols}]", data.len());
    ArrayViewMut2::from_shape((rows, cols), data).expect("length was just checked")
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// The definition.
    fn reference(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                c[i * n + j] = (0..k).map(|l| a[i * k + l] as f64 * b[l * n + j] as f64).sum();
            }
        }
        c
    }

    #[test]
    fn matches_the_definition_at_odd_and_tiled_sizes_and_strides() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 33, 65), (300, 128, 257), (64, 512, 300)] {
            let a: Vec<f32> = (0..m * k).map(|i| ((i * 37 % 251) as f32 - 125.0) / 64.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| ((i * 53 % 241) as f32 - 120.0) / 64.0).collect();
            let want = reference(&a, &b, m, k, n);
            let mut c = vec![1.0; m * n];
            matmul(mat(&a, m, k), mat(&b, k, n), mat_mut(&mut c, m, n), Out::Add);
            let mut ct = vec![0.0; m * n];
            // The transposed product into a transposed output: other strides, same numbers.
            matmul(
                mat(&b, k, n).reversed_axes(),
                mat(&a, m, k).reversed_axes(),
                mat_mut(&mut ct, m, n).reversed_axes(),
                Out::Store,
            );
            // |error| <= k * 2^-24 * sum|a||b| <= k * 2^-24 * k * 4
            let bound = (k * k) as f64 * 4.0 * 2f64.powi(-24) + 1e-6;
            for i in 0..m * n {
                assert!((c[i] as f64 - 1.0 - want[i]).abs() <= bound, "({m},{k},{n}) {i}: {} {}", c[i] - 1.0, want[i]);
                assert!((ct[i] as f64 - want[i]).abs() <= bound);
            }
        }
    }
}
