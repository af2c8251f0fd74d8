//! RmsNorm with the int8 quantiser, and its backward.

use super::{Columns, ROOM, Rows, THREADS, column_sum, exact, int, padded, room, rows_each};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// What is normed.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// `x`, float32 or bf16
    Plain(Columns),
    /// `y ⊙ silu(z)`
    Gated(Columns, Columns),
    /// `relu(gate)² ⊙ up`
    Squared(Columns, Columns),
}

impl Source {
    fn args(&self, rows: usize, width: usize) -> [Arg; 4] {
        match self {
            Source::Plain(x) => [x.floats(rows, width), int(x.stride), Arg::Null, int(0)],
            Source::Gated(a, b) | Source::Squared(a, b) => {
                assert_eq!(a.buf.dtype, Dtype::F32);
                [a.floats(rows, width), int(a.stride), b.arg(rows, width), int(b.stride)]
            }
        }
    }
}

/// Norm and quantiser of `rows` rows of `gain.len` channels. `normed`, when given, receives the float rows too.
///
/// # Errors
/// A fault of the device.
pub fn quantize(
    dev: &mut dyn Device,
    source: Source,
    gain: Buf,
    eps: f32,
    out: Rows,
    normed: Option<Buf>,
) -> Result<()> {
    let (rows, width) = (out.rstd.len, gain.len);
    let codes = exact(out.codes, Dtype::I8, rows * padded(width));
    norm(dev, source, gain, eps, (codes, exact(out.scales, Dtype::F32, rows)), out.rstd, normed)
}

/// Norm alone: `normed` `[rows, width]`, `rstd` `[rows]`.
///
/// # Errors
/// A fault of the device.
pub fn normalize(dev: &mut dyn Device, source: Source, gain: Buf, eps: f32, rstd: Buf, normed: Buf) -> Result<()> {
    norm(dev, source, gain, eps, (Arg::Null, Arg::Null), rstd, Some(normed))
}

fn norm(
    dev: &mut dyn Device,
    source: Source,
    gain: Buf,
    eps: f32,
    (codes, scales): (Arg, Arg),
    rstd: Buf,
    normed: Option<Buf>,
) -> Result<()> {
    let (rows, width) = (rstd.len, gain.len);
    let kernel = match source {
        Source::Plain(_) => "norm_plain",
        Source::Gated(..) => "norm_gated",
        Source::Squared(..) => "norm_squared",
    };
    let [a, stride_a, b, stride_b] = source.args(rows, width);
    let normed = normed.map_or(Arg::Null, |n| room(n, rows * width));
    let args = [
        a,
        stride_a,
        b,
        stride_b,
        exact(gain, Dtype::F32, width),
        Arg::Float(eps),
        int(rows),
        int(width),
        int(padded(width)),
        codes,
        scales,
        exact(rstd, Dtype::F32, rows),
        normed,
    ];
    dev.launch(kernel, Launch { grid: [rows as u32, 1, 1], threads: THREADS, shared: ROOM }, &args)
}

/// Elements of [`backward`]'s `partials`.
pub fn partials_len(rows: usize, width: usize) -> usize {
    rows.div_ceil(rows_each(rows)) * width
}

/// From `dn` `[rows, width]`, the gradient of the norm's output, to those of its source: `to.0` (of x, y, or gate; added where
/// `add`, for x alone; otherwise `dn` may lie in the same place), and `to.1` (of z or up). The gain's is added to `dgain`.
///
/// # Errors
/// A fault of the device.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn backward(
    dev: &mut dyn Device,
    source: Source,
    gain: Buf,
    rstd: Buf,
    dn: Buf,
    to: (Columns, Option<Columns>),
    add: bool,
    partials: Buf,
    dgain: Buf,
) -> Result<()> {
    let (rows, width) = (rstd.len, gain.len);
    let kernel = match (source, to.1) {
        (Source::Plain(_), None) => "norm_backward_plain",
        (Source::Gated(..), Some(_)) => "norm_backward_gated",
        (Source::Squared(..), Some(_)) => "norm_backward_squared",
        _ => panic!("a product has two gradients, a plain row one"),
    };
    let [a, stride_a, b, stride_b] = source.args(rows, width);
    let (db, stride_db) = to.1.map_or((Arg::Null, int(0)), |c| (c.arg(rows, width), int(c.stride)));
    let each = rows_each(rows);
    let blocks = rows.div_ceil(each);
    let args = [
        a,
        stride_a,
        b,
        stride_b,
        exact(gain, Dtype::F32, width),
        exact(rstd, Dtype::F32, rows),
        room(dn, rows * width),
        int(rows),
        int(width),
        int(each),
        to.0.arg(rows, width),
        int(to.0.stride),
        db,
        stride_db,
        int(add as usize),
        room(partials, blocks * width),
    ];
    dev.launch(kernel, Launch { grid: [blocks as u32, 1, 1], threads: THREADS, shared: ROOM }, &args)?;
    column_sum(dev, partials, blocks, width, dgain)
}
