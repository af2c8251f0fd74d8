use std::sync::OnceLock;

use elleci_core::archive::{PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::ParamKind;
use elleci_core::sampler::SamplerOptions;

use super::*;
use crate::data::tokenizer::{TrainOptions, train_tokenizer};

const VOCAB: usize = 352;

/// A tiny model with random weights whose logits differ by units.
fn open() -> &'static OpenModel {
    static OPEN: OnceLock<OpenModel> = OnceLock::new();
    OPEN.get_or_init(|| {
        let config = ModelConfig {
            vocab_size: VOCAB,
            d_model: 32,
            n_layers: 4,
            max_seq_len: 64,
            n_heads: 2,
            kv_rank: 8,
            d_nope: 8,
            d_rope: 4,
            d_v: 8,
            d_inner: 64,
            head_dim: 16,
            d_state: 8,
            ffn_hidden: 48,
            ..ModelConfig::preset("nano").unwrap()
        };
        let texts = (0..200).map(|i| format!("La città è più {} che bella: perché no? {i}", "grande ".repeat(i % 5)));
        let options = TrainOptions { tokens: 330, vocab_size: VOCAB, words: Vec::new() };
        let tokenizer = train_tokenizer(texts, &options).unwrap();
        let mut params = initialise(&config, 11);
        let layout = params.layout().clone();
        for p in layout.params().iter().filter(|p| p.kind == ParamKind::Embedding) {
            params.data_mut()[p.range.clone()].iter_mut().for_each(|w| *w *= 40.0);
        }
        let bytes = to_bytes(&config, &params, Some(tokenizer.json()), PackOptions::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.elleci");
        std::fs::write(&path, bytes).unwrap();
        // The map outlives the name.
        OpenModel::open(&path).unwrap()
    })
}

fn engine(max_length: usize) -> Engine<'static> {
    Engine::new(open(), max_length).unwrap()
}

/// `ln softmax` of a row at a token, in float64.
fn log_softmax(row: &[f32], token: u32) -> f64 {
    let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
    f64::from(row[token as usize]) - total.ln()
}

/// The score of a pair by one sequence of its own, `parts` of whose input are fed in a call each; and its log-likelihood by another sum of
/// exponentials.
fn alone(pair: &Pair, parts: &[usize]) -> (Score, f64) {
    let model = open().packed();
    let input = [&pair.context[..], &pair.continuation[..pair.continuation.len() - 1]].concat();
    let first = pair.context.len() - 1;
    let mut session = Session::new(model).unwrap();
    let (mut score, mut logprob, mut at) = (NOTHING, 0.0, 0);
    for end in parts.iter().copied().chain([input.len()]).filter(|end| *end <= input.len()) {
        if end <= at {
            continue;
        }
        let mut feeds = [Feed { session: &mut session, tokens: &input[at..end] }];
        Batch::new()
            .with_one_form()
            .extend_each(model, &mut feeds, |_, i, row| {
                if let Some(place) = (at + i).checked_sub(first) {
                    let token = pair.continuation[place];
                    add(&mut score, &LogRow::new(row), row, token);
                    logprob += log_softmax(row, token);
                }
            })
            .unwrap();
        at = end;
    }
    (score, logprob)
}

/// `score` is that of a sequence of its own, in one call and in several.
fn assert_alone(pair: &Pair, score: Score) {
    for parts in [&[][..], &[1], &[1, 2, pair.context.len()], &[pair.context.len()]] {
        let (same, logprob) = alone(pair, parts);
        assert_eq!(score, same, "{parts:?} {pair:?}");
        assert!((score.logprob - logprob).abs() < 2e-5 * pair.continuation.len() as f64, "{score:?} {logprob}");
    }
}

#[test]
fn the_continuation_is_what_follows_the_context_s_own_tokens() {
    let mut e = engine(64);
    let whole = e.encode("La città è bella");
    let context = e.encode("La città");
    // White space at the end of the context belongs to the continuation.
    for (c, k) in [("La città", " è bella"), ("La città ", "è bella")] {
        let pair = e.pair(c, k).unwrap();
        assert_eq!(pair.context, context);
        assert_eq!(pair.continuation, whole[context.len()..], "{c:?}");
    }
    // Where the whole merges across the boundary, the continuation still is what lies past the context's length.
    let (part, merged) = (e.encode("gran"), e.encode("grande che"));
    assert!(part != merged[..part.len()] && part.len() < merged.len(), "{part:?} {merged:?}");
    let pair = e.pair("gran", "de che").unwrap();
    assert_eq!((&pair.context[..], &pair.continuation[..]), (&part[..], &merged[part.len()..]));
    // Without a context, the token that ends documents stands for it.
    let sentence = e.encode("La città");
    let pair = e.pair("", "La città").unwrap();
    assert_eq!((pair.context, pair.continuation), (vec![END_OF_TEXT_ID], sentence));
    assert!(e.pair("La città", "").unwrap_err().to_string().contains("no tokens"));
}

#[test]
fn a_long_context_loses_its_beginning() {
    let mut e = engine(4);
    let tokens = e.encode("La città è più grande che bella");
    assert!(tokens.len() > 5, "{tokens:?}");
    let context = "La città è più grande che";
    let (whole, pair) = (e.encode(context), e.pair(context, " bella").unwrap());
    // Window and the token predicted after it: five in all.
    assert_eq!(pair.context.len() + pair.continuation.len(), 5);
    assert_eq!(pair.truncated + pair.context.len(), whole.len());
    assert_eq!(pair.context, whole[pair.truncated..]);
    assert_eq!(engine(64).pair(context, " bella").unwrap().truncated, 0);
    let error = e.pair("La", " città è più grande che bella: perché no?").unwrap_err().to_string();
    assert!(error.contains("--max-length"), "{error}");
}

#[test]
fn windows_are_the_harness_s() {
    let tokens: Vec<u32> = (1..=10).collect();
    let windows = |max, overlap| -> Vec<(Vec<u32>, Vec<u32>)> {
        let mut all = Windows::new(tokens.clone(), 0, max, overlap).unwrap();
        let mut cut = Vec::new();
        loop {
            let left = all.len();
            let Some(p) = all.next() else {
                assert_eq!(left, 0, "{max} {overlap}");
                return cut;
            };
            assert_eq!(all.len() + 1, left, "{max} {overlap}");
            cut.push((p.context, p.continuation));
        }
    };
    // get_rolling_token_windows and make_disjoint_window of the harness, by hand.
    assert_eq!(windows(4, 1), [(vec![0], vec![1, 2, 3, 4]), (vec![4], vec![5, 6, 7, 8]), (vec![6, 7, 8], vec![9, 10])]);
    assert_eq!(windows(12, 1), [(vec![0], tokens.clone())]);
    let overlapping = windows(4, 3);
    assert_eq!(overlapping[..2], [(vec![0], vec![1, 2, 3, 4]), (vec![2, 3, 4], vec![5, 6])]);
    for (max, overlap) in [(1, 1), (3, 2), (4, 4), (5, 1), (9, 3), (10, 10)] {
        let scored: Vec<u32> = windows(max, overlap).into_iter().flat_map(|w| w.1).collect();
        assert_eq!(scored, tokens, "every token once: {max} {overlap}");
    }
    assert!(Windows::new(tokens.clone(), 0, 4, 5).is_err());
    assert!(Windows::new(Vec::new(), 0, 4, 1).unwrap().next().is_none());
}

#[test]
fn scores_are_those_of_a_sequence_of_its_own_whatever_the_company() {
    let mut e = engine(64);
    let contexts = ["La città è", "", "perché no? La città", "La città è più grande grande che"];
    let continuations = [" più grande", " bella", " è", " perché no? 17 grande che bella: sì", "x"];
    let mut pairs = Vec::new();
    for continuation in continuations {
        for context in contexts {
            pairs.push(e.pair(context, continuation).unwrap());
        }
    }
    let together = e.score(&pairs, None).unwrap();
    for (pair, score) in pairs.iter().zip(&together) {
        assert_alone(pair, *score);
        assert_eq!(e.score(std::slice::from_ref(pair), None).unwrap(), [*score], "company");
    }
}

#[test]
fn what_continuations_have_in_common_is_fed_once() {
    let mut e = engine(64);
    let shared = "La città è più grande che bella: perché no?";
    let texts = [&format!("{shared} è"), &format!("{shared} no? x"), shared, shared, "perché no?", "x", shared];
    let pairs: Vec<Pair> = texts.iter().map(|t| e.pair("", t).unwrap()).collect();
    let found = branches(&pairs, &[0, 1, 2, 3, 4, 5, 6], 0);
    assert_eq!(found.iter().map(|b| b.members.len()).collect::<Vec<_>>(), [4, 1, 1, 1]);
    // The third ends with what the others share, so that its last token is left.
    assert_eq!(found[0].shared, pairs[2].continuation.len() - 1);
    assert!(found[0].shared >= MIN_BRANCH && found[1..].iter().all(|b| b.shared == 0));
    // They are sorted, so that the last joins them.
    let fed = |branches: &[Branch]| 1 + branches.iter().map(|b| b.tokens(&pairs)).sum::<usize>();
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_key(|&i| &pairs[i].continuation);
    let sorted = branches(&pairs, &order, 0);
    assert!(sorted.iter().any(|b| b.members.len() == 5) && fed(&sorted) < fed(&found));
    let scores = e.score(&pairs, None).unwrap();
    assert_eq!(e.fed, fed(&sorted) as u64);
    assert_eq!(e.asked, pairs.iter().map(|p| p.continuation.len() as u64).sum::<u64>(), "with a context of one token");
    assert!(e.fed < e.asked);
    for (pair, score) in pairs.iter().zip(&scores) {
        assert_alone(pair, *score);
    }
    // A neighbour that has less in common joins only where that saves more than it costs the others.
    let tokens = |shared: u32, own: u32| -> Pair {
        let continuation = (0..shared).chain([own, own]).map(|t| 100 + t).collect();
        Pair { context: vec![END_OF_TEXT_ID], continuation, truncated: 0 }
    };
    let shared_of = |pairs: &[Pair]| -> Vec<(usize, usize)> {
        let members: Vec<usize> = (0..pairs.len()).collect();
        branches(pairs, &members, 0).iter().map(|b| (b.members.len(), b.shared)).collect()
    };
    assert_eq!(shared_of(&[tokens(9, 50), tokens(9, 60), tokens(4, 70), tokens(4, 80)]), [(2, 9), (2, 4)]);
    assert_eq!(shared_of(&[tokens(9, 50), tokens(9, 60), tokens(7, 70)]), [(3, 7)]);
    // Several contexts, one with a stem, whose branches are of both kinds.
    let contexts = ["", "La città è più grande che bella: perché no? 1 La città è più bella", "perché no?"];
    let mut pairs = Vec::new();
    for context in contexts {
        for continuation in
            [" x", &format!(" {shared} è"), &format!(" {shared} no? x"), " perché", &format!(" {shared}")]
        {
            pairs.push(e.pair(context, continuation).unwrap());
        }
    }
    let stem = e.stem(&pairs[5], &pairs[6]).unwrap();
    assert!(stem.is_some());
    for (pair, score) in pairs.iter().zip(e.score(&pairs, stem.as_ref()).unwrap()) {
        assert_alone(pair, score);
    }
}

#[test]
fn a_stem_is_evaluated_once_and_gives_the_scores_of_its_parts() {
    let mut e = engine(64);
    let shared = "La città è più grande che bella: perché no? 1 La città è più bella: perché";
    let texts = [format!("{shared} sì"), format!("{shared} no"), shared.to_string(), "La città".to_string()];
    let pairs: Vec<Pair> = texts.iter().map(|c| e.pair(c, " grande che").unwrap()).collect();
    let stem = e.stem(&pairs[0], &pairs[1]).unwrap().expect("a long beginning is shared");
    let at = stem.session.position();
    assert!(at >= MIN_STEM && at <= pairs[2].context.len());
    let before = e.fed;
    let scores = e.score(&pairs, Some(&stem)).unwrap();
    let continued: usize = pairs.iter().map(|p| p.continuation.len() - 1).sum();
    let contexts: usize = pairs.iter().map(|p| p.context.len() - if p.context.len() >= at { at } else { 0 }).sum();
    assert_eq!(e.fed - before, (contexts + continued) as u64, "the stem is not fed again");
    for (pair, score) in pairs.iter().zip(&scores) {
        assert_alone(pair, *score);
    }
    // Little in common is not worth a session; all in common is.
    let short: Vec<Pair> = ["La", "La città", ""].map(|c| e.pair(c, " è").unwrap()).into();
    assert!(e.stem(&short[0], &short[1]).unwrap().is_none());
    assert!(e.stem(&short[2], &short[2]).unwrap().is_some());
}

#[test]
fn texts_are_written_as_if_alone_and_stop_where_they_must() {
    let mut e = engine(64);
    let how = |until: &[&str], max_tokens| Continue {
        max_tokens,
        until: until.iter().map(|u| u.to_string()).collect(),
        sampling: SamplerOptions::greedy(),
    };
    let prompts = ["La città è", "perché no?", ""];
    let all = e.generate(&prompts, &how(&[], 12), |_| 0).unwrap();
    for (prompt, text) in prompts.iter().zip(&all) {
        let mut own = e.generate(&[prompt], &how(&[], 12), |_| 0).unwrap();
        assert_eq!(own.swap_remove(0), *text);
        assert!(text.tokens == 12 || text.ended, "{text:?}");
    }
    // The text up to any of its own characters, when that is what stops it.
    let whole = &all[0].text;
    let stop: String = whole.chars().skip(3).take(2).collect();
    let cut = e.generate(&prompts[..1], &how(&[&stop], 12), |_| 0).unwrap().swap_remove(0);
    assert_eq!(cut.text, whole[..whole.find(&stop).unwrap()]);
    assert!(cut.ended);
    // Drawn texts depend on their seed alone.
    let drawn = Continue { sampling: SamplerOptions { temperature: 1.0, ..SamplerOptions::default() }, ..how(&[], 12) };
    let two = e.generate(&prompts[..2], &drawn, |i| i as u64).unwrap();
    assert_eq!(e.generate(&prompts[1..2], &drawn, |_| 1).unwrap()[0], two[1]);
    assert_ne!(e.generate(&prompts[1..2], &drawn, |_| 2).unwrap()[0], two[1]);
    // A prompt gives way to what is to be written.
    let long = "La città è più grande che bella ".repeat(8);
    assert!(e.generate(&[&long], &how(&[], 12), |_| 0).unwrap()[0].truncated > 0);
    assert!(e.generate(&[&long], &how(&[], 64), |_| 0).unwrap_err().to_string().contains("--max-length"));
}
