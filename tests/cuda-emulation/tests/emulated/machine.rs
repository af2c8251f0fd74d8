//! A device with buffers made as a test needs them.

use elleci_cuda::arena::{Arena, Buf, Dtype, Use};
use elleci_cuda::device::Device;
use elleci_cuda::driver::Card;
use elleci_cuda_emulation::Emulated;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Numbers for tests: uniform in [-1, 1).
pub struct Numbers(ChaCha8Rng);

impl Numbers {
    pub fn new(seed: u64) -> Numbers {
        Numbers(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn one(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.one() * scale).collect()
    }

    pub fn below(&mut self, n: u32) -> u32 {
        self.0.next_u32() % n
    }
}

/// The device under test: the emulated one, or with ELLECI_CUDA_TEST=card the first card of the machine.
pub fn device(seed: u64) -> Box<dyn Device> {
    match std::env::var("ELLECI_CUDA_TEST").as_deref() {
        Ok("card") => Box::new(Card::open(0).unwrap()),
        _ => Box::new(Emulated::new(seed)),
    }
}

/// Collects buffers with their contents; `start` then makes the device.
#[derive(Default)]
pub struct Bench {
    arena: Option<Arena>,
    contents: Vec<(Buf, Vec<u8>)>,
}

impl Bench {
    pub fn new() -> Bench {
        Bench { arena: Some(Arena::new(64)), contents: Vec::new() }
    }

    /// A buffer that nothing has written.
    pub fn empty(&mut self, dtype: Dtype, len: usize) -> Buf {
        let arena = self.arena.as_mut().unwrap();
        let name = format!("buffer {}", arena.regions().len());
        arena.buffer(Use::Scratch, name, dtype, len)
    }

    pub fn room(&mut self, len: usize) -> Buf {
        self.empty(Dtype::F32, len)
    }

    pub fn bytes(&mut self, dtype: Dtype, len: usize, bytes: Vec<u8>) -> Buf {
        let buf = self.empty(dtype, len);
        self.contents.push((buf, bytes));
        buf
    }

    pub fn floats(&mut self, values: &[f32]) -> Buf {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(Dtype::F32, values.len(), bytes)
    }

    pub fn words(&mut self, values: &[u32]) -> Buf {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(Dtype::U32, values.len(), bytes)
    }

    pub fn start(self, seed: u64) -> Box<dyn Device> {
        self.start_on(device(seed))
    }

    pub fn start_on<D: Device>(self, mut device: D) -> D {
        device.reserve(&self.arena.unwrap()).unwrap();
        for (buf, bytes) in self.contents {
            device.write(buf, &bytes).unwrap();
        }
        device
    }
}

pub fn read_bytes(device: &mut dyn Device, buf: Buf) -> Vec<u8> {
    let mut bytes = vec![0; buf.bytes() as usize];
    device.read(buf, &mut bytes).unwrap();
    bytes
}

pub fn read(device: &mut dyn Device, buf: Buf) -> Vec<f32> {
    assert_eq!(buf.dtype, Dtype::F32);
    read_bytes(device, buf).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// ‖got − want‖ / ‖want‖; NaN where one is not finite.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| *a as f64 - *b as f64));
    difference / norm(&mut want.iter().map(|v| *v as f64)).max(1e-30)
}

/// Fails where the distance is above `bound`; NaN fails too.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    let d = distance(got, want);
    assert!(
        d <= bound,
        "{what}: {d:e} > {bound:e}\n got {:?}\nwant {:?}",
        &got[..got.len().min(6)],
        &want[..want.len().min(6)]
    );
}
