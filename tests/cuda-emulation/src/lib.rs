//! An emulated CUDA device, for tests: it runs the kernels of `elleci-cuda` on the CPU and watches every access.
//!
//! How blocks and threads are run, and what is found, stands in `cxx/machine.cpp`. The machine is one for the whole process:
//! a second [`Emulated`] waits until the first is dropped.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use elleci_cuda::arena::{Arena, Buf, Dtype, Region};
use elleci_cuda::device::{Ability, Arg, Device, DeviceError, Launch, Matmul, Recording, Result};

mod matmul;

pub use matmul::e4m3;

#[repr(C)]
#[derive(Clone, Copy)]
struct Dim3 {
    x: u32,
    y: u32,
    z: u32,
}

unsafe extern "C" {
    fn emulated_find(name: *const c_char) -> *const c_void;
    fn emulated_signature(kernel: *const c_void) -> *const c_char;
    fn emulated_memory(size: usize) -> *mut u8;
    fn emulated_mark(at: usize, size: usize, live: c_int, defined: c_int);
    fn emulated_defined(at: usize, size: usize) -> c_int;
    fn emulated_launch(
        kernel: *const c_void,
        grid: Dim3,
        block: Dim3,
        shared: u32,
        args: *mut *mut c_void,
        seed: u64,
    ) -> *const c_char;
}

static MACHINE: Mutex<()> = Mutex::new(());

#[derive(Clone, Debug)]
enum Command {
    Zero(Buf),
    Launch(&'static str, Launch, Vec<Arg>),
    Matmul(Matmul, Buf),
}

/// The emulated device.
pub struct Emulated {
    base: *mut u8,
    bytes: u64,
    memory: u64,
    regions: Vec<Region>,
    seed: u64,
    recording: Option<Vec<Command>>,
    recordings: Vec<Vec<Command>>,
    launches: usize,
    products: usize,
    lacks: Vec<Ability>,
    _machine: MutexGuard<'static, ()>,
}

impl Emulated {
    /// A device without memory. Threads run in an order drawn from `seed`; 0 keeps them in their own.
    pub fn new(seed: u64) -> Emulated {
        // A test that failed while it held the machine leaves it usable: every launch starts afresh.
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        Emulated {
            base: std::ptr::null_mut(),
            bytes: 0,
            memory: 1 << 40,
            regions: Vec::new(),
            seed,
            recording: None,
            recordings: Vec::new(),
            launches: 0,
            products: 0,
            lacks: Vec::new(),
            _machine: machine,
        }
    }

    /// The same device with this many bytes of memory.
    pub fn with_memory(self, memory: u64) -> Emulated {
        Emulated { memory, ..self }
    }

    /// The same device without an ability.
    pub fn without(mut self, ability: Ability) -> Emulated {
        self.lacks.push(ability);
        self
    }

    /// Products of the library so far.
    pub fn products(&self) -> usize {
        self.products
    }

    /// Bytes asked for so far, at the most.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Kernels run so far.
    pub fn launches(&self) -> usize {
        self.launches
    }

    fn check(&self, buf: Buf) -> Result<()> {
        let inside = |r: &Region| buf.at >= r.buf.at && buf.at + buf.bytes() <= r.buf.at + r.buf.bytes();
        match self.regions.iter().any(inside) {
            true => Ok(()),
            false => {
                Err(DeviceError::Driver { action: "copy", reason: format!("{buf:?} is in no region of the plan") })
            }
        }
    }

    /// The name of the buffer at a place, for messages.
    fn region_at(&self, at: u64) -> &str {
        let before = self.regions.iter().rfind(|r| r.buf.at <= at);
        before.map_or("nothing", |r| r.name.as_str())
    }

    fn run(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        let fault = |reason: String| Err(DeviceError::Kernel { kernel, reason });
        let name = CString::new(kernel).expect("kernels have plain names");
        // SAFETY: the name is a C string; the function only compares it.
        let function = unsafe { emulated_find(name.as_ptr()) };
        if function.is_null() {
            return fault("there is no kernel of this name".into());
        }
        // SAFETY: the pointer came from emulated_find, whose table is static, as are its strings.
        let signature = unsafe { CStr::from_ptr(emulated_signature(function)) }.to_string_lossy();
        let given: String = args.iter().map(letter).collect();
        if signature != given {
            return fault(format!("takes ({signature}) and was given ({given})"));
        }
        let mut values: Vec<[u64; 2]> = args.iter().map(|a| self.value(a)).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| v.as_mut_ptr().cast()).collect();
        let [x, y, z] = launch.grid;
        self.launches += 1;
        // SAFETY: the arguments have the types of the kernel's parameters, as the signature says; the machine is this device's
        // alone while it holds the lock; what the kernel may do to memory is checked access by access.
        let complaint = unsafe {
            emulated_launch(
                function,
                Dim3 { x, y, z },
                Dim3 { x: launch.threads, y: 1, z: 1 },
                launch.shared,
                pointers.as_mut_ptr(),
                self.seed,
            )
        };
        if complaint.is_null() {
            return Ok(());
        }
        // SAFETY: a message that is not null is a C string in static memory.
        let mut reason = unsafe { CStr::from_ptr(complaint) }.to_string_lossy().into_owned();
        let offset = reason.split(" bytes at ").nth(1).and_then(|r| r.split_once(" of device memory"));
        if let Some(at) = offset.and_then(|(at, _)| at.parse().ok()) {
            reason += &format!(", in or behind `{}`", self.region_at(at));
        }
        fault(reason)
    }

    fn value(&self, arg: &Arg) -> [u64; 2] {
        let address = |b: &Buf| self.base as u64 + b.at;
        match arg {
            Arg::Buf(b) => [address(b), 0],
            Arg::Null => [0, 0],
            Arg::Floats(b) => [address(b), (b.dtype == Dtype::Bf16) as u64],
            Arg::Int(i) => [*i as u32 as u64, 0],
            Arg::Float(f) => [f.to_bits() as u64, 0],
        }
    }
}

/// The letter of an argument in a kernel's signature.
fn letter(arg: &Arg) -> char {
    match arg {
        Arg::Buf(_) | Arg::Null => 'p',
        Arg::Floats(_) => 'F',
        Arg::Int(_) => 'i',
        Arg::Float(_) => 'f',
    }
}

impl Device for Emulated {
    fn describe(&self) -> String {
        "emulated CUDA device".into()
    }

    fn room(&mut self) -> Result<u64> {
        Ok(self.memory)
    }

    fn reserve(&mut self, arena: &Arena) -> Result<()> {
        if arena.bytes() > self.memory {
            return Err(DeviceError::Memory { needed: arena.bytes(), free: self.memory });
        }
        // SAFETY: the machine is this device's while it holds the lock; the old memory has no other user.
        self.base = unsafe { emulated_memory(arena.bytes().max(256) as usize) };
        if self.base.is_null() {
            return Err(DeviceError::Memory { needed: arena.bytes(), free: 0 });
        }
        self.bytes = self.bytes.max(arena.bytes());
        self.recordings.clear();
        self.regions.clear();
        self.relabel(arena)
    }

    fn relabel(&mut self, arena: &Arena) -> Result<()> {
        if arena.bytes() > self.bytes {
            return Err(DeviceError::Memory { needed: arena.bytes(), free: self.bytes });
        }
        let same = |a: &Region, b: &Region| a.buf == b.buf && a.name == b.name;
        let kept = self.regions.iter().zip(arena.regions()).take_while(|(a, b)| same(a, b)).count();
        for (regions, live) in [(&self.regions[kept..], 0), (&arena.regions()[kept..], 1)] {
            for r in regions {
                // SAFETY: regions lie within the arena, whose size is that of the memory.
                unsafe { emulated_mark(r.buf.at as usize, r.buf.bytes() as usize, live, 0) };
            }
        }
        self.regions = arena.regions().to_vec();
        Ok(())
    }

    fn base(&self) -> u64 {
        self.base as u64
    }

    fn write(&mut self, to: Buf, bytes: &[u8]) -> Result<()> {
        self.check(to)?;
        assert_eq!(to.bytes(), bytes.len() as u64, "a copy of another size");
        // SAFETY: the region lies within the memory, and has the size of the bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(to.at as usize), bytes.len());
            emulated_mark(to.at as usize, bytes.len(), 1, 1);
        }
        Ok(())
    }

    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> Result<()> {
        self.check(from)?;
        assert_eq!(from.bytes(), bytes.len() as u64, "a copy of another size");
        // SAFETY: the region lies within the memory, and has the size of the bytes.
        let defined = unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(from.at as usize), bytes.as_mut_ptr(), bytes.len());
            emulated_defined(from.at as usize, bytes.len()) != 0
        };
        match defined {
            true => Ok(()),
            false => Err(DeviceError::Driver {
                action: "copy to the host",
                reason: format!("not all of `{}` was written", self.region_at(from.at)),
            }),
        }
    }

    fn zero(&mut self, buf: Buf) -> Result<()> {
        match &mut self.recording {
            Some(commands) => {
                commands.push(Command::Zero(buf));
                Ok(())
            }
            None => self.write(buf, &vec![0; buf.bytes() as usize]),
        }
    }

    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        match &mut self.recording {
            Some(commands) => {
                commands.push(Command::Launch(kernel, launch, args.to_vec()));
                Ok(())
            }
            None => self.run(kernel, launch, args),
        }
    }

    fn offers(&self, ability: Ability) -> Result<()> {
        match self.lacks.contains(&ability) {
            true => {
                Err(DeviceError::Lacks { what: "the emulated device", reason: format!("was made without {ability:?}") })
            }
            false => Ok(()),
        }
    }

    fn matmul(&mut self, product: &Matmul, workspace: Buf) -> Result<()> {
        match &mut self.recording {
            Some(commands) => {
                commands.push(Command::Matmul(*product, workspace));
                Ok(())
            }
            None => self.multiply(product, workspace),
        }
    }

    fn record(&mut self) -> Result<()> {
        self.recording = Some(Vec::new());
        Ok(())
    }

    fn recorded(&mut self) -> Result<Recording> {
        self.recordings.push(self.recording.take().unwrap_or_default());
        Ok(Recording(self.recordings.len() - 1))
    }

    fn replay(&mut self, recording: Recording) -> Result<()> {
        for command in self.recordings[recording.0].clone() {
            match command {
                Command::Zero(buf) => self.zero(buf)?,
                Command::Launch(kernel, launch, args) => self.run(kernel, launch, &args)?,
                Command::Matmul(product, workspace) => self.multiply(&product, workspace)?,
            }
        }
        Ok(())
    }
}
