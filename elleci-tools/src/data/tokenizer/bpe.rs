//! Byte-pair encoding of one piece, and a cache of pieces.
//!
//! The `tokenizers` crate keeps offsets, normalised copies and an added-vocabulary search for each text; none of
//! that is needed here, and without it encoding is several times faster. Special tokens are never looked for: the
//! text of a corpus can only become text tokens. The tests hold the result against the crate.

use super::pretokenize::pieces;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

type FastMap<K, V> = HashMap<K, V, Xxh3DefaultBuilder>;

/// The merges of a byte-level BPE.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// The token of every single byte.
    bytes: [u32; 256],
    /// Pair of tokens to (rank, merged token); the lowest rank merges first.
    merges: FastMap<u64, (u32, u32)>,
}

/// Tokens of pieces seen before; one a thread. Bounded: it forgets everything when it is full.
#[derive(Default)]
pub struct Cache {
    spans: FastMap<Box<str>, (u32, u32)>,
    tokens: Vec<u32>,
}

impl Cache {
    /// Pieces that are remembered: some 10 MB.
    const MAX_PIECES: usize = 1 << 17;
    /// Longer pieces are rare and seldom repeat.
    const MAX_PIECE_BYTES: usize = 32;
}

fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Encoder {
    /// An encoder from the tokens of the 256 bytes and the merges `(left, right, merged)` by rank.
    pub fn new(bytes: [u32; 256], merges: impl IntoIterator<Item = (u32, u32, u32)>) -> Encoder {
        let mut map = FastMap::default();
        for (rank, (left, right, merged)) in (0..).zip(merges) {
            // A pair that is listed twice keeps the later rank, as in the `tokenizers` crate.
            map.insert(pair_key(left, right), (rank, merged));
        }
        Encoder { bytes, merges: map }
    }

    /// Adds a merge after all others; a pair that is already there stays as it is.
    pub fn push(&mut self, left: u32, right: u32, merged: u32) {
        let rank = self.merges.len() as u32;
        self.merges.entry(pair_key(left, right)).or_insert((rank, merged));
    }

    /// Appends the tokens of `text` to `out`.
    pub fn encode(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) {
        for piece in pieces(text) {
            if piece.len() > Cache::MAX_PIECE_BYTES {
                self.encode_piece(piece, out);
                continue;
            }
            if let Some(&(start, end)) = cache.spans.get(piece) {
                out.extend_from_slice(&cache.tokens[start as usize..end as usize]);
                continue;
            }
            let start = out.len();
            self.encode_piece(piece, out);
            if cache.spans.len() >= Cache::MAX_PIECES {
                cache.spans.clear();
                cache.tokens.clear();
            }
            let at = cache.tokens.len() as u32;
            cache.tokens.extend_from_slice(&out[start..]);
            cache.spans.insert(piece.into(), (at, cache.tokens.len() as u32));
        }
    }

    /// Appends the tokens of one piece (no split, no cache).
    pub fn encode_piece(&self, piece: &str, out: &mut Vec<u32>) {
        // Up to this length searching all pairs for each merge beats keeping a heap.
        const SHORT: usize = 48;
        if piece.len() <= SHORT {
            self.merge_by_search(piece.as_bytes(), out);
        } else {
            self.merge_by_heap(piece.as_bytes(), out);
        }
    }

    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        self.merges.get(&pair_key(left, right)).copied()
    }

    /// The definition: while any pair can merge, merge the leftmost pair of the lowest rank.
    fn merge_by_search(&self, piece: &[u8], out: &mut Vec<u32>) {
        let start = out.len();
        out.extend(piece.iter().map(|b| self.bytes[*b as usize]));
        loop {
            let best = (start + 1..out.len())
                .filter_map(|i| self.merge(out[i - 1], out[i]).map(|(rank, merged)| (rank, i, merged)))
                .min();
            let Some((_, i, merged)) = best else { return };
            out[i - 1] = merged;
            out.remove(i);
        }
    }

    /// The same in O(n log n): pairs in a heap by rank and position, tokens in a linked list.
    fn merge_by_heap(&self, piece: &[u8], out: &mut Vec<u32>) {
        const NONE: usize = usize::MAX;
        let n = piece.len();
        let mut tokens: Vec<u32> = piece.iter().map(|b| self.bytes[*b as usize]).collect();
        let mut next: Vec<usize> = (1..n).chain([NONE]).collect();
        let mut previous: Vec<usize> = [NONE].into_iter().chain(0..n - 1).collect();
        let mut heap = BinaryHeap::new();
        let candidate = |tokens: &[u32], left: usize, right: usize| {
            let (rank, merged) = self.merge(tokens[left], tokens[right])?;
            Some(Reverse((rank, left, right, tokens[left], tokens[right], merged)))
        };
        heap.extend((1..n).filter_map(|i| candidate(&tokens, i - 1, i)));
        while let Some(Reverse((_, left, right, left_token, right_token, merged))) = heap.pop() {
            // Stale if either side has merged since. A token that merged away is marked by `previous`.
            if next[left] != right || tokens[left] != left_token || tokens[right] != right_token {
                continue;
            }
            tokens[left] = merged;
            next[left] = next[right];
            // Never again anyone's right neighbour, nor a left one.
            next[right] = right;
            if next[left] != NONE {
                previous[next[left]] = left;
                heap.extend(candidate(&tokens, left, next[left]));
            }
            if previous[left] != NONE {
                heap.extend(candidate(&tokens, previous[left], left));
            }
        }
        let mut i = 0;
        while i != NONE {
            out.push(tokens[i]);
            i = next[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::permutation::mix64;

    #[test]
    fn the_heap_merges_as_the_search_does() {
        // Bytes 'a'..'e' as tokens, and every pair of early tokens merges with a scrambled rank.
        let bytes = std::array::from_fn(|b| b as u32);
        for seed in 0..50u64 {
            let pick = |i: u64, k: u64| match mix64(seed * 1000 + i * 2 + k) % (5 + i) {
                small @ 0..5 => 97 + small as u32,
                merged => 256 + (merged - 5) as u32,
            };
            let pairs = (0..60).map(|i| (pick(i, 0), pick(i, 1), 256 + i as u32));
            let encoder = Encoder::new(bytes, pairs);
            for len in [1, 2, 3, 10, 100, 300] {
                let piece: Vec<u8> = (0..len).map(|i| b'a' + (mix64(seed * 77 + i) % 5) as u8).collect();
                let (mut a, mut b) = (Vec::new(), Vec::new());
                encoder.merge_by_search(&piece, &mut a);
                encoder.merge_by_heap(&piece, &mut b);
                assert_eq!(a, b, "seed {seed}, length {len}");
            }
        }
    }
}
