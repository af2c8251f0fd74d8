//! Sessions against the training forward, and against each other.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use common::odd_config;
use elleci_core::archive::{AlignedBytes, Archive, DenseFormat, PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::{Batch, Feed, InferenceError, Output, Probe, Session};
use elleci_core::init::initialise;
use elleci_core::model::{Batch as TrainBatch, Checkpointing, Model, Workspace};
use elleci_core::ternary::packed::Packing;
use rayon::{ThreadPool, ThreadPoolBuilder};

const EXACT: PackOptions = PackOptions { packing: Packing::T5, sparse: Packing::C5, dense: DenseFormat::F32 };

fn archive(c: &ModelConfig) -> Archive<AlignedBytes> {
    Archive::open(to_bytes(c, &initialise(c, 11), None, EXACT).unwrap()).unwrap()
}

fn tokens(c: &ModelConfig, n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * i * 31 + i * 7 + 5) as u32 % c.vocab_size as u32).collect()
}

/// The logits after every token, by the training forward: `[tokens, vocab]`.
fn sequence_forward(c: &ModelConfig, tokens: &[u32]) -> Vec<f32> {
    let model = Model::new(c.clone(), initialise(c, 11)).unwrap();
    let n = tokens.len();
    let mut ws = Workspace::new(c, 1, n, Checkpointing::None);
    let mut logits = vec![0.0; n * c.vocab_size];
    let batch = TrainBatch { batch: 1, seq: n, tokens, targets: tokens, weights: &vec![1.0; n] };
    model.logits(&mut ws, &batch, &mut logits).unwrap();
    logits
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    let largest = want.iter().map(|x| x.abs()).fold(0.0, f32::max);
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Decoding, feeding in runs and feeding at once all equal the sequence forward. The integer products are exact in all of them;
/// floats differ in the order of sums, by some 2^-22 relative, and where a value stands that close to a quantiser's tie, its code
/// flips by one. With some 1,500 codes of up to 127 steps a token, a flip comes about every 1 / (1500 · 127 · 2^-22) ≈ 20
/// tokens, moves logits by hundredths, and stays in the caches. So the first ten positions must agree to rounding, and all of
/// them must stay within what a few flips do; a wrong position, state or cache would be off by whole logits.
#[test]
fn every_way_of_feeding_equals_the_sequence_forward() {
    let nano = ModelConfig { vocab_size: 300, ..ModelConfig::preset("nano").unwrap() };
    // Heads that attention's groups of eight and four do not divide, and that they do.
    let heads = |n_heads| ModelConfig { n_heads, d_v: 6, n_layers: 3, ..odd_config() };
    for (c, n) in [
        (odd_config(), 600),
        (nano, 150),
        (heads(5), 200),
        (heads(8), 200),
        (heads(9), 200),
        (heads(12), 200),
        (heads(13), 200),
    ] {
        let archive = archive(&c);
        let model = archive.model();
        let tokens = tokens(&c, n);
        let want = sequence_forward(&c, &tokens);
        let want = |t: usize| &want[t * c.vocab_size..(t + 1) * c.vocab_size];
        for runs in [vec![1; n], vec![n], vec![10, 1, n - 75, 1, 1, 62], vec![300.min(n - 1), n - 300.min(n - 1)]] {
            let mut session = Session::new(model).unwrap();
            let (mut batch, mut exact) = (Batch::new(), vec![false; n]);
            for run in runs {
                let start = session.position();
                let feed = Feed { session: &mut session, tokens: &tokens[start..start + run] };
                let mut seen = 0;
                let each = batch.extend_each(model, &mut [feed], |feed, index, logits| {
                    assert_eq!((feed, index), (0, seen));
                    let worst = worst(logits, want(start + index));
                    assert!(worst < 0.1, "position {}: {worst}", start + index);
                    exact[start + index] = worst < 1e-4;
                    seen += 1;
                });
                each.unwrap();
                assert_eq!(seen, run);
            }
            assert!(exact[..10].iter().all(|e| *e), "positions that agree to rounding: {exact:?}");
            assert_eq!(session.tokens(), tokens);
        }
    }
}

/// The bits of a sequence do not depend on how it is cut into calls: of several tokens each, or of any if there is one form of attention.
#[test]
fn cuts_change_nothing() {
    let nano = ModelConfig { vocab_size: 300, ..ModelConfig::preset("nano").unwrap() };
    for (c, n) in [(odd_config(), 300), (nano, 150)] {
        let archive = archive(&c);
        let model = archive.model();
        let tokens = tokens(&c, n);
        let logits = |mut batch: Batch, runs: &[usize]| {
            let mut session = Session::new(model).unwrap();
            let mut all = Vec::new();
            for run in runs {
                let start = session.position();
                let feed = Feed { session: &mut session, tokens: &tokens[start..start + run] };
                batch.extend_each(model, &mut [feed], |_, _, row| all.extend_from_slice(row)).unwrap();
            }
            assert_eq!(session.position(), n);
            (all, session.to_bytes())
        };
        let whole = logits(Batch::new(), &[n]);
        let several = [2, 3, 4, 7, 8, 9, 31, 33, n - 97];
        for (batch, runs) in [
            (Batch::new(), &several[..]),
            (Batch::new(), &[n - 2, 2]),
            (Batch::new(), &[129, n - 129]),
            (Batch::new().with_one_form(), &several),
            (Batch::new().with_one_form(), &[1, 1, 38, 1, 2, 86, 1, n - 130]),
            (Batch::new().with_one_form(), &vec![1; n]),
        ] {
            assert!(logits(batch, runs) == whole, "{runs:?}");
        }
        assert!(logits(Batch::new(), &vec![1; n]) != whole, "decoding has a form of its own");
    }
}

/// The same calls give the same bits: alone or in company, on one thread or several, with either packing.
#[test]
fn company_threads_and_packing_change_nothing() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let tokens = tokens(&c, 700);
    let prompts = [&tokens[..300], &tokens[300..301], &tokens[301..330], &tokens[330..331], &tokens[331..700]];
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .map(|prompt| {
            let mut session = Session::new(model).unwrap();
            session.extend(model, prompt).unwrap();
            session.extend(model, &[7]).unwrap().to_vec()
        })
        .collect();
    let other = PackOptions { packing: Packing::I2, sparse: Packing::I2, ..EXACT };
    let i2 = Archive::open(to_bytes(&c, &initialise(&c, 11), None, other).unwrap()).unwrap();
    for (threads, model) in [(1, model), (3, model), (2, i2.model())] {
        let pool = pool(threads);
        pool.install(|| {
            let mut sessions: Vec<Session> = prompts.iter().map(|_| Session::new(model).unwrap()).collect();
            let mut batch = Batch::new();
            let mut feeds: Vec<Feed> =
                sessions.iter_mut().zip(prompts).map(|(session, tokens)| Feed { session, tokens }).collect();
            batch.extend(model, &mut feeds).unwrap();
            let mut feeds: Vec<Feed> = sessions.iter_mut().map(|session| Feed { session, tokens: &[7] }).collect();
            let logits = batch.extend(model, &mut feeds).unwrap();
            for (got, want) in logits.chunks_exact(c.vocab_size).zip(&alone) {
                assert!(got == want);
            }
        });
    }
}

/// Threads that take passes by themselves, each a little behind the one before: the same bits in the same order, and nobody waits for ever.
#[test]
fn threads_that_take_passes_change_nothing() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let tokens = tokens(&c, 900);
    let run = |threads: usize, lengths: &[usize], bad: Option<usize>| {
        let pool = pool(threads);
        let mut sessions: Vec<Session> = lengths.iter().map(|_| Session::new(model).unwrap()).collect();
        let mut rows: Vec<Vec<f32>> = vec![Vec::new(); lengths.len()];
        for _ in 0..2 {
            let feeds = sessions.iter_mut().zip(lengths);
            let mut feeds: Vec<Feed> = feeds.map(|(session, n)| Feed { session, tokens: &tokens[..*n] }).collect();
            let before: Vec<usize> = rows.iter().map(|rows| rows.len() / c.vocab_size).collect();
            let visit = |feed: usize, index: usize, row: &[f32]| {
                assert_ne!(Some(index), bad, "the visitor's own panic");
                assert_eq!(before[feed] + index, rows[feed].len() / c.vocab_size);
                rows[feed].extend_from_slice(row);
            };
            pool.install(|| Batch::new().extend_each(model, &mut feeds, visit)).unwrap();
        }
        (rows, sessions.iter().map(Session::to_bytes).collect::<Vec<_>>())
    };
    for lengths in [&[450][..], &[900], &[300, 2, 40, 1], &[1, 700], &[33; 9]] {
        let want = run(1, lengths, None);
        for threads in [2, 3, 7] {
            assert!(run(threads, lengths, None) == want, "{lengths:?} on {threads} threads");
        }
    }
    for bad in [0, 130, 449] {
        assert!(catch_unwind(AssertUnwindSafe(|| run(3, &[450], Some(bad)))).is_err());
    }
    // Once, whatever other sequences have at hand.
    let calls = AtomicUsize::new(0);
    let mut sessions: Vec<Session> = (0..4).map(|_| Session::new(model).unwrap()).collect();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let visit = |_: usize, _: usize, _: &[f32]| {
            calls.fetch_add(1, SeqCst);
            panic!("the visitor's own panic");
        };
        let mut feeds: Vec<Feed> =
            sessions.iter_mut().map(|session| Feed { session, tokens: &tokens[..200] }).collect();
        let pool = pool(3);
        pool.install(|| Batch::new().extend_each(model, &mut feeds, visit))
    }));
    assert!(ended.is_err() && calls.into_inner() == 1);
    // What a panic has left is of no use, and says so.
    let mut session = Session::new(model).unwrap();
    session.extend(model, &tokens[..5]).unwrap();
    let mark = session.clone();
    let calls = AtomicUsize::new(0);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let visit = |_: usize, index: usize, _: &[f32]| {
            calls.fetch_add(1, SeqCst);
            assert!(index < 20, "the visitor's own panic");
        };
        let feed = Feed { session: &mut session, tokens: &tokens[5..705] };
        let pool = pool(2);
        pool.install(|| Batch::new().extend_each(model, &mut [feed], visit))
    }));
    assert!(ended.is_err());
    assert_eq!(calls.into_inner(), 21);
    assert_eq!(session.extend(model, &[1]).unwrap_err(), InferenceError::Interrupted);
    assert!(Session::from_bytes(model, &session.to_bytes()).is_err());
    session.rewind(&mark);
    assert!(session.extend(model, &[1]).unwrap() == mark.clone().extend(model, &[1]).unwrap());
}

/// Probes have the bits of feeds, however long they are and whether threads share the rows or each takes some of the sequences; the sessions
/// stay as they are.
#[test]
fn probes_have_the_bits_of_feeds_and_change_nothing() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let tokens = tokens(&c, 1000);
    let mut session = Session::new(model).unwrap();
    session.extend(model, &tokens[..250]).unwrap();
    let before = session.to_bytes();
    // One token, few, and more than a pass, around the ends of pages; alike, so that three threads take two each; and uneven.
    let alike = [61, 62, 63, 64, 60, 59];
    for lengths in [&[1, 2, 5, 16, 17, 70, 200][..], &alike, &[1; 7], &[300, 3]] {
        let parts: Vec<&[u32]> = lengths.iter().enumerate().map(|(i, n)| &tokens[250 + i..250 + i + n]).collect();
        let want: Vec<Vec<f32>> = parts
            .iter()
            .map(|part| {
                let (mut fork, mut rows) = (session.clone(), Vec::new());
                let feed = Feed { session: &mut fork, tokens: part };
                Batch::new().extend_each(model, &mut [feed], |_, _, row| rows.extend_from_slice(row)).unwrap();
                rows
            })
            .collect();
        for threads in [1, 3] {
            let pool = pool(threads);
            let probes: Vec<Probe> = parts.iter().map(|part| Probe { session: &session, tokens: part }).collect();
            let got: Vec<Mutex<Vec<f32>>> = parts.iter().map(|_| Mutex::default()).collect();
            // All of the first, of the others the last two.
            let first = |probe: usize| if probe == 0 { 0 } else { lengths[probe].saturating_sub(2) };
            let visit = |probe: usize, index: usize, row: &[f32]| {
                let mut rows = got[probe].lock().unwrap();
                assert_eq!(index, first(probe) + rows.len() / c.vocab_size);
                rows.extend_from_slice(row);
            };
            pool.install(|| Batch::new().probe(model, &probes, |probe| Output::From(first(probe)), visit)).unwrap();
            for (probe, (got, want)) in got.into_iter().zip(&want).enumerate() {
                assert!(
                    got.into_inner().unwrap() == want[first(probe) * c.vocab_size..],
                    "{lengths:?} {probe} {threads}"
                );
            }
            assert!(session.to_bytes() == before);
        }
    }
}

/// Every feed gets what was asked for it and nothing else, whatever the others get; hidden states are what the head reads.
#[test]
fn outputs_are_those_asked_for() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let tokens = tokens(&c, 300);
    let feeds = [(&tokens[..150], Output::Nothing), (&tokens[5..145], Output::Hidden)];
    let feeds = [feeds, [(&tokens[..140], Output::Each), (&tokens[9..10], Output::Last)]].concat();
    let mut sessions: Vec<Session> = feeds.iter().map(|_| Session::new(model).unwrap()).collect();
    let mut calls: Vec<Feed> =
        sessions.iter_mut().zip(&feeds).map(|(session, (tokens, _))| Feed { session, tokens }).collect();
    let mut got: Vec<Vec<Vec<f32>>> = vec![Vec::new(); feeds.len()];
    Batch::new()
        .extend_with(
            model,
            &mut calls,
            |feed| feeds[feed].1,
            |feed, index, values| {
                assert_eq!(index, got[feed].len());
                got[feed].push(values.to_vec());
            },
        )
        .unwrap();
    assert!(got[0].is_empty() && got[2].len() == 140 && got[3].len() == 1);
    let logits = |tokens: &[u32]| {
        let (mut session, mut rows) = (Session::new(model).unwrap(), Vec::new());
        let feed = Feed { session: &mut session, tokens };
        Batch::new().extend_each(model, &mut [feed], |_, _, row| rows.push(row.to_vec())).unwrap();
        rows
    };
    assert!(got[2] == logits(feeds[2].0) && got[3] == logits(feeds[3].0));
    // The head's product with the hidden states is the logits.
    let params = initialise(&c, 11);
    let layout = params.layout();
    let head = &params.data()[layout.params()[layout.lm_head().0].range.clone()];
    for (hidden, want) in got[1].iter().zip(logits(feeds[1].0)) {
        let dot = |row: &[f32]| row.iter().zip(hidden).map(|(w, x)| w * x).sum();
        let logits: Vec<f32> = head.chunks_exact(c.d_model).map(dot).collect();
        assert!(worst(&logits, &want) < 1e-5);
    }
    assert_eq!(got[1].len(), 140);
    assert_eq!(sessions[0].tokens(), feeds[0].0);
}

/// The last layer, whichever mixer it has, is computed for the rows whose output is wanted: their bits, and what the session goes on from,
/// are those of all rows.
#[test]
fn what_is_not_wanted_changes_nothing() {
    for n_layers in [3, 5] {
        let c = ModelConfig { n_layers, ..odd_config() };
        let archive = archive(&c);
        let model = archive.model();
        let tokens = tokens(&c, 400);
        let kinds = [
            (170, Output::Nothing),
            (130, Output::Last),
            (60, Output::From(23)),
            (1, Output::Nothing),
            (1, Output::Last),
            (9, Output::From(9)),
            (9, Output::From(8)),
            (40, Output::Each),
            (30, Output::Hidden),
        ];
        for (threads, split) in [(1, false), (3, false), (2, true)] {
            // Of all of them at once, or each in a call of its own: then some passes want nothing at all.
            let run = |every: bool| {
                let mut sessions: Vec<Session> = kinds.iter().map(|_| Session::new(model).unwrap()).collect();
                let rows = Mutex::new(vec![Vec::new(); kinds.len()]);
                for turn in 0..2 {
                    let outputs = |feed: usize| match kinds[feed].1 {
                        Output::Hidden => Output::Hidden,
                        _ if every || turn == 1 => Output::Each,
                        output => output,
                    };
                    let parts = sessions.chunks_mut(if split { 1 } else { kinds.len() });
                    for (part, sessions) in parts.enumerate() {
                        let mut feeds: Vec<Feed> = sessions
                            .iter_mut()
                            .enumerate()
                            .map(|(f, session)| Feed {
                                session,
                                tokens: &tokens[part + f + turn..][..kinds[part + f].0],
                            })
                            .collect();
                        let visit = |feed: usize, index: usize, row: &[f32]| {
                            rows.lock().unwrap()[part + feed].push((turn, index, row.to_vec()));
                        };
                        let outputs = |feed| outputs(part + feed);
                        pool(threads).install(|| Batch::new().extend_with(model, &mut feeds, outputs, visit)).unwrap();
                    }
                }
                rows.into_inner().unwrap()
            };
            for (((len, output), got), mut want) in kinds.iter().zip(run(false)).zip(run(true)) {
                let first = match output {
                    Output::Nothing => *len,
                    Output::Last => len - 1,
                    Output::From(first) => *first,
                    _ => 0,
                };
                want.retain(|(turn, index, _)| *turn == 1 || *index >= first);
                assert!(got == want, "{n_layers} layers, {threads} threads, {len} tokens, {output:?}");
            }
        }
    }
}

#[test]
fn forks_rewinds_and_saves_are_exact() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let tokens = tokens(&c, 320);
    let mut session = Session::new(model).unwrap();
    session.extend(model, &tokens[..270]).unwrap();
    let mark = session.clone();
    let straight = session.extend(model, &tokens[270..300]).unwrap().to_vec();
    // A fork goes its own way without disturbing the other.
    let mut fork = mark.clone();
    fork.extend(model, &[1, 2, 3]).unwrap();
    let mut again = mark.clone();
    assert!(again.extend(model, &tokens[270..300]).unwrap() == straight);
    // Back, and on again.
    session.rewind(&mark);
    assert_eq!(session.position(), 270);
    assert!(session.extend(model, &tokens[270..300]).unwrap() == straight);
    // Through bytes.
    let saved = session.to_bytes();
    let mut restored = Session::from_bytes(model, &saved).unwrap();
    assert_eq!(restored.to_bytes(), saved);
    let next = session.extend(model, &tokens[300..]).unwrap();
    assert!(restored.extend(model, &tokens[300..]).unwrap() == next);
    assert!(Session::from_bytes(model, &Session::new(model).unwrap().to_bytes()).unwrap().tokens().is_empty());
    for cut in (0..saved.len()).step_by(101).chain(saved.len() - 9..saved.len()) {
        assert!(Session::from_bytes(model, &saved[..cut]).is_err());
    }
    for at in (0..saved.len()).step_by(37) {
        let mut damaged = saved.clone();
        damaged[at] ^= 4;
        assert!(Session::from_bytes(model, &damaged).is_err(), "{at}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let c = odd_config();
    let archive = archive(&c);
    let model = archive.model();
    let mut session = Session::new(model).unwrap();
    session.extend(model, &[1, 2]).unwrap();
    let before = session.to_bytes();
    let fault = session.extend(model, &[5, 301]).unwrap_err();
    assert_eq!(fault, InferenceError::Token { token: 301, vocab_size: 301 });
    assert_eq!(session.extend(model, &[]).unwrap_err(), InferenceError::NoTokens);
    let other = ModelConfig { ffn_hidden: 101, ..c.clone() };
    let other = Archive::open(to_bytes(&other, &initialise(&other, 1), None, EXACT).unwrap()).unwrap();
    assert_eq!(session.extend(other.model(), &[1]).unwrap_err(), InferenceError::OtherModel);
    assert_eq!(Session::from_bytes(other.model(), &before).unwrap_err(), InferenceError::OtherModel);
    assert_eq!(session.to_bytes(), before);
    // A damaged row of the embedding is found when it is asked for, before anything has changed.
    let mut bytes = archive.into_bytes();
    let at = {
        let archive = Archive::open(&bytes).unwrap();
        archive.model().tensors().find(|t| t.name == "tok_emb.weight").unwrap().offset + 72 * 4 * 9
    };
    bytes.as_mut_slice()[at] ^= 1;
    let archive = Archive::open(&bytes).unwrap();
    let mut session = Session::from_bytes(archive.model(), &before).unwrap();
    assert!(matches!(session.extend(archive.model(), &[8, 9]), Err(InferenceError::Archive(_))));
    assert_eq!(session.to_bytes(), before);
    assert!(session.extend(archive.model(), &[8, 10]).is_ok());
}
