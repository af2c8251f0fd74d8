//! The windows of a text that is longer than what the model sees at once.

use anyhow::ensure;

use super::Pair;

/// Windows of a text, cut as they are asked for: see [`super::Engine::windows`].
#[derive(Debug)]
pub struct Windows {
    tokens: Vec<u32>,
    /// Stands before the first token.
    prefix: u32,
    max_length: usize,
    /// Tokens from the start of a window to that of the next, all of which the next scores.
    stride: usize,
    /// Tokens that are in the windows cut so far.
    done: usize,
}

impl Windows {
    pub(super) fn new(tokens: Vec<u32>, prefix: u32, max_length: usize, overlap: usize) -> anyhow::Result<Windows> {
        ensure!(
            (1..=max_length).contains(&overlap),
            "an overlap of {overlap} tokens does not fit a window of {max_length}; it must be 1 to {max_length}"
        );
        Ok(Windows { tokens, prefix, max_length, stride: max_length - overlap + 1, done: 0 })
    }
}

impl Iterator for Windows {
    type Item = Pair;

    fn next(&mut self) -> Option<Pair> {
        if self.done == self.tokens.len() {
            return None;
        }
        let end = self.tokens.len().min(if self.done == 0 { self.max_length } else { self.done + self.stride });
        let context = if self.done == 0 {
            vec![self.prefix]
        } else {
            // The window's input ends one before its last token, and is as long as a window can be.
            self.tokens[end - self.max_length - 1..self.done].to_vec()
        };
        let continuation = self.tokens[self.done..end].to_vec();
        self.done = end;
        Some(Pair { context, continuation, truncated: 0 })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let mut left = self.tokens.len() - self.done;
        let mut windows = 0;
        if self.done == 0 && left > 0 {
            windows = 1;
            left -= left.min(self.max_length);
        }
        windows += left.div_ceil(self.stride);
        (windows, Some(windows))
    }
}

impl ExactSizeIterator for Windows {}
