//! JSON: one object a line (JSON lines), or one array of objects.

use super::oasst::Trees;
use super::{ReadOptions, Row, RowResult, Schema};
use anyhow::{Context, Result, bail};
use serde::Deserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde_json::Value;
use std::cell::Cell;
use std::io::{self, BufRead, Read};

/// A longer row is none of a text corpus, and must not fill the memory.
const MAX_ROW: u64 = 1 << 28;

type Visit<'a> = dyn FnMut(u64, RowResult) -> Result<bool> + 'a;

/// Reads rows. The schema is told by the first row that has a known one.
pub fn read(mut input: Box<dyn BufRead>, options: &ReadOptions, visit: &mut Visit<'_>) -> Result<()> {
    let mut rows = Rows { options, schema: options.schema, trees: Trees::default(), number: 0, unknown: None, visit };
    let is_array = first_byte(&mut input).context("cannot read (truncated or damaged?)")? == Some(b'[');
    let whole = if is_array { read_array(input, &mut rows, MAX_ROW)? } else { read_lines(input, &mut rows)? };
    if whole { rows.finish() } else { Ok(()) }
}

/// The first byte that is no white space; what stands before it is passed over.
fn first_byte(input: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let buffer = input.fill_buf()?;
        let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
        let (first, at_end) = (buffer.get(blank).copied(), buffer.is_empty());
        input.consume(blank);
        if first.is_some() || at_end {
            return Ok(first);
        }
    }
}

/// One reason instead of one a line.
const SEVERAL_LINES: &str = "an object over several lines; write one a line (JSON lines), or one array of objects";

/// Returns whether all was read.
fn read_lines(mut input: Box<dyn BufRead>, rows: &mut Rows<'_, '_>) -> Result<bool> {
    let mut line = Vec::new();
    // The first line only opens an object: of a file that often just describes the corpus that it lies in, unless others are rows.
    let mut opened = false;
    loop {
        line.clear();
        let read = (&mut input).take(MAX_ROW).read_until(b'\n', &mut line);
        if read.context("cannot read (truncated or damaged?)")? == 0 {
            return if opened { rows.row(Err(SEVERAL_LINES.to_string())) } else { Ok(true) };
        }
        let content = line.trim_ascii();
        if content.is_empty() {
            continue;
        }
        let number = rows.number + 1;
        if line.len() as u64 == MAX_ROW && line.last() != Some(&b'\n') {
            bail!("line {number} is longer than {MAX_ROW} bytes; is this JSON lines (one object a line)?");
        }
        if number == 1 && content == b"{" && !opened {
            opened = true;
            continue;
        }
        if std::mem::take(&mut opened) {
            if parse(&line).is_err() {
                return rows.row(Err(SEVERAL_LINES.to_string()));
            }
            // A damaged row like any other.
            if !rows.row(Err("malformed JSON".to_string()))? {
                return Ok(false);
            }
        }
        if !rows.row(parse(&line))? {
            return Ok(false);
        }
    }
}

fn parse(line: &[u8]) -> std::result::Result<Row, String> {
    let text = std::str::from_utf8(line).map_err(|_| "invalid UTF-8".to_string())?;
    serde_json::from_str(text).map_err(|_| "malformed JSON".to_string()).and_then(object)
}

fn object(value: Value) -> std::result::Result<Row, String> {
    match value {
        Value::Object(row) => Ok(row),
        _ => Err("not a JSON object".to_string()),
    }
}

/// Element by element, each of at most `max_row` bytes; returns whether all was read.
///
/// # Errors
/// Anything that is not one whole array: where it goes on after a fault cannot be told, so rows would get lost.
fn read_array(input: Box<dyn BufRead>, rows: &mut Rows<'_, '_>, max_row: u64) -> Result<bool> {
    let left = Cell::new(max_row);
    let mut json = serde_json::Deserializer::from_reader(Bounded { inner: input, left: &left });
    let mut elements = Elements { rows, left: &left, max_row, end: None };
    let read = json.deserialize_seq(&mut elements);
    if let Some(end) = elements.end {
        return end.map(|()| false);
    }
    let remedy = "; mend the file, or write one object a line (JSON lines)";
    let element = rows.number + 1;
    match read {
        Err(_) if left.get() == 0 => bail!("element {element} of the array is longer than {max_row} bytes"),
        Err(e) if e.is_io() => Err(io::Error::from(e)).context("cannot read (truncated or damaged?)"),
        Err(e) => bail!("element {element} of the array is malformed JSON: {e}{remedy}"),
        Ok(()) => match json.end() {
            Ok(()) => Ok(true),
            Err(e) => bail!("something follows the JSON array: {e}{remedy}"),
        },
    }
}

/// Ends when `left` bytes have passed.
struct Bounded<'a> {
    inner: Box<dyn BufRead>,
    left: &'a Cell<u64>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = (&mut self.inner).take(self.left.get()).read(buffer)?;
        self.left.set(self.left.get() - read as u64);
        Ok(read)
    }
}

/// Hands on the elements of an array as they are read.
struct Elements<'a, 'r, 'v> {
    rows: &'a mut Rows<'r, 'v>,
    left: &'a Cell<u64>,
    max_row: u64,
    /// How it ended, if that was not the array's end.
    end: Option<Result<()>>,
}

impl<'de> Visitor<'de> for &mut Elements<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = elements.next_element()? {
            self.left.set(self.max_row);
            match self.rows.row(object(value)) {
                Ok(true) => {}
                end => {
                    self.end = Some(end.map(drop));
                    return Err(A::Error::custom("no more is wanted"));
                }
            }
        }
        Ok(())
    }
}

/// What becomes of the rows of a file.
struct Rows<'r, 'v> {
    options: &'r ReadOptions,
    schema: Option<Schema>,
    trees: Trees,
    /// Rows so far.
    number: u64,
    /// The columns of the first row without a known schema.
    unknown: Option<Vec<String>>,
    visit: &'r mut Visit<'v>,
}

impl Rows<'_, '_> {
    /// Returns whether more is wanted.
    fn row(&mut self, row: std::result::Result<Row, String>) -> Result<bool> {
        self.number += 1;
        let row = match row {
            Ok(row) => row,
            Err(reason) => return (self.visit)(self.number, Err(reason)),
        };
        match self.schema.or_else(|| Schema::detect(row.keys().map(String::as_str))) {
            None => {
                self.unknown.get_or_insert_with(|| row.keys().cloned().collect());
                (self.visit)(self.number, Err("columns of no known schema".to_string()))
            }
            Some(Schema::Oasst) => {
                self.schema = Some(Schema::Oasst);
                self.trees.push(&row).map_or_else(|reason| (self.visit)(self.number, Err(reason)), |()| Ok(true))
            }
            Some(found) => {
                self.schema = Some(found);
                (self.visit)(self.number, found.document(&row))
            }
        }
    }

    fn finish(self) -> Result<()> {
        match (self.schema, self.unknown) {
            (Some(Schema::Oasst), _) => self.trees.finish(&self.options.languages, self.visit),
            (None, Some(columns)) => bail!(
                "its columns ({}) match no known schema; name one of {} with --schema",
                columns.join(", "),
                Schema::names()
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_without_end_does_not_fill_the_memory() {
        let array = |json: &'static str| {
            let (options, mut visit) = (ReadOptions::default(), |_, _| Ok(true));
            let (schema, trees, unknown) = (None, Trees::default(), None);
            let mut rows = Rows { options: &options, schema, trees, number: 0, unknown, visit: &mut visit };
            read_array(Box::new(json.as_bytes()), &mut rows, 20).map_err(|e| e.to_string())
        };
        // Each element may have as many bytes, not all of them together.
        assert_eq!(array(r#"[{"text":"uno"}, {"text":"due"}, {"text":"tre"}]"#), Ok(true));
        let e = array(r#"[{"text":"uno"}, {"text":"due e molto altro"}]"#).unwrap_err();
        assert_eq!(e, "element 2 of the array is longer than 20 bytes");
    }
}
