//! From logits to log-probabilities.

use elleci_core::ops::rows;

/// What turns a row of logits into log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogRow {
    /// The largest logit.
    pub max: f32,
    /// `ln Σ exp(x)`
    normaliser: f64,
}

impl LogRow {
    /// Of the logits `[vocab_size]` at one position.
    pub fn new(row: &[f32]) -> LogRow {
        // 128 partial sums of terms in [0, 1]: for a vocabulary of 32,128 their relative error stays below 251 · 2⁻²⁴, and in practice
        // near its square root.
        let (max, total) = rows::max_and_exp_sum(row);
        LogRow { max, normaliser: f64::from(max) + f64::from(total).ln() }
    }

    /// The natural logarithm of the probability of a token that has this logit.
    pub fn of(&self, logit: f32) -> f64 {
        f64::from(logit) - self.normaliser
    }
}

/// The `count` likeliest tokens with their logits, likeliest first; of equal ones the lower id. Logits that are not numbers never
/// count.
pub fn likeliest(row: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    let mut threshold = f32::NEG_INFINITY;
    for (token, &logit) in row.iter().enumerate() {
        // Ids rise: an equal logit ranks behind those that are there.
        if logit > threshold || (best.len() < count && !logit.is_nan()) {
            let at = best.partition_point(|(_, l)| *l >= logit);
            best.insert(at, (token as u32, logit));
            best.truncate(count);
            if best.len() == count {
                threshold = best.last().map_or(f32::INFINITY, |(_, l)| *l);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let row: Vec<f32> = (0..301).map(|i| ((i * 37) % 101) as f32 * 0.17 - 9.0).collect();
        let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let of = LogRow::new(&row);
        for &x in &row {
            assert!((of.of(x) - (f64::from(x).exp() / total).ln()).abs() < 1e-5);
        }
        assert_eq!(of.max, 8.0);
    }

    #[test]
    fn the_likeliest_are_in_order_and_the_lower_id_comes_first() {
        let row = [1.0, 3.0, f32::NAN, 3.0, -1.0, f32::NEG_INFINITY, 2.0];
        assert_eq!(likeliest(&row, 3), [(1, 3.0), (3, 3.0), (6, 2.0)]);
        assert_eq!(likeliest(&row, 1), [(1, 3.0)]);
        assert_eq!(likeliest(&row, 0), []);
        assert_eq!(likeliest(&row, 20).len(), 6);
    }
}
