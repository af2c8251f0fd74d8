//! JSON lines: one object a line.

use super::oasst::Trees;
use super::{ReadOptions, Row, RowResult, Schema};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, Read};

/// A longer line is no row of a text corpus, and must not fill the memory.
const MAX_LINE: u64 = 1 << 28;

/// Reads JSON lines. The schema is told by the first row that has a known one.
pub fn read(
    mut input: Box<dyn BufRead>,
    options: &ReadOptions,
    visit: &mut dyn FnMut(u64, RowResult) -> Result<bool>,
) -> Result<()> {
    let mut schema = options.schema;
    let mut trees = Trees::default();
    let mut number = 0;
    let mut unknown: Option<Vec<String>> = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut input).take(MAX_LINE).read_until(b'\n', &mut line);
        if read.context("cannot read (truncated or damaged?)")? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        number += 1;
        if line.len() as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            bail!("line {number} is longer than {MAX_LINE} bytes; is this JSON lines (one object a line)?");
        }
        let go_on = match parse(&line) {
            Err(reason) => visit(number, Err(reason))?,
            Ok(row) => match schema.or_else(|| Schema::detect(row.keys().map(String::as_str))) {
                None => {
                    unknown.get_or_insert_with(|| row.keys().cloned().collect());
                    visit(number, Err("columns of no known schema".to_string()))?
                }
                Some(Schema::Oasst) => {
                    schema = Some(Schema::Oasst);
                    trees.push(&row).map_or_else(|reason| visit(number, Err(reason)), |()| Ok(true))?
                }
                Some(found) => {
                    schema = Some(found);
                    visit(number, found.document(&row))?
                }
            },
        };
        if !go_on {
            return Ok(());
        }
    }
    match (schema, unknown) {
        (Some(Schema::Oasst), _) => trees.finish(&options.languages, visit),
        (None, Some(columns)) => bail!(
            "its columns ({}) match no known schema; name one of {} with --schema",
            columns.join(", "),
            Schema::names()
        ),
        _ => Ok(()),
    }
}

fn parse(line: &[u8]) -> std::result::Result<Row, String> {
    let text = std::str::from_utf8(line).map_err(|_| "invalid UTF-8".to_string())?;
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(row)) => Ok(row),
        Ok(_) => Err("not a JSON object".to_string()),
        Err(_) => Err("malformed JSON".to_string()),
    }
}
