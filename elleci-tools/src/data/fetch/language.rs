//! Telling Italian from English by stop words.

/// A language that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Language {
    /// Italian.
    Italian,
    /// English.
    English,
}

// Words of one language that are not words of the other ("a", "in", "no", "come", "per", "me" and "so" are in both).
const ITALIAN: &[&str] = &[
    "il", "lo", "la", "gli", "le", "un", "una", "uno", "di", "del", "della", "dei", "delle", "dello", "degli", "da",
    "dal", "dalla", "nel", "nella", "nei", "nelle", "al", "alla", "ai", "alle", "allo", "sul", "sulla", "con", "che",
    "è", "e", "non", "si", "sono", "questo", "questa", "questi", "più", "anche", "essere", "viene", "può", "se", "ma",
    "ed", "o", "l", "dell", "nell", "all", "dall", "quando", "tutti", "tra", "ogni", "mi", "ti", "ci", "perché", "ha",
    "chi", "cosa",
];
const ENGLISH: &[&str] = &[
    "the", "of", "and", "to", "is", "that", "for", "it", "with", "as", "are", "this", "be", "on", "by", "not", "or",
    "from", "you", "an", "at", "was", "if", "can", "which", "your", "have", "has", "will", "i", "but", "he", "his",
    "they", "we", "when", "all", "there", "their", "what", "who", "my", "one", "would", "may", "use", "these",
];

/// Stop words of Italian and of English, and words, in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// All words.
    pub words: usize,
    /// Italian stop words.
    pub italian: usize,
    /// English stop words.
    pub english: usize,
}

/// Counts the stop words of both languages.
pub fn count(text: &str) -> Count {
    let mut count = Count::default();
    for word in text.split(|c: char| !c.is_alphabetic()).filter(|w| !w.is_empty()) {
        let word = word.to_lowercase();
        count.words += 1;
        count.italian += usize::from(ITALIAN.contains(&word.as_str()));
        count.english += usize::from(ENGLISH.contains(&word.as_str()));
    }
    count
}

/// The language of running text: at least one word in ten is its stop word, and twice as many as the other's.
/// `None` for short text and for text in neither (code, tables, names, other languages).
pub fn detect(text: &str) -> Option<Language> {
    let Count { words, italian, english } = count(text);
    let (language, most, least) =
        if italian >= english { (Language::Italian, italian, english) } else { (Language::English, english, italian) };
    (words >= 5 && 10 * most >= words && most >= 2 * least).then_some(language)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_two_apart_and_nothing_else() {
        for (text, want) in [
            ("Il gatto dorme sul tavolo della cucina.", Some(Language::Italian)),
            ("The cat is asleep on the kitchen table.", Some(Language::English)),
            ("Die Katze schläft auf dem Tisch in der Küche und träumt.", None),
            ("foo bar baz qux quux corge grault", None),
            ("La casa", None),
            ("La casa e il mare, the house and the sea", None),
        ] {
            assert_eq!(detect(text), want, "{text}");
        }
    }
}
