//! The texts that come with the program: what a run without data of its own trains on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::config::RunConfig;
use crate::data::prepare::{PrepareOptions, Progress, prepare};
use crate::data::sources::{ReadOptions, TextSplit};
use crate::data::tokenizer::{TrainOptions, train_tokenizer};

/// Sources of the bundled texts: name, and file names with contents.
const SOURCES: [(&str, &[(&str, &str)]); 3] = [
    (
        "english",
        &[
            ("en-articles-2.txt", include_str!("../../../fixtures/text/en-articles-2.txt")),
            ("en-articles.txt", include_str!("../../../fixtures/text/en-articles.txt")),
            ("en-everyday.txt", include_str!("../../../fixtures/text/en-everyday.txt")),
            ("en-stories.txt", include_str!("../../../fixtures/text/en-stories.txt")),
            ("en-tales-2.txt", include_str!("../../../fixtures/text/en-tales-2.txt")),
            ("en-tales.txt", include_str!("../../../fixtures/text/en-tales.txt")),
        ],
    ),
    (
        "instructions",
        &[
            ("instructions-generated.jsonl", include_str!("../../../fixtures/instructions-generated.jsonl")),
            ("instructions.jsonl", include_str!("../../../fixtures/instructions.jsonl")),
        ],
    ),
    (
        "italian",
        &[
            ("it-cose-e-parole.txt", include_str!("../../../fixtures/text/it-cose-e-parole.txt")),
            ("it-diari-e-dialoghi.txt", include_str!("../../../fixtures/text/it-diari-e-dialoghi.txt")),
            ("it-favole.txt", include_str!("../../../fixtures/text/it-favole.txt")),
            ("it-geografia-storia.txt", include_str!("../../../fixtures/text/it-geografia-storia.txt")),
            ("it-natura-e-luoghi.txt", include_str!("../../../fixtures/text/it-natura-e-luoghi.txt")),
            ("it-personaggi-e-mestieri.txt", include_str!("../../../fixtures/text/it-personaggi-e-mestieri.txt")),
            ("it-racconti-brevi.txt", include_str!("../../../fixtures/text/it-racconti-brevi.txt")),
            ("it-racconti.txt", include_str!("../../../fixtures/text/it-racconti.txt")),
            ("it-scienza.txt", include_str!("../../../fixtures/text/it-scienza.txt")),
            ("it-stories-generated.txt", include_str!("../../../fixtures/text/it-stories-generated.txt")),
            ("it-vita-quotidiana.txt", include_str!("../../../fixtures/text/it-vita-quotidiana.txt")),
        ],
    ),
];

/// Share of the documents that is held out: there are few, so more than the usual hundredth.
const HELD_OUT: f64 = 0.05;

/// Whether a configuration names no data, and its sources are those of the bundled texts.
pub fn applies(config: &RunConfig) -> bool {
    let data = &config.data;
    let unnamed = data.dir.as_os_str().is_empty() && data.sources.values().all(|p| p.as_os_str().is_empty());
    unnamed && data.sources.keys().map(String::as_str).eq(SOURCES.iter().map(|s| s.0))
}

/// Trains a tokenizer on the bundled texts and prepares shards under `out/data`, unless that is there already.
///
/// # Errors
/// Whatever the file system reports.
pub fn prepare_in(out: &Path, vocab_size: usize) -> anyhow::Result<PathBuf> {
    let target = out.join("data");
    if target.join("tokenizer.json").is_file() {
        return Ok(target);
    }
    let temporary = out.join(".data.tmp");
    if temporary.exists() {
        fs::remove_dir_all(&temporary).with_context(|| format!("removing {}", temporary.display()))?;
    }
    let result = prepare_all(&temporary, vocab_size).and_then(|()| Ok(fs::rename(&temporary, &target)?));
    if result.is_err() {
        // The first error is the one to report; the next start removes what may be left.
        let _ = fs::remove_dir_all(&temporary);
    }
    result.with_context(|| format!("preparing the bundled texts for model.vocab_size = {vocab_size}"))?;
    Ok(target)
}

fn prepare_all(dir: &Path, vocab_size: usize) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    crate::exit::errln!("preparing the bundled texts: a tokenizer of {vocab_size} tokens, then shards");
    let texts = SOURCES.iter().flat_map(|(_, files)| files.iter().map(|(_, text)| text.to_string()));
    let tokenizer = train_tokenizer(texts, &TrainOptions::new(vocab_size, vocab_size))?;
    let raw = dir.join("texts");
    for (source, files) in SOURCES {
        let from = raw.join(source);
        fs::create_dir_all(&from)?;
        for (name, text) in files {
            fs::write(from.join(name), text)?;
        }
        let options = PrepareOptions {
            read: ReadOptions { text_split: TextSplit::Rule, ..ReadOptions::default() },
            holdout: HELD_OUT,
            ..PrepareOptions::new(vec![from], dir.join(source))
        };
        prepare(&tokenizer, &options, &Progress::default())?;
    }
    fs::remove_dir_all(&raw)?;
    tokenizer.save(&dir.join("tokenizer.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text that is added to the fixtures is to be trained on, too.
    #[test]
    fn every_fixture_is_bundled() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
        let names = |dir: &Path, end: &str| -> Vec<String> {
            let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = entries.filter(|n| n.ends_with(end)).collect();
            names.sort();
            names
        };
        let mut found = names(&fixtures, ".jsonl");
        found.extend(names(&fixtures.join("text"), ".txt"));
        let mut bundled: Vec<&str> = SOURCES.iter().flat_map(|s| s.1.iter().map(|f| f.0)).collect();
        found.sort();
        bundled.sort_unstable();
        assert_eq!(found, bundled);
    }

    #[test]
    fn they_become_shards_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = prepare_in(dir.path(), 512).unwrap();
        let stamp = || fs::metadata(data.join("tokenizer.json")).unwrap().modified().unwrap();
        let first = stamp();
        for (source, _) in SOURCES {
            let set = crate::data::shards::ShardSet::open(&data.join(source)).unwrap();
            let index = set.index();
            assert!(index.train.documents > 9 && index.val.documents > 0 && index.vocab_size == 512, "{source}");
        }
        assert_eq!(prepare_in(dir.path(), 512).unwrap(), data);
        assert_eq!(stamp(), first);
    }
}
