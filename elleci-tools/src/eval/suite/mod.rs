//! The bundled suite: tasks that need no data from anywhere.

pub mod arithmetic;
pub mod grammar;

use std::path::Path;

use serde_json::{Value, json};

use super::task::{Kind, Metric, Task};
use super::template::Row;

/// Rows of a bundled task.
pub struct Bundled {
    /// Of the evaluation.
    pub rows: Vec<Row>,
    /// For examples.
    pub shots: Vec<Row>,
}

/// Problems of the multiple-choice task, and of the one where the model writes the answer.
const PROBLEMS: (u64, u64) = (300, 60);

/// Beginnings of texts for the generation check.
const PROMPTS: [&str; 16] = [
    "C'era una volta",
    "La mattina presto, quando il paese ancora dorme,",
    "Il gatto guardò la finestra e",
    "Per fare una buona minestra di verdure bisogna",
    "La città di Torino si trova",
    "Caro nonno, ti scrivo perché",
    "Il sole è una stella che",
    "Quando ero bambino, d'estate,",
    "Secondo me la cosa più importante è",
    "Il maestro entrò in classe e disse:",
    "In autunno le foglie",
    "La differenza tra un fiume e un lago è che",
    "Un giorno una volpe incontrò",
    "Per imparare una lingua nuova",
    "La notizia arrivò in piazza nel pomeriggio:",
    "L'acqua, quando viene scaldata,",
];

const HELD_OUT_ITALIAN: &str = include_str!("../../../../fixtures/held-out/it.txt");
const HELD_OUT_ENGLISH: &str = include_str!("../../../../fixtures/held-out/en.txt");

/// The rows of a bundled task; `None` for other names.
pub fn rows(name: &str) -> Option<Bundled> {
    let (rows, shots) = match name {
        "it_minimal_pairs" => (minimal_pairs(), Vec::new()),
        "it_arithmetic" => (problems(0..PROBLEMS.0), problems(10_000..10_012)),
        "it_arithmetic_generate" => (problems(1_000..1_000 + PROBLEMS.1), problems(10_000..10_012)),
        "it_bits_per_byte" => (documents(HELD_OUT_ITALIAN), Vec::new()),
        "en_bits_per_byte" => (documents(HELD_OUT_ENGLISH), Vec::new()),
        "it_generation" => (PROMPTS.iter().map(|p| row([("prompt", json!(p))])).collect(), Vec::new()),
        _ => return None,
    };
    Some(Bundled { rows, shots })
}

fn row<const N: usize>(columns: [(&str, Value); N]) -> Row {
    columns.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

fn minimal_pairs() -> Vec<Row> {
    let all = grammar::minimal_pairs();
    let longest = all.iter().map(|(_, pairs)| pairs.len()).max().unwrap_or(0);
    let mut rows = Vec::new();
    // One of each phenomenon in turn, so that --limit leaves some of all.
    for i in 0..longest {
        for (phenomenon, pairs) in &all {
            if let Some((good, bad)) = pairs.get(i) {
                rows.push(row([("good", json!(good)), ("bad", json!(bad)), ("phenomenon", json!(phenomenon))]));
            }
        }
    }
    rows
}

fn problems(numbers: std::ops::Range<u64>) -> Vec<Row> {
    let problem = |number| {
        let p = arithmetic::problem(number);
        let numbers: Vec<String> = p.numbers.iter().map(u32::to_string).collect();
        row([("problem", json!(p.text)), ("numbers", json!(numbers)), ("answer", json!(p.answer.to_string()))])
    };
    numbers.map(problem).collect()
}

fn documents(text: &str) -> Vec<Row> {
    text.split("\n---\n").map(|d| row([("text", json!(d.trim()))])).collect()
}

/// The task of `--text`: bits per byte of a file, in windows that share `overlap` tokens; `number` keeps two files of one name apart.
pub fn text_task(path: &Path, number: usize, overlap: usize) -> Task {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plain: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let name = format!("text_{number}_{plain}");
    let rolling = r#"
        name = "text"
        title = "A text"
        version = 1.0
        kind = "rolling"
        text = "{{ text }}"
        metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    "#;
    let mut task = Task::parse(rolling).unwrap_or_else(|_| unreachable!("the definition above is sound"));
    debug_assert!(task.kind == Kind::Rolling && task.metrics.contains(&Metric::BitsPerByte));
    task.name = name;
    task.overlap = overlap;
    task
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_suite_are_as_large_as_they_say() {
        let count = |name| rows(name).unwrap().rows.len();
        assert_eq!(count("it_minimal_pairs"), 2400);
        assert_eq!((count("it_arithmetic"), count("it_arithmetic_generate")), (300, 60));
        assert!(count("it_bits_per_byte") >= 8 && count("en_bits_per_byte") >= 3);
        assert!(rows("arc_it").is_none());
        let first: Vec<_> =
            rows("it_minimal_pairs").unwrap().rows.iter().take(16).map(|r| r["phenomenon"].clone()).collect();
        let distinct: std::collections::HashSet<_> = first.iter().collect();
        assert_eq!(distinct.len(), 16);
    }

    /// What a model was trained on says nothing about it.
    #[test]
    fn held_out_text_is_in_no_fixture() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
        let mut corpus = String::new();
        for file in std::fs::read_dir(dir.join("text")).unwrap() {
            corpus += &std::fs::read_to_string(file.unwrap().path()).unwrap();
        }
        for text in [HELD_OUT_ITALIAN, HELD_OUT_ENGLISH] {
            for sentence in text.split(['.', '\n']).map(str::trim).filter(|s| s.len() > 40) {
                assert!(!corpus.contains(sentence), "{sentence}");
            }
        }
    }
}
