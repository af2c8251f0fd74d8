//! The short convolution and the step sizes of a Mamba-2 mixer.

use super::{THREADS, column_sum, elementwise, exact, int, room, rows_each};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Sizes of the convolution, and of the projections that its input lies in: x is the second half of `zx`
/// `[tokens, 2 inner]`, B and C are the first columns of `bcdt` `[tokens, 2 d_state + heads]`.
#[derive(Clone, Copy, Debug)]
pub struct ConvShape {
    /// Rows
    pub tokens: usize,
    /// Tokens of a sequence
    pub seq: usize,
    /// Channels of x
    pub inner: usize,
    /// Channels of B and of C
    pub d_state: usize,
    /// Heads of dt
    pub heads: usize,
    /// Length of the filters
    pub taps: usize,
}

impl ConvShape {
    /// x, B and C.
    pub fn channels(&self) -> usize {
        self.inner + 2 * self.d_state
    }

    /// Columns of `bcdt`.
    pub fn bcdt_width(&self) -> usize {
        2 * self.d_state + self.heads
    }

    fn args(&self) -> [Arg; 6] {
        [self.tokens, self.seq, self.channels(), self.inner, self.taps, self.bcdt_width()].map(int)
    }

    fn inputs(&self, zx: Buf, bcdt: Buf) -> [Arg; 2] {
        [room(zx, self.tokens * 2 * self.inner), room(bcdt, self.tokens * self.bcdt_width())]
    }

    fn launch(&self) -> Launch {
        let grid = [self.channels().div_ceil(THREADS as usize) as u32, self.tokens as u32, 1];
        Launch { grid, threads: THREADS, shared: 0 }
    }

    /// Elements of [`conv_backward`]'s `partials`.
    pub fn conv_partials_len(&self) -> usize {
        self.tokens.div_ceil(rows_each(self.tokens)) * self.channels() * (self.taps + 1)
    }

    /// Elements of [`step_sizes_backward`]'s `partials`.
    pub fn step_partials_len(&self) -> usize {
        self.tokens.div_ceil(rows_each(self.tokens)) * self.heads
    }
}

/// Filters and bias of the convolution: `[channels, taps]` and `[channels]`.
#[derive(Clone, Copy, Debug)]
pub struct Filters {
    /// Tap 0 is the oldest
    pub weight: Buf,
    /// One a channel
    pub bias: Buf,
}

impl Filters {
    fn args(&self, s: &ConvShape) -> [Arg; 2] {
        [exact(self.weight, Dtype::F32, s.channels() * s.taps), exact(self.bias, Dtype::F32, s.channels())]
    }
}

fn joined<const N: usize>(parts: [&[Arg]; N]) -> Vec<Arg> {
    parts.concat()
}

/// `out` `[tokens, channels] = silu(conv(x, B, C))`.
///
/// # Errors
/// A fault of the device.
pub fn conv_silu(dev: &mut dyn Device, s: ConvShape, zx: Buf, bcdt: Buf, filters: Filters, out: Buf) -> Result<()> {
    let out = room(out, s.tokens * s.channels());
    let args = joined([&s.inputs(zx, bcdt), &filters.args(&s), &s.args(), &[out]]);
    dev.launch("conv_silu", s.launch(), &args)
}

/// From `dout` `[tokens, channels]` (overwritten) to the gradients of the input, in the places of `dzx` and `dbcdt` where it lies
/// in the projections; those of the filters are added to `dfilters`.
///
/// # Errors
/// A fault of the device.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn conv_backward(
    dev: &mut dyn Device,
    s: ConvShape,
    zx: Buf,
    bcdt: Buf,
    filters: Filters,
    dout: Buf,
    (dzx, dbcdt): (Buf, Buf),
    partials: Buf,
    dfilters: Filters,
) -> Result<()> {
    let d = room(dout, s.tokens * s.channels());
    let args = joined([&s.inputs(zx, bcdt), &filters.args(&s), &s.args(), &[d]]);
    dev.launch("conv_silu_pre", s.launch(), &args)?;

    let each = rows_each(s.tokens);
    let blocks = s.tokens.div_ceil(each);
    let launch = Launch { grid: [s.launch().grid[0], blocks as u32, 1], ..s.launch() };
    let width = s.channels() * (s.taps + 1);
    let args = joined([&s.inputs(zx, bcdt), &[d], &s.args(), &[int(each), room(partials, blocks * width)]]);
    dev.launch("conv_dw", launch, &args)?;
    // A row of partials holds the taps, then the bias; both parameters lie apart.
    let taps = s.channels() * s.taps;
    column_sum_part(dev, partials, blocks, (0, taps, width), dfilters.weight)?;
    column_sum_part(dev, partials, blocks, (taps, s.channels(), width), dfilters.bias)?;

    let args = joined([&[d, filters.args(&s)[0]], &s.args(), &s.inputs(dzx, dbcdt)]);
    dev.launch("conv_dx", s.launch(), &args)
}

/// [`column_sum`] of columns `from..from + len` of rows of `width`.
fn column_sum_part(
    dev: &mut dyn Device,
    partials: Buf,
    rows: usize,
    (from, len, width): (usize, usize, usize),
    out: Buf,
) -> Result<()> {
    let args = [
        Arg::Buf(partials.part(from, rows * width - from)),
        int(rows),
        int(len),
        int(width),
        exact(out, Dtype::F32, len),
    ];
    dev.launch("column_sum_part", elementwise(len), &args)
}

/// `dt` `[tokens, heads] = softplus(raw + bias)`, raw being the last columns of `bcdt`.
///
/// # Errors
/// A fault of the device.
pub fn step_sizes(dev: &mut dyn Device, s: ConvShape, bcdt: Buf, bias: Buf, dt: Buf) -> Result<()> {
    let args = [
        room(bcdt, s.tokens * s.bcdt_width()),
        exact(bias, Dtype::F32, s.heads),
        int(s.tokens),
        int(s.heads),
        int(s.bcdt_width()),
        exact(dt, Dtype::F32, s.tokens * s.heads),
    ];
    dev.launch("step_sizes", elementwise(s.tokens * s.heads), &args)
}

/// From `ddt` to the gradient of the raw step sizes, in the last columns of `dbcdt`; the bias's is added to `dbias`.
///
/// # Errors
/// A fault of the device.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn step_sizes_backward(
    dev: &mut dyn Device,
    s: ConvShape,
    bcdt: Buf,
    bias: Buf,
    ddt: Buf,
    dbcdt: Buf,
    partials: Buf,
    dbias: Buf,
) -> Result<()> {
    let each = rows_each(s.tokens);
    let blocks = s.tokens.div_ceil(each);
    let width = s.tokens * s.bcdt_width();
    let args = [
        room(bcdt, width),
        exact(bias, Dtype::F32, s.heads),
        room(ddt, s.tokens * s.heads),
        int(s.tokens),
        int(s.heads),
        int(s.bcdt_width()),
        int(each),
        room(dbcdt, width),
        room(partials, blocks * s.heads),
    ];
    let grid = [s.heads.div_ceil(THREADS as usize) as u32, blocks as u32, 1];
    dev.launch("step_sizes_backward", Launch { grid, threads: THREADS, shared: 0 }, &args)?;
    column_sum(dev, partials, blocks, s.heads, dbias)
}
