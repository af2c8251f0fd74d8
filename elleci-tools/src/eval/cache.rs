//! Answers on disk: one file a model and task, a line an answer, so that what was interrupted goes on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::metrics::Answer;

/// Goes up when the same question may get another answer.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Head {
    elleci_eval: u32,
    key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Answer {
        doc: usize,
        #[serde(flatten)]
        kept: Kept,
    },
    Part {
        doc: usize,
        #[serde(flatten)]
        part: Part,
    },
}

/// An answer, and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
    /// Whether the context lost its beginning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
}

/// What is known of a text whose windows are not all scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// How many are: the first so many.
    pub windows: usize,
    /// Their log-likelihoods, added one after the other.
    pub logprob: f64,
}

/// Where answers are kept, if anywhere.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: Option<PathBuf>,
}

/// The answers of one task, open for more.
#[derive(Default)]
pub struct Answers {
    /// Those there are, by [`super::item::Item::doc`].
    pub known: BTreeMap<usize, Kept>,
    /// Those that are begun.
    pub parts: BTreeMap<usize, Part>,
    file: Option<(BufWriter<File>, PathBuf)>,
}

impl Cache {
    /// A cache in `dir`; `None`: nothing is kept.
    pub fn new(dir: Option<PathBuf>) -> Cache {
        Cache { dir }
    }

    /// The directory that is used where none is named: `elleci/eval` in the user's cache.
    pub fn default_dir() -> Option<PathBuf> {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")))?;
        Some(base.join("elleci").join("eval"))
    }

    /// Opens the answers of task `name` by the model `model`; `key` tells everything that they depend on. A file of another
    /// key or a damaged one is begun anew; a line that broke off is dropped.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn open(&self, model: &str, name: &str, key: &str) -> anyhow::Result<Answers> {
        let Some(dir) = &self.dir else { return Ok(Answers::default()) };
        let dir = dir.join(model);
        fs::create_dir_all(&dir).with_context(|| format!("{}: cannot create the cache; see --cache", dir.display()))?;
        let path = dir.join(format!("{name}-{}.jsonl", &key[..16]));
        let (known, parts) = read(&path, key).unwrap_or_default();
        // Written anew, so that nothing half-written stays in the middle.
        let at = || format!("{}: cannot write the cache; see --cache", path.display());
        let partial = path.with_extension("partial");
        let mut file = BufWriter::new(File::create(&partial).with_context(at)?);
        write_line(&mut file, &Head { elleci_eval: FORMAT, key: key.to_string() }).with_context(at)?;
        for (doc, kept) in &known {
            write_line(&mut file, &Line::Answer { doc: *doc, kept: kept.clone() }).with_context(at)?;
        }
        for (doc, part) in &parts {
            write_line(&mut file, &Line::Part { doc: *doc, part: *part }).with_context(at)?;
        }
        file.flush().with_context(at)?;
        fs::rename(&partial, &path).with_context(at)?;
        Ok(Answers { known, parts, file: Some((file, path)) })
    }
}

/// The answers in a file; `None` if it is not there or not of this key.
fn read(path: &Path, key: &str) -> Option<(BTreeMap<usize, Kept>, BTreeMap<usize, Part>)> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let head: Head = serde_json::from_str(lines.next()?).ok()?;
    if head.elleci_eval != FORMAT || head.key != key {
        return None;
    }
    let sound = |line: &str| serde_json::from_str::<Line>(line).ok();
    let (mut known, mut parts) = (BTreeMap::new(), BTreeMap::new());
    for line in lines.map_while(sound) {
        match line {
            Line::Answer { doc, kept } => _ = known.insert(doc, kept),
            Line::Part { doc, part } => _ = parts.insert(doc, part),
        }
    }
    parts.retain(|doc, _| !known.contains_key(doc));
    Some((known, parts))
}

fn write_line(file: &mut impl Write, line: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *file, line)?;
    file.write_all(b"\n")
}

impl Answers {
    /// Adds answers, on disk too.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn add(&mut self, answers: Vec<(usize, Kept)>) -> anyhow::Result<()> {
        for (doc, kept) in answers {
            self.write(&Line::Answer { doc, kept: kept.clone() })?;
            self.parts.remove(&doc);
            self.known.insert(doc, kept);
        }
        self.flush()
    }

    /// Notes how far the text `doc` is, on disk too.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn add_part(&mut self, doc: usize, part: Part) -> anyhow::Result<()> {
        self.write(&Line::Part { doc, part })?;
        self.parts.insert(doc, part);
        self.flush()
    }

    fn write(&mut self, line: &Line) -> anyhow::Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        write_line(file, line).with_context(|| format!("{}: cannot write", path.display()))
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        file.flush().with_context(|| format!("{}: cannot write", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_and_broken_lines_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(dir.path().to_path_buf()));
        let key = "0123456789abcdef0123";
        let kept = |answer, cut| Kept { answer, cut };
        let scores = kept(Answer::Scores(vec![(-1.234_567_890_123_456_7, true), (-0.1, false)]), true);
        let text = kept(Answer::Text { text: "una riga\ne mezza".into(), ended: true }, false);
        let rolling = kept(Answer::Rolling(-3.5), false);
        {
            let mut answers = cache.open("m", "t", key).unwrap();
            answers.add(vec![(0, scores.clone()), (7, rolling.clone())]).unwrap();
            answers.add(vec![(2, text.clone())]).unwrap();
        }
        let path = dir.path().join("m/t-0123456789abcdef.jsonl");
        let whole = fs::read_to_string(&path).unwrap();
        // The process ended in the middle of the last line.
        fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let known = cache.open("m", "t", key).unwrap().known;
        assert_eq!(known, BTreeMap::from([(0, scores), (7, rolling)]));
        // Another key of the same beginning: nothing of it is used.
        assert!(cache.open("m", "t", "0123456789abcdefXXXX").unwrap().known.is_empty());
        fs::write(&path, "no JSON\n").unwrap();
        assert!(cache.open("m", "t", key).unwrap().known.is_empty());
        assert!(Cache::new(None).open("m", "t", key).unwrap().known.is_empty());
    }
    #[test]
    fn a_text_s_part_comes_back_to_the_bit_until_the_text_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(dir.path().to_path_buf()));
        let key = "0123456789abcdef0123";
        // A sum whose shortest decimal form has 17 digits.
        let part = |windows| Part { windows, logprob: -(0.1 + 0.2) * windows as f64 };
        {
            let mut answers = cache.open("m", "t", key).unwrap();
            answers.add_part(3, part(1)).unwrap();
            answers.add_part(3, part(3)).unwrap();
            answers.add_part(5, part(2)).unwrap();
        }
        {
            let mut answers = cache.open("m", "t", key).unwrap();
            assert_eq!(answers.parts, BTreeMap::from([(3, part(3)), (5, part(2))]));
            assert!(answers.known.is_empty());
            answers.add(vec![(3, Kept { answer: Answer::Rolling(-3.5), cut: false })]).unwrap();
        }
        let answers = cache.open("m", "t", key).unwrap();
        assert_eq!(answers.parts, BTreeMap::from([(5, part(2))]));
        assert_eq!(answers.known.keys().collect::<Vec<_>>(), [&3]);
    }
}
