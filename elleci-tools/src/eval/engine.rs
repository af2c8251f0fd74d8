//! Log-likelihoods and continuations: what every task asks a model.
//!
//! Text becomes tokens as lm-evaluation-harness does it: a context and its continuation are encoded as one text, white space at
//! the end of the context counts as the continuation's, and the continuation's tokens are those past the length of the context
//! encoded alone. A context that several requests share is evaluated once, and each continuation is scored on its session, which stays as
//! it is. What the continuations of a context have in common is evaluated once too, and so is the beginning that all contexts
//! of a task share (examples, instructions), for the whole task (the [`Stem`]).
//! What a request is given does not depend on the others, nor on what is shared: a session computes the same bits in every company and,
//! in the one form of attention that scoring has it use, however its tokens are cut into calls.

mod windows;
mod writing;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, ensure};
use elleci_core::archive::PackedModel;
use elleci_core::inference::{Batch, Feed, Output, Probe, Session};

use crate::data::tokenizer::{Cache, END_OF_TEXT_ID, Tokenizer};
use crate::run::logprob::LogRow;
use crate::run::model::OpenModel;

pub use windows::Windows;
pub use writing::{Continuation, Continue};

/// Tokens of a call at least, where there are so many: some passes of the model for each of a few threads, and enough long windows for them
/// to share out evenly.
const CALL_TOKENS: usize = 4096;
/// Memory that the sessions of a call may take: those of contexts, and once more those of branches.
const CALL_BYTES: usize = 256 << 20;
/// Sessions of a call at most: the logits of each are kept until its continuations are scored.
const CALL_SESSIONS: usize = 64;
/// A shared beginning must save this many tokens to be worth a session.
const MIN_STEM: usize = 16;
/// And so must that of two continuations, whose session is a fork.
const MIN_BRANCH: usize = 3;

/// A continuation to be scored after a context, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// What comes before; never empty.
    pub context: Vec<u32>,
    /// What is scored; never empty.
    pub continuation: Vec<u32>,
    /// Tokens that were cut from the left of the context because the window is no longer.
    pub truncated: usize,
}

/// The score of a [`Pair`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Sum of the natural logarithms of the tokens' probabilities.
    pub logprob: f64,
    /// Whether every token is the likeliest at its place.
    pub greedy: bool,
}

/// The score of no tokens.
const NOTHING: Score = Score { logprob: 0.0, greedy: true };

/// Tokens to be scored.
struct Asked<'a> {
    /// What would come after the first token of the probe, and so on
    tokens: &'a [u32],
    /// The score of those before them
    before: Score,
}

/// Continuations of one context that begin alike.
struct Branch {
    /// The context
    group: usize,
    /// Tokens that they have in common; each has another after them.
    shared: usize,
    members: Vec<usize>,
}

impl Branch {
    /// Tokens that are fed for it.
    fn tokens(&self, pairs: &[Pair]) -> usize {
        let rest = self.members.iter().map(|i| pairs[*i].continuation.len() - 1 - self.shared);
        self.shared + rest.sum::<usize>()
    }
}

/// The continuations of a context, neighbours that begin alike together.
fn branches(pairs: &[Pair], members: &[usize], group: usize) -> Vec<Branch> {
    let mut branches: Vec<Branch> = Vec::new();
    for &i in members {
        let tokens = &pairs[i].continuation;
        if let Some(last) = branches.last_mut() {
            let first = &pairs[last.members[0]].continuation;
            let common = first.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            // A token is left to each. What the members before have in common beyond this is fed for each of them then.
            let others = last.members.len() - 1;
            let room = if others == 0 { first.len() - 1 } else { last.shared };
            let common = common.min(tokens.len() - 1).min(room);
            if common >= MIN_BRANCH && (others == 0 || common > others * (last.shared - common)) {
                last.shared = common;
                last.members.push(i);
                continue;
            }
        }
        branches.push(Branch { group, shared: 0, members: vec![i] });
    }
    branches
}

/// The beginning that the contexts of a task share, evaluated once.
pub struct Stem {
    session: Session,
    /// Logits after it `[vocab_size]`.
    logits: Vec<f32>,
}

/// A model that answers requests.
pub struct Engine<'a> {
    model: PackedModel<'a>,
    tokenizer: &'a Tokenizer,
    banned: Vec<u32>,
    /// For scores
    batch: Batch,
    /// For texts, which are written a token at a time
    writing: Batch,
    words: Cache,
    max_length: usize,
    /// Sessions that may exist together in a call.
    sessions: usize,
    /// Tokens fed so far.
    pub fed: u64,
    /// Tokens that would have been, had every request been answered by itself.
    pub asked: u64,
}

impl<'a> Engine<'a> {
    /// An engine whose windows are `max_length` tokens long.
    ///
    /// # Errors
    /// A model without a tokenizer, or one that does not fit into memory.
    pub fn new(open: &'a OpenModel, max_length: usize) -> anyhow::Result<Engine<'a>> {
        let model = open.packed();
        let tokenizer = open.tokenizer().with_context(|| {
            format!("{} has no tokenizer, and text cannot be scored; `elleci-convert --tokenizer` adds one", open.name)
        })?;
        let bytes = Session::new(model)?.bytes().max(1);
        let sessions = (CALL_BYTES / bytes).clamp(1, CALL_SESSIONS);
        let banned = open.banned(false);
        let (batch, writing) = (Batch::new().with_one_form(), Batch::new());
        let words = Cache::default();
        Ok(Engine { model, tokenizer, banned, batch, writing, words, max_length, sessions, fed: 0, asked: 0 })
    }

    /// Bytes of the model.
    pub fn model_bytes(&self) -> u64 {
        self.model.archive_bytes() as u64
    }

    /// Length of a window in tokens.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The tokens of a text.
    pub fn encode(&mut self, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        self.tokenizer.encode_into(text, &mut self.words, &mut tokens);
        tokens
    }

    /// A context and its continuation as tokens, the context cut from the left to what the window holds.
    ///
    /// # Errors
    /// A continuation without tokens, or longer than the window.
    pub fn pair(&mut self, context: &str, continuation: &str) -> anyhow::Result<Pair> {
        let head = context.trim_end();
        let (context, continuation) = if head.is_empty() {
            let continuation = self.encode(&format!("{context}{continuation}"));
            if continuation.first() == Some(&END_OF_TEXT_ID) {
                (continuation[..1].to_vec(), continuation[1..].to_vec())
            } else {
                (vec![END_OF_TEXT_ID], continuation)
            }
        } else {
            let mut whole = self.encode(&format!("{context}{continuation}"));
            let alone = self.encode(head);
            let continuation = whole.split_off(alone.len().min(whole.len()));
            (alone, continuation)
        };
        self.window(context, continuation)
    }

    /// The windows of a text: each token is scored once, the first after the token that ends documents, and a window's tokens
    /// see at least `overlap` tokens before them (1: windows that share nothing but one token, as the harness has them).
    ///
    /// # Errors
    /// An overlap that leaves no room in the window.
    pub fn windows(&mut self, text: &str, overlap: usize) -> anyhow::Result<Windows> {
        let tokens = self.encode(text);
        Windows::new(tokens, END_OF_TEXT_ID, self.max_length, overlap)
    }

    fn window(&self, mut context: Vec<u32>, continuation: Vec<u32>) -> anyhow::Result<Pair> {
        ensure!(!continuation.is_empty(), "the continuation has no tokens");
        ensure!(
            continuation.len() <= self.max_length,
            "a continuation of {} tokens is longer than the window of {}; raise --max-length",
            continuation.len(),
            self.max_length
        );
        // The last token is only predicted: a window of n tokens scores n + 1 with its context.
        let truncated = (context.len() + continuation.len()).saturating_sub(self.max_length + 1);
        context.drain(..truncated);
        Ok(Pair { context, continuation, truncated })
    }

    /// Evaluates what two contexts have in common, for all contexts of their task. `None` if it would save little.
    ///
    /// # Errors
    /// What the model reports.
    pub fn stem(&mut self, a: &Pair, b: &Pair) -> anyhow::Result<Option<Stem>> {
        let common = a.context.iter().zip(&b.context).take_while(|(a, b)| a == b).count();
        if a.truncated + b.truncated > 0 || (common < MIN_STEM && !(a.context == b.context && common > 0)) {
            return Ok(None);
        }
        let mut session = Session::new(self.model)?;
        let mut feeds = [Feed { session: &mut session, tokens: &a.context[..common] }];
        let logits = self.batch.extend(self.model, &mut feeds)?.to_vec();
        self.fed += common as u64;
        Ok(Some(Stem { session, logits }))
    }

    /// The scores of `pairs`, in their order.
    ///
    /// # Errors
    /// What the model reports.
    pub fn score(&mut self, pairs: &[Pair], stem: Option<&Stem>) -> anyhow::Result<Vec<Score>> {
        let mut places: HashMap<&[u32], usize> = HashMap::new();
        let mut groups: Vec<(&[u32], Vec<usize>)> = Vec::new();
        for (i, pair) in pairs.iter().enumerate() {
            let place = *places.entry(&pair.context).or_insert_with(|| {
                groups.push((&pair.context, Vec::new()));
                groups.len() - 1
            });
            groups[place].1.push(i);
        }
        // The last token of each is only predicted.
        self.asked += pairs.iter().map(|p| (p.context.len() + p.continuation.len() - 1) as u64).sum::<u64>();
        let mut scores = vec![NOTHING; pairs.len()];
        let mut rest = groups.as_slice();
        while !rest.is_empty() {
            let taken = calls(rest.iter().map(|g| (g.0.len(), true)), self.sessions);
            let (call, after) = rest.split_at(taken);
            self.score_groups(pairs, call, stem, &mut scores)?;
            rest = after;
        }
        Ok(scores)
    }

    /// The scores of tokens that follow `probes`.
    fn probe(&mut self, probes: &[Probe<'_>], asked: &[Asked<'_>]) -> anyhow::Result<Vec<Score>> {
        self.fed += probes.iter().map(|p| p.tokens.len() as u64).sum::<u64>();
        let scores: Vec<Mutex<Score>> = asked.iter().map(|a| Mutex::new(a.before)).collect();
        self.batch.probe(
            self.model,
            probes,
            |_| Output::Each,
            |probe, index, logits| {
                // Nobody else wants it: a probe's outputs come one after the other.
                let mut score = scores[probe].lock().unwrap_or_else(PoisonError::into_inner);
                add(&mut score, &LogRow::new(logits), logits, asked[probe].tokens[index]);
            },
        )?;
        Ok(scores.into_iter().map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner)).collect())
    }

    /// One call for the contexts of `groups`, then as many as are needed for their continuations.
    fn score_groups(
        &mut self,
        pairs: &[Pair],
        groups: &[(&[u32], Vec<usize>)],
        stem: Option<&Stem>,
        scores: &mut [Score],
    ) -> anyhow::Result<()> {
        let vocab = self.model.config().vocab_size;
        let mut sessions = Vec::with_capacity(groups.len());
        let mut starts = Vec::with_capacity(groups.len());
        for (context, _) in groups {
            let shared = stem.filter(|s| context.starts_with(s.session.tokens()));
            sessions.push(match shared {
                Some(stem) => stem.session.clone(),
                None => Session::new(self.model)?,
            });
            starts.push(shared.map_or(0, |s| s.session.position()));
        }
        let new: Vec<usize> = (0..groups.len()).filter(|&g| starts[g] < groups[g].0.len()).collect();
        let mut feeds: Vec<Feed<'_>> = sessions
            .iter_mut()
            .enumerate()
            .filter(|(g, _)| starts[*g] < groups[*g].0.len())
            .map(|(g, session)| Feed { session, tokens: &groups[g].0[starts[g]..] })
            .collect();
        self.fed += feeds.iter().map(|f| f.tokens.len() as u64).sum::<u64>();
        let logits = if feeds.is_empty() { &[] } else { self.batch.extend(self.model, &mut feeds)? };
        let mut rows: Vec<&[f32]> = groups.iter().map(|_| stem.map_or(&[][..], |s| &s.logits)).collect();
        for (row, g) in logits.chunks_exact(vocab).zip(new) {
            rows[g] = row;
        }
        for (g, (_, members)) in groups.iter().enumerate() {
            let row = LogRow::new(rows[g]);
            for &i in members {
                add(&mut scores[i], &row, rows[g], pairs[i].continuation[0]);
            }
        }
        let of_group = |(g, (_, members)): (usize, &(&[u32], Vec<usize>))| {
            let mut members = members.clone();
            members.sort_by_key(|&i| &pairs[i].continuation);
            branches(pairs, &members, g)
        };
        let branches: Vec<Branch> = groups.iter().enumerate().flat_map(of_group).collect();
        let mut rest = branches.as_slice();
        while !rest.is_empty() {
            let taken = calls(rest.iter().map(|b| (b.tokens(pairs), b.shared > 0)), self.sessions);
            let (call, after) = rest.split_at(taken);
            self.score_branches(pairs, call, &sessions, scores)?;
            rest = after;
        }
        Ok(())
    }

    /// A call for what continuations have in common, if any have, and one for the rest of them.
    fn score_branches(
        &mut self,
        pairs: &[Pair],
        branches: &[Branch],
        sessions: &[Session],
        scores: &mut [Score],
    ) -> anyhow::Result<()> {
        let shared: Vec<&Branch> = branches.iter().filter(|b| b.shared > 0).collect();
        let mut forks: Vec<Session> = shared.iter().map(|b| sessions[b.group].clone()).collect();
        let parts = forks.iter_mut().zip(&shared);
        let mut feeds: Vec<Feed<'_>> =
            parts.map(|(session, b)| Feed { session, tokens: &pairs[b.members[0]].continuation[..b.shared] }).collect();
        self.fed += feeds.iter().map(|f| f.tokens.len() as u64).sum::<u64>();
        if !feeds.is_empty() {
            self.batch.extend_with(
                self.model,
                &mut feeds,
                |_| Output::Each,
                |branch, index, logits| {
                    let row = LogRow::new(logits);
                    for &i in &shared[branch].members {
                        add(&mut scores[i], &row, logits, pairs[i].continuation[index + 1]);
                    }
                },
            )?;
        }
        let mut forks = forks.iter();
        let (mut probes, mut asked, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for b in branches {
            let own = if b.shared > 0 { forks.next() } else { None };
            let session = own.unwrap_or(&sessions[b.group]);
            for &i in &b.members {
                // The last token is only predicted.
                let (tokens, next) = (&pairs[i].continuation[b.shared..], b.shared + 1);
                if tokens.len() > 1 {
                    probes.push(Probe { session, tokens: &tokens[..tokens.len() - 1] });
                    asked.push(Asked { tokens: &pairs[i].continuation[next..], before: scores[i] });
                    places.push(i);
                }
            }
        }
        if !probes.is_empty() {
            for (i, score) in places.into_iter().zip(self.probe(&probes, &asked)?) {
                scores[i] = score;
            }
        }
        Ok(())
    }
}

/// How many of the feeds belong into one call: of each its tokens, and whether it takes one of so many `sessions`.
fn calls(feeds: impl Iterator<Item = (usize, bool)>, sessions: usize) -> usize {
    let (mut tokens, mut made, mut taken) = (0, 0, 0);
    for (length, session) in feeds {
        made += usize::from(session);
        if made > sessions || tokens >= CALL_TOKENS {
            break;
        }
        tokens += length;
        taken += 1;
    }
    taken
}

fn add(score: &mut Score, row: &LogRow, logits: &[f32], token: u32) {
    let (before, from) = logits.split_at(token as usize);
    score.logprob += row.of(from[0]);
    // Of several that are likeliest, the first counts.
    score.greedy = score.greedy && from[0] == row.max && !before.contains(&row.max);
}

#[cfg(test)]
mod tests;
