//! A prompt on its way through the model.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use elleci_core::inference::{Output, Session};
use elleci_core::sampler::SamplerError;

use super::cache::{Cut, PrefixCache, cuts};
use super::job::{Ask, Count, Event, Generate, Job, Task, TokenScore};
use super::writing::{Writing, score};

/// A prompt that is being read.
#[derive(Debug)]
pub struct Reading {
    /// Its request.
    pub ask: Arc<Ask>,
    /// What it has taken so far.
    pub session: Session,
    /// What is gathered along the way.
    pub gathered: Gathered,
    /// Its index in the request.
    index: usize,
    cuts: Vec<Cut>,
    /// The cut that the next run ends at.
    next: usize,
    keep: Vec<usize>,
    cached: usize,
}

/// The prompt, and the outputs of its runs.
#[derive(Debug)]
pub struct Gathered {
    /// What is read, and what for.
    pub job: Job,
    /// Scores of its tokens from the second on, where they are wanted.
    scores: Vec<TokenScore>,
    /// Sum of its hidden states.
    sum: Vec<f64>,
    /// Logits after the last token.
    pub last: Vec<f32>,
}

impl Gathered {
    /// Takes an output of the run that begins at token `start`.
    pub fn take(&mut self, start: usize, index: usize, values: &[f32]) {
        match &self.job.task {
            Task::Embed => {
                self.sum.resize(values.len(), 0.0);
                self.sum.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(*v));
            }
            Task::Generate(generate) => {
                let next = self.job.prompt.get(start + index + 1);
                if let (Some(&next), Some(top), true) = (next, generate.logprobs, generate.scores_prompt()) {
                    self.scores.push(score(values, next, top));
                }
                if next.is_none() {
                    self.last.clear();
                    self.last.extend_from_slice(values);
                }
            }
        }
    }
}

impl Reading {
    /// Begins, as far on as the cache allows.
    pub fn new(ask: Arc<Ask>, index: usize, job: Job, fresh: &Session, cache: &mut PrefixCache) -> Reading {
        let cuts = cuts(&job.prompt);
        // Where every token's output is wanted, every token must be computed.
        let (session, keep) = if job.task.wants_every_token() {
            (None, Vec::new())
        } else {
            let found = cache.find(&job.prompt, &cuts);
            (found.session, found.keep)
        };
        let session = session.unwrap_or_else(|| fresh.clone());
        let cached = session.position();
        let next = cuts.iter().take_while(|c| c.end <= cached).count();
        ask.active.fetch_add(job.copies.len(), Relaxed);
        let gathered = Gathered { job, scores: Vec::new(), sum: Vec::new(), last: Vec::new() };
        Reading { ask, session, gathered, index, cuts, next, keep, cached }
    }

    /// Sequences that it becomes.
    pub fn copies(&self) -> usize {
        self.gathered.job.copies.len()
    }

    /// Tokens of the prompt, and how many of them came from the cache; none for choices that begin after the first.
    pub fn tokens(&self) -> (usize, usize) {
        if self.gathered.job.copies.start == 0 { (self.gathered.job.prompt.len(), self.cached) } else { (0, 0) }
    }

    /// Bounds of the next run.
    pub fn run(&self) -> (usize, usize) {
        (self.session.position(), self.cuts[self.next].end)
    }

    /// What is wanted of it.
    pub fn output(&self) -> Output {
        match &self.gathered.job.task {
            Task::Embed => Output::Hidden,
            task if task.wants_every_token() => Output::Each,
            Task::Generate(_) if self.next + 1 == self.cuts.len() => Output::Last,
            Task::Generate(_) => Output::Nothing,
        }
    }

    /// The run has been taken. Whether the prompt is complete.
    pub fn advance(&mut self, cache: &mut PrefixCache) -> bool {
        if self.keep.contains(&self.next) {
            cache.keep(self.cuts[self.next], &self.session);
        }
        self.next += 1;
        self.next == self.cuts.len()
    }

    /// What comes of the complete prompt: its embedding, or choices to be written, with the logits for their first token.
    ///
    /// # Errors
    /// Options of the sampler without a meaning.
    pub fn finish(self) -> Result<(Vec<Writing>, Vec<f32>), SamplerError> {
        let Gathered { job, scores, sum, last } = self.gathered;
        let tokens = job.prompt.len();
        let generate: Arc<Generate> = match job.task {
            Task::Embed => {
                self.ask.tell(Event::Embedding { prompt: self.index, vector: unit(&sum), tokens });
                return Ok((Vec::new(), last));
            }
            Task::Generate(generate) => generate,
        };
        if generate.scores_prompt() {
            self.ask.tell(Event::Prompt { prompt: self.index, scores });
        }
        let writing = |copy| {
            let count = match copy {
                0 => Count { prompt: tokens, cached: self.cached, chosen: 0 },
                _ => Count::default(),
            };
            let start = (self.ask.clone(), self.session.clone());
            Writing::new(start, (self.index, copy), generate.clone(), count)
        };
        let writing = job.copies.map(writing).collect::<Result<_, _>>()?;
        Ok((writing, last))
    }
}

/// In the direction of the sum, of length 1. The mean points there too.
fn unit(sum: &[f64]) -> Vec<f32> {
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    sum.iter().map(|x| (x * scale) as f32).collect()
}
