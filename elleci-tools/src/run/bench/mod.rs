//! `elleci-run bench`: how fast prompts are read and text is written.

mod table;

use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use elleci_core::archive::PackedModel;
use elleci_core::inference::{Batch, Feed, Session};
use elleci_core::simd::Isa;

use super::cli::BenchArgs;
use super::model::OpenModel;
use crate::exit::usage;
use crate::train::device::{Device, available_memory};
pub use table::{Row, render};

/// What a test measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// A prompt of so many tokens at once.
    Prompt(usize),
    /// So many tokens one by one.
    Generate(usize),
    /// So many tokens one by one in each of several sequences, which are advanced together.
    Together {
        /// Tokens of each sequence.
        tokens: usize,
        /// Sequences.
        sequences: usize,
    },
}

impl Test {
    /// Its name, as in llama-bench.
    pub fn name(self) -> String {
        match self {
            Test::Prompt(n) => format!("pp{n}"),
            Test::Generate(n) => format!("tg{n}"),
            Test::Together { tokens, sequences } => format!("tg{tokens} x{sequences}"),
        }
    }

    /// Tokens that are taken in, those of all sequences together.
    fn tokens(self) -> usize {
        match self {
            Test::Prompt(n) | Test::Generate(n) => n,
            Test::Together { tokens, sequences } => tokens * sequences,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// [`crate::exit::Usage`] for options without a meaning; a model that cannot be used.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let prompts = args.n_prompt.iter().map(|n| Test::Prompt(*n));
    let texts = args.n_gen.iter().flat_map(|&tokens| {
        args.parallel.iter().map(move |&sequences| match sequences {
            1 => Test::Generate(tokens),
            _ => Test::Together { tokens, sequences },
        })
    });
    let tests: Vec<Test> = prompts.chain(texts).filter(|t| t.tokens() > 0).collect();
    ensure!(!tests.is_empty(), usage("-p and -n are all 0: there is nothing to measure"));
    let devices = args.threads.iter().map(|n| Device::choose(&args.device, *n)).collect::<anyhow::Result<Vec<_>>>()?;
    let open = devices[0].install(|| match (&args.model, &args.preset) {
        (Some(path), _) => open_timed(path).context("--model"),
        (None, Some(preset)) => match &args.save {
            Some(path) => {
                let at = path.display();
                ensure!(!path.exists(), usage(format!("--save: {at} is there already; -m {at} measures it")));
                OpenModel::save_random(preset, path)?;
                open_timed(path)
            }
            None => OpenModel::random(preset),
        },
        (None, None) => Err(usage("--model or --preset is needed")),
    })?;
    crate::exit::errln!("{}", open.announcement());
    let mut rows = Vec::new();
    for device in &devices {
        crate::exit::errln!("{}", device.announcement);
        device.install(|| {
            for &depth in &args.depth {
                let mut session = filled(open.packed(), depth)?;
                for &test in &tests {
                    let row = measure(&open, &mut session, test, device.threads, args.repetitions)?;
                    crate::exit::errln!("{} threads {}: {}", device.threads, row.test_name(), row.speed());
                    rows.push(row);
                }
            }
            Ok(())
        })?;
    }
    let mut out = io::stdout().lock();
    out.write_all(render(&rows, args.output)?.as_bytes()).and_then(|()| out.flush()).context("standard output")
}

/// Opens a model and takes a first token, with the times of both.
fn open_timed(path: &Path) -> anyhow::Result<OpenModel> {
    let start = Instant::now();
    let open = OpenModel::open(path)?;
    let opened = start.elapsed().as_secs_f64() * 1e3;
    Session::new(open.packed())?.extend(open.packed(), &[0])?;
    let first = start.elapsed().as_secs_f64() * 1e3;
    crate::exit::errln!("opened in {opened:.1} ms, first logits {first:.1} ms after the start");
    Ok(open)
}

/// Tokens without a pattern; the same every time.
fn tokens(vocab_size: usize, count: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((state >> 32) * vocab_size as u64) >> 32) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// A session that has taken `depth` tokens.
fn filled(model: PackedModel<'_>, depth: usize) -> anyhow::Result<Session> {
    let mut session = Session::new(model)?;
    if depth > 0 {
        session.extend(model, &tokens(model.config().vocab_size, depth))?;
    }
    Ok(session)
}

fn measure(
    open: &OpenModel,
    session: &mut Session,
    test: Test,
    threads: usize,
    repetitions: u32,
) -> anyhow::Result<Row> {
    let model = open.packed();
    let tokens = tokens(model.config().vocab_size, test.tokens());
    let depth = session.position();
    let (mut batch, mut others) = (Batch::new(), Vec::new());
    // The first one finds cold caches and grows the buffers; it is not counted. What filled a session has already done that.
    let uncounted = u32::from(depth == 0);
    let rounds = repetitions + uncounted;
    // A mark holds a second state once the session goes on: no more memory than the work needs.
    let mark = (rounds > 1).then(|| session.clone());
    let mut seconds = Vec::new();
    if let Test::Together { sequences, .. } = test {
        let (needed, free) = (session.bytes() as u64 * sequences as u64, available_memory());
        ensure!(
            needed <= free,
            "--parallel {sequences} takes {needed} bytes, and {free} are free: fewer sequences fit"
        );
    }
    for _ in 0..rounds {
        if let Test::Together { sequences, .. } = test {
            others = vec![session.clone(); sequences];
        }
        let start = Instant::now();
        match test {
            Test::Prompt(_) => {
                session.extend(model, &tokens)?;
            }
            Test::Generate(_) => {
                for token in &tokens {
                    session.extend(model, std::slice::from_ref(token))?;
                }
            }
            Test::Together { sequences, .. } => {
                for tokens in tokens.chunks_exact(sequences) {
                    let feeds = others.iter_mut().zip(tokens);
                    let mut feeds: Vec<Feed<'_>> =
                        feeds.map(|(session, token)| Feed { session, tokens: std::slice::from_ref(token) }).collect();
                    batch.extend(model, &mut feeds)?;
                }
            }
        }
        seconds.push(start.elapsed().as_secs_f64());
        if let Some(mark) = &mark {
            session.rewind(mark);
        }
    }
    seconds.drain(..uncounted as usize);
    Ok(Row {
        model: open.name.clone(),
        size: open.bytes() as u64,
        parameters: open.parameters() as u64,
        isa: Isa::detect().name(),
        threads,
        test,
        depth,
        seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_in_the_vocabulary_and_spread() {
        let tokens = tokens(100, 10_000);
        assert!(tokens.iter().all(|t| *t < 100));
        for token in 0..100 {
            let count = tokens.iter().filter(|t| **t == token).count();
            // 100 expected with a deviation of 10; six of them.
            assert!((40..160).contains(&count), "{token}: {count}");
        }
    }
}
