//! Comparing an answer with references as SQuAD's evaluation does, and looks at generated text.

use std::collections::{HashMap, HashSet};

/// Lower case, without ASCII punctuation, without the words "a", "an" and "the", single spaces. The English articles are what
/// SQuAD's script drops in every language, and so does the harness; "a" is an Italian preposition, dropped on both sides.
pub fn normalise(text: &str) -> String {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // Articles go by word boundaries, which need not be spaces: "l’a" in typographic quotes holds an "a" of its own.
    let mut out = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        out.push_str(if ["a", "an", "the"].contains(&run) { " " } else { run });
        rest = after;
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether `text` is one of the references after [`normalise`].
pub fn exact(text: &str, references: &[String]) -> f64 {
    let text = normalise(text);
    f64::from(u8::from(references.iter().any(|r| normalise(r) == text)))
}

/// F1 of the words that `text` shares with the reference where it is largest. Without words, whether both have none.
pub fn token_f1(text: &str, references: &[String]) -> f64 {
    let text = normalise(text);
    let words: Vec<&str> = text.split(' ').filter(|w| !w.is_empty()).collect();
    let one = |reference: &String| {
        let reference = normalise(reference);
        let wanted: Vec<&str> = reference.split(' ').filter(|w| !w.is_empty()).collect();
        if words.is_empty() || wanted.is_empty() {
            return f64::from(u8::from(words.is_empty() && wanted.is_empty()));
        }
        let mut left: HashMap<&str, usize> = HashMap::new();
        wanted.iter().for_each(|w| *left.entry(w).or_default() += 1);
        let mut shared = 0;
        for word in &words {
            if let Some(n) = left.get_mut(word).filter(|n| **n > 0) {
                *n -= 1;
                shared += 1;
            }
        }
        if shared == 0 {
            return 0.0;
        }
        let (precision, recall) = (shared as f64 / words.len() as f64, shared as f64 / wanted.len() as f64);
        2.0 * precision * recall / (precision + recall)
    };
    references.iter().map(one).fold(0.0, f64::max)
}

/// Distinct runs of `n` words, and all of them.
fn ngrams(text: &str, n: usize) -> (usize, usize) {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    let all = words.windows(n).count();
    (words.windows(n).collect::<HashSet<_>>().len(), all)
}

/// Share of the runs of four words that occurred before; 0 for a text without any.
pub fn repetition(text: &str) -> f64 {
    let (distinct, all) = ngrams(text, 4);
    if all == 0 { 0.0 } else { 1.0 - distinct as f64 / all as f64 }
}

/// Distinct pairs of neighbouring words as a share of all; 0 for a text without any.
pub fn distinct_2(text: &str) -> f64 {
    let (distinct, all) = ngrams(text, 2);
    if all == 0 { 0.0 } else { distinct as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| t.to_string()).collect()
    }

    #[test]
    fn answers_are_normalised_as_squad_does() {
        for (text, want) in [
            ("  The  Colosseo, a Roma!", "colosseo roma"),
            ("un'idea", "unidea"),
            ("Théâtre the-a an", "théâtre thea"),
            ("l’a «b»", "l’ «b»"),
            ("...", ""),
        ] {
            assert_eq!(normalise(text), want, "{text}");
        }
    }

    #[test]
    fn exact_match_and_f1_by_hand() {
        assert_eq!(exact("Nel 1861.", &list(&["1860", "nel 1861"])), 1.0);
        assert_eq!(exact("1861", &list(&["nel 1861"])), 0.0);
        // Shared: "nel", "1861", "marzo" = 3 of 4 and of 3: P 0.75, R 1, F1 6/7.
        let f1 = token_f1("nel mese marzo 1861", &list(&["Roma", "nel marzo 1861"]));
        assert!((f1 - 6.0 / 7.0).abs() < 1e-12, "{f1}");
        // A word counts as often as the reference has it: 1 of 3, and of 1.
        assert!((token_f1("no no no", &list(&["no"])) - 0.5).abs() < 1e-12);
        assert_eq!(token_f1("Parigi", &list(&["Roma"])), 0.0);
        assert_eq!((token_f1("the", &list(&["a"])), token_f1("", &list(&["Roma"]))), (1.0, 0.0));
    }

    #[test]
    fn repetition_counts_runs_that_came_before() {
        // "a b c d" twice in nine words: six runs, "a b c d" and "b c d x"... only "a b c d" recurs.
        assert!((repetition("a b c d x a b c d") - 1.0 / 6.0).abs() < 1e-12);
        assert_eq!((repetition("uno due tre"), repetition("")), (0.0, 0.0));
        assert!((repetition("no no no no no no") - 2.0 / 3.0).abs() < 1e-12);
        assert!((distinct_2("No no no sì") - 2.0 / 3.0).abs() < 1e-12);
    }
}
