//! The residual stream in bf16: what reads and writes it does what it does in float32, to the bit, but for the rounding of what is
//! written. (The projections that add to it are in `products`.)

use elleci_cuda::arena::Dtype;
use elleci_cuda::ops::norm::{self, Source};
use elleci_cuda::ops::{Columns, Rows, loss, padded};
use half::bf16;

use crate::machine::{Bench, Numbers, read, read_bytes};

fn halves(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    (halves.iter().flat_map(|v| v.to_le_bytes()).collect(), halves.iter().map(|v| v.to_f32()).collect())
}

/// Everything that a norm leaves, forward and backward, of rows of float32 or of the same values in bf16.
fn normed(as_bf16: bool) -> (Vec<u8>, [Vec<f32>; 4]) {
    let mut numbers = Numbers::new(6);
    let (rows, width) = (7, 300);
    let (bytes, values) = halves(&numbers.vec(rows * width, 1.5));
    let gain: Vec<f32> = numbers.vec(width, 0.2).iter().map(|g| 1.0 + g).collect();
    let dn = numbers.vec(rows * width, 1.0);
    let mut bench = Bench::new();
    let x = if as_bf16 { bench.bytes(Dtype::Bf16, rows * width, bytes) } else { bench.floats(&values) };
    let (gain, dn) = (bench.floats(&gain), bench.floats(&dn));
    let out =
        Rows { codes: bench.empty(Dtype::I8, rows * padded(width)), scales: bench.room(rows), rstd: bench.room(rows) };
    let (floats, dgain) = (bench.room(rows * width), bench.floats(&vec![1.0; width]));
    let partials = bench.room(norm::partials_len(rows, width));
    let mut device = bench.start(23);
    let source = Source::Plain(Columns::all(x, width));
    norm::quantize(&mut device, source, gain, 1e-5, out, Some(floats)).unwrap();
    // The gradient in the place of what it comes from, as the step has it.
    let to = (Columns::all(dn, width), None);
    norm::backward(&mut device, source, gain, out.rstd, dn, to, false, partials, dgain).unwrap();
    let mut of = |buf| read(&mut device, buf);
    let all = [of(out.rstd), of(floats), of(dn), of(dgain)];
    (read_bytes(&mut device, out.codes), all)
}

#[test]
fn a_norm_reads_bf16_as_the_floats_that_it_stands_for() {
    assert_eq!(normed(true), normed(false));
}

#[test]
fn the_embedding_is_written_in_bf16() {
    let mut numbers = Numbers::new(7);
    let (d, tokens) = (33, [3u32, 0, 4, 3]);
    let table = numbers.vec(5 * d, 1.0);
    let mut bench = Bench::new();
    let (tokens_buf, table_buf) = (bench.words(&tokens), bench.floats(&table));
    let h = bench.empty(Dtype::Bf16, tokens.len() * d);
    let mut device = bench.start(31);
    loss::embed(&mut device, tokens_buf, table_buf, d, h).unwrap();
    let rows: Vec<f32> = tokens.iter().flat_map(|t| table[*t as usize * d..][..d].to_vec()).collect();
    assert_eq!(read_bytes(&mut device, h), halves(&rows).0);
}
