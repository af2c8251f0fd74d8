//! Five trits in a byte.
//!
//! A byte is not a base-3 number, which would take divisions to read, but two bit fields: the low five bits L and the high three
//! bits H. With trits t0..t4 in {0, 1, 2}, `low = t0 + 3 t1 + 9 t2` (0..27) and `high = t3 + 3 t4` (0..9):
//!
//! - `high < 8`: `L = low`, `H = high`.
//! - `high = 8` does not fit three bits. Those bytes have `L = 28 + low / 8` and `H = low % 8`: L is 28..32, which the others leave
//!   unused. Rotating the byte left by three brings `low` into its low five bits.
//!
//! So every trit is one lookup of six bits: that is `vpermb` on AVX-512 VBMI, `tbl` on NEON, and two `pshufb` elsewhere.
//! 243 of the 256 bytes are ever written; the other 13 (L = 27, or a low past 26) read as a low of three ones.

/// Bits of L that are all set in the bytes with `high = 8`.
pub(super) const ESCAPE: u8 = 0b11100;

/// The low three trits of every five-bit value.
pub(super) const LOW: [[u8; 3]; 32] = {
    let mut table = [[1; 3]; 32];
    let mut i = 0;
    while i < 27 {
        table[i] = [(i % 3) as u8, (i / 3 % 3) as u8, (i / 9) as u8];
        i += 1;
    }
    table
};

/// The byte of five trits, each in {0, 1, 2}.
pub const fn encode(t: [u8; 5]) -> u8 {
    let (low, high) = (t[0] + 3 * t[1] + 9 * t[2], t[3] + 3 * t[4]);
    if high < 8 { low | (high << 5) } else { (28 + low / 8) | ((low % 8) << 5) }
}

/// The five trits of a byte; every byte has a meaning.
pub const fn decode(byte: u8) -> [u8; 5] {
    let escaped = byte & ESCAPE == ESCAPE;
    let low = LOW[(if escaped { byte.rotate_left(3) } else { byte } & 31) as usize];
    let high = if escaped { 8 } else { byte >> 5 };
    [low[0], low[1], low[2], high % 3, high / 3]
}

/// [`decode`] of all bytes.
pub(super) const DECODED: [[u8; 5]; 256] = {
    let mut table = [[0; 5]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = decode(byte as u8);
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_243_round_trip_and_differ() {
        let mut seen = [false; 256];
        for n in 0..243u32 {
            let t = [0, 1, 2, 3, 4].map(|k| (n / 3u32.pow(k) % 3) as u8);
            let byte = encode(t);
            assert_eq!(decode(byte), t);
            assert!(!core::mem::replace(&mut seen[byte as usize], true));
        }
        for byte in (0..=255).filter(|b| !seen[*b as usize]) {
            assert_eq!(decode(byte)[..3], [1; 3], "an unused byte has a defined meaning");
        }
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(encode([0, 0, 0, 0, 0]), 0);
        assert_eq!(encode([1, 1, 1, 1, 1]), 0b100_01101);
        assert_eq!(encode([2, 2, 2, 1, 2]), 0b111_11010);
        assert_eq!(encode([0, 0, 0, 2, 2]), 0b000_11100);
        assert_eq!(encode([2, 2, 2, 2, 2]), 0b010_11111);
    }
}
