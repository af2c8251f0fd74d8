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
            ("articles.txt", include_str!("../../../fixtures/text/en-articles.txt")),
            ("everyday.txt", include_str!("../../../fixtures/text/en-everyday.txt")),
            ("stories.txt", include_str!("../../../fixtures/text/en-stories.txt")),
        ],
    ),
    (
        "instructions",
        &[
            ("written.jsonl", include_str!("../../../fixtures/instructions.jsonl")),
            ("generated.jsonl", include_str!("../../../fixtures/instructions-generated.jsonl")),
        ],
    ),
    (
        "italian",
        &[
            ("cose-e-parole.txt", include_str!("../../../fixtures/text/it-cose-e-parole.txt")),
            ("favole.txt", include_str!("../../../fixtures/text/it-favole.txt")),
            ("geografia-storia.txt", include_str!("../../../fixtures/text/it-geografia-storia.txt")),
            ("racconti-brevi.txt", include_str!("../../../fixtures/text/it-racconti-brevi.txt")),
            ("racconti.txt", include_str!("../../../fixtures/text/it-racconti.txt")),
            ("scienza.txt", include_str!("../../../fixtures/text/it-scienza.txt")),
            ("generati.txt", include_str!("../../../fixtures/text/it-stories-generated.txt")),
            ("vita-quotidiana.txt", include_str!("../../../fixtures/text/it-vita-quotidiana.txt")),
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
    result.context("preparing the bundled texts")?;
    Ok(target)
}

fn prepare_all(dir: &Path, vocab_size: usize) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    eprintln!("preparing the bundled texts: a tokenizer of {vocab_size} tokens, then shards");
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
