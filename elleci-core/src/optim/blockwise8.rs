//! 8-bit block-wise dynamic quantisation of optimiser states (Dettmers et al. 2022, <https://arxiv.org/abs/2110.02861>).
//!
//! A block of [`BLOCK`] values is stored as its largest magnitude (`absmax`, f32) and one code a value. A code names
//! one of 256 fixed numbers in [-1, 1]: seven decades, 10⁻⁷ to 1, the k-th holding twice as many evenly spaced values
//! as the one below it. So large values keep two digits, and small ones do not vanish beside them.
//!
//! Finding the nearest code must be fast and exact. Codes are compared as magnitudes: `near` tells, by the exponent
//! and the seven highest mantissa bits of a magnitude, the code of the smallest number with those bits; one comparison with
//! `limit`, the last number that still belongs to that code, finishes. That is exact because no two limits fall
//! into one such bucket, which a test checks for every bucket.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Values that share one `absmax`.
pub const BLOCK: usize = 256;

/// Mantissa bits that the bucket of a magnitude keeps.
const BUCKET_SHIFT: u32 = 23 - 7;
/// Bucket of 2⁻²³: no limit but that of zero itself lies below it.
const FIRST_BUCKET: u32 = (127 - 23) << 7;
/// Buckets up to that of 1.0, rounded up to a power of two so that a mask proves the index in range.
const BUCKETS: usize = 4096;

/// 256 numbers in [-1, 1] and the tables that find the nearest of them.
#[derive(Clone)]
pub struct DynamicMap {
    /// The number of every code, ascending.
    values: [f32; 256],
    /// The code of 0: how many negative codes there are.
    zero: u32,
    /// By bucket of |x|: steps away from `zero` of the smallest |x| in the bucket.
    near: [u32; BUCKETS],
    /// By steps away from `zero`: the largest |x| that belongs to this code.
    limit: [f32; 256],
}

impl DynamicMap {
    /// For values of either sign (the first moment): 127 negative codes, 0, their 127 mirror images, and 1.
    /// -1 has no code: -absmax is stored as -0.993 absmax.
    pub fn signed() -> Box<DynamicMap> {
        let magnitudes = magnitudes(1);
        let mut values: Vec<f32> = magnitudes[1..128].iter().rev().map(|m| -m).collect();
        values.extend_from_slice(&magnitudes);
        DynamicMap::build(&values, 127, &magnitudes, midpoint_below(magnitudes[0], magnitudes[1]))
    }

    /// For values that are never negative (the second moment): 0, twice as many codes a decade, and 1.
    ///
    /// A positive value never takes the code of 0: AdamW divides by the root of the second moment, and a moment
    /// rounded to 0 would turn a tiny gradient into a step of `m / eps`. It takes the smallest positive code instead,
    /// which errs towards a smaller step.
    pub fn unsigned() -> Box<DynamicMap> {
        let magnitudes = magnitudes(2);
        DynamicMap::build(&magnitudes, 0, &magnitudes, 0.0)
    }

    fn build(values: &[f32], zero: u32, magnitudes: &[f32], zero_limit: f32) -> Box<DynamicMap> {
        let mut map =
            Box::new(DynamicMap { values: [0.0; 256], zero, near: [0; BUCKETS], limit: [f32::INFINITY; 256] });
        map.values.copy_from_slice(values);
        for (limit, pair) in map.limit.iter_mut().zip(magnitudes.windows(2)) {
            *limit = midpoint_below(pair[0], pair[1]);
        }
        map.limit[0] = zero_limit;
        for bucket in 1..BUCKETS {
            let smallest = f32::from_bits((bucket as u32 + FIRST_BUCKET) << BUCKET_SHIFT);
            map.near[bucket] = map.limit.iter().take_while(|&&limit| smallest > limit).count() as u32;
        }
        map
    }

    /// The number of every code, ascending.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The code of 0.
    pub fn zero_code(&self) -> u8 {
        self.zero as u8
    }

    /// The code nearest to `x` in [-1, 1]; of two equally near, the one nearer to 0. NaN takes some code.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        let magnitude = x.abs();
        let bucket = (magnitude.to_bits() >> BUCKET_SHIFT).saturating_sub(FIRST_BUCKET);
        let first = self.near[bucket as usize & (BUCKETS - 1)];
        let steps = first + (magnitude > self.limit[first as usize & 255]) as u32;
        let code = if x < 0.0 { self.zero - steps.min(self.zero) } else { self.zero + steps };
        code as u8
    }

    /// Quantises a block of at most [`BLOCK`] values into codes; returns its absmax.
    ///
    /// # Panics
    /// When `codes` is shorter than `x`.
    #[inline(always)]
    pub fn quantise(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        // Non-negative floats order as their bits do, and an integer maximum vectorises.
        let absmax = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.abs().to_bits())));
        let divisor = if absmax > 0.0 { absmax } else { 1.0 };
        for (code, &v) in codes[..x.len()].iter_mut().zip(x) {
            *code = self.code(v / divisor);
        }
        absmax
    }

    /// The values of a block: `out[i] = values[codes[i]] * absmax`.
    ///
    /// # Panics
    /// When `codes` is shorter than `out`.
    #[inline(always)]
    pub fn dequantise(&self, codes: &[u8], absmax: f32, out: &mut [f32]) {
        for (v, &code) in out.iter_mut().zip(codes) {
            *v = self.values[code as usize] * absmax;
        }
    }
}

/// 0, then the middles of `scale * 2^decade` equal parts of [0.1, 1] · 10^(decade - 6) for decades 0 to 6, then 1.
fn magnitudes(scale: u32) -> Vec<f32> {
    let mut out = Vec::with_capacity(256);
    out.push(0.0);
    for decade in 0..7 {
        let parts = scale << decade;
        let unit = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0][decade];
        out.extend((0..parts).map(|k| (unit * (0.1 + 0.9 * (k as f64 + 0.5) / parts as f64)) as f32));
    }
    out.push(1.0);
    out
}

/// The largest f32 that is at most (a + b)/2. Sums of two codes are exact in f64.
fn midpoint_below(a: f32, b: f32) -> f32 {
    let middle = (a as f64 + b as f64) / 2.0;
    let rounded = middle as f32;
    if rounded as f64 > middle { rounded.next_down() } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    /// The definition: the nearest of all codes, the one nearer to 0 of two; by `zero_only_if_zero`, 0 for 0 alone.
    fn nearest_by_search(map: &DynamicMap, x: f32, zero_only_if_zero: bool) -> u8 {
        let distance = |code: usize| (map.values[code] as f64 - x as f64).abs();
        let mut best = None;
        for code in 0..256 {
            if zero_only_if_zero && x != 0.0 && map.values[code] == 0.0 {
                continue;
            }
            best = match best {
                Some(b) if distance(b) < distance(code) => Some(b),
                Some(b) if distance(b) == distance(code) && map.values[b].abs() < map.values[code].abs() => Some(b),
                _ => Some(code),
            };
        }
        best.unwrap() as u8
    }

    #[test]
    fn maps_are_those_of_the_paper() {
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        for map in [&signed, &unsigned] {
            assert!(map.values.windows(2).all(|w| w[0] < w[1]), "strictly ascending");
            assert_eq!(map.values[map.zero_code() as usize], 0.0);
            assert_eq!(map.values[255], 1.0);
        }
        assert_eq!((signed.zero_code(), unsigned.zero_code()), (127, 0));
        for k in 1..=127 {
            assert_eq!(signed.values[127 - k], -signed.values[127 + k], "mirror images");
        }
        // By hand: decade 0 of the signed map is the middle of [1e-7, 1e-6]; its decade 6 starts half of 0.9/64 above 0.1.
        // The unsigned decade 0 has two parts, with middles 0.325e-6 and 0.775e-6.
        assert_eq!(signed.values[128], 5.5e-7);
        assert_eq!(signed.values[128 + 63], 0.107_031_25);
        assert_eq!(signed.values[254], 0.992_968_75);
        assert_eq!(unsigned.values[1..3], [3.25e-7, 7.75e-7]);
        assert_eq!(unsigned.values[254], 0.996_484_4);
    }

    /// With monotonicity this proves `code` equal to the search for every float: inside a bucket the answer is one of
    /// two neighbours, and `limit` separates them.
    #[test]
    fn no_bucket_holds_two_limits() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            assert!(map.limit.windows(2).all(|w| w[0] <= w[1]));
            let last = (1f32.to_bits() >> BUCKET_SHIFT) - FIRST_BUCKET;
            assert!((last as usize) < BUCKETS);
            for bucket in 0..=last {
                let bits = (bucket + FIRST_BUCKET) << BUCKET_SHIFT;
                let low = if bucket == 0 { 0.0 } else { f32::from_bits(bits) };
                let high = f32::from_bits(bits | ((1 << BUCKET_SHIFT) - 1));
                let inside = map.limit.iter().filter(|&&l| l >= low && l < high).count();
                assert!(inside <= 1, "bucket {bucket}: {inside} limits in [{low}, {high})");
            }
        }
    }

    #[test]
    fn codes_equal_the_search_at_and_beside_every_limit_and_code() {
        for (map, signs) in [(DynamicMap::signed(), &[1.0, -1.0][..]), (DynamicMap::unsigned(), &[1.0][..])] {
            let points: Vec<f32> = map.limit.iter().chain(&map.values).copied().filter(|x| x.abs() <= 1.0).collect();
            for x in points.into_iter().flat_map(|x| [x.next_down(), x, x.next_up()]) {
                for sign in signs {
                    let x = x.abs().min(1.0) * sign;
                    assert_eq!(map.code(x), nearest_by_search(&map, x, map.zero == 0), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_zeros_and_of_subnormals_survive() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            for value in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, f32::MAX] {
                let (mut codes, mut back) = (vec![9; 3], vec![9.0; 3]);
                let absmax = map.quantise(&[value, 0.0, value], &mut codes);
                map.dequantise(&codes, absmax, &mut back);
                assert_eq!(back, [value, 0.0, value]);
            }
        }
    }

    proptest! {
        #[test]
        fn codes_equal_the_search(bits in 0..=1f32.to_bits(), negative: bool) {
            let x = f32::from_bits(bits);
            let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
            let sx = if negative { -x } else { x };
            prop_assert_eq!(signed.code(sx), nearest_by_search(&signed, sx, false));
            prop_assert_eq!(unsigned.code(x), nearest_by_search(&unsigned, x, true));
        }

        #[test]
        fn a_block_errs_by_at_most_half_a_gap(
            x in proptest::collection::vec((-1f32..1.0, -9f32..3.0), 1..=BLOCK), positive: bool
        ) {
            let x: Vec<f32> = x.into_iter()
                .map(|(u, e)| libm::powf(10.0, e) * if positive { u.abs() } else { u }).collect();
            let map = if positive { DynamicMap::unsigned() } else { DynamicMap::signed() };
            let (mut codes, mut back) = (vec![0; x.len()], vec![0.0; x.len()]);
            let absmax = map.quantise(&x, &mut codes);
            map.dequantise(&codes, absmax, &mut back);
            prop_assert_eq!(absmax, x.iter().fold(0.0, |m: f32, v| m.max(v.abs())));
            for (&v, &b) in x.iter().zip(&back) {
                // Decade d of 2^d (signed) or 2^(d+1) parts has gaps of 0.9 * 10^(d-6) / parts; half of one is the error, and
                // at a decade's lower end no more than that. -1 lacks a code: half a gap as well. Below the lowest
                // decade the error is at most its smallest code. Roundings of the division and the product: 3 * 2^-24.
                let r = (v / absmax).abs() as f64;
                let decade = (libm::floor(libm::log10(r.max(1e-300))) + 7.0).clamp(0.0, 6.0);
                let parts = libm::exp2(decade) * if positive { 2.0 } else { 1.0 };
                let unit = libm::pow(10.0, decade - 6.0);
                let bound = if r < 1e-7 { 5.5e-7 } else { 0.45 * unit / parts } + 3.0 * r.max(unit * 0.1) / 16_777_216.0;
                let error = (v as f64 - b as f64).abs() / absmax as f64;
                prop_assert!(error <= bound, "{} -> {}: {} > {}", v, b, error, bound);
                prop_assert!(b == 0.0 || b.is_sign_negative() == v.is_sign_negative(), "sign of {} -> {}", v, b);
                prop_assert!(!positive || v == 0.0 || b > 0.0, "a positive second moment became 0");
            }
        }
    }
}
