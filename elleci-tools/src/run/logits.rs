//! `elleci-run logits`: every logit of a batch, to hold against another implementation.

use std::path::Path;

use anyhow::{Context, ensure};
use elleci_core::inference::{Batch, Feed, Session};
use safetensors::Dtype;

use super::cli::LogitsArgs;
use super::model::OpenModel;
use crate::checkpoint::tensors::{self, Bytes, Tensor, TensorFile};
use crate::checkpoint::write_atomic;
use crate::exit::usage;
use crate::train::device::{Device, available_memory};

/// Runs the verb.
///
/// # Errors
/// Files that are missing, damaged or do not fit; [`crate::exit::Usage`] for a device that is not there.
pub fn run(args: &LogitsArgs) -> anyhow::Result<()> {
    let same = |input: &Path| Some(input.canonicalize().ok()? == args.out.canonicalize().ok()?);
    for input in args.model.model.iter().chain([&args.batch]) {
        ensure!(
            same(input) != Some(true),
            usage(format!("--out: {} would be replaced by its logits", input.display()))
        );
    }
    let device = Device::choose(&args.model.device.device, args.model.device.threads)?;
    crate::exit::errln!("{}", device.announcement);
    device.install(|| {
        let open = OpenModel::chosen(args.model.model.as_deref())?;
        crate::exit::errln!("{}", open.announcement());
        let vocab_size = open.config().vocab_size;
        let ([rows, seq], tokens) = read_batch(args, vocab_size)?;
        let (needed, free) = ((rows * seq) as u64 * vocab_size as u64 * 4, available_memory());
        ensure!(
            needed <= free,
            "--batch: the logits of {rows} x {seq} tokens are {needed} bytes, and {free} are free: give fewer at a time"
        );
        let mut logits = vec![0.0; rows * seq * vocab_size];
        let ids: Vec<u32> = tokens.iter().map(|t| *t as u32).collect();
        let mut sessions = (0..rows).map(|_| Session::new(open.packed())).collect::<Result<Vec<_>, _>>()?;
        let mut batch = Batch::new();
        // One call feeds whole sequences; with --decode there is a call for every position.
        let step = if args.decode { 1 } else { seq };
        for start in (0..seq).step_by(step) {
            let feed = |(session, row)| Feed { session, tokens: &ids[row * seq + start..][..step] };
            let mut feeds: Vec<Feed<'_>> = sessions.iter_mut().zip(0..).map(feed).collect();
            batch.extend_each(open.packed(), &mut feeds, |row, position, values| {
                let at = (row * seq + start + position) * vocab_size;
                logits[at..at + vocab_size].copy_from_slice(values);
            })?;
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        let bytes = Bytes::Ready(bytes.into());
        let results = vec![
            Tensor { name: "tokens".into(), dtype: Dtype::I64, shape: vec![rows, seq], bytes },
            Tensor::f32("logits", &[rows, seq, vocab_size], &logits),
        ];
        write_atomic(&args.out, |path| tensors::write(path, results).map(|_| ())).context("--out")?;
        crate::exit::outln!("{}", serde_json::json!({ "out": args.out, "shape": [rows, seq, vocab_size] }));
        Ok(())
    })
}

fn read_batch(args: &LogitsArgs, vocab_size: usize) -> anyhow::Result<([usize; 2], Vec<i64>)> {
    let file = TensorFile::open(&args.batch).context("--batch")?;
    let (shape, tokens) = file.read_integers("tokens").context("--batch")?;
    let at = args.batch.display();
    let &[rows, seq] = shape.as_slice() else {
        anyhow::bail!("--batch: {at}: `tokens` has shape {shape:?}; it must be [B, T]");
    };
    ensure!(rows > 0 && seq > 0, "--batch: {at}: `tokens` is empty: {shape:?}");
    if let Some(token) = tokens.iter().find(|t| !(0..vocab_size as i64).contains(t)) {
        anyhow::bail!("--batch: {at}: `tokens` holds {token}; the model's `vocab_size` is {vocab_size}");
    }
    Ok(([rows, seq], tokens))
}
