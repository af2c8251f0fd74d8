//! The table of a bench, in the forms that llama-bench has.

use anyhow::Context;
use serde_json::json;

use super::Test;
use crate::report::format::si;
use crate::run::cli::BenchOutput;

/// One test and its repetitions.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Name of the model.
    pub model: String,
    /// Bytes of its archive.
    pub size: u64,
    /// Its parameters.
    pub parameters: u64,
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// What was measured.
    pub test: Test,
    /// Tokens in the session before it.
    pub depth: usize,
    /// Wall-clock time of each repetition.
    pub seconds: Vec<f64>,
}

/// Mean and sample standard deviation; the latter is 0 for a single value.
fn mean_sd(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

impl Row {
    /// Tokens a second of each repetition.
    fn samples(&self) -> Vec<f64> {
        self.seconds.iter().map(|s| self.test.tokens() as f64 / s).collect()
    }

    /// `pp512`, or `tg128 @ d1024` in a session that is not empty.
    pub fn test_name(&self) -> String {
        let name = self.test.name();
        if self.depth == 0 { name } else { format!("{name} @ d{}", self.depth) }
    }

    /// Mean ± standard deviation, tokens a second.
    pub fn speed(&self) -> String {
        let (mean, sd) = mean_sd(&self.samples());
        format!("{mean:.2} ± {sd:.2}")
    }

    /// `1.49 B`, as the peers write it.
    fn parameters(&self) -> String {
        let text = si(self.parameters as f64).replace('G', "B");
        match text.find(|c: char| c.is_alphabetic()) {
            Some(at) => format!("{} {}", &text[..at], &text[at..]),
            None => text,
        }
    }

    fn backend(&self) -> String {
        format!("CPU {}", self.isa)
    }

    /// The keys that llama-bench has, in its units.
    fn json(&self) -> serde_json::Value {
        let (avg_ts, stddev_ts) = mean_sd(&self.samples());
        let ns: Vec<f64> = self.seconds.iter().map(|s| s * 1e9).collect();
        let (avg_ns, stddev_ns) = mean_sd(&ns);
        let (n_prompt, n_gen, n_parallel) = match self.test {
            Test::Prompt(n) => (n, 0, 1),
            Test::Generate(n) => (0, n, 1),
            Test::Together { tokens, sequences } => (0, tokens, sequences),
        };
        json!({
            "model_filename": self.model, "model_size": self.size, "model_n_params": self.parameters,
            "backends": self.backend(), "n_threads": self.threads, "n_prompt": n_prompt, "n_gen": n_gen,
            "n_parallel": n_parallel, "n_depth": self.depth, "test": self.test_name(), "avg_ns": avg_ns.round(),
            "stddev_ns": stddev_ns.round(), "avg_ts": avg_ts, "stddev_ts": stddev_ts, "samples_ts": self.samples(),
        })
    }
}

/// All rows as text.
///
/// # Errors
/// None that a caller can cause.
pub fn render(rows: &[Row], output: BenchOutput) -> anyhow::Result<String> {
    match output {
        BenchOutput::Md => Ok(markdown(rows)),
        BenchOutput::Json => {
            let rows: Vec<_> = rows.iter().map(Row::json).collect();
            Ok(serde_json::to_string_pretty(&rows)? + "\n")
        }
        BenchOutput::Csv => csv(rows),
    }
}

fn markdown(rows: &[Row]) -> String {
    let head = ["model", "size", "params", "backend", "threads", "test", "t/s"].map(String::from);
    let cells = |r: &Row| {
        let size = format!("{:.2} MiB", r.size as f64 / (1 << 20) as f64);
        [r.model.clone(), size, r.parameters(), r.backend(), r.threads.to_string(), r.test_name(), r.speed()]
    };
    let all: Vec<[String; 7]> = std::iter::once(head).chain(rows.iter().map(cells)).collect();
    let width = |c: usize| all.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    // Names to the left, numbers to the right.
    let left = |c: usize| c == 0 || c == 3;
    let mut out = String::new();
    for (i, row) in all.iter().enumerate() {
        for (c, cell) in row.iter().enumerate() {
            let width = widths[c];
            out += &if left(c) { format!("| {cell:<width$} ") } else { format!("| {cell:>width$} ") };
        }
        out += "|\n";
        if i == 0 {
            for (c, width) in widths.iter().enumerate() {
                out += &if left(c) {
                    format!("| {} ", "-".repeat(*width))
                } else {
                    format!("| {}: ", "-".repeat(width - 1))
                };
            }
            out += "|\n";
        }
    }
    out
}

fn csv(rows: &[Row]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for (i, row) in rows.iter().enumerate() {
        let serde_json::Value::Object(mut all) = row.json() else { unreachable!("a row is an object") };
        all.remove("samples_ts");
        if i == 0 {
            writer.write_record(all.keys())?;
        }
        let text = |v: &serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
        writer.write_record(all.values().map(text))?;
    }
    String::from_utf8(writer.into_inner()?).context("a name that is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let row = Row {
            model: "elleci-1.5b".into(),
            size: 400 << 20,
            parameters: 1_494_416_256,
            isa: "avx2",
            threads: 2,
            test: Test::Prompt(512),
            depth: 0,
            seconds: vec![2.0, 4.0],
        };
        vec![row.clone(), Row { test: Test::Generate(128), depth: 1024, seconds: vec![8.0], ..row }]
    }

    #[test]
    fn the_table_is_that_of_llama_bench() {
        // 256 and 128 tokens a second: mean 192, deviation 128/√2.
        let expected = "\
| model       |       size | params | backend  | threads |          test |            t/s |
| ----------- | ---------: | -----: | -------- | ------: | ------------: | -------------: |
| elleci-1.5b | 400.00 MiB | 1.49 B | CPU avx2 |       2 |         pp512 | 192.00 ± 90.51 |
| elleci-1.5b | 400.00 MiB | 1.49 B | CPU avx2 |       2 | tg128 @ d1024 |   16.00 ± 0.00 |
";
        assert_eq!(render(&rows(), BenchOutput::Md).unwrap(), expected);
    }

    #[test]
    fn json_and_csv_say_the_same() {
        let json: serde_json::Value = serde_json::from_str(&render(&rows(), BenchOutput::Json).unwrap()).unwrap();
        assert_eq!(json[0]["samples_ts"], json!([256.0, 128.0]));
        assert_eq!(json[0]["avg_ns"], 3e9);
        assert_eq!(
            (&json[1]["n_gen"], &json[1]["n_depth"], &json[1]["stddev_ts"]),
            (&json!(128), &json!(1024), &json!(0.0))
        );
        let text = render(&rows(), BenchOutput::Csv).unwrap();
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let head = reader.headers().unwrap().clone();
        for (record, row) in reader.records().zip(json.as_array().unwrap()) {
            for (key, value) in head.iter().zip(&record.unwrap()) {
                assert_eq!(value, row[key].as_str().map_or_else(|| row[key].to_string(), str::to_string), "{key}");
            }
        }
        assert_eq!(text.lines().count(), 3);
    }

    /// The tokens of all sequences count, and the name says how many there are.
    #[test]
    fn sequences_together() {
        let row = Row { test: Test::Together { tokens: 128, sequences: 8 }, seconds: vec![8.0], ..rows().remove(0) };
        assert_eq!((row.test_name(), row.speed()), ("tg128 x8".into(), "128.00 ± 0.00".into()));
        let json: serde_json::Value = serde_json::from_str(&render(&[row], BenchOutput::Json).unwrap()).unwrap();
        assert_eq!((&json[0]["n_gen"], &json[0]["n_parallel"]), (&json!(128), &json!(8)));
    }
}
