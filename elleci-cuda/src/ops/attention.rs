//! Causal attention over MLA's pieces, and the rotation of queries and keys.

use super::{Products, THREADS, elementwise, exact, int, room};
use crate::arena::{Buf, Dtype};
use crate::device::{Arg, Device, Launch, Result};

/// Queries or keys of a block.
const BLOCK: u32 = 64;
/// Widths that the kernels are compiled for; heads are padded to the next.
pub const WIDTHS: [usize; 2] = [64, 128];

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names of the model configuration")]
pub struct Heads {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub d_nope: usize,
    pub d_rope: usize,
    pub d_v: usize,
    pub kv_rank: usize,
}

/// What attention reads, as in `elleci_core::ops::attention`.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// `[tokens, heads * (d_nope + d_rope)]`, rotated
    pub q: Buf,
    /// `[tokens, heads * (d_nope + d_v)]`
    pub kv: Buf,
    /// `[tokens, kv_rank + d_rope]`: the latent, then the rotated shared key
    pub ckr: Buf,
}

/// What the backward reads of the forward and of its output's gradient.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Log-sum-exp of every row `[batch, heads, seq]`
    pub lse: Buf,
    /// The output `[tokens, heads * d_v]`
    pub o: Buf,
    /// Its gradient
    pub d_o: Buf,
    /// Scratch `[batch, heads, seq]`
    pub delta: Buf,
}

/// Where the gradients go.
#[derive(Clone, Copy, Debug)]
pub struct Towards {
    /// As `q`
    pub dq: Buf,
    /// As `kv`
    pub dkv: Buf,
    /// Each head's share of the shared key's gradient `[heads, tokens, d_rope]`
    pub dkr_heads: Buf,
}

impl Heads {
    /// Rows of every buffer.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    fn row_q(&self) -> usize {
        self.heads * (self.d_nope + self.d_rope)
    }

    fn row_kv(&self) -> usize {
        self.heads * (self.d_nope + self.d_v)
    }

    /// The compiled width for these heads; `None` where they are wider than all.
    pub fn width(&self) -> Option<usize> {
        WIDTHS.into_iter().find(|w| self.d_nope + self.d_rope <= *w && self.d_v <= *w)
    }

    fn scale(&self) -> f32 {
        1.0 / ((self.d_nope + self.d_rope) as f32).sqrt()
    }

    fn args(&self, input: Input) -> Vec<Arg> {
        let t = self.tokens();
        let mut args = vec![
            room(input.q, t * self.row_q()),
            room(input.kv, t * self.row_kv()),
            room(input.ckr, t * (self.kv_rank + self.d_rope)),
        ];
        args.extend([self.seq, self.heads, self.d_nope, self.d_rope, self.d_v, self.kv_rank].map(int));
        args.push(Arg::Float(self.scale()));
        args
    }

    /// The launch of a block of rows a block, and which of `[f32_64, f32_128, bf16_64, bf16_128]` it is.
    fn launch(&self, products: Products, wide_tiles: u32, square_tiles: u32, floats: u32) -> (Launch, usize) {
        let width = self.width().expect("checked when the plan was made");
        let shared = wide_tiles * products.tile_bytes(BLOCK, width as u32)
            + square_tiles * products.tile_bytes(BLOCK, BLOCK)
            + 4 * floats;
        let grid = [self.seq.div_ceil(BLOCK as usize) as u32, self.heads as u32, self.batch as u32];
        (Launch { grid, threads: THREADS, shared }, products.pick(0, 2) + (width == WIDTHS[1]) as usize)
    }
}

/// `o` `[tokens, heads * d_v]` and `lse` `[batch, heads, seq]`.
///
/// # Errors
/// A fault of the device.
pub fn forward(dev: &mut dyn Device, products: Products, h: Heads, input: Input, o: Buf, lse: Buf) -> Result<()> {
    const KERNELS: [&str; 4] = [
        "attention_forward_f32_64",
        "attention_forward_f32_128",
        "attention_forward_bf16_64",
        "attention_forward_bf16_128",
    ];
    let (launch, kernel) = h.launch(products, 3, 1, BLOCK * (BLOCK + 4) + 3 * BLOCK);
    let mut args = h.args(input);
    args.extend([room(o, h.tokens() * h.heads * h.d_v), exact(lse, Dtype::F32, h.tokens() * h.heads)]);
    dev.launch(KERNELS[kernel], launch, &args)
}

/// The gradients of queries, keys and values.
///
/// # Errors
/// A fault of the device.
pub fn backward(
    dev: &mut dyn Device,
    products: Products,
    h: Heads,
    input: Input,
    out: Output,
    towards: Towards,
) -> Result<()> {
    let (t, rows) = (h.tokens(), h.tokens() * h.heads);
    let o_len = t * h.heads * h.d_v;
    let (lse, delta) = (exact(out.lse, Dtype::F32, rows), exact(out.delta, Dtype::F32, rows));
    let args = [room(out.o, o_len), room(out.d_o, o_len), int(t), int(h.seq), int(h.heads), int(h.d_v), delta];
    let warps = THREADS as usize / 32;
    let launch = Launch { grid: [rows.div_ceil(warps) as u32, 1, 1], threads: THREADS, shared: 0 };
    dev.launch("attention_delta", launch, &args)?;

    const DQ: [&str; 4] =
        ["attention_dq_f32_64", "attention_dq_f32_128", "attention_dq_bf16_64", "attention_dq_bf16_128"];
    let (launch, kernel) = h.launch(products, 4, 1, 2 * BLOCK);
    let mut args = h.args(input);
    args.extend([lse, delta, room(out.d_o, o_len), room(towards.dq, t * h.row_q())]);
    dev.launch(DQ[kernel], launch, &args)?;

    const DKV: [&str; 4] =
        ["attention_dkv_f32_64", "attention_dkv_f32_128", "attention_dkv_bf16_64", "attention_dkv_bf16_128"];
    let (launch, kernel) = h.launch(products, 4, 2, 2 * BLOCK);
    let mut args = h.args(input);
    args.extend([lse, delta, room(out.d_o, o_len), room(towards.dkv, t * h.row_kv())]);
    args.push(room(towards.dkr_heads, rows * h.d_rope));
    dev.launch(DKV[kernel], launch, &args)
}

/// The last channels of `dckr` rows `[tokens, kv_rank + d_rope]`: the heads' shares, summed.
///
/// # Errors
/// A fault of the device.
pub fn sum_heads(dev: &mut dyn Device, h: Heads, dkr_heads: Buf, dckr: Buf) -> Result<()> {
    let t = h.tokens();
    let args = [
        room(dkr_heads, t * h.heads * h.d_rope),
        int(t),
        int(h.heads),
        int(h.kv_rank),
        int(h.d_rope),
        room(dckr, t * (h.kv_rank + h.d_rope)),
    ];
    dev.launch("sum_heads", elementwise(t * h.d_rope), &args)
}

/// The channels of a row that are rotated: `d_rope` at `offset` of each of `groups` groups of `group`.
#[derive(Clone, Copy, Debug)]
pub struct Rotated {
    /// Groups of a row
    pub groups: usize,
    /// Channels of a group
    pub group: usize,
    /// The first that is rotated
    pub offset: usize,
}

/// Rotates in place by `table` `[2, seq, d_rope / 2]` (cosines, sines); back where `inverse`.
///
/// # Errors
/// A fault of the device.
pub fn rotate(dev: &mut dyn Device, h: Heads, data: Buf, at: Rotated, table: Buf, inverse: bool) -> Result<()> {
    let t = h.tokens();
    let args = [
        room(data, t * at.groups * at.group),
        exact(table, Dtype::F32, h.seq * h.d_rope),
        int(t),
        int(h.seq),
        int(at.groups),
        int(at.group),
        int(at.offset),
        int(h.d_rope),
        Arg::Float(if inverse { -1.0 } else { 1.0 }),
    ];
    dev.launch("rotate", elementwise(t * at.groups * h.d_rope / 2), &args)
}
