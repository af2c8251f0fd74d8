//! Bits per byte of a text, and what the choices of `--dense` cost.

use std::f64::consts::LN_2;
use std::path::Path;

use elleci_core::archive::{Archive, DenseFormat, PackOptions, to_bytes};
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::params::{Id, ParamKind, Params};
use serde_json::{Map, Value, json};

use super::job::Job;
use super::source::{Source, SourceModel};
use super::{is_packed, read_finite, tokenizer};
use crate::data::tokenizer::{END_OF_TEXT_ID, Tokenizer};
use crate::exit::usage;

/// Sequences that go through the model together.
const ROWS: usize = 4;

/// Tokens of a window at most: models that were trained with longer sequences are scored on shorter ones, in memory and time that
/// every machine has.
const WINDOW: usize = 4096;

/// A text as tokens: the first is `<|endoftext|>`, the others are predicted.
pub struct Text {
    tokens: Vec<u32>,
    /// Bytes that the predicted tokens stand for.
    bytes: u64,
}

impl Text {
    /// Reads and tokenises a file; `most` tokens of it, 0 = all.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a file that is missing, no text, or empty.
    pub fn read(path: &Path, tokenizer: &Tokenizer, most: usize) -> anyhow::Result<Text> {
        Ok(Text::new(&read_text(path)?, tokenizer, most))
    }

    /// The same bytes for several tokenizers: as many as `most` tokens of the one that has fewer bytes a token stand for.
    ///
    /// # Errors
    /// As [`Text::read`].
    pub fn read_for_all(path: &Path, tokenizers: &[Tokenizer], most: usize) -> anyhow::Result<Vec<Text>> {
        let text = read_text(path)?;
        let whole: Vec<Text> = tokenizers.iter().map(|tokenizer| Text::new(&text, tokenizer, most)).collect();
        let bytes = whole.iter().map(|t| t.bytes).min().unwrap_or(0);
        // A token may end inside of a character: at its end, so that something is left.
        let cut = (bytes as usize..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
        let same = |(t, tokenizer): (Text, &Tokenizer)| match t.bytes == cut as u64 {
            true => t,
            false => Text::new(&text[..cut], tokenizer, 0),
        };
        Ok(whole.into_iter().zip(tokenizers).map(same).collect())
    }

    fn new(text: &str, tokenizer: &Tokenizer, most: usize) -> Text {
        let mut tokens = vec![END_OF_TEXT_ID];
        tokens.extend(tokenizer.encode(text));
        if most > 0 {
            tokens.truncate(most + 1);
        }
        let bytes = tokenizer.decode_bytes(&tokens[1..]).len() as u64;
        Text { tokens, bytes }
    }

    fn predicted(&self) -> usize {
        self.tokens.len() - 1
    }
}

/// The file of `--text`.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| usage(format!("--text {}: {e}", path.display())))?;
    match text.is_empty() {
        true => Err(usage(format!("--text {}: it is empty", path.display()))),
        false => Ok(text),
    }
}

/// Bits per byte of a text, read in windows of the length that the model was trained with, [`WINDOW`] at most.
pub fn bits_per_byte(model: &Model, text: &Text, job: &Job) -> anyhow::Result<f64> {
    let config = model.config();
    let seq = config.max_seq_len.min(WINDOW).min(text.predicted());
    let mut workspace = Workspace::new(config, ROWS, seq, Checkpointing::EveryLayer);
    let (size, mut nats) = (ROWS * seq, 0.0);
    let (mut tokens, mut targets, mut weights) = (vec![0; size], vec![0; size], vec![0.0; size]);
    for start in (0..text.predicted()).step_by(size) {
        let count = size.min(text.predicted() - start);
        tokens.fill(0);
        targets.fill(0);
        weights.fill(0.0);
        tokens[..count].copy_from_slice(&text.tokens[start..start + count]);
        targets[..count].copy_from_slice(&text.tokens[start + 1..start + count + 1]);
        weights[..count].fill(1.0);
        let batch = Batch { batch: ROWS, seq, tokens: &tokens, targets: &targets, weights: &weights };
        nats += model.loss(&mut workspace, &batch)?;
        job.advance(count as u64)?;
    }
    Ok(nats / LN_2 / text.bytes as f64)
}

/// All weights of a source.
pub fn load(source: &Source, model: &SourceModel) -> anyhow::Result<Model> {
    let mut params = Params::zeros(model.layout.clone());
    for (param, &index) in model.layout.params().iter().zip(&model.index) {
        read_finite(source, index, is_packed(source), &mut params.data_mut()[param.range.clone()])?;
    }
    Ok(Model::new(model.config.clone(), params)?)
}

/// Bits per byte of every choice of `--dense`, `f32` first: what was trained.
pub fn dense_choices(
    source: &Source,
    shape: &SourceModel,
    path: &Path,
    most: usize,
    job: &Job,
) -> anyhow::Result<Value> {
    let text = Text::read(path, &tokenizer(source)?, most)?;
    let mut model = load(source, shape)?;
    job.begin("scoring", text.predicted() as u64 * DenseFormat::ALL.len() as u64);
    let dense = |kind| matches!(kind, ParamKind::Embedding | ParamKind::Matrix);
    let params = shape.layout.params().iter().enumerate();
    let dense: Vec<Id> = params.filter(|(_, p)| dense(p.kind)).map(|(i, _)| Id(i)).collect();
    let trained: Vec<Vec<f32>> = dense.iter().map(|&id| model.params()[id].to_vec()).collect();
    let mut scores = Map::new();
    for format in DenseFormat::ALL {
        let restore = |params: &mut Params| {
            dense.iter().zip(&trained).for_each(|(&id, values)| params[id].copy_from_slice(values));
        };
        model.update(restore);
        if format != DenseFormat::F32 {
            round(&mut model, &dense, format)?;
        }
        scores.insert(format.name().into(), json!(bits_per_byte(&model, &text, job)?));
    }
    let mut report = Map::new();
    report.insert("text".into(), json!(path));
    report.insert("tokens".into(), json!(text.predicted()));
    report.insert("bytes".into(), json!(text.bytes));
    report.insert("by_dense".into(), Value::Object(scores));
    Ok(Value::Object(report))
}

/// Replaces the full-precision matrices by what an archive gives back of them.
fn round(model: &mut Model, dense: &[Id], format: DenseFormat) -> anyhow::Result<()> {
    let options = PackOptions { dense: format, ..PackOptions::default() };
    let bytes = to_bytes(model.config(), model.params(), None, options)?;
    let archive = Archive::open(bytes)?;
    model.update(|params| dense.iter().try_for_each(|&id| archive.model().read(id, &mut params[id])))?;
    Ok(())
}

/// The table of [`dense_choices`].
pub fn print(report: &Value) {
    let Some(scores) = report["by_dense"].as_object() else { return };
    let exact = scores.get("f32").and_then(Value::as_f64).unwrap_or(f64::NAN);
    crate::exit::outln!(
        "  bits per byte of {} ({} tokens):",
        report["text"].as_str().unwrap_or_default(),
        report["tokens"]
    );
    for format in DenseFormat::ALL {
        let score = scores.get(format.name()).and_then(Value::as_f64).unwrap_or(f64::NAN);
        crate::exit::outln!("    --dense {:5} {score:.5}  {:+.4} %", format.name(), (score / exact - 1.0) * 100.0);
    }
}

/// A text scored by one source.
pub fn one(source: &Source, text: &Text, job: &Job) -> anyhow::Result<Value> {
    let shape = source.model()?;
    let model = load(source, &shape)?;
    job.begin("scoring", text.predicted() as u64);
    let score = bits_per_byte(&model, text, job)?;
    Ok(json!({ "model": source.path, "form": source.form.name(), "bits_per_byte": score, "tokens": text.predicted(),
        "bytes": text.bytes }))
}
