//! The chunked scan of Mamba-2.

use super::{Products, ROOM, THREADS, column_sum, elementwise, exact, int, room};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Steps of a chunk.
pub const CHUNK: usize = 64;
/// Channels of a head, at most.
pub const MAX_HEAD: usize = 64;
/// Widths of the state that the kernels are compiled for; others are padded.
pub const STATES: [usize; 2] = [64, 128];
/// Heads whose gradients of B and C one block adds up.
const HEADS_EACH: usize = 8;

/// Sizes of a scan.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names of the model configuration")]
pub struct Shape {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub d_state: usize,
}

impl Shape {
    /// Rows of every activation.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// Channels of x and y.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    fn width(&self) -> usize {
        self.inner() + 2 * self.d_state
    }

    fn chunks(&self) -> usize {
        self.seq.div_ceil(CHUNK)
    }

    /// Chunks of all heads of all sequences: elements of `decay` and of the shares of small gradients.
    pub fn chunk_heads(&self) -> usize {
        self.batch * self.chunks() * self.heads
    }

    /// Elements of the states at the entry of every chunk `[batch, chunks, heads, head_dim, d_state]`.
    pub fn states_len(&self) -> usize {
        self.chunk_heads() * self.head_dim * self.d_state
    }

    fn groups(&self) -> usize {
        self.heads.div_ceil(HEADS_EACH)
    }

    /// Elements of the head groups' shares of the gradients of B and C.
    pub fn dbc_len(&self) -> usize {
        self.groups() * self.tokens() * 2 * self.d_state
    }

    /// The compiled width of the state; `None` where a head or the state is wider than all.
    pub fn compiled_states(&self) -> Option<usize> {
        STATES.into_iter().find(|n| self.d_state <= *n && self.head_dim <= MAX_HEAD)
    }

    fn sizes(&self) -> [Arg; 4] {
        [self.seq, self.heads, self.head_dim, self.d_state].map(int)
    }

    /// The launch of a block a chunk and `across` heads or groups, and which of the four kernels it is.
    fn launch(
        &self,
        products: Products,
        across: usize,
        state_tiles: u32,
        head_tiles: u32,
        bytes: u32,
    ) -> (Launch, usize) {
        let n = self.compiled_states().expect("checked when the plan was made");
        let chunk = CHUNK as u32;
        let shared =
            state_tiles * products.tile_bytes(chunk, n as u32) + head_tiles * products.tile_bytes(chunk, chunk) + bytes;
        let grid = [across as u32, self.chunks() as u32, self.batch as u32];
        (Launch { grid, threads: THREADS, shared }, products.pick(0, 2) + (n == STATES[1]) as usize)
    }

    fn pass(&self, dev: &mut dyn Device, states: Buf, decay: Buf, backward: bool) -> Result<()> {
        let state_len = self.head_dim * self.d_state;
        let args = [
            exact(states, Dtype::F32, self.states_len()),
            exact(decay, Dtype::F32, self.chunk_heads()),
            int(self.batch),
            int(self.chunks()),
            int(self.heads),
            int(state_len),
            int(backward as usize),
        ];
        dev.launch("ssd_pass", elementwise(self.batch * self.heads * state_len), &args)
    }
}

/// What the scan reads.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// x, B and C `[tokens, inner + 2 d_state]`
    pub xbc: Buf,
    /// Step sizes `[tokens, heads]`
    pub dt: Buf,
    /// `[heads]`
    pub a_log: Buf,
    /// `d` `[heads]`
    pub skip: Buf,
}

/// What the backward needs of the forward.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// States at the entry of every chunk
    pub states: Buf,
    /// What is left of them at its end, a factor a head
    pub decay: Buf,
}

/// `y` `[tokens, inner]`, and what the backward needs.
///
/// # Errors
/// A fault of the device.
pub fn forward(dev: &mut dyn Device, products: Products, s: Shape, x: Input, saved: Saved, y: Buf) -> Result<()> {
    let (xbc, dt) = (room(x.xbc, s.tokens() * s.width()), exact(x.dt, Dtype::F32, s.tokens() * s.heads));
    let (a_log, skip) = (exact(x.a_log, Dtype::F32, s.heads), exact(x.skip, Dtype::F32, s.heads));
    let states = exact(saved.states, Dtype::F32, s.states_len());
    let [seq, heads, head_dim, d_state] = s.sizes();

    const STATES: [&str; 4] = ["ssd_states_f32_64", "ssd_states_f32_128", "ssd_states_bf16_64", "ssd_states_bf16_128"];
    let (launch, kernel) = s.launch(products, s.heads, 1, 1, 3 * 4 * CHUNK as u32);
    let args = [xbc, dt, a_log, seq, heads, head_dim, d_state, states, exact(saved.decay, Dtype::F32, s.chunk_heads())];
    dev.launch(STATES[kernel], launch, &args)?;
    s.pass(dev, saved.states, saved.decay, false)?;

    const SCAN: [&str; 4] = ["ssd_scan_f32_64", "ssd_scan_f32_128", "ssd_scan_bf16_64", "ssd_scan_bf16_128"];
    let (launch, kernel) = s.launch(products, s.heads, 2, 2, 2 * 4 * CHUNK as u32);
    let y = room(y, s.tokens() * s.inner());
    dev.launch(SCAN[kernel], launch, &[xbc, dt, a_log, skip, states, seq, heads, head_dim, d_state, y])
}

/// Buffers of the backward that live for it alone.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// Gradients of the states, `states_len`
    pub dstates: Buf,
    /// `dbc_len`
    pub dbc: Buf,
    /// Shares of the gradients of a_log, `chunk_heads`
    pub da_log: Buf,
    /// Shares of those of the skip, `chunk_heads`
    pub dskip: Buf,
}

/// Where the gradients go.
#[derive(Clone, Copy, Debug)]
pub struct Towards {
    /// As `xbc`, stored
    pub dxbc: Buf,
    /// As `dt`, stored
    pub ddt: Buf,
    /// Added
    pub a_log: Buf,
    /// Added
    pub skip: Buf,
}

/// The gradients of everything that the scan reads, from `dy` `[tokens, inner]`.
///
/// # Errors
/// A fault of the device.
#[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
pub fn backward(
    dev: &mut dyn Device,
    products: Products,
    s: Shape,
    x: Input,
    saved: Saved,
    dy: Buf,
    scratch: Scratch,
    to: Towards,
) -> Result<()> {
    let (xbc, dt) = (room(x.xbc, s.tokens() * s.width()), exact(x.dt, Dtype::F32, s.tokens() * s.heads));
    let (a_log, skip) = (exact(x.a_log, Dtype::F32, s.heads), exact(x.skip, Dtype::F32, s.heads));
    let dstates = exact(scratch.dstates, Dtype::F32, s.states_len());
    let dy = room(dy, s.tokens() * s.inner());
    let [seq, heads, head_dim, d_state] = s.sizes();

    const DSTATES: [&str; 4] =
        ["ssd_dstates_f32_64", "ssd_dstates_f32_128", "ssd_dstates_bf16_64", "ssd_dstates_bf16_128"];
    let (launch, kernel) = s.launch(products, s.heads, 1, 1, 3 * 4 * CHUNK as u32);
    dev.launch(DSTATES[kernel], launch, &[xbc, dy, dt, a_log, seq, heads, head_dim, d_state, dstates])?;
    s.pass(dev, scratch.dstates, saved.decay, true)?;

    const BACKWARD: [&str; 4] =
        ["ssd_backward_f32_64", "ssd_backward_f32_128", "ssd_backward_bf16_64", "ssd_backward_bf16_128"];
    let floats = 4 * CHUNK * (MAX_HEAD + 4) + 4 * 4 * CHUNK;
    let (launch, kernel) = s.launch(products, s.groups(), 3, 3, floats as u32 + ROOM);
    let args = [
        xbc,
        dt,
        a_log,
        skip,
        exact(saved.states, Dtype::F32, s.states_len()),
        dstates,
        exact(saved.decay, Dtype::F32, s.chunk_heads()),
        dy,
        seq,
        heads,
        head_dim,
        d_state,
        room(to.dxbc, s.tokens() * s.width()),
        exact(to.ddt, Dtype::F32, s.tokens() * s.heads),
        exact(scratch.da_log, Dtype::F32, s.chunk_heads()),
        exact(scratch.dskip, Dtype::F32, s.chunk_heads()),
        exact(scratch.dbc, Dtype::F32, s.dbc_len()),
    ];
    dev.launch(BACKWARD[kernel], launch, &args)?;

    let args = [
        exact(scratch.dbc, Dtype::F32, s.dbc_len()),
        int(s.tokens()),
        int(s.groups()),
        int(s.inner()),
        int(s.d_state),
        room(to.dxbc, s.tokens() * s.width()),
    ];
    dev.launch("ssd_sum_groups", elementwise(s.tokens() * 2 * s.d_state), &args)?;
    let chunks = s.chunk_heads() / s.heads;
    column_sum(dev, scratch.da_log, chunks, s.heads, to.a_log)?;
    column_sum(dev, scratch.dskip, chunks, s.heads, to.skip)
}
