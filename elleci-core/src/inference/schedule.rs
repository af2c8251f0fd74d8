//! How the tokens of a call are cut into passes, and which threads run them.
//!
//! The threads of a pool share the work in one of two ways. *Loops*: one pass after the other, every loop in it dealt to the threads, so that
//! weights are read once; between the loops are barriers and short serial parts, and rows that one thread has written are read by the
//! others. *Passes*: every thread takes the next pass through the model by itself. Passes of different sequences have nothing to do with each
//! other; where a sequence goes on in the next pass, that one stays a layer behind, as it needs the state that the tokens before
//! leave there. The bits are the same: those of a row depend neither on its company nor on the cut.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::batch::Feed;
use super::pass::{Call, Outputs, Scratch, Visit};
use super::session::LayerState;
use crate::par::{self, Exclusive};

/// Rows of a pass: working memory is bounded, however long a prompt is.
const ROWS: usize = 128;
/// Rows of all passes that run at a time, where so many threads take passes that fewer than [`ROWS`] for each would do.
const ALL_ROWS: usize = 512;
/// Rows a thread from which on weights are read for enough of them, whoever else reads them (docs/LOG.md).
const MANY: usize = 64;
/// Bytes of a model that the second and third level of the caches let every thread read in every pass, for however few rows.
const SMALL: usize = 8 << 20;

/// Rows `row .. row + len` of a pass: a run of tokens of one feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub feed: usize,
    /// First token of the run, counted from the start of the feed
    pub start: usize,
    pub row: usize,
    pub len: usize,
    /// Tokens of the whole feed
    pub feed_len: usize,
}

impl Segment {
    /// Whether the feed ends with this run.
    pub fn ends(&self) -> bool {
        self.start + self.len == self.feed_len
    }
}

/// Feeds as threads share them.
pub(super) struct Inputs<'a> {
    pub tokens: Vec<&'a [u32]>,
    /// Positions of the first tokens
    pub positions: Vec<usize>,
    /// `[layers, feeds]`
    states: Vec<Exclusive<&'a mut LayerState>>,
}

impl<'a> Inputs<'a> {
    fn new(feeds: &'a mut [Feed<'_>], layers: usize) -> Inputs<'a> {
        let tokens = feeds.iter().map(|f| f.tokens).collect();
        let positions = feeds.iter().map(|f| f.session.position()).collect();
        let mut rest: Vec<_> = feeds.iter_mut().map(|f| f.session.layers.iter_mut()).collect();
        let mut states = Vec::with_capacity(layers * rest.len());
        for _ in 0..layers {
            states.extend(rest.iter_mut().map(|r| Exclusive::new(r.next().expect("a session has the model's layers"))));
        }
        Inputs { tokens, positions, states }
    }

    /// The state of a feed in a layer.
    pub fn state(&self, layer: usize, feed: usize) -> &Exclusive<&'a mut LayerState> {
        &self.states[layer * self.tokens.len() + feed]
    }
}

/// The place of a pass in the order of those that it shares a sequence with. Whatever becomes of the pass, the next does not wait for ever.
pub(super) struct Turn<'a> {
    /// Stages that the pass before has behind it, if this one goes on with a sequence of it
    before: Option<&'a AtomicUsize>,
    own: &'a AtomicUsize,
}

impl Turn<'_> {
    /// Waits until the pass before has `stage` behind it.
    pub fn wait(&self, stage: usize) {
        if let Some(before) = self.before {
            par::wait_until(|| before.load(Ordering::Acquire) > stage);
        }
    }

    /// This pass has `stage` behind it.
    pub fn done(&self, stage: usize) {
        self.own.store(stage + 1, Ordering::Release);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.own.store(usize::MAX, Ordering::Release);
    }
}

impl Call<'_> {
    /// Advances the feeds' sessions, and gives `visit` the outputs: those of one feed in order, one after the other.
    pub fn run(&self, scratch: &mut Vec<Scratch>, feeds: &mut [Feed<'_>], outputs: &Outputs<'_>, visit: &Visit<'_>) {
        let lens: Vec<usize> = feeds.iter().map(|f| f.tokens.len()).collect();
        let threads = takers(lens.iter().sum(), self.model.archive_bytes(), par::threads());
        let passes = cut(&lens, threads);
        if scratch.len() < threads {
            scratch.resize_with(threads, Scratch::default);
        }
        let inputs = Inputs::new(feeds, self.model.config().n_layers);
        let stages: Vec<AtomicUsize> = passes.iter().map(|_| AtomicUsize::new(0)).collect();
        let next = AtomicUsize::new(0);
        // In their order: what a pass waits for is always in somebody's hands.
        let take = |scratch: &mut Scratch| {
            loop {
                let p = next.fetch_add(1, Ordering::Relaxed);
                let Some(segments) = passes.get(p) else { return };
                let before = (segments[0].start > 0).then(|| &stages[p - 1]);
                let turn = Turn { before, own: &stages[p] };
                self.pass(scratch, &inputs, segments, &turn, outputs, visit);
            }
        };
        match &mut scratch[..threads] {
            [scratch] => take(scratch),
            scratch => par::for_each(scratch.iter_mut().collect(), take),
        }
        drop(inputs);
        for feed in feeds {
            feed.session.tokens.extend_from_slice(feed.tokens);
        }
    }
}

/// How many of `threads` take passes of `rows` rows; one if they share loops.
fn takers(rows: usize, model_bytes: usize, threads: usize) -> usize {
    let least = if model_bytes <= SMALL { 1 } else { MANY };
    if rows >= least * threads { threads } else { 1 }
}

/// The passes of feeds of `lens` tokens, in order: of about as many rows each, and with several threads as many for each of them. Where
/// sequences meet nearby, there.
fn cut(lens: &[usize], threads: usize) -> Vec<Vec<Segment>> {
    let ends: Vec<usize> = lens.iter().scan(0, |end, len| Some(core::mem::replace(end, *end + len) + len)).collect();
    let Some(rows) = ends.last().copied().filter(|rows| *rows > 0) else { return Vec::new() };
    let most = if threads == 1 { ROWS } else { (ALL_ROWS / threads).clamp(MANY, ROWS) };
    let passes = rows.div_ceil(most).next_multiple_of(threads).min(rows);
    let near = rows / passes / 8;
    let mut bounds: Vec<usize> = (1..=passes)
        .map(|p| {
            let even = rows * p / passes;
            let after = ends.partition_point(|end| *end < even);
            let around = ends[after.saturating_sub(1)..=after].iter().copied();
            around.min_by_key(|end| end.abs_diff(even)).filter(|end| end.abs_diff(even) <= near).unwrap_or(even)
        })
        .collect();
    bounds.dedup();
    let (mut at, mut feed, mut start) = (0, 0, 0);
    let mut pass_to = |bound: usize| {
        let (mut segments, first) = (Vec::new(), at);
        while at < bound {
            let len = (lens[feed] - start).min(bound - at);
            segments.push(Segment { feed, start, row: at - first, len, feed_len: lens[feed] });
            (at, start) = (at + len, start + len);
            if start == lens[feed] {
                (feed, start) = (feed + 1, 0);
            }
        }
        segments
    };
    bounds.into_iter().map(&mut pass_to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(passes: &[Vec<Segment>]) -> Vec<usize> {
        passes.iter().map(|segments| segments.iter().map(|s| s.len).sum()).collect()
    }

    #[test]
    fn passes_are_even_and_end_between_sequences_where_they_can() {
        assert_eq!(rows(&cut(&[256], 1)), [128, 128]);
        assert_eq!(rows(&cut(&[257], 1)), [85, 86, 86]);
        assert_eq!(rows(&cut(&[257], 2)), [64, 64, 64, 65]);
        assert_eq!(rows(&cut(&[40], 2)), [20, 20]);
        assert_eq!(rows(&cut(&[1; 8], 2)), [4, 4]);
        assert_eq!(rows(&cut(&[1; 3], 2)), [1, 2]);
        assert_eq!(rows(&cut(&[1], 1)), [1]);
        assert_eq!(rows(&cut(&[52, 48], 2)), [52, 48]);
        assert_eq!(rows(&cut(&[60, 40], 2)), [50, 50]);
        assert_eq!(rows(&cut(&[1024], 16)), [64; 16]);
        assert!(cut(&[], 2).is_empty());
    }

    #[test]
    fn threads_take_passes_of_enough_rows_or_of_a_small_model() {
        assert_eq!([1, 127, 128, 500].map(|rows| takers(rows, 1 << 30, 2)), [1, 1, 2, 2]);
        assert_eq!([1, 2, 8].map(|rows| takers(rows, 1 << 20, 2)), [1, 2, 2]);
        assert_eq!(takers(500, 1 << 20, 1), 1);
    }

    proptest! {
        #[test]
        fn passes_hold_every_token_once_and_in_order(
            lens in proptest::collection::vec(1usize..400, 0..20),
            threads in 1usize..9,
        ) {
            let passes = cut(&lens, threads);
            let mut next: Vec<usize> = vec![0; lens.len()];
            for (p, segments) in passes.iter().enumerate() {
                prop_assert!(!segments.is_empty());
                let mut row = 0;
                for (i, s) in segments.iter().enumerate() {
                    prop_assert!(s.len > 0 && s.row == row && s.start == next[s.feed] && s.feed_len == lens[s.feed]);
                    // What a sequence goes on from is in the pass before.
                    prop_assert!(s.start == 0 || (i == 0 && passes[p - 1].last().unwrap().feed == s.feed));
                    (row, next[s.feed]) = (row + s.len, s.start + s.len);
                }
                prop_assert!(row <= ROWS * 5 / 4);
            }
            prop_assert_eq!(next, lens);
        }
    }
}
