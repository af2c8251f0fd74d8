//! Parquet: only the needed columns, page by page.

use super::oasst::Trees;
use super::{Input, ReadOptions, Row, RowResult, Schema};
use anyhow::{Context, Result, bail};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::Value;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Reads a parquet file; `position` grows by the row's share of the file.
pub fn read(
    input: &Input,
    options: &ReadOptions,
    position: &Arc<AtomicU64>,
    visit: &mut dyn FnMut(u64, RowResult) -> Result<bool>,
) -> Result<()> {
    let file = File::open(&input.path).context("cannot open")?;
    let reader = SerializedFileReader::new(file).context("not a valid parquet file (truncated or damaged?)")?;
    let meta = reader.metadata().file_metadata();
    let rows = meta.num_rows().max(1) as u64;
    let root = meta.schema().clone();
    let names = || root.get_fields().iter().map(|f| f.name());
    let Some(schema) = options.schema.or_else(|| Schema::detect(names())) else {
        bail!(
            "its columns ({}) match no known schema; name one of {} with --schema",
            names().collect::<Vec<_>>().join(", "),
            Schema::names()
        );
    };
    for column in schema.required().iter().filter(|c| schema.columns().contains(c)) {
        if !names().any(|n| n == *column) {
            let found = names().collect::<Vec<_>>().join(", ");
            bail!("schema {} needs the column `{column}`, but the file has {found}", schema.name());
        }
    }
    let wanted = root.get_fields().iter().filter(|f| schema.columns().contains(&f.name())).cloned().collect();
    let projection = Type::group_type_builder(root.name()).with_fields(wanted).build()?;
    // Few rows at a time: a row of text may be long.
    let iterator = RowIter::from_file_into(Box::new(reader)).project(Some(projection))?.with_batch_size(64);
    let mut trees = Trees::default();
    let mut told = 0;
    for (number, row) in (1..).zip(iterator) {
        let row = row.with_context(|| format!("row {number} cannot be read (damaged?)"))?;
        let row: Row = row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect();
        let now = (u128::from(input.size) * u128::from(number) / u128::from(rows)) as u64;
        position.fetch_add(now.saturating_sub(told), Ordering::Relaxed);
        told = now.max(told);
        let go_on = if schema == Schema::Oasst {
            trees.push(&row).map_or_else(|reason| visit(number, Err(reason)), |()| Ok(true))?
        } else {
            visit(number, schema.document(&row))?
        };
        if !go_on {
            return Ok(());
        }
    }
    trees.finish(&options.languages, visit)
}

/// As JSON has it; kinds that no schema reads become null.
pub fn value(field: Field) -> Value {
    match field {
        Field::Str(s) => Value::String(s),
        // Files written without the UTF-8 annotation.
        Field::Bytes(b) => std::str::from_utf8(b.data()).map_or(Value::Null, |s| Value::String(s.to_string())),
        Field::Bool(b) => Value::Bool(b),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::Float(x) => x.into(),
        Field::Double(x) => x.into(),
        Field::Group(row) => Value::Object(row.into_columns().into_iter().map(|(n, f)| (n, value(f))).collect()),
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect()),
        _ => Value::Null,
    }
}
