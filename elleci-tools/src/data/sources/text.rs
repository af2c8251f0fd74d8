//! Plain text.

use super::{Document, RowResult, TextSplit};
use anyhow::{Context, Result};
use std::io::BufRead;

/// Reads plain text; invalid UTF-8 makes a document unusable, not the file.
pub fn read(
    mut input: Box<dyn BufRead>,
    split: TextSplit,
    visit: &mut dyn FnMut(u64, RowResult) -> Result<bool>,
) -> Result<()> {
    let mut number = 0;
    let mut document = Vec::new();
    let mut flush = |document: &mut Vec<u8>, at_end: bool| -> Result<bool> {
        // Several separators in a row separate once; an empty file is still reported.
        let blank = document.iter().all(u8::is_ascii_whitespace);
        if blank && !(at_end && number == 0) {
            document.clear();
            return Ok(true);
        }
        number += 1;
        let text = String::from_utf8(std::mem::take(document)).map_err(|_| "invalid UTF-8".to_string());
        visit(number, text.and_then(|t| super::schema::clean(&t).map(Document::Text)))
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line).context("cannot read (truncated or damaged?)")? == 0 {
            flush(&mut document, true)?;
            return Ok(());
        }
        let ends = match split {
            TextSplit::File => false,
            TextSplit::Rule => line.trim_ascii() == b"---",
            TextSplit::Blank => line.trim_ascii().is_empty(),
        };
        if !ends {
            document.extend_from_slice(&line);
        } else if !flush(&mut document, false)? {
            return Ok(());
        }
    }
}
