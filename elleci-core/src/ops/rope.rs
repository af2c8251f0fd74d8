//! Rotary position embedding: half-split pairs `(j, j + d/2)`, angle `pos · base^(-2j/d)` (SPEC §1.2).

use alloc::vec::Vec;

/// Cosines and sines of positions `0..len`, computed in float64 and rounded once.
#[derive(Clone, Debug, Default)]
pub struct RopeTable {
    half: usize,
    /// `[len, half]` cosines, then as many sines
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table of rows of `d` channels at positions `0..len`.
    pub fn new(d: usize, base: f32, len: usize) -> RopeTable {
        let mut table = RopeTable { half: d / 2, cos: Vec::new(), sin: Vec::new() };
        table.extend(base, len);
        table
    }

    /// The table whose row i has the rotation of the i-th of any positions: [`RopeTable::rotate`] then takes i.
    pub fn of_positions(d: usize, base: f32, positions: impl IntoIterator<Item = usize>) -> RopeTable {
        let mut table = RopeTable { half: d / 2, cos: Vec::new(), sin: Vec::new() };
        table.push(base, positions);
        table
    }

    /// Makes room for positions below `len`.
    pub fn extend(&mut self, base: f32, len: usize) {
        self.push(base, self.len()..len);
    }

    fn push(&mut self, base: f32, positions: impl IntoIterator<Item = usize>) {
        let d = (2 * self.half) as f64;
        let frequency = |j: usize| libm::pow(base as f64, -2.0 * j as f64 / d);
        let frequencies: Vec<f64> = (0..self.half).map(frequency).collect();
        for pos in positions {
            for frequency in &frequencies {
                let angle = pos as f64 * frequency;
                self.cos.push(libm::cos(angle) as f32);
                self.sin.push(libm::sin(angle) as f32);
            }
        }
    }

    /// Positions in the table.
    pub fn len(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Whether the table has no position.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }

    /// Rotates one row of `d` channels to position `pos`.
    #[inline(always)]
    pub fn rotate(&self, row: &mut [f32], pos: usize) {
        self.turn(row, pos, 1.0);
    }

    /// The inverse of [`RopeTable::rotate`], which is its backward too.
    #[inline(always)]
    pub fn unrotate(&self, row: &mut [f32], pos: usize) {
        self.turn(row, pos, -1.0);
    }

    #[inline(always)]
    fn turn(&self, row: &mut [f32], pos: usize, sign: f32) {
        let at = pos * self.half..(pos + 1) * self.half;
        let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
        let (a, b) = row.split_at_mut(self.half);
        for j in 0..self.half {
            let (x, y, c, s) = (a[j], b[j], cos[j], sin[j] * sign);
            a[j] = x * c - y * s;
            b[j] = y * c + x * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_distance_alone_and_unrotate_inverts() {
        let table = RopeTable::new(8, 100.0, 64);
        let (q, k): (Vec<f32>, Vec<f32>) = (0..8).map(|i| ((i as f32 * 0.7).sin(), (i as f32 * 1.3).cos())).unzip();
        let score = |i: usize, j: usize| {
            let (mut a, mut b) = (q.clone(), k.clone());
            table.rotate(&mut a, i);
            table.rotate(&mut b, j);
            a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>()
        };
        // 8 products of magnitude <= 2, each off by a few ulp
        assert!((score(5, 2) - score(60, 57)).abs() < 8.0 * 2.0 * 4.0 * f32::EPSILON);
        assert!((score(5, 2) - score(5, 3)).abs() > 1e-3);
        let mut row = q.clone();
        table.rotate(&mut row, 33);
        table.unrotate(&mut row, 33);
        for (a, b) in row.iter().zip(&q) {
            assert!((a - b).abs() < 4.0 * f32::EPSILON);
        }
    }
}
