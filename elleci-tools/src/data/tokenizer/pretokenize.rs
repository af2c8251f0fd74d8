//! The GPT-2 split of text into pieces that merges never cross.
//!
//! It computes exactly the matches of
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
//! with a scanner: the look-ahead keeps regex engines from their fast path, and the split is most of the cost of
//! tokenising. The tests hold it against the `tokenizers` crate.

use std::sync::OnceLock;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Number,
    Other,
}

const CHARS: usize = 0x11_0000;

/// Two bits a character, made from the tables of the regex crate so that both agree on what a letter is.
fn table() -> &'static [Class] {
    static TABLE: OnceLock<Box<[Class]>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![Class::Other; CHARS].into_boxed_slice();
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
            // The patterns are constants that the tests parse; a table without them would be a wrong tokenizer.
            let hir = regex_syntax::parse(pattern).expect("a constant, valid class");
            if let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(ranges)) = hir.kind() {
                for range in ranges.ranges() {
                    table[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
        }
        table
    })
}

/// The pieces of `text`, in order; together they are `text`.
pub fn pieces(text: &str) -> Pieces<'_> {
    Pieces { rest: text, table: table() }
}

/// See [`pieces`].
pub struct Pieces<'a> {
    rest: &'a str,
    table: &'static [Class],
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let len = self.piece_len()?;
        let (piece, rest) = self.rest.split_at(len);
        self.rest = rest;
        Some(piece)
    }
}

impl Pieces<'_> {
    fn class(&self, c: char) -> Class {
        self.table[c as usize]
    }

    /// Bytes at the start of `text` that are of one class.
    fn run(&self, text: &str, class: Class) -> usize {
        text.char_indices().find(|(_, c)| self.class(*c) != class).map_or(text.len(), |(i, _)| i)
    }

    fn piece_len(&self) -> Option<usize> {
        let text = self.rest;
        let first = text.chars().next()?;
        if first == '\'' {
            for suffix in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"] {
                if text.starts_with(suffix) {
                    return Some(suffix.len());
                }
            }
        }
        let class = self.class(first);
        if class != Class::Space {
            return Some(self.run(text, class));
        }
        if first == ' '
            && let Some(second) = text[1..].chars().next()
            && self.class(second) != Class::Space
        {
            return Some(1 + self.run(&text[1..], self.class(second)));
        }
        let spaces = self.run(text, Class::Space);
        // Before other text, a run of spaces leaves its last one to what follows - unless there is only one.
        let last = text[..spaces].chars().next_back().map_or(0, char::len_utf8);
        Some(if spaces < text.len() && spaces > last { spaces - last } else { spaces })
    }
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn splits_as_gpt2_does() {
        for (text, want) in [
            ("", vec![]),
            ("Ciao mondo", vec!["Ciao", " mondo"]),
            ("perché no?  Sì!", vec!["perché", " no", "?", " ", " Sì", "!"]),
            ("l'acqua del'500", vec!["l", "'", "acqua", " del", "'", "500"]),
            ("it's we'll 'd", vec!["it", "'s", " we", "'ll", " '", "d"]),
            ("a\n\n b \n", vec!["a", "\n\n", " b", " \n"]),
            ("a\n\nb", vec!["a", "\n", "\n", "b"]),
            ("x\u{a0}y", vec!["x", "\u{a0}", "y"]),
            ("3²½ 10", vec!["3²½", " 10"]),
            ("e\u{301}!", vec!["e", "\u{301}!"]),
            ("  ", vec!["  "]),
        ] {
            assert_eq!(pieces(text).collect::<Vec<_>>(), want, "{text:?}");
        }
    }
}
