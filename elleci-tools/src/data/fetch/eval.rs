//! The test sets of `elleci-eval`, from the Hugging Face hub.
//!
//! The hub keeps a parquet form of every public data set on the branch `refs/convert/parquet`, as `CONFIG/SPLIT/*.parquet`
//! whatever the set itself looks like: that is where splits are taken from. Where it is absent, the set's own files are.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hf_hub::{Repo, RepoType};

use super::hub::{Client, link};
use crate::eval::task::Source;

/// The branch of the parquet forms.
const CONVERTED: &str = "refs/convert/parquet";

/// Gets the splits of `sources` (each once), and links them as `out/OWNER/NAME/CONFIG/SPLIT/FILE`; `got` is told of each. What
/// cannot be had is reported, and the others go on.
///
/// # Errors
/// Anything that could not be had.
pub fn fetch(out: &Path, sources: &[Source], got: &mut dyn FnMut(&Path)) -> Result<()> {
    if sources.is_empty() {
        crate::exit::errln!("nothing to get: these tasks are part of elleci-eval, and need no data");
        return Ok(());
    }
    let client = Client::new()?;
    let mut wanted: BTreeSet<(&str, &str, &str)> = BTreeSet::new();
    let mut failed = Vec::new();
    for source in sources {
        for file in &source.files {
            wanted.insert((&source.repo, "", file));
        }
        if source.files.is_empty() {
            let splits = [Some(&source.split), source.shots_split.as_ref()];
            wanted.extend(
                splits.into_iter().flatten().map(|s| (source.repo.as_str(), source.config.as_str(), s.as_str())),
            );
        }
    }
    for (repo, config, split) in wanted {
        crate::exit::errln!("{repo} {config} {split}");
        if let Err(error) = fetch_one(&client, out, (repo, config, split), got) {
            crate::exit::errln!("  {error:#}");
            failed.push(repo);
        }
    }
    failed.dedup();
    ensure!(failed.is_empty(), "not everything could be had: {}; run again to go on", failed.join(", "));
    Ok(())
}

/// A split, or with an empty `config` the file of that name.
fn fetch_one(
    client: &Client,
    out: &Path,
    (repo, config, split): (&str, &str, &str),
    got: &mut dyn FnMut(&Path),
) -> Result<()> {
    let (owner, name) = repo.split_once('/').context("a data set is called owner/name")?;
    let to = out.join(owner).join(name);
    let main = Repo::dataset(repo.to_string());
    let converted = Repo::with_revision(repo.to_string(), RepoType::Dataset, CONVERTED.to_string());
    let (at, files) = if config.is_empty() {
        (main, vec![split.to_string()])
    } else {
        match client.list(&converted).map(|files| converted_files(&files, config, split)) {
            Ok(files) if !files.is_empty() => (converted, files),
            _ => {
                let files = client.list(&main)?;
                (main, own_files(&files, config, split))
            }
        }
    };
    if files.is_empty() {
        bail!("it has no file of the split {split} of {config}; has it been rearranged?");
    }
    let to = if config.is_empty() { to } else { to.join(config).join(split) };
    for file in files {
        let cached = client.download(&at, &file).with_context(|| file.clone())?;
        let name = Path::new(&file).file_name().context("a file without a name")?;
        got(&link(&cached, &to.join(name))?);
    }
    Ok(())
}

/// Of the parquet form.
fn converted_files(files: &[String], config: &str, split: &str) -> Vec<String> {
    let prefix = format!("{config}/{split}/");
    files.iter().filter(|f| f.starts_with(&prefix) && f.ends_with(".parquet")).cloned().collect()
}

/// Of a data set as its owner arranged it: the first arrangement that has any.
fn own_files(files: &[String], config: &str, split: &str) -> Vec<String> {
    let known = |f: &str| [".parquet", ".jsonl", ".json", ".csv"].iter().any(|e| f.ends_with(e));
    let is_split = |f: &str, prefix: &str| {
        let rest = f.strip_prefix(prefix).and_then(|f| f.strip_prefix(split));
        rest.is_some_and(|r| r.starts_with(['-', '_', '.', '/']))
    };
    let prefixes = [format!("{config}/"), format!("data/{config}/"), "data/".to_string(), String::new()];
    let of = |prefix: &String| -> Vec<String> {
        files.iter().filter(|f| known(f) && is_split(f, prefix)).cloned().collect()
    };
    prefixes.iter().map(of).find(|found| !found.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_found_however_a_set_is_arranged() {
        let list = |files: &[&str]| files.iter().map(|f| f.to_string()).collect::<Vec<_>>();
        let files = list(&["it/test/0000.parquet", "it/test/0001.parquet", "it/test-x/0.parquet", "de/test/0.parquet"]);
        assert_eq!(converted_files(&files, "it", "test"), files[..2]);
        for (files, want) in [
            (list(&["it/test-00000.parquet", "it/testing.parquet", "data/test.csv"]), "it/test-00000.parquet"),
            (list(&["README.md", "data/it/test.jsonl", "data/test.jsonl"]), "data/it/test.jsonl"),
            (list(&["test.bin", "data/test.jsonl", "data/train.jsonl"]), "data/test.jsonl"),
            (list(&["test.csv", "test_all.csv"]), "test.csv"),
        ] {
            assert_eq!(own_files(&files, "it", "test")[0], want);
        }
        assert!(own_files(&list(&["dev.csv"]), "it", "test").is_empty());
    }
}
