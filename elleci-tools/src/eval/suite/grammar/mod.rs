//! Italian minimal pairs: two sentences that differ in one point of grammar, one right and one wrong.
//!
//! Every phenomenon crosses words and frames in full; of the sentences that come out, a fixed number is drawn by a hash of
//! their text, so that the set is the same everywhere and a new word changes little of it. The wrong sentence breaks exactly
//! the rule of its phenomenon.

mod agreement;
mod lexicon;
mod syntax;

use std::collections::HashSet;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

/// Pairs of a phenomenon.
const EACH: usize = 150;

/// A phenomenon, and what makes its sentences.
type Phenomenon = (&'static str, fn(&mut Pairs));

/// The sentences that a phenomenon can make.
#[derive(Default)]
pub struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// One more: the right sentence and the wrong one.
    fn add(&mut self, pair: (String, String)) {
        self.0.push(pair);
    }
}

/// A fixed draw of what `make` makes.
fn pick(make: fn(&mut Pairs)) -> Vec<(String, String)> {
    let mut pairs = Pairs::default();
    make(&mut pairs);
    let hashed = |pair: (String, String)| (xxh3_64(format!("{}\n{}", pair.0, pair.1).as_bytes()), pair);
    let mut hashed: Vec<_> = pairs.0.into_iter().map(hashed).collect();
    hashed.sort_unstable();
    let mut pairs: Vec<_> = hashed.into_iter().map(|(_, pair)| pair).collect();
    pairs.dedup();
    // A right sentence once: the same one twice would weigh double.
    let mut seen = HashSet::new();
    pairs.retain(|(good, _)| seen.insert(good.clone()));
    pairs.truncate(EACH);
    pairs
}

/// All pairs by phenomenon: (name, [(right, wrong)]).
pub fn minimal_pairs() -> Vec<(&'static str, Vec<(String, String)>)> {
    let all = [agreement::ALL, syntax::ALL].concat();
    all.into_par_iter().map(|(name, make)| (name, pick(make))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_two_thousand_pairs_of_sixteen_phenomena() {
        let all = minimal_pairs();
        assert_eq!(all.len(), 16);
        for (name, pairs) in &all {
            assert_eq!(pairs.len(), EACH, "{name}");
        }
        let total: usize = all.iter().map(|(_, p)| p.len()).sum();
        assert!(total >= 2_000, "{total}");
    }

    #[test]
    fn pairs_are_well_formed_sentences_that_differ() {
        // No sentence that is right in one place may be wrong in another.
        let all = minimal_pairs();
        let good: HashSet<&str> = all.iter().flat_map(|(_, p)| p).map(|p| p.0.as_str()).collect();
        for (name, pairs) in &all {
            for (right, wrong) in pairs {
                assert_ne!(right, wrong, "{name}");
                assert!(!good.contains(wrong.as_str()), "{name}: both right and wrong: {wrong}");
                for text in [right, wrong] {
                    let first = text.chars().next().unwrap();
                    assert!(first.is_uppercase() && text.ends_with(['.', '?']), "{name}: {text}");
                    assert!(!text.contains("  ") && !text.contains(" .") && !text.contains("' "), "{name}: {text}");
                }
                // One or two words apart at most, counted as the words that are not in common.
                let words = |t: &str| t.to_lowercase().split([' ', '\'']).map(str::to_string).collect::<Vec<_>>();
                let (a, b) = (words(right), words(wrong));
                let apart = a.iter().filter(|w| !b.contains(w)).count();
                assert!(apart <= 2, "{name}: {right} / {wrong}");
            }
        }
    }

    #[test]
    fn the_draw_is_fixed() {
        let text: Vec<String> = minimal_pairs()
            .iter()
            .flat_map(|(name, pairs)| pairs.iter().map(move |(a, b)| format!("{name}|{a}|{b}\n")))
            .collect();
        // A change here changes every published number of the suite: raise the task's version with it.
        assert_eq!(format!("{:016x}", xxh3_64(text.concat().as_bytes())), "ded9a39bb28c32ff");
    }
}
