//! What surrounds the loop: saving, resuming, evaluating, sampling.

use std::collections::BTreeMap;

use anyhow::Context;
use elleci_core::memory::work_per_token;

use super::backend::{Counters, Group};
use super::eval::{EvalShape, Evaluation, evaluate};
use super::samples::{Sampling, sample};
use super::{Progress, Run, SKIPS};
use crate::checkpoint::{Checkpoint, FORMAT, RngState, State};

impl Run<'_> {
    /// Writes a checkpoint, then removes surplus ones.
    ///
    /// # Errors
    /// Whatever the file system reports; earlier checkpoints are untouched then.
    pub fn save(&mut self) -> anyhow::Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        let Counters { updates, averaged } = self.backend.counters();
        let mut state = State {
            format: FORMAT,
            step: self.progress.step,
            phase: self.plan.phase(self.progress.step),
            tokens: self.progress.tokens,
            skipped: self.progress.skipped,
            updates,
            averaged,
            rng: RngState::new(self.config.training.seed),
            data: match &self.ahead {
                Some(ahead) => ahead.cursor.clone(),
                None => self.feed.cursor()?,
            },
            tokenizer: self.feed.tokenizer(),
            seconds: self.progress.seconds,
            config: self.config.clone(),
            files: BTreeMap::new(),
        };
        let mut groups = Vec::new();
        for group in groups_of(averaged) {
            groups.push((group.file(), self.backend.export(group)?));
        }
        let path = store.save(&mut state, groups)?;
        store.prune(self.config.training.keep_last)?;
        self.log.note(&format!("saved {}", path.display()));
        self.log.page(&self.config, &self.machine, self.progress.step >= self.plan.steps())
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// A checkpoint of another configuration, tokenizer or data.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        let state = &checkpoint.state;
        state.accepts(&self.config)?;
        state.accepts_tokenizer(&self.feed.tokenizer())?;
        let at = || format!("resuming from {}", checkpoint.dir.display());
        self.ahead = None;
        self.feed.restore(&state.data).with_context(at)?;
        let counters = Counters { updates: state.updates, averaged: state.averaged };
        for group in groups_of(state.averaged) {
            let file = checkpoint.tensors(group.file()).with_context(at)?;
            self.backend.import(group, &file, counters).with_context(at)?;
        }
        let State { step, tokens, skipped, seconds, .. } = *state;
        self.progress = Progress { step, tokens, skipped, seconds };
        Ok(())
    }

    /// Scores held-out text and logs the result under `prefix`.
    ///
    /// # Errors
    /// A faulty shard, or a fault of the device.
    pub fn evaluate(&mut self, prefix: &str) -> anyhow::Result<Option<Evaluation>> {
        let (training, seq) = (&self.config.training, self.config.model.max_seq_len);
        let shape = EvalShape { rows: training.batch, seq, max_tokens: training.eval_tokens };
        let shares = self.plan.run_weights();
        let evaluation = evaluate(self.backend.as_mut(), self.feed.as_ref(), &shares, shape)?;
        if let Some(e) = &evaluation {
            self.log.evaluation((self.progress.step, self.progress.tokens), prefix, e)?;
        }
        Ok(evaluation)
    }

    /// Continues every prompt; returns prompts with texts. Nothing, where no tokenizer is known.
    ///
    /// # Errors
    /// When the tokenizer refuses, or a fault of the device.
    pub fn continue_prompts(&mut self) -> anyhow::Result<Vec<(String, String)>> {
        let Some(text) = &self.text else { return Ok(Vec::new()) };
        let (seed, step) = (self.config.training.seed, self.progress.step);
        let mut texts = Vec::new();
        for (i, prompt) in self.config.training.prompts.iter().enumerate() {
            let draw = (seed, (step << 8) + i as u64);
            let continued = sample(self.backend.as_mut(), text.as_ref(), prompt, Sampling::default(), draw)?;
            texts.push((prompt.clone(), continued));
        }
        Ok(texts)
    }

    /// Continues every prompt and logs the texts.
    ///
    /// # Errors
    /// As [`Run::continue_prompts`], and whatever the file system reports.
    pub fn sample(&mut self) -> anyhow::Result<()> {
        for (prompt, text) in self.continue_prompts()? {
            self.log.sample(self.progress.step, &prompt, &text)?;
        }
        Ok(())
    }

    /// Share of the machine's measured peak at a rate of tokens; not a number where there is none.
    pub(super) fn utilisation(&self, seq: usize, tokens_per_second: f64) -> f64 {
        let flops = work_per_token(&self.config.model, seq).flops() * tokens_per_second;
        self.peak.map_or(f64::NAN, |peak| peak.utilisation(flops, 1.0))
    }

    /// What a run says that has come to nothing.
    pub(super) fn diverged(&self) -> String {
        let newest = self.store.as_ref().and_then(|store| store.newest());
        let kept = newest.map_or_else(
            || "there is no checkpoint yet".to_string(),
            |(step, path)| format!("the newest checkpoint is of step {step} ({})", path.display()),
        );
        format!(
            "the loss or the gradient norm of the last {SKIPS} steps, to step {}, was not finite: the run has diverged; {kept}. Begin \
             another with a smaller optimizer.peak_lr or a longer optimizer.schedule.warmup",
            self.progress.step
        )
    }

    /// What an interrupted run says.
    pub(super) fn stopped(&self) -> String {
        let step = self.progress.step;
        match self.store {
            Some(_) => format!("stopped and saved after step {step}; the same command goes on from there"),
            None => format!("stopped after step {step}"),
        }
    }
}

fn groups_of(averaged: u64) -> impl Iterator<Item = Group> {
    let average = (averaged > 0).then_some(Group::Average);
    [Group::Weights, Group::Optimizer].into_iter().chain(average)
}
