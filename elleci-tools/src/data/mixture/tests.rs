use super::super::shards::{ShardOptions, ShardWriter};
use super::*;
use std::collections::HashMap;
use std::path::Path;

/// A set of `documents` whose tokens are all different: token ids count up from `first`.
fn write(dir: &Path, first: u32, documents: u32, hash: char) -> Vec<Vec<u32>> {
    let options = ShardOptions {
        tokenizer_sha256: hash.to_string().repeat(64),
        token_bytes: (0..5000).map(|t| if t < 4 { 0 } else { 1 + t % 3 }).collect(),
        end_of_text: 0,
        shard_tokens: 100,
        overwrite: false,
    };
    let mut w = ShardWriter::create(dir, options).unwrap();
    let mut next = first;
    let mut all = Vec::new();
    for i in 0..documents {
        let len = 1 + (i * 5) % 23;
        let mut tokens: Vec<u32> = (next..next + len).collect();
        next += len;
        tokens.push(0);
        // Even tokens are targets; so is the end.
        let mask: Vec<bool> = tokens.iter().map(|t| t % 2 == 0).collect();
        w.push(Split::Train, &tokens, Some(&mask)).unwrap();
        if i % 4 == 0 {
            w.push(Split::Val, &tokens, Some(&mask)).unwrap();
        }
        all.push(tokens);
    }
    w.finish().unwrap();
    all
}

fn spec(dir: &Path, name: &str) -> SourceSpec {
    SourceSpec { name: name.to_string(), path: dir.join(name) }
}

fn three() -> (tempfile::TempDir, Vec<SourceSpec>) {
    let tmp = tempfile::tempdir().unwrap();
    for (name, first, documents) in [("a", 4, 60), ("b", 1000, 40), ("c", 2000, 7)] {
        write(&tmp.path().join(name), first, documents, '1');
    }
    let specs = ["a", "b", "c"].map(|n| spec(tmp.path(), n)).to_vec();
    (tmp, specs)
}

#[test]
fn every_token_is_a_target_once_an_epoch() {
    let tmp = tempfile::tempdir().unwrap();
    let documents = write(&tmp.path().join("a"), 4, 30, '1');
    let total: usize = documents.iter().map(Vec::len).sum();
    for seq in [1, 7, 32, 500] {
        let mut m = Mixture::open(&[spec(tmp.path(), "a")], 5).unwrap();
        let mut stream = vec![0];
        while stream.len() <= 3 * total {
            let (source, e) = m.next(&[1.0], seq).unwrap();
            assert_eq!((source, e.tokens.len(), e.target_weights.len()), (0, seq + 1, seq));
            assert_eq!(e.tokens[0], *stream.last().unwrap(), "sequences overlap by one token");
            for (t, w) in e.tokens[1..].iter().zip(&e.target_weights) {
                assert_eq!(*w, if t % 2 == 0 { 1.0 } else { 0.0 });
            }
            stream.extend(&e.tokens[1..]);
        }
        let orders: Vec<Vec<u32>> = (0..3)
            .map(|epoch| {
                let targets = &stream[1 + epoch * total..1 + (epoch + 1) * total];
                let mut sorted: Vec<&[u32]> = targets.split_inclusive(|t| *t == 0).collect();
                let order = sorted.iter().map(|d| d[0]).collect();
                sorted.sort();
                let mut want: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
                want.sort();
                assert_eq!(sorted, want, "epoch {epoch}, seq {seq}: each document whole, once");
                order
            })
            .collect();
        assert!(orders[0] != orders[1] && orders[1] != orders[2], "each epoch has its own order");
        assert_eq!(m.cursor().sources[0].tokens as usize, stream.len() - 1);
        assert_eq!(m.cursor().sources[0].epoch as usize, (stream.len() - 1) / total);
    }
}

#[test]
fn shares_stay_within_one_sequence_of_exact() {
    let (_tmp, specs) = three();
    for weights in [[0.55, 0.35, 0.10], [0.2, 0.25, 0.55], [1.0, 1.0, 1.0], [0.5, 0.5, 0.0], [0.98, 0.01, 0.01]] {
        let mut m = Mixture::open(&specs, 1).unwrap();
        let sum: f64 = weights.iter().sum();
        let mut drawn = [0u64; 3];
        for step in 1..=2000 {
            let (source, _) = m.next(&weights, 8).unwrap();
            drawn[source] += 8;
            for (d, w) in drawn.iter().zip(weights) {
                let exact = w / sum * 8.0 * f64::from(step);
                // Shares are rounded to 2^-30: 16,000 tokens are off by less than 1e-4 of a token.
                assert!((*d as f64 - exact).abs() < 8.0 + 1e-4, "{weights:?} step {step}: {drawn:?}");
            }
        }
    }
}

#[test]
fn many_sources_stay_within_one_sequence_too() {
    // Random weights from a fixed generator, on the chooser alone.
    let mut state = 7;
    for n in 2..12 {
        for _ in 0..20 {
            let weights: Vec<f64> = (0..n)
                .map(|_| {
                    state = mix64(state);
                    1.0 + (state % 1000) as f64
                })
                .collect();
            let shares = shares(&weights, &vec!["x"; n]).unwrap();
            let mut credits = vec![0; n];
            for step in 0..3000 {
                let chosen = choose(&credits, &shares, 16);
                for (c, s) in credits.iter_mut().zip(&shares) {
                    *c += s * 16;
                }
                credits[chosen] -= ONE * 16;
                assert!(credits.iter().all(|c| c.abs() < ONE * 16), "{weights:?} step {step}: {credits:?}");
                assert_eq!(credits.iter().sum::<i64>(), 0);
            }
        }
    }
}

#[test]
fn a_restored_mixture_goes_on_as_if_uninterrupted() {
    let (_tmp, specs) = three();
    let phases = [([0.6, 0.3, 0.1], 16), ([0.1, 0.3, 0.6], 16), ([0.1, 0.3, 0.6], 33), ([0.0, 0.5, 0.5], 7)];
    let run = |m: &mut Mixture, from: usize, to: usize| {
        (from..to).map(|i| m.next(&phases[i / 50].0, phases[i / 50].1).unwrap()).collect::<Vec<_>>()
    };
    let mut whole = Mixture::open(&specs, 9).unwrap();
    let want = run(&mut whole, 0, 200);
    for stop in [0, 1, 49, 50, 73, 100, 149, 199] {
        let mut first = Mixture::open(&specs, 9).unwrap();
        run(&mut first, 0, stop);
        let json = serde_json::to_string(&first.cursor()).unwrap();
        // Another seed at opening: the cursor's one counts.
        let mut second = Mixture::open(&specs, 1234).unwrap();
        run(&mut second, 0, 13);
        second.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(run(&mut second, stop, 200), want[stop..], "stopped after {stop}");
        assert_eq!(second.cursor(), whole.cursor());
    }
    let other = run(&mut Mixture::open(&specs, 10).unwrap(), 0, 20);
    assert_ne!(other, want[..20], "the seed matters");
}

#[test]
fn validation_covers_the_held_out_split_in_order_with_its_bytes() {
    let (_tmp, specs) = three();
    let m = Mixture::open(&specs, 9).unwrap();
    for source in 0..3 {
        let split = &m.set(source).index().val;
        let examples: Vec<_> = m.validation(source, 10).map(Result::unwrap).collect();
        assert_eq!(examples.len() as u64, split.tokens.div_ceil(10));
        assert_eq!(examples.iter().map(|e| e.bytes).sum::<u64>(), split.target_bytes);
        let weight: f32 = examples.iter().flat_map(|e| &e.example.target_weights).sum();
        assert_eq!(weight as u64, split.target_tokens);
        let mut seen = HashMap::new();
        for e in &examples {
            assert_eq!((e.example.tokens.len(), e.example.target_weights.len()), (11, 10));
            for t in e.example.tokens[1..].iter().filter(|t| **t != 0) {
                *seen.entry(*t).or_insert(0) += 1;
            }
        }
        assert!(seen.values().all(|n| *n == 1), "every held-out token once");
        assert_eq!(seen.len() as u64, split.tokens - split.documents);
        assert_eq!(examples, m.validation(source, 10).map(Result::unwrap).collect::<Vec<_>>());
    }
}

#[test]
fn misuse_is_explained() {
    let (tmp, specs) = three();
    write(&tmp.path().join("d"), 4, 5, '2');
    let fails = |specs: &[SourceSpec]| format!("{:#}", Mixture::open(specs, 1).err().unwrap());
    assert!(fails(&[]).contains("no data source"));
    assert!(fails(&[specs[0].clone(), specs[0].clone()]).contains("two data sources are called `a`"));
    assert!(fails(&[specs[0].clone(), spec(tmp.path(), "d")]).contains("different tokenizers"));
    assert!(fails(&[spec(tmp.path(), "nowhere")]).contains("data source `nowhere`"));
    let mut m = Mixture::open(&specs, 1).unwrap();
    let mut bad = |w: &[f64], seq| format!("{:#}", m.next(w, seq).err().unwrap());
    assert!(bad(&[1.0], 8).contains("1 weights for 3 data sources (a, b, c)"));
    assert!(bad(&[0.0; 3], 8).contains("are 0"));
    assert!(bad(&[1.0, -1.0, 1.0], 8).contains("weight of data source `b` is -1"));
    assert!(bad(&[1.0, f64::NAN, 1.0], 8).contains("`b` is NaN"));
    assert!(bad(&[1.0; 3], 0).contains("sequence length 0"));
}

#[test]
fn a_cursor_of_other_data_is_refused_and_changes_nothing() {
    let (tmp, specs) = three();
    write(&tmp.path().join("other"), 4, 60, '1');
    let mut m = Mixture::open(&specs, 1).unwrap();
    m.next(&[1.0; 3], 8).unwrap();
    let good = m.cursor();
    type Edit = fn(&mut Cursor);
    let edits: [(Edit, &str); 5] = [
        (|c| c.sources[1].name = "x".into(), "for the sources a, x, c, but the run has a, b, c"),
        (|c| c.sources[2].fingerprint ^= 1, "`c`"),
        (|c| c.sources[0].document = 60, "`document` 60 of 60"),
        (|c| c.sources[2].offset = 1000, "`offset` 1000"),
        (|c| c.sources[1].credit = i64::MIN, "impossible `credit`"),
    ];
    for (edit, why) in edits {
        let mut bad = good.clone();
        edit(&mut bad);
        let e = format!("{:#}", m.restore(&bad).unwrap_err());
        assert!(e.contains(why), "{e}");
        assert_eq!(m.cursor(), good);
    }
}
