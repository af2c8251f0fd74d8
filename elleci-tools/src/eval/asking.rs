//! Asking the model what is not known yet, in waves: between two of them Ctrl-C is looked at, answers are kept and progress is shown.

use anyhow::Context;
use elleci_core::sampler::SamplerOptions;

use super::Prepared;
use super::cache::{Kept, Part};
use super::cli::RunArgs;
use super::engine::{Continuation, Continue, Engine, Pair, Stem, Windows};
use super::item::Item;
use super::metrics::Answer;
use super::progress::Progress;
use super::report::{Absent, Why};
use super::task::{Kind, Task};
use crate::run::interrupt::Generating;

/// Items that are asked together, at most: of many with one context some begin alike.
const WAVE: usize = 512;
/// Bytes of text in them at most, and at least; in between as many as keep a model busy for some seconds.
const WAVE_BYTES: [u64; 2] = [64 << 10, 16 << 10];
/// Bytes of text times those of the model.
const WAVE_WORK: u64 = 1 << 40;
/// Texts that are generated together.
const GENERATE_WAVE: usize = 32;
/// Windows of texts that are scored together, at most.
const ROLLING_WINDOWS: usize = 16;
/// Tokens of them that are enough to keep all threads at work: a large model's long windows come one by one, and are kept so.
const ROLLING_TOKENS: usize = 4096;
/// Characters of a continuation that an error shows.
const SHOWN: usize = 40;

/// Asks everything that is not known. False if Ctrl-C ended it.
pub(super) fn answer_all(
    args: &RunArgs,
    engine: &mut Engine<'_>,
    prepared: &mut Vec<Prepared>,
    absent: &mut Vec<Absent>,
) -> anyhow::Result<bool> {
    let interrupt = Generating::begin();
    let total = prepared.iter().map(|p| p.missing().iter().map(|i| i.weight()).sum::<u64>()).sum();
    let mut progress = Progress::new(total);
    let mut index = 0;
    let mut finished = true;
    while index < prepared.len() {
        let p = &mut prepared[index];
        match answer_task(args, engine, p, &interrupt, &mut progress) {
            Ok(()) => index += 1,
            Err(error) => {
                let reason = format!("{error:#}");
                progress.note(&format!("{}: cannot run: {reason}", p.task.name));
                absent.push(Absent { name: p.task.name.clone(), reason, why: Why::Failed });
                prepared.remove(index);
            }
        }
        if interrupt.stopped() {
            finished = prepared.iter().all(|p| p.missing().is_empty());
            break;
        }
    }
    progress.finish();
    Ok(finished)
}

/// Asks what is missing of one task.
fn answer_task(
    args: &RunArgs,
    engine: &mut Engine<'_>,
    p: &mut Prepared,
    interrupt: &Generating,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let scored = matches!(p.task.kind, Kind::MultipleChoice | Kind::Loglikelihood);
    let missing: Vec<Item> = p.missing().into_iter().cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    if p.task.kind == Kind::Rolling {
        return rolling(engine, p, &missing, interrupt, progress);
    }
    let stem = if scored { stem(engine, &p.items)? } else { None };
    let [most, least] = WAVE_BYTES;
    let bytes = (WAVE_WORK / engine.model_bytes().max(1)).clamp(least, most);
    let mut done = p.wanted - missing.len();
    let mut rest = missing.as_slice();
    while !rest.is_empty() && !interrupt.stopped() {
        let count = match p.task.kind {
            Kind::Generate => GENERATE_WAVE.min(rest.len()),
            _ => wave(rest, bytes),
        };
        let (items, after) = rest.split_at(count);
        rest = after;
        let answers = match p.task.kind {
            Kind::Generate => generate(args, engine, &p.task, items)?,
            _ => score(engine, items, stem.as_ref())?,
        };
        done += answers.len();
        p.answers.add(items.iter().map(|i| i.doc).zip(answers).collect())?;
        progress.step(items.iter().map(Item::weight).sum(), &p.task.name, done, p.wanted);
    }
    Ok(())
}

/// How many of the items are asked together: no more than [`WAVE`] with so many bytes of text, but one at least.
fn wave(items: &[Item], bytes: u64) -> usize {
    let mut text = 0;
    let fitting = items.iter().take(WAVE).take_while(|item| {
        text += item.weight();
        text <= bytes
    });
    fitting.count().max(1)
}

/// What the contexts of a task begin with: what its last two items have in common.
fn stem(engine: &mut Engine<'_>, items: &[Item]) -> anyhow::Result<Option<Stem>> {
    let [.., a, b] = items else { return Ok(None) };
    let first = |engine: &mut Engine<'_>, item: &Item| engine.pair(&item.context, &item.continuations[0]);
    let (a, b) = (first(engine, a)?, first(engine, b)?);
    engine.stem(&a, &b)
}

fn score(engine: &mut Engine<'_>, items: &[Item], stem: Option<&Stem>) -> anyhow::Result<Vec<Kept>> {
    let mut pairs: Vec<Pair> = Vec::new();
    for item in items {
        for continuation in &item.continuations {
            let pair = engine.pair(&item.context, continuation);
            pairs.push(pair.with_context(|| format!("item {} ({:?})", item.doc, beginning(continuation)))?);
        }
    }
    let scores = engine.score(&pairs, stem)?;
    let mut start = 0;
    let mut answers = Vec::with_capacity(items.len());
    for item in items {
        let own = start..start + item.continuations.len();
        start = own.end;
        let cut = pairs[own.clone()].iter().any(|p| p.truncated > 0);
        let answer = Answer::Scores(scores[own].iter().map(|s| (s.logprob, s.greedy)).collect());
        answers.push(Kept { answer, cut });
    }
    Ok(answers)
}

/// The log-likelihoods of whole texts, window by window in their order. What is known of a text is kept with every wave, so that a run
/// which is stopped within it goes on there, and ends with the same bits as one that was not.
fn rolling(
    engine: &mut Engine<'_>,
    p: &mut Prepared,
    items: &[Item],
    interrupt: &Generating,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let mut texts = Vec::with_capacity(items.len());
    for item in items {
        let windows = engine.windows(&item.context, p.task.overlap)?;
        let part = p.answers.parts.get(&item.doc).copied().filter(|part| part.windows < windows.len());
        texts.push(Text { item, all: windows.len(), part: part.unwrap_or_default(), windows });
    }
    for text in &mut texts {
        text.windows.by_ref().take(text.part.windows).for_each(drop);
        progress.skip(text.weight());
    }
    let all: usize = texts.iter().map(|t| t.all).sum();
    let wave = (ROLLING_TOKENS / engine.max_length()).clamp(1, ROLLING_WINDOWS);
    let mut rest = texts.as_mut_slice();
    let mut done: usize = rest.iter().map(|t| t.part.windows).sum();
    while !rest.is_empty() {
        if interrupt.stopped() {
            return Ok(());
        }
        let (mut windows, mut owners) = (Vec::with_capacity(wave), Vec::with_capacity(wave));
        for (i, text) in rest.iter_mut().enumerate() {
            windows.extend(text.windows.by_ref().take(wave - windows.len()));
            owners.resize(windows.len(), i);
            if windows.len() == wave {
                break;
            }
        }
        let touched = owners.last().map_or(0, |last| last + 1);
        let before: u64 = rest[..touched].iter().map(Text::weight).sum();
        for (score, owner) in engine.score(&windows, None)?.iter().zip(&owners) {
            rest[*owner].part.windows += 1;
            rest[*owner].part.logprob += score.logprob;
        }
        done += windows.len();
        let units = rest[..touched].iter().map(Text::weight).sum::<u64>() - before;
        let over = rest.iter().take_while(|t| t.part.windows == t.all).count();
        let (ended, after) = rest.split_at_mut(over);
        let kept = |t: &Text<'_>| (t.item.doc, Kept { answer: Answer::Rolling(t.part.logprob), cut: false });
        p.answers.add(ended.iter().map(kept).collect())?;
        if let Some(begun) = after.first().filter(|t| t.part.windows > 0) {
            p.answers.add_part(begun.item.doc, begun.part)?;
        }
        progress.step(units, &format!("{}, windows", p.task.name), done, all);
        rest = after;
    }
    Ok(())
}

/// A text whose windows are being scored.
struct Text<'a> {
    item: &'a Item,
    /// Windows of it.
    all: usize,
    /// Those that are scored.
    part: Part,
    /// Those that are not.
    windows: Windows,
}

impl Text<'_> {
    /// The share of the item's weight that is scored.
    fn weight(&self) -> u64 {
        let share = u128::from(self.item.weight()) * self.part.windows as u128 / self.all.max(1) as u128;
        share as u64
    }
}

fn generate(args: &RunArgs, engine: &mut Engine<'_>, task: &Task, items: &[Item]) -> anyhow::Result<Vec<Kept>> {
    let how = task.generation.as_ref().context("the task has no `generation`")?;
    let sampling = SamplerOptions { temperature: how.temperature, ..SamplerOptions::default() };
    let how = Continue { max_tokens: how.max_tokens, until: how.until.clone(), sampling };
    let prompts: Vec<&str> = items.iter().map(|i| i.context.as_str()).collect();
    // A text's draws depend on the seed and its own number, not on its company.
    let seed = |i: usize| args.seed.wrapping_mul(1_000_003).wrapping_add(items[i].doc as u64);
    let texts = engine.generate(&prompts, &how, seed)?;
    let kept = |t: Continuation| Kept { cut: t.truncated > 0, answer: Answer::Text { text: t.text, ended: t.ended } };
    Ok(texts.into_iter().map(kept).collect())
}

/// The beginning of a text, for an error.
fn beginning(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
