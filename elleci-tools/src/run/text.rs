//! Tokens to text while they come: never half a character, never the beginning of a stop string.

/// What a push made certain.
#[derive(Debug, PartialEq, Eq)]
pub struct Shown {
    /// Text to be shown now; may be empty.
    pub text: String,
    /// The stop string, by index, that the text has met. Nothing comes after it.
    pub stop: Option<usize>,
}

/// Decodes bytes to text piece by piece and looks for stop strings.
///
/// A token may hold part of a character, and a stop string may be spread over several: what is not certain yet is held
/// back until it is.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Vec<String>,
    /// The beginning of a character.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl TextStream {
    /// A stream that ends at any of `stops`; empty ones are passed over.
    pub fn new(stops: &[String]) -> TextStream {
        TextStream { stops: stops.to_vec(), ..TextStream::default() }
    }

    /// Takes the bytes of a token.
    pub fn push(&mut self, bytes: &[u8]) -> Shown {
        self.partial.extend_from_slice(bytes);
        let mut rest = self.partial.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (sound, tail) = rest.split_at(e.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(sound));
                    // Without a length the tail may still become a character.
                    let Some(broken) = e.error_len() else {
                        rest = tail;
                        break;
                    };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    rest = &tail[broken..];
                }
            }
        }
        self.partial = rest.to_vec();
        self.certain()
    }

    /// Moves out of `held` what no stop string can claim any more.
    fn certain(&mut self) -> Shown {
        let stops = self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
        let met = stops.clone().filter_map(|(i, s)| Some((self.held.find(s.as_str())?, i))).min();
        if let Some((at, index)) = met {
            self.held.truncate(at);
            self.partial.clear();
            return Shown { text: std::mem::take(&mut self.held), stop: Some(index) };
        }
        let begins = |s: &str| {
            let lengths = s.char_indices().map(|(i, _)| i).skip(1).take_while(|&n| n <= self.held.len());
            lengths.filter(|&n| self.held.ends_with(&s[..n])).max()
        };
        let waiting = stops.filter_map(|(_, s)| begins(s)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - waiting);
        Shown { text: std::mem::replace(&mut self.held, tail), stop: None }
    }

    /// The end: what was held back is text after all; half a character is U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        if !self.partial.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is shown of `bytes`, pushed in pieces of `size`, and the stop that was met.
    fn stream(bytes: &[u8], size: usize, stops: &[&str]) -> (String, Option<usize>) {
        let mut stream = TextStream::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let mut all = String::new();
        for piece in bytes.chunks(size) {
            let Shown { text, stop } = stream.push(piece);
            all += &text;
            if stop.is_some() {
                assert_eq!(stream.finish(), "");
                return (all, stop);
            }
        }
        (all + &stream.finish(), None)
    }

    #[test]
    fn characters_come_whole() {
        let text = "Perché no? 🌊 così…\n";
        for size in 1..8 {
            assert_eq!(stream(text.as_bytes(), size, &[]), (text.to_string(), None), "pieces of {size}");
        }
        let mut s = TextStream::new(&[]);
        let wave = "🌊".as_bytes();
        assert_eq!(s.push(&wave[..3]).text, "");
        assert_eq!(s.push(&wave[3..]).text, "🌊");
    }

    #[test]
    fn what_is_no_text_becomes_replacement_characters() {
        let bytes = b"a\xffb\xc3(c\xe2\x82";
        for size in 1..8 {
            assert_eq!(stream(bytes, size, &[]).0, String::from_utf8_lossy(bytes), "pieces of {size}");
        }
    }

    #[test]
    fn stop_strings_are_found_however_they_are_cut() {
        let text = "uno, due, tré. Fine della storia".as_bytes();
        for size in 1..12 {
            assert_eq!(stream(text, size, &["tré. F"]), ("uno, due, ".into(), Some(0)), "pieces of {size}");
            assert_eq!(stream(text, size, &["storie", "", "due"]), ("uno, ".into(), Some(2)));
            // The one that begins first, wherever the others are in the list.
            assert_eq!(stream(text, size, &["Fine", "e, t"]).1, Some(1));
            assert_eq!(stream(text, size, &["unoo", "storia!"]).0.as_bytes(), text);
        }
    }

    #[test]
    fn only_the_possible_beginning_of_a_stop_waits() {
        let mut s = TextStream::new(&["</s>".into()]);
        assert_eq!(s.push(b"x <").text, "x ");
        assert_eq!(s.push(b"/").text, "");
        assert_eq!(s.push(b"b").text, "</b");
        assert_eq!(s.push(b"</s").text, "");
        assert_eq!(s.finish(), "</s");
    }
}
