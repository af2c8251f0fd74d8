//! From answers to values: per item, then per task, with standard errors.
//!
//! Definitions are lm-evaluation-harness's. Standard errors are those of the mean (with n − 1), and by seeded bootstrap where the
//! harness bootstraps too; weighted metrics have none there and none here.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::item::Item;
use super::task::{Aggregate, Metric, Task};
use super::text_match;
use crate::data::fetch::language::{Language, detect};

/// What the model answered to an [`Item`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Log-likelihood of each continuation, and whether it is what the model itself would write.
    Scores(Vec<(f64, bool)>),
    /// Log-likelihood of a whole text.
    Rolling(f64),
    /// A text, and whether it ended before the limit.
    Text {
        /// The text.
        text: String,
        /// Whether it ended.
        ended: bool,
    },
}

/// What an item contributes to a metric: a value, or a pair (log-likelihood and units; right and chosen class).
pub type ItemValue = [f64; 2];

/// Resamples of a bootstrap.
const RESAMPLES: usize = 1000;

/// The index of the largest value, the first of several.
pub fn argmax(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, value) in values.enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

/// The value of every metric of the task for an item.
pub fn item_values(task: &Task, item: &Item, answer: &Answer) -> Vec<(Metric, ItemValue)> {
    task.metrics.iter().map(|m| (*m, item_value(task, *m, item, answer))).collect()
}

fn item_value(task: &Task, metric: Metric, item: &Item, answer: &Answer) -> ItemValue {
    let hit = |hit: bool| [f64::from(u8::from(hit)), 0.0];
    match answer {
        Answer::Scores(scores) => {
            let by = |units: fn(&str) -> usize| {
                let units = item.choices.iter().map(|c| units(c) as f64);
                hit(item.gold.contains(&argmax(scores.iter().zip(units).map(|(s, u)| s.0 / u))))
            };
            let likeliest = || argmax(scores.iter().map(|s| s.0));
            match metric {
                Metric::Acc if item.choices.is_empty() => hit(scores[0].1),
                Metric::Acc => hit(item.gold.contains(&likeliest())),
                Metric::AccNorm => by(|c| c.chars().count()),
                Metric::AccBytes => by(str::len),
                Metric::F1 | Metric::F1Sentipolc => [item.gold.first().map_or(-1.0, |g| *g as f64), likeliest() as f64],
                Metric::Mc2 => {
                    // Relative to the largest, so that small probabilities do not vanish; the quotient is the same.
                    let max = scores.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
                    let share = |i: usize| (scores[i].0 - max).exp();
                    let all: f64 = (0..scores.len()).map(share).sum();
                    [item.gold.iter().map(|i| share(*i)).sum::<f64>() / all, 0.0]
                }
                _ => [scores[0].0, 0.0],
            }
        }
        Answer::Rolling(logprob) => {
            let units = if metric == Metric::WordPerplexity { words(&item.context) } else { item.context.len() };
            [*logprob, units as f64]
        }
        Answer::Text { text, ended } => match metric {
            Metric::ExactMatch | Metric::TokenF1 => {
                let pattern = task.generation.as_ref().and_then(|g| g.extract.as_ref());
                let found = pattern.map_or(Some(text.as_str()), |p| extract(p, text)).unwrap_or_default();
                let score = if metric == Metric::ExactMatch { text_match::exact } else { text_match::token_f1 };
                [score(found, &item.references), 0.0]
            }
            Metric::Repetition => [text_match::repetition(text), 0.0],
            Metric::Distinct2 => [text_match::distinct_2(text), 0.0],
            Metric::Italian => hit(detect(text) == Some(Language::Italian)),
            _ => hit(*ended),
        },
    }
}

/// Pieces between runs of white space, as `re.split(r"\s+", text)` counts them: empty ones at the ends too.
fn words(text: &str) -> usize {
    let inner = text.split_whitespace().count();
    let edges = [text.starts_with(char::is_whitespace), text.ends_with(char::is_whitespace)];
    (inner + edges.iter().filter(|e| **e).count()).max(1)
}

/// The first group of the pattern, or its match.
fn extract<'t>(pattern: &str, text: &'t str) -> Option<&'t str> {
    let found = regex::Regex::new(pattern).ok()?.captures(text)?;
    found.get(1).or_else(|| found.get(0)).map(|m| m.as_str())
}

/// The task's value from its items'.
pub fn aggregate(how: Aggregate, values: &[ItemValue]) -> f64 {
    let mean = || values.iter().map(|v| v[0]).sum::<f64>() / values.len() as f64;
    let weighted = || values.iter().map(|v| v[0]).sum::<f64>() / values.iter().map(|v| v[1]).sum::<f64>();
    match how {
        Aggregate::Mean => mean(),
        Aggregate::ExpMean => (-mean()).exp(),
        Aggregate::ExpWeighted => (-weighted()).exp(),
        Aggregate::Bits => -weighted() / std::f64::consts::LN_2,
        Aggregate::F1 => class_f1(values.iter().map(|v| (v[0] == 1.0, v[1] == 1.0))),
        Aggregate::F1Sentipolc => {
            // Positive, negative, neutral, mixed: two questions of yes and no.
            let positive = values.iter().map(|v| v.map(|class| class == 0.0 || class == 3.0));
            let negative = values.iter().map(|v| v.map(|class| class == 1.0 || class == 3.0));
            (both_classes(positive) + both_classes(negative)) / 2.0
        }
    }
}

/// F1 of the class `true`; pairs are (right, chosen). 0 where the class does not occur.
fn class_f1(pairs: impl Iterator<Item = (bool, bool)>) -> f64 {
    let (mut both, mut either) = (0.0, 0.0);
    for (right, chosen) in pairs {
        both += f64::from(u8::from(right && chosen));
        either += f64::from(u8::from(right)) + f64::from(u8::from(chosen));
    }
    if either == 0.0 { 0.0 } else { 2.0 * both / either }
}

/// Mean of the F1 of both classes. Where only one occurs at all, its F1 counts and the other's is 0.
fn both_classes(pairs: impl Iterator<Item = [bool; 2]> + Clone) -> f64 {
    let of = |class: bool| class_f1(pairs.clone().map(|[right, chosen]| (right == class, chosen == class)));
    (of(false) + of(true)) / 2.0
}

/// What guessing gets at a metric that counts classes: the expectation of [`aggregate`] where the chosen class is drawn from `choices`,
/// all equally likely, for every item. `None` for other aggregates. Only the right classes of `values` count.
pub fn guessed(how: Aggregate, values: &[ItemValue], choices: usize) -> Option<f64> {
    let classes = |wanted: &[usize]| {
        let right = values.iter().filter(|v| wanted.iter().any(|c| *c as f64 == v[0])).count();
        (right, wanted.iter().filter(|c| **c < choices).count() as f64 / choices.max(1) as f64)
    };
    let n = values.len();
    let one = |(right, p)| guessed_f1(n, right, p);
    // An expectation of means is the mean of expectations.
    let both = |(right, p)| (guessed_f1(n, right, p) + guessed_f1(n, n - right, 1.0 - p)) / 2.0;
    match how {
        Aggregate::F1 => Some(one(classes(&[1]))),
        Aggregate::F1Sentipolc => Some((both(classes(&[0, 3])) + both(classes(&[1, 3]))) / 2.0),
        _ => None,
    }
}

/// The expected F1 of a class that `right` of `n` items have, where it is chosen with probability `p` for each.
///
/// F1 = 2·TP / (right + c), with c the items it is chosen for. c is binomial, and given c, TP is hypergeometric with the mean
/// c·right / n: so E[F1] = Σ_c C(n, c) pᶜ (1 − p)ⁿ⁻ᶜ · 2·c·right / n / (right + c).
fn guessed_f1(n: usize, right: usize, p: f64) -> f64 {
    let (n_items, right) = (n as f64, right as f64);
    if n == 0 || right == 0.0 || p <= 0.0 {
        return 0.0;
    }
    if p >= 1.0 {
        return 2.0 * right / (right + n_items);
    }
    // Logarithms: C(n, c) outgrows float64 beyond a thousand items.
    let (mut sum, mut log) = (0.0, n_items * (1.0 - p).ln());
    for c in 1..=n {
        let c = c as f64;
        log += ((n_items - c + 1.0) / c * p / (1.0 - p)).ln();
        sum += log.exp() * 2.0 * c * right / n_items / (right + c);
    }
    sum
}

/// The standard error of [`aggregate`], where there is one. `seed` decides the bootstrap's draws.
pub fn standard_error(how: Aggregate, values: &[ItemValue], seed: u64) -> Option<f64> {
    let n = values.len() as f64;
    if values.len() < 2 {
        return None;
    }
    match how {
        Aggregate::Mean => {
            let mean = aggregate(how, values);
            let squares: f64 = values.iter().map(|v| (v[0] - mean).powi(2)).sum();
            Some((squares / (n - 1.0) / n).sqrt())
        }
        Aggregate::ExpWeighted | Aggregate::Bits => None,
        _ => {
            let draws = bootstrap(values.len(), seed, RESAMPLES, |picked| {
                let sample: Vec<ItemValue> = picked.iter().map(|i| values[*i]).collect();
                aggregate(how, &sample)
            });
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let squares: f64 = draws.iter().map(|d| (d - mean).powi(2)).sum();
            Some((squares / (draws.len() as f64 - 1.0)).sqrt())
        }
    }
}

/// `f` of `resamples` draws of `n` indices below `n`, with replacement.
pub fn bootstrap(n: usize, seed: u64, resamples: usize, mut f: impl FnMut(&[usize]) -> f64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut picked = vec![0; n];
    let mut draw = |_| {
        picked.iter_mut().for_each(|p| *p = ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize);
        f(&picked)
    };
    (0..resamples).map(&mut draw).collect()
}

#[cfg(test)]
mod tests;
