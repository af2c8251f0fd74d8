//! How the tokens of a call are cut into passes, and which threads run them.
//!
//! The threads of a pool share the work in one of two ways. *Loops*: one pass after the other, every loop in it dealt to the threads, so that
//! weights are read once; between the loops are barriers and short serial parts, and rows that one thread has written are read by the
//! others. *Passes*: every thread takes the next pass through the model by itself. Passes of different sequences have nothing to do with each
//! other; where a sequence goes on in the next pass, that one stays a little behind, as it needs the state that the tokens before
//! leave in every layer. The bits are the same: those of a row depend neither on its company nor on the cut.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::batch::Feed;
use super::pass::{Call, Outputs, Scratch, Visit};
use super::session::LayerState;
use crate::par::{self, Exclusive};

/// Rows of a pass, but for an eighth at either end: working memory is bounded, however long a prompt is.
const ROWS: usize = 128;
/// Rows of the passes that more than four threads take at a time; but no less than [`LEAST_ROWS`] each.
const ALL_ROWS: usize = 512;
/// Rows a thread from which on passes are taken: so many are worth reading all weights, whoever else reads them (docs/LOG.md).
const LEAST_ROWS: usize = 64;
/// Bytes of a model that the second and third level of the caches let every thread read in every pass, for however few rows.
const SMALL_MODEL: usize = 8 << 20;
/// Rows of a small model's pass from which on it may wait for another.
const SMALL_ROWS: usize = 8;

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

/// The place of a pass in the order of those that it shares a sequence with.
pub(super) struct Turn<'a> {
    /// Stages that the pass before has behind it, if this one goes on with a sequence of it: layers' states, and all
    before: Option<&'a AtomicUsize>,
    own: &'a AtomicUsize,
    /// Whether a panic has ended some pass of the call
    failed: &'a AtomicBool,
}

/// What a pass has behind it that is over.
const ALL: usize = usize::MAX;

impl Turn<'_> {
    /// Waits until the pass before has left its states in `layer`. After a panic they may be any.
    pub fn wait(&self, layer: usize) {
        if let Some(before) = self.before {
            par::wait_until(|| before.load(Ordering::Acquire) > layer || self.failed.load(Ordering::Relaxed));
        }
    }

    /// Waits until the pass before is over. False after a panic.
    pub fn wait_for_all(&self) -> bool {
        self.wait(ALL - 1);
        !self.failed.load(Ordering::Relaxed)
    }

    /// This pass has left its states in `layer`.
    pub fn done(&self, layer: usize) {
        self.own.store(layer + 1, Ordering::Release);
    }

    fn over(self) {
        self.own.store(ALL, Ordering::Release);
        core::mem::forget(self);
    }
}

impl Drop for Turn<'_> {
    /// By a panic: otherwise it is over.
    fn drop(&mut self) {
        self.failed.store(true, Ordering::Relaxed);
    }
}

impl Call<'_> {
    /// Advances the feeds' sessions, and gives `visit` the outputs: those of one feed in order, one after the other.
    pub fn run(&self, scratch: &mut Vec<Scratch>, feeds: &mut [Feed<'_>], outputs: &Outputs<'_>, visit: &Visit<'_>) {
        let lens: Vec<usize> = feeds.iter().map(|f| f.tokens.len()).collect();
        let (model, layers) = (self.model.archive_bytes(), self.model.config().n_layers);
        let threads = takers(&lens, model, par::threads());
        let passes = cut(&lens, threads);
        if scratch.len() < threads {
            scratch.resize_with(threads, Scratch::default);
        }
        feeds.iter_mut().for_each(|feed| feed.session.interrupted = true);
        let inputs = Inputs::new(feeds, layers);
        let stages: Vec<AtomicUsize> = passes.iter().map(|_| AtomicUsize::new(0)).collect();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        // In their order: what a pass waits for is always in somebody's hands.
        let take = |scratch: &mut Scratch| {
            while !failed.load(Ordering::Relaxed) {
                let p = next.fetch_add(1, Ordering::Relaxed);
                let Some(segments) = passes.get(p) else { return };
                let before = (segments[0].start > 0).then(|| &stages[p - 1]);
                let turn = Turn { before, own: &stages[p], failed: &failed };
                self.pass(scratch, &inputs, segments, &turn, outputs, visit);
                turn.over();
            }
        };
        match &mut scratch[..threads] {
            [scratch] => take(scratch),
            scratch => par::for_each(scratch.iter_mut().collect(), take),
        }
        drop(inputs);
        for feed in feeds {
            feed.session.tokens.extend_from_slice(feed.tokens);
            feed.session.interrupted = false;
        }
        if model > SMALL_MODEL {
            // What a prompt needed, and single tokens do not.
            scratch.truncate(1);
        }
    }
}

/// How many of `threads` take passes of feeds of `lens` tokens; one if all share loops.
fn takers(lens: &[usize], model_bytes: usize, threads: usize) -> usize {
    let rows: usize = lens.iter().sum();
    if model_bytes <= SMALL_MODEL {
        threads.min(lens.len().max(rows / SMALL_ROWS)).max(1)
    } else if rows >= LEAST_ROWS * threads {
        threads
    } else {
        1
    }
}

/// The passes of feeds of `lens` tokens, in order: of about as many rows each, and with several threads as many for each of them. Where
/// sequences meet nearby, there.
fn cut(lens: &[usize], threads: usize) -> Vec<Vec<Segment>> {
    let ends: Vec<usize> = lens.iter().scan(0, |end, len| Some(core::mem::replace(end, *end + len) + len)).collect();
    let Some(rows) = ends.last().copied().filter(|rows| *rows > 0) else { return Vec::new() };
    let most = if threads == 1 { ROWS } else { (ALL_ROWS / threads).clamp(LEAST_ROWS, ROWS) };
    let passes = rows.div_ceil(most).next_multiple_of(threads).min(rows);
    let near = rows / passes / 8;
    let bounds = (1..=passes).map(|p| {
        let even = (rows as u64 * p as u64 / passes as u64) as usize;
        let after = ends.partition_point(|end| *end < even);
        let around = ends[after.saturating_sub(1)..=after].iter().copied();
        around.min_by_key(|end| end.abs_diff(even)).filter(|end| end.abs_diff(even) <= near).unwrap_or(even)
    });
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
    bounds.map(&mut pass_to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
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
        assert_eq!([1, 127, 128, 500].map(|rows| takers(&[rows], 1 << 30, 2)), [1, 1, 2, 2]);
        assert_eq!([1, 15, 16, 500].map(|rows| takers(&[rows], 1 << 20, 2)), [1, 1, 2, 2]);
        assert_eq!([1, 2, 8].map(|feeds| takers(&vec![1; feeds], 1 << 20, 4)), [1, 2, 4]);
        assert_eq!((takers(&[500], 1 << 20, 1), takers(&[], 1 << 20, 2)), (1, 1));
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
