//! How a run uses a card's memory: how many sequences at once, which activations are kept, where the running mean lives.
//!
//! None of it changes what is computed, but the order in which gradients are added. What is not set is chosen: passes of at least
//! `SATURATED` tokens, then the fewest layers computed twice, then the most sequences, then operands that are kept. (That so many tokens keep a card busy is an
//! estimate; no card has measured it yet.)

use std::fmt::Write;

use elleci_core::model::Checkpointing;
use elleci_cuda::arena::{Arena, Use};
use elleci_cuda::device::{Ability, DeviceError};
use elleci_cuda::ops::Products;
use elleci_cuda::ops::product::Gemm;
use elleci_cuda::plan::{Options, Plan as DevicePlan};

use super::super::backend::pass_rows;
use super::super::config::{CudaFloat, CudaGemm, CudaProducts, CudaTernary, RunConfig};
use super::super::plan::{Plan, checkpointing, largest_micro_batch, precision};

/// Tokens from which on more at once are taken to be no faster.
const SATURATED: usize = 4096;

/// Where the running mean of the weights is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mean {
    /// On the device, or nowhere.
    Device,
    /// In the host's memory: every step that is averaged copies the weights there.
    Host,
}

/// How a run uses a device.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The largest pass, and the form of the step.
    pub options: Options,
    /// Where the running mean is.
    pub mean: Mean,
    /// Bytes of the device's memory that the run takes at most.
    pub bytes: u64,
    /// The plan of the largest pass.
    pub arena: Arena,
}

/// Layers whose forward is computed twice when `segment` of `n` layers stand in memory together.
fn recomputed(n: usize, segment: usize) -> usize {
    (n.div_ceil(segment) - 1) * segment
}

/// Segments that are worth a choice, the fastest first: a longer one that recomputes no fewer layers only takes memory.
fn segments(n: usize) -> Vec<usize> {
    let mut out: Vec<usize> = Vec::new();
    for segment in 1..=n {
        if out.last().is_none_or(|last| recomputed(n, segment) < recomputed(n, *last)) {
            out.push(segment);
        }
    }
    out.reverse();
    out
}

/// A segment as the configuration would say it.
fn kept(n: usize, segment: usize) -> Checkpointing {
    match segment {
        1 => Checkpointing::EveryLayer,
        s if s >= n => Checkpointing::None,
        s => Checkpointing::EveryKth(s),
    }
}

/// All forms of checkpointing that are worth a choice, the fastest first.
pub fn forms(n: usize) -> Vec<Checkpointing> {
    segments(n).into_iter().map(|segment| kept(n, segment)).collect()
}

/// What a run of a configuration may look like.
struct Candidate {
    rows: usize,
    segment: usize,
    unpacked: bool,
    mean: Mean,
}

fn candidates(config: &RunConfig, schedule: &Plan) -> Vec<Candidate> {
    let n = config.model.n_layers;
    let segments = checkpointing(config).map_or_else(|| segments(n), |c| vec![c.segment(n)]);
    let (batch, seq) = largest_micro_batch(config, schedule);
    let mut rows: Vec<usize> = match config.cuda.rows {
        0 => (1..=batch).rev().filter(|r| batch.is_multiple_of(*r)).collect(),
        given => vec![pass_rows(batch, seq, given * seq)],
    };
    rows.dedup();
    let busy = |r: usize| r == rows[0] || r * seq >= SATURATED;
    let (many, few): (Vec<usize>, Vec<usize>) = rows.iter().partition(|r| busy(**r));
    let fast = segments.iter().flat_map(|s| many.iter().map(move |r| (*r, *s)));
    let small = few.iter().flat_map(|r| segments.iter().map(move |s| (*r, *s)));
    let shapes: Vec<_> = fast.chain(small).collect();
    let forms: &[bool] = match config.cuda.ternary {
        CudaTernary::Auto => &[true, false],
        CudaTernary::Packed => &[false],
        CudaTernary::Unpacked => &[true],
    };
    let shapes: Vec<_> = shapes.iter().flat_map(|s| forms.iter().map(move |form| (*s, *form))).collect();
    let places: &[Mean] = if config.swa.start < 1.0 { &[Mean::Device, Mean::Host] } else { &[Mean::Device] };
    places
        .iter()
        .flat_map(|m| shapes.iter().map(|((r, s), u)| Candidate { rows: *r, segment: *s, unpacked: *u, mean: *m }))
        .collect()
}

fn options(config: &RunConfig, candidate: &Candidate, seq: usize) -> Options {
    let is_bf16 = |f: CudaFloat| f == CudaFloat::Bf16;
    Options {
        batch: candidate.rows,
        seq,
        whole_step: false,
        checkpointing: kept(config.model.n_layers, candidate.segment),
        bf16_masters: is_bf16(config.cuda.masters),
        bf16_gradients: is_bf16(config.cuda.gradients),
        states: precision(config),
        products: match config.cuda.products {
            CudaProducts::Float32 => Products::F32,
            CudaProducts::Bf16 => Products::Bf16,
            CudaProducts::Fp8 => Products::Fp8,
        },
        unpacked: candidate.unpacked,
        // Where it is not known yet, the one that takes more memory.
        gemm: if config.cuda.gemm == CudaGemm::Own { Gemm::Own } else { Gemm::Library },
        bf16_stream: is_bf16(config.cuda.stream),
        average: config.swa.start < 1.0 && candidate.mean == Mean::Device,
        guard: 0,
    }
}

/// A candidate with its memory: the largest of all passes that the run makes, evaluation included.
fn plan(config: &RunConfig, schedule: &Plan, candidate: &Candidate) -> Result<Choice, DeviceError> {
    let (_, seq) = largest_micro_batch(config, schedule);
    let tokens = candidate.rows * seq;
    let whole_step = schedule.stages().iter().all(|(shape, _)| {
        shape.micro_batches == 1 && pass_rows(shape.sequences, shape.seq_len, tokens) == shape.sequences
    });
    let options = Options { whole_step, ..options(config, candidate, seq) };
    let arena = DevicePlan::new(&config.model, options)?.arena;
    let mut bytes = arena.bytes();
    for (shape, _) in schedule.stages() {
        let batch = pass_rows(shape.rows(0), shape.seq_len, tokens);
        bytes =
            bytes.max(DevicePlan::new(&config.model, Options { batch, seq: shape.seq_len, ..options })?.arena.bytes());
    }
    let seq = config.model.max_seq_len;
    let batch = pass_rows(config.training.batch, seq, tokens);
    let evaluation = Options { batch, seq, checkpointing: Checkpointing::EveryLayer, ..options };
    bytes = bytes.max(DevicePlan::new(&config.model, evaluation)?.arena.bytes());
    Ok(Choice { options, mean: candidate.mean, bytes, arena })
}

/// The configuration for a device that offers this, and who multiplies there and why.
///
/// # Errors
/// What the configuration asks for and the device lacks, with what to set instead.
pub fn settle(
    config: &RunConfig,
    offers: impl Fn(Ability) -> Result<(), DeviceError>,
) -> Result<(RunConfig, String), DeviceError> {
    if config.cuda.products == CudaProducts::Fp8 {
        offers(Ability::Fp8)?;
    }
    let (gemm, why) = match (config.cuda.gemm, offers(Ability::Library)) {
        (CudaGemm::Own, _) => (CudaGemm::Own, "our own kernels (as asked)".to_string()),
        (CudaGemm::Auto, Err(e)) => (CudaGemm::Own, format!("our own kernels ({e})")),
        (CudaGemm::Cublaslt, Err(e)) => return Err(e),
        (asked, Ok(())) => {
            let why = if asked == CudaGemm::Auto { "it is installed" } else { "as asked" };
            (CudaGemm::Cublaslt, format!("cuBLASLt ({why})"))
        }
    };
    let mut settled = config.clone();
    settled.cuda.gemm = gemm;
    Ok((settled, format!("large products by {why}")))
}

/// The fastest way to run a configuration in `room` bytes of a device's memory.
///
/// # Errors
/// A configuration that the kernels do not cover, or that does not fit: with what it takes, and settings that would.
pub fn choose(config: &RunConfig, schedule: &Plan, room: u64) -> anyhow::Result<Choice> {
    match best(config, schedule, room)? {
        Ok(choice) => Ok(choice),
        Err(smallest) => Err(anyhow::anyhow!(too_small(config, schedule, room, smallest))),
    }
}

/// The first candidate that fits, or the bytes of the smallest.
fn best(config: &RunConfig, schedule: &Plan, room: u64) -> Result<Result<Choice, u64>, DeviceError> {
    let (mut smallest, mut refused) = (u64::MAX, None);
    for candidate in candidates(config, schedule) {
        match plan(config, schedule, &candidate) {
            Ok(choice) if choice.bytes <= room => return Ok(Ok(choice)),
            Ok(choice) => smallest = smallest.min(choice.bytes),
            // Fewer sequences may be covered where so many are not.
            Err(e) => refused = Some(e),
        }
    }
    match refused {
        Some(e) if smallest == u64::MAX => Err(e),
        _ => Ok(Err(smallest)),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// A setting that takes less memory.
struct Remedy {
    text: &'static str,
    apply: fn(&mut RunConfig),
}

/// In the order in which they cost least.
const REMEDIES: [Remedy; 7] = [
    Remedy { text: "cuda.ternary=auto", apply: |c| c.cuda.ternary = CudaTernary::Auto },
    Remedy { text: "cuda.rows=0", apply: |c| c.cuda.rows = 0 },
    Remedy { text: "training.checkpointing=auto", apply: |c| c.training.checkpointing = "auto".into() },
    Remedy { text: "cuda.gradients=bf16", apply: |c| c.cuda.gradients = CudaFloat::Bf16 },
    Remedy { text: "optimizer.states=8bit", apply: |c| c.optimizer.states = super::super::config::States::EightBit },
    Remedy { text: "cuda.masters=bf16", apply: |c| c.cuda.masters = CudaFloat::Bf16 },
    Remedy { text: "cuda.stream=bf16", apply: |c| c.cuda.stream = CudaFloat::Bf16 },
];

/// What to say of a run that does not fit: what it takes at least, what there is, and what would fit.
fn too_small(config: &RunConfig, schedule: &Plan, room: u64, smallest: u64) -> String {
    let mut text = format!(
        "the run takes {:.2} GiB of the card's memory at least, and {:.2} GiB are free for it (nvidia-smi lists the processes on it)",
        gib(smallest),
        gib(room)
    );
    // One setting if one is enough, else all up to the first that is.
    let fits = |c: &RunConfig| matches!(best(c, schedule, room), Ok(Ok(_)));
    let with = |remedies: &[&Remedy]| {
        let mut changed = config.clone();
        remedies.iter().for_each(|r| (r.apply)(&mut changed));
        changed
    };
    let useful: Vec<&Remedy> = REMEDIES.iter().filter(|r| with(&[r]) != *config).collect();
    let single = useful.iter().find(|r| fits(&with(&[r]))).map(|r| vec![*r]);
    let several = || (1..=useful.len()).map(|n| useful[..n].to_vec()).find(|r| fits(&with(r)));
    let words =
        |remedies: Vec<&Remedy>| remedies.iter().map(|r| format!("--set {}", r.text)).collect::<Vec<_>>().join(" ");
    match single.or_else(several) {
        Some(remedies) => _ = write!(text, "; it fits with {}", words(remedies)),
        None => {
            let least = match best(&with(&useful), schedule, 0) {
                Ok(Err(bytes)) => format!(": it needs {:.2} GiB with all that save memory", gib(bytes)),
                _ => String::new(),
            };
            _ = write!(
                text,
                "; no setting makes it fit{least}. Take a larger card, a smaller --preset, or --device cpu"
            );
        }
    }
    text
}

/// Lines of a device's memory by use, for `--dry-run`.
pub fn describe(config: &RunConfig, choice: &Choice) -> String {
    let Options { batch, seq, checkpointing, .. } = choice.options;
    let activations = match checkpointing {
        Checkpointing::None => "all activations kept".to_string(),
        Checkpointing::EveryLayer => "the input of every layer kept".to_string(),
        Checkpointing::EveryKth(k) => format!("the input of one layer in {k} kept"),
    };
    let mut out = format!("Card         a pass of {batch} x {seq} tokens, {activations}:\n");
    let float = |f: CudaFloat| if f == CudaFloat::Bf16 { "bf16" } else { "float32" };
    let masters = format!("matrices {}", float(config.cuda.masters));
    let gradients = format!("of matrices {}", float(config.cuda.gradients));
    let lent = match choice.arena.lent_to(Use::Activations) {
        0 => String::new(),
        bytes => format!("beside {:.3} GiB in the memory of gradients, which come later in the step", gib(bytes)),
    };
    let rows = [
        ("weights", Use::Weights, masters.as_str()),
        (
            "ternary forms",
            Use::Ternary,
            if choice.options.unpacked { "2 bits a weight, and operands of products" } else { "2 bits a weight" },
        ),
        ("gradients", Use::Gradients, gradients.as_str()),
        ("optimizer states", Use::Optimizer, ""),
        (
            "running mean of the weights",
            Use::Average,
            if choice.mean == Mean::Host { "in the host's memory" } else { "" },
        ),
        ("activations", Use::Activations, lent.as_str()),
        ("scratch", Use::Scratch, "logits in chunks, the batch, tables"),
    ];
    for (what, purpose, note) in rows {
        _ = writeln!(out, "  {what:<30}{:>9.3} GiB  {note}", gib(choice.arena.bytes_of(purpose)));
    }
    let more = match choice.bytes > choice.arena.bytes() {
        true => format!("; {:.3} GiB while it evaluates sequences of {}", gib(choice.bytes), config.model.max_seq_len),
        false => String::new(),
    };
    _ = writeln!(
        out,
        "  {:<30}{:>9.3} GiB  what is asked of the driver, once{more}",
        "total",
        gib(choice.arena.bytes())
    );
    out
}

#[cfg(test)]
mod tests;
