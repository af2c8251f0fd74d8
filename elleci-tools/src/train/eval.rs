//! Validation: bits per byte of held-out text, by source and over the mix.

use std::f64::consts::LN_2;

use super::backend::Backend;
use super::batches::Feed;

/// The score of one source.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The source.
    pub source: String,
    /// Sum of the cross-entropies of all targets, in nats.
    pub nats: f64,
    /// Targets.
    pub tokens: f64,
    /// Bytes of text that the targets stand for.
    pub bytes: u64,
}

impl Score {
    /// Bits per byte.
    pub fn bpb(&self) -> f64 {
        self.nats / (LN_2 * self.bytes as f64)
    }

    /// Nats per token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens
    }
}

/// All scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// In the order of the feed; sources without held-out text are left out.
    pub scores: Vec<Score>,
    /// Nats per token of the mix.
    pub loss: f64,
    /// Bits per byte of the mix.
    pub bpb: f64,
}

/// How held-out text is read.
#[derive(Clone, Copy, Debug)]
pub struct EvalShape {
    /// Sequences that go through the model together.
    pub rows: usize,
    /// Tokens in each.
    pub seq: usize,
    /// Tokens of a source at most, in whole batches; 0 = all.
    pub max_tokens: usize,
}

/// Scores every source. `shares` are the sources' shares of tokens in the whole run, so that the number of the mix
/// means the same thing in all phases. `None` where nothing is held out.
///
/// # Errors
/// A faulty shard, or a fault of the device.
pub fn evaluate(
    backend: &mut dyn Backend,
    feed: &dyn Feed,
    shares: &[f64],
    shape: EvalShape,
) -> anyhow::Result<Option<Evaluation>> {
    let (mut scores, mut used) = (Vec::new(), Vec::new());
    for (index, source) in feed.sources().into_iter().enumerate() {
        let mut score = Score { source, nats: 0.0, tokens: 0.0, bytes: 0 };
        for batch in feed.held_out(index, shape.rows, shape.seq) {
            let (batch, bytes) = batch?;
            score.nats += backend.evaluate(&batch.view())?;
            score.tokens += batch.weight();
            score.bytes += bytes;
            if shape.max_tokens > 0 && score.tokens >= shape.max_tokens as f64 {
                break;
            }
        }
        if score.bytes > 0 {
            used.push(shares.get(index).copied().unwrap_or(0.0));
            scores.push(score);
        }
    }
    Ok(mix(scores, &used))
}

/// The numbers of the mix: a token of it is of source s with probability `shares[s]`.
fn mix(scores: Vec<Score>, shares: &[f64]) -> Option<Evaluation> {
    let total: f64 = shares.iter().sum();
    if total <= 0.0 {
        return None;
    }
    let mean = |value: &dyn Fn(&Score) -> f64| -> f64 {
        scores.iter().zip(shares).map(|(s, share)| share / total * value(s) / s.tokens).sum()
    };
    let (loss, bytes) = (mean(&|s| s.nats), mean(&|s| s.bytes as f64));
    Some(Evaluation { loss, bpb: loss / (LN_2 * bytes), scores })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sources in equal shares: 1 bit a token at 4 bytes a token, and 3 bits a token at 2 bytes a token:
    /// 2 bits a token at 3 bytes a token.
    #[test]
    fn the_mix_is_weighted_by_tokens() {
        let score = |bits: f64, bytes| Score { source: String::new(), nats: bits * LN_2 * 10.0, tokens: 10.0, bytes };
        let e = mix(vec![score(1.0, 40), score(3.0, 20)], &[0.3, 0.3]).unwrap();
        assert!((e.bpb - 2.0 / 3.0).abs() < 1e-12 && (e.loss - 2.0 * LN_2).abs() < 1e-12, "{e:?}");
        assert!((e.scores[0].bpb() - 0.25).abs() < 1e-12 && (e.scores[1].bpb() - 1.5).abs() < 1e-12);
        assert!(mix(vec![], &[]).is_none());
    }
}
