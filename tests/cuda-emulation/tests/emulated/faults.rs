//! The emulation finds what it promises to find.

use elleci_cuda::arena::Dtype;
use elleci_cuda::device::{Arg, Device, DeviceError, Launch};
use elleci_cuda_emulation::Emulated;
use half::bf16;

use crate::machine::{Bench, Numbers, close, read};

fn launch(threads: u32, blocks: u32, shared: u32) -> Launch {
    Launch { grid: [blocks, 1, 1], threads, shared }
}

/// The message of a launch that must fail.
fn complaint(kernel: &'static str, l: Launch, args: impl Fn(Arg) -> Vec<Arg>, seed: u64) -> String {
    let mut bench = Bench::new();
    let out = bench.room(128);
    let mut device = bench.start_on(Emulated::new(seed));
    match device.launch(kernel, l, &args(Arg::Buf(out))) {
        Err(DeviceError::Kernel { reason, .. }) => reason,
        other => panic!("{kernel}: {other:?}"),
    }
}

#[test]
fn a_race_is_found_whatever_the_order_and_a_barrier_ends_it() {
    for seed in [0, 1, 99] {
        let found = complaint("fault_race", launch(128, 1, 512), |out| vec![out, Arg::Int(0)], seed);
        assert!(found.contains("race") || found.contains("nothing wrote"), "{found}");
        let mut bench = Bench::new();
        let out = bench.room(128);
        let mut device = bench.start_on(Emulated::new(seed));
        device.launch("fault_race", launch(128, 1, 512), &[Arg::Buf(out), Arg::Int(1)]).unwrap();
        assert_eq!(read(&mut device, out)[..3], [1.0, 2.0, 3.0]);
    }
}

#[test]
fn accesses_out_of_bounds_are_found() {
    let found = complaint("fault_bounds", launch(32, 1, 0), |out| vec![out, Arg::Int(129)], 0);
    assert!(found.contains("write out of bounds") && found.contains("buffer 0"), "{found}");
    let found = complaint("fault_shared", launch(32, 1, 64), |out| vec![out, Arg::Int(16)], 0);
    assert!(found.contains("read out of bounds") && found.contains("shared"), "{found}");
}

#[test]
fn undefined_memory_is_found_on_the_device_and_by_the_host() {
    let found = complaint("fault_shared", launch(32, 1, 64), |out| vec![out, Arg::Int(15)], 0);
    assert!(found.contains("nothing wrote"), "{found}");
    let mut bench = Bench::new();
    let out = bench.room(128);
    let mut device = bench.start_on(Emulated::new(0));
    device.launch("fault_bounds", launch(32, 1, 0), &[Arg::Buf(out), Arg::Int(127)]).unwrap();
    let error = device.read(out, &mut [0; 512]).unwrap_err().to_string();
    assert!(error.contains("not all of"), "{error}");
}

#[test]
fn blocks_that_write_the_same_word_are_found() {
    let found = complaint("fault_blocks", launch(32, 2, 0), |out| vec![out], 0);
    assert!(found.contains("race of two writes") && found.contains("block (1, 0, 0)"), "{found}");
}

#[test]
fn lanes_that_do_not_come_are_found() {
    let found = complaint("fault_exchange", launch(64, 1, 0), |out| vec![out], 0);
    assert!(found.contains("wait for others that do not come"), "{found}");
}

#[test]
fn arguments_of_other_types_are_refused() {
    let found = complaint("fault_bounds", launch(32, 1, 0), |out| vec![out, Arg::Float(1.0)], 0);
    assert!(found.contains("takes (pi)"), "{found}");
    let found = complaint("fault_bounds", launch(96, 1, 0), |out| vec![out, Arg::Int(1)], 0);
    assert!(found.contains("at most 32"), "{found}");
}

/// The fragments of one product, loaded as the PTX manual lays them out, give the product.
#[test]
fn a_fragment_is_what_the_manual_says() {
    let mut numbers = Numbers::new(3);
    let (a, b) = (numbers.vec(256, 1.0), numbers.vec(128, 1.0));
    let mut bench = Bench::new();
    let (buf_a, buf_b, d) = (bench.floats(&a), bench.floats(&b), bench.empty(Dtype::F32, 128));
    let mut device = bench.start_on(Emulated::new(5));
    device.launch("fragment_bf16", launch(32, 1, 0), &[Arg::Buf(buf_a), Arg::Buf(buf_b), Arg::Buf(d)]).unwrap();
    let round = |v: f32| bf16::from_f32(v).to_f32();
    let want: Vec<f32> =
        (0..128).map(|i| (0..16).map(|k| round(a[i / 8 * 16 + k]) * round(b[k * 8 + i % 8])).sum()).collect();
    // The same 16 products, added in order in float32 on both sides.
    close("mma", &read(&mut device, d), &want, 1e-6);
}
