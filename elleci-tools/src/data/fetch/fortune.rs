//! Fortune files: aphorisms between lines of `%`; the Italian ones write accents as apostrophes.

/// The aphorisms of a file, overstrikes removed, tabs as spaces.
pub fn aphorisms(file: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut current = String::new();
    for line in file.lines().chain(["%"]) {
        if line.trim_end() == "%" {
            let text = current.trim_end().trim_start_matches('\n');
            if !text.trim().is_empty() {
                out.push(text.to_string());
            }
            current.clear();
        } else {
            for c in line.trim_end().chars() {
                match c {
                    '\u{8}' => drop(current.pop()),
                    '\t' => current.push_str("    "),
                    c if c.is_control() => {}
                    c => current.push(c),
                }
            }
            current.push('\n');
        }
    }
    out
}

/// Words that end in a real apostrophe.
const APOSTROPHES: &[&str] = &[
    "po", "mo", "fa", "va", "sta", "da", "di", "be", "to", "de", "co", "su", "ca", "ma", "a", "i", "o", "so", "pe",
    "vo", "ve",
];

/// `perche'` to `perché`, `e'` to `è`: a vowel and an apostrophe at the end of a word, unless the apostrophe is real or
/// closes a quotation.
pub fn accents(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut quote_open = false;
    for (i, &c) in chars.iter().enumerate() {
        let before = i.checked_sub(1).map(|j| chars[j]);
        if c == '\n' {
            quote_open = false;
        }
        if c != '\'' {
            out.push(c);
            continue;
        }
        let letter_before = before.is_some_and(char::is_alphabetic);
        let letter_after = chars.get(i + 1).is_some_and(|c| c.is_alphabetic());
        if !letter_before && letter_after && !quote_open {
            quote_open = true;
        } else if !letter_after && quote_open {
            quote_open = false;
        } else if letter_before && !letter_after {
            let start = (0..i).rev().find(|j| !chars[*j].is_alphabetic()).map_or(0, |j| j + 1);
            let word: String = chars[start..i].iter().flat_map(|c| c.to_lowercase()).collect();
            if let Some(accented) = before.and_then(|v| accented(v, &word)) {
                out.pop();
                out.push(accented);
                continue;
            }
        }
        out.push(c);
    }
    out
}

/// The accented vowel that ends `word` (in lower case, without the apostrophe).
fn accented(vowel: char, word: &str) -> Option<char> {
    if APOSTROPHES.contains(&word) {
        return None;
    }
    let acute = word.ends_with("che")
        || matches!(word, "ne" | "se" | "pote" | "poiche")
        || (word.len() > 3 && word.ends_with("tre"));
    Some(match vowel {
        'a' => 'à',
        'e' if acute => 'é',
        'e' => 'è',
        'i' => 'ì',
        'o' => 'ò',
        'u' => 'ù',
        'A' => 'À',
        'E' if acute => 'É',
        'E' => 'È',
        'I' => 'Ì',
        'O' => 'Ò',
        'U' => 'Ù',
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aphorisms_are_split() {
        assert_eq!(aphorisms("uno\n\t-- A\n%\n%\ndu\u{8}ue\n"), ["uno\n    -- A", "due"]);
    }

    #[test]
    fn accents_come_back_and_apostrophes_stay() {
        for (from, to) in [
            ("E' cosi', perche' e' tardi.", "È così, perché è tardi."),
            ("un po' d'acqua, la citta'!", "un po' d'acqua, la città!"),
            ("PERCHE' NO? CITTA'", "PERCHÉ NO? CITTÀ"),
            ("ne' io ne' tu; se' stesso, cioe' tre e ventitre'", "né io né tu; sé stesso, cioè tre e ventitré"),
            ("disse 'torno domani' e ando' via", "disse 'torno domani' e andò via"),
            ("l'ora dell'anno '90, piu'", "l'ora dell'anno '90, più"),
            ("c'e' gia'", "c'è già"),
        ] {
            assert_eq!(accents(from), to);
        }
    }
}
