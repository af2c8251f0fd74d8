//! Which files to read.

use super::{Format, Input, ReadOptions, Schema};
use crate::exit::usage;
use anyhow::{Context, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const KNOWN: &str = ".parquet, .jsonl, .ndjson, .json, .txt, .md, the latter also with .gz or .zst";

fn format_of(path: &Path) -> Option<Format> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
    match plain.unwrap_or(&name).rsplit_once('.')?.1 {
        "parquet" if plain.is_none() => Some(Format::Parquet),
        "jsonl" | "ndjson" | "json" => Some(Format::Json),
        "txt" | "md" => Some(Format::Text),
        _ => None,
    }
}

/// What [`find_inputs`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The files to read, in a fixed order.
    pub inputs: Vec<Input>,
    /// Files of other kinds in the directories.
    pub ignored: u64,
    /// What the user should know: directories that were passed over, options without effect.
    pub notes: Vec<String>,
}

/// Files and directories (searched in full; links are followed, but not in circles) as a list of files.
///
/// # Errors
/// Wrong usage: a path that does not exist, a named file of an unknown kind, or options that apply to none of the files. Also
/// a path that cannot be read, or nothing to read.
pub fn find_inputs(paths: &[PathBuf], options: &ReadOptions) -> Result<Found> {
    let mut found = Found::default();
    for path in paths {
        let meta = match fs::metadata(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(usage(format!("{}: cannot read the input: {e}", path.display())));
            }
            meta => meta.with_context(|| format!("{}: cannot read the input", path.display()))?,
        };
        if meta.is_dir() {
            found.walk(path, &mut Vec::new())?;
        } else if let Some(format) = format_of(path) {
            found.inputs.push(Input { path: path.clone(), size: meta.len(), format });
        } else {
            return Err(usage(format!("{}: unknown kind of file; known are {KNOWN}", path.display())));
        }
    }
    if found.inputs.is_empty() {
        let list: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
        anyhow::bail!("{}: no file to read; known kinds are {KNOWN}", list.join(", "));
    }
    found.check_options(options)?;
    Ok(found)
}

impl Found {
    /// `above` holds the real paths of the directories that lead here.
    fn walk(&mut self, dir: &Path, above: &mut Vec<PathBuf>) -> Result<()> {
        let context = || format!("{}: cannot read the directory", dir.display());
        let real = fs::canonicalize(dir).with_context(context)?;
        if above.contains(&real) {
            self.notes.push(format!("{}: leads back to {}; skipped", dir.display(), real.display()));
            return Ok(());
        }
        let mut entries =
            fs::read_dir(dir).with_context(context)?.collect::<std::io::Result<Vec<_>>>().with_context(context)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        above.push(real);
        for entry in entries {
            let path = entry.path();
            let meta = fs::metadata(&path).with_context(|| format!("{}: cannot read", path.display()))?;
            if meta.is_dir() {
                self.walk(&path, above)?;
            } else if let Some(format) = format_of(&path) {
                self.inputs.push(Input { path, size: meta.len(), format });
            } else {
                self.ignored += 1;
            }
        }
        above.pop();
        Ok(())
    }

    /// Options that would be without effect, unseen.
    fn check_options(&mut self, options: &ReadOptions) -> Result<()> {
        let given = match (options.schema, options.languages.is_empty()) {
            (None, true) => return Ok(()),
            (Some(_), true) => "--schema does",
            (None, false) => "--lang does",
            (Some(_), false) => "--schema and --lang do",
        };
        if let Some(schema) = options.schema.filter(|s| *s != Schema::Oasst && !options.languages.is_empty()) {
            return Err(usage(format!(
                "--lang is for --schema oasst; rows of schema {} tell no language",
                schema.name()
            )));
        }
        let mut plain = self.inputs.iter().filter(|i| i.format == Format::Text);
        let Some(first) = plain.next() else { return Ok(()) };
        let count = 1 + plain.count();
        if count == self.inputs.len() {
            return Err(usage(format!(
                "{}: plain text, which has no columns: {given} not apply to it; leave the option out or name other inputs",
                first.path.display()
            )));
        }
        let note =
            format!("{count} files are plain text, to which {given} not apply (first: {})", first.path.display());
        self.notes.push(note);
        Ok(())
    }
}
