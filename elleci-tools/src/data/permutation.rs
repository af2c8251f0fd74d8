//! A keyed permutation of `0..n` in constant memory: the order of documents in an epoch.
//!
//! A shuffled list would cost 8 bytes a document and a pass at every restore. A Feistel network over the next even
//! power of two, walked along its cycles until it lands below `n`, needs four round keys and gives the element at any
//! position at once; the domain is at most four times `n`, so a walk takes fewer than four steps on average.

/// SplitMix64's finaliser: every input bit reaches every output bit.
pub fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A bijection of `0..n` chosen by a key.
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    /// The permutation of `0..n` that `key` chooses; `n` is below 2^62.
    pub fn new(n: u64, key: u64) -> Permutation {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        let mut keys = [0; 4];
        let mut state = key;
        for k in &mut keys {
            state = mix64(state);
            *k = state;
        }
        Permutation { n, half_bits, keys }
    }

    /// The element at `position`, which is below `n`.
    pub fn at(&self, position: u64) -> u64 {
        debug_assert!(position < self.n);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = position;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix64(right ^ key) & mask));
            }
            x = (left << self.half_bits) | right;
            if x < self.n {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_once_at_every_size() {
        for n in (1..70).chain([255, 256, 257, 1000]) {
            for key in 0..3 {
                let p = Permutation::new(n, key);
                let mut seen: Vec<u64> = (0..n).map(|i| p.at(i)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>(), "n {n}, key {key}");
            }
        }
    }

    #[test]
    fn keys_give_different_orders_that_are_not_the_identity() {
        let order = |key| (0..1000).map(|i| Permutation::new(1000, key).at(i)).collect::<Vec<_>>();
        assert_ne!(order(1), order(2));
        // A random permutation of 1000 has one fixed point on average; 12 or more happen once in 10^9.
        assert!(order(1).iter().enumerate().filter(|(i, x)| *i as u64 == **x).count() < 12);
    }
}
