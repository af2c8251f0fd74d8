//! The plots and the page of a run, drawn from its metrics.

use std::path::Path;

use anyhow::Result;

use super::format::{si, thousands};
use super::metrics::{self, EvalRecord, Record, Sample, StepRecord};
use super::{Page, Plot};
use crate::data::files::write_atomically;

/// The loss curve alone, for a README.
pub const LOSS_SVG: &str = "loss.svg";
/// The page.
pub const REPORT_HTML: &str = "report.html";

/// What the metrics do not say.
#[derive(Clone, Debug, Default)]
pub struct RunFacts<'a> {
    /// The run's name.
    pub title: &'a str,
    /// Its state and date.
    pub subtitle: &'a str,
    /// The machine, see [`super::machine::facts`].
    pub machine: &'a [(String, String)],
    /// The effective configuration, as TOML.
    pub config: &'a str,
}

/// Writes `loss.svg` and `report.html` into the directory of the metrics, each whole or not at all.
///
/// # Errors
/// When the metrics cannot be read or a file cannot be written.
pub fn write_report(dir: &Path, run: &RunFacts<'_>) -> Result<()> {
    let records = metrics::read(dir)?;
    let loss = Plot::loss(&format!("{}: loss", run.title), &records).svg();
    let mut plots = vec![loss.clone()];
    let (steps, evals, samples) = sort(&records);
    if !evals.is_empty() {
        plots.push(Plot::bits_per_byte("held-out text", &records).svg());
    }
    plots.push(Plot::health("gradient norm and speed", &records).svg());
    let page = Page {
        title: run.title,
        subtitle: run.subtitle,
        figures: &figures(&steps, &evals),
        plots: &plots,
        evals: &evals,
        samples: &samples,
        machine: run.machine,
        config: run.config,
    };
    write_atomically(&dir.join(LOSS_SVG), loss.as_bytes())?;
    write_atomically(&dir.join(REPORT_HTML), page.html().as_bytes())
}

fn sort(records: &[Record]) -> (Vec<&StepRecord>, Vec<EvalRecord>, Vec<Sample>) {
    let (mut steps, mut evals, mut samples) = (vec![], vec![], vec![]);
    for record in records {
        match record {
            Record::Step(s) => steps.push(s),
            Record::Eval(e) => evals.push(e.clone()),
            Record::Sample(s) => samples.push(s.clone()),
        }
    }
    (steps, evals, samples)
}

/// The numbers that a reader looks for first.
fn figures(steps: &[&StepRecord], evals: &[EvalRecord]) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut add = |what: &str, value: String| out.push((what.to_string(), value));
    let Some(last) = steps.last() else { return out };
    let points: Vec<_> = steps.iter().map(|s| (s.step as f64, s.loss)).collect();
    add("steps", thousands(last.step));
    add("tokens", si(last.tokens as f64));
    if let Some(loss) = super::plot::smooth(&points).last() {
        add("training loss", format!("{:.3}", loss.1));
    }
    if let Some(eval) = evals.last() {
        add("validation", format!("{:.3} bits a byte", eval.bpb));
    }
    add("tokens a second", si(median(steps.iter().map(|s| s.tokens_per_s))));
    let mfu = median(steps.iter().map(|s| s.mfu));
    if mfu.is_finite() {
        add("MFU", format!("{:.0}%", 100.0 * mfu));
    }
    if last.skipped > 0 {
        add("skipped steps", thousands(last.skipped));
    }
    out
}

/// The middle value: steps slowed down by something else do not move it.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Metrics;
    use super::*;

    #[test]
    fn a_run_is_drawn_from_its_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(dir.path()).unwrap();
        let facts = RunFacts { title: "nano <1>", config: "steps = 3", ..RunFacts::default() };
        write_report(dir.path(), &facts).unwrap();
        assert!(fs::read_to_string(dir.path().join(LOSS_SVG)).unwrap().contains("no data yet"));
        for step in 1..=3 {
            let (tokens_per_s, mfu) = if step == 2 { (10.0, 0.01) } else { (5000.0, 0.38) };
            let (loss, tokens) = (9.0 / step as f64, step * 2048);
            let (lr, grad_norm, phase, seq_len, skipped, ms) = (1e-3, 0.8, 1, 256, 0, 412.0);
            let record =
                StepRecord { step, tokens, loss, lr, grad_norm, phase, seq_len, skipped, ms, tokens_per_s, mfu };
            metrics.step(&record).unwrap();
        }
        metrics.eval(&EvalRecord { step: 3, tokens: 6144, loss: 3.0, bpb: 1.5, sources: vec![] }).unwrap();
        metrics.sample(&Sample { step: 3, prompt: "Ciao".into(), text: " mondo".into() }).unwrap();
        write_report(dir.path(), &facts).unwrap();
        let html = fs::read_to_string(dir.path().join(REPORT_HTML)).unwrap();
        let parts =
            ["nano &lt;1&gt;", "6.14k", "3.000", "1.500 bits a byte", "5.00k", "38%", "<b>Ciao</b> mondo", "steps = 3"];
        for part in parts {
            assert!(html.contains(part), "{part}");
        }
        assert_eq!(html.matches("<svg").count(), 3);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            5,
            "three of metrics, two of the report, nothing temporary"
        );
    }

    #[test]
    fn what_cannot_be_read_or_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", write_report(&dir.path().join("none"), &RunFacts::default()).unwrap_err());
        assert!(error.contains("metrics.jsonl"), "{error}");
        Metrics::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join(REPORT_HTML)).unwrap();
        let error = format!("{:#}", write_report(dir.path(), &RunFacts::default()).unwrap_err());
        assert!(error.contains("report.html"), "{error}");
    }
}
