//! Sessions kept for prompts that begin alike.
//!
//! An answer must not depend on what the server happens to remember. A session's floats do not depend on how its tokens were cut into calls
//! of several (see `elleci_core::inference`), but those of tokens that came one by one are rounded otherwise. So a prompt is cut at
//! places that follow from its tokens, no run has a single one (unless that is the prompt), and a session is kept only at such a place;
//! going on from it is bit for bit what computing everything would have been. The end of an answer is no place: it was reached token by
//! token. A dialogue goes on from the beginning of its last assistant turn.

use std::collections::{HashMap, HashSet};

use bytemuck::cast_slice;
use elleci_core::inference::Session;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::data::tokenizer::IM_START_ID;

/// Tokens of a run, those of a pass of the model; one more at the end of a prompt that would leave one over.
pub const RUN: usize = 128;
/// A turn begins a new run only when the one before it has so many tokens: short runs waste a pass.
const TURN: usize = 16;
/// Beginnings remembered: two generations of so many.
const SEEN: usize = 1 << 15;

/// The end of a run of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tokens before it.
    pub end: usize,
    /// Hash of them, and of how they are cut.
    pub hash: u64,
}

/// Where a prompt is cut into runs; the last cut is its end.
pub fn cuts(tokens: &[u32]) -> Vec<Cut> {
    let (mut cuts, mut start, mut hash) = (Vec::new(), 0, 0);
    for end in 1..=tokens.len() {
        let turn = tokens.get(end) == Some(&IM_START_ID) && end - start >= TURN;
        let full = end - start == RUN;
        if end == tokens.len() || (turn || full) && end + 1 < tokens.len() {
            hash = xxh3_64_with_seed(cast_slice(&tokens[start..end]), hash);
            cuts.push(Cut { end, hash });
            start = end;
        }
    }
    cuts
}

/// What the cache knows of a prompt.
pub struct Found {
    /// A session that has taken the first runs.
    pub session: Option<Session>,
    /// Cuts, by index, at which the session should be kept when it comes there.
    pub keep: Vec<usize>,
}

struct Entry {
    session: Session,
    bytes: usize,
    used: u64,
}

/// Sessions by what they have taken, the least recently used given up first.
pub struct PrefixCache {
    entries: HashMap<u64, Entry>,
    bytes: usize,
    limit: usize,
    clock: u64,
    seen: HashSet<u64>,
    seen_before: HashSet<u64>,
}

impl PrefixCache {
    /// Empty; it may hold `limit` bytes.
    pub fn new(limit: usize) -> PrefixCache {
        let (seen, seen_before) = (HashSet::new(), HashSet::new());
        PrefixCache { entries: HashMap::new(), bytes: 0, limit, clock: 0, seen, seen_before }
    }

    /// Bytes that its sessions take. Pages that they share with each other count each time.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sessions in it.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Looks a prompt up. Something of it is always left to be computed: the last run gives the logits.
    pub fn find(&mut self, tokens: &[u32], cuts: &[Cut]) -> Found {
        if self.limit == 0 {
            return Found { session: None, keep: Vec::new() };
        }
        self.clock += 1;
        let inner = &cuts[..cuts.len() - 1];
        let mut from = 0;
        let mut session = None;
        for (i, cut) in inner.iter().enumerate().rev() {
            let entry = self.entries.get_mut(&cut.hash);
            if let Some(entry) = entry.filter(|e| e.session.tokens() == &tokens[..cut.end]) {
                entry.used = self.clock;
                (session, from) = (Some(entry.session.clone()), i + 1);
                break;
            }
        }
        // Where it leaves the prompts from before is where others may leave them too; and it may itself be gone on from.
        let shared = inner.iter().take_while(|c| self.has_seen(c.hash)).count();
        inner.iter().for_each(|c| self.see(c.hash));
        let mut keep: Vec<usize> = [shared, inner.len()].iter().filter(|n| **n > from).map(|n| n - 1).collect();
        keep.dedup();
        Found { session, keep }
    }

    fn has_seen(&self, hash: u64) -> bool {
        self.seen.contains(&hash) || self.seen_before.contains(&hash)
    }

    fn see(&mut self, hash: u64) {
        if self.seen.len() == SEEN {
            self.seen_before = std::mem::take(&mut self.seen);
        }
        self.seen.insert(hash);
    }

    /// Keeps a session that stands at a cut.
    pub fn keep(&mut self, cut: Cut, session: &Session) {
        let bytes = session.bytes();
        if bytes > self.limit || self.entries.contains_key(&cut.hash) {
            return;
        }
        while self.bytes + bytes > self.limit {
            let Some(oldest) = self.entries.iter().min_by_key(|(_, e)| e.used).map(|(hash, _)| *hash) else { break };
            self.bytes -= self.entries.remove(&oldest).map_or(0, |e| e.bytes);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.entries.insert(cut.hash, Entry { session: session.clone(), bytes, used: self.clock });
    }
}

#[cfg(test)]
mod tests {
    use elleci_core::archive::{Archive, PackOptions, to_bytes};
    use elleci_core::config::ModelConfig;
    use elleci_core::init::initialise;

    use super::*;

    fn ends(tokens: &[u32]) -> Vec<usize> {
        cuts(tokens).iter().map(|c| c.end).collect()
    }

    #[test]
    fn cuts_follow_from_what_is_before_them() {
        let mut tokens: Vec<u32> = (0..400).map(|i| 10 + i % 90).collect();
        assert_eq!(ends(&tokens), [128, 256, 384, 400]);
        assert_eq!(ends(&tokens[..1]), [1]);
        assert_eq!(ends(&tokens[..128]), [128]);
        // No run has a single token.
        assert_eq!(ends(&tokens[..129]), [129]);
        assert_eq!(ends(&tokens[..130]), [128, 130]);
        for at in [0, 5, 40, 300] {
            tokens[at] = IM_START_ID;
        }
        assert_eq!(ends(&tokens), [40, 168, 296, 400]);
        let all = cuts(&tokens);
        for n in 1..400 {
            let part = cuts(&tokens[..n]);
            assert_eq!(part[..part.len() - 1], all[..part.len() - 1], "the first {n}");
        }
        let mut other = tokens.clone();
        other[200] += 1;
        let other = cuts(&other);
        assert_eq!(other.iter().zip(&all).take_while(|(a, b)| a == b).count(), 2);
    }

    #[test]
    fn prompts_that_begin_alike_share_and_the_oldest_go() {
        let c = ModelConfig { vocab_size: 200, n_layers: 2, ..ModelConfig::preset("nano").unwrap() };
        let archive = Archive::open(to_bytes(&c, &initialise(&c, 1), None, PackOptions::default()).unwrap()).unwrap();
        let model = archive.model();
        let reached = |tokens: &[u32]| {
            let mut session = Session::new(model).unwrap();
            session.extend(model, tokens).unwrap();
            session
        };
        let stem: Vec<u32> = (0..300).map(|i| 10 + i % 90).collect();
        let prompt = |last: u32| [&stem[..], &vec![last; 200]].concat();
        let bytes = reached(&stem).bytes();
        let mut cache = PrefixCache::new(4 * bytes);
        let (a, b) = (prompt(7), prompt(8));
        let (cuts_a, cuts_b) = (cuts(&a), cuts(&b));
        let found = cache.find(&a, &cuts_a);
        assert!(found.session.is_none());
        assert_eq!(found.keep, [2]);
        cache.keep(cuts_a[2], &reached(&a[..384]));
        // The second one is seen to share 256 tokens, the third one gets them.
        assert_eq!(cache.find(&b, &cuts_b).keep, [1, 2]);
        cache.keep(cuts_b[1], &reached(&b[..256]));
        let third = prompt(9);
        let found = cache.find(&third, &cuts(&third));
        assert_eq!(found.session.unwrap().position(), 256);
        assert_eq!(found.keep, [2]);
        // The same prompt again has all but its last run.
        let found = cache.find(&a, &cuts_a);
        assert_eq!((found.session.unwrap().position(), found.keep), (384, vec![]));
        assert!(cache.bytes() <= 4 * bytes);
        for i in 0..20 {
            let tokens = vec![20 + i; 300];
            cache.keep(cuts(&tokens)[1], &reached(&tokens[..256]));
            assert!(cache.bytes() <= 4 * bytes && !cache.is_empty());
        }
        assert!(cache.find(&a, &cuts_a).session.is_none());
    }
}
