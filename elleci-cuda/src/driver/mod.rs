//! A card, through the driver API: libcuda and NVRTC are opened when a [`Card`] is, and never linked.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};

use cudarc::driver::{result, sys};

use crate::arena::{Arena, Buf, Dtype};
use crate::device::{Ability, Arg, Device, DeviceError, Launch, Matmul, Recording, Result};
use crate::nvrtc;
use crate::source::SOURCES;

mod facts;
mod faults;
mod library;
mod staging;
mod timing;

pub use facts::{Facts, probe};
use facts::{find, guarded, has_fp8};
use faults::fault;
use library::{Library, Places};
use staging::Staging;
pub use timing::Mark;

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    /// Shared memory that blocks may ask for so far
    shared: u32,
}

/// One device with its context, a stream, and all kernels loaded.
pub struct Card {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<&'static str, Kernel>,
    /// Loaded by name and not used yet: names become 'static with the first launch
    loaded: HashMap<String, sys::CUfunction>,
    memory: sys::CUdeviceptr,
    bytes: u64,
    recordings: Vec<(sys::CUgraph, sys::CUgraphExec)>,
    capability: (i32, i32),
    name: String,
    staging: Option<Staging>,
    /// cuBLASLt, or why there is none
    library: Result<Library>,
    /// Two floats, 0 and 1, in the card's memory
    switches: sys::CUdeviceptr,
}

/// Memory that stays free beside a plan: for recorded steps (graphs) and what the driver takes as it goes.
const SPARE: u64 = 256 << 20;

fn not_opened() -> DeviceError {
    DeviceError::Missing { library: "libcublasLt", reason: "it is opened after the kernels".into() }
}

/// The address of a variable of a module.
fn global(module: sys::CUmodule, name: &CStr) -> Result<sys::CUdeviceptr> {
    // SAFETY: the module is loaded.
    let (address, _) = unsafe { result::module::get_global(module, name.to_owned()) }
        .map_err(fault("find a variable of the kernels"))?;
    Ok(address)
}

impl Card {
    /// Opens device `ordinal` and compiles the kernels for it (some 25 s of one processor).
    ///
    /// # Errors
    /// A missing driver or NVRTC, no such device, one that is too old, or a fault of it.
    pub fn open(ordinal: usize) -> Result<Card> {
        guarded(|| Card::open_present(ordinal))
    }

    fn open_present(ordinal: usize) -> Result<Card> {
        let (device, name, capability) = find(ordinal)?;
        // SAFETY: the device is valid; the context is released when the card is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(fault("make a context on the device"))?;
        let mut card = Card {
            ordinal,
            device,
            context,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            kernels: HashMap::new(),
            loaded: HashMap::new(),
            memory: 0,
            bytes: 0,
            recordings: Vec::new(),
            capability,
            name,
            staging: None,
            library: Err(not_opened()),
            switches: 0,
        };
        card.enter()?;
        card.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(fault("make a stream"))?;
        card.staging = Some(Staging::new().map_err(fault("allocate page-locked memory"))?);
        card.load()?;
        card.library = Library::open();
        Ok(card)
    }

    /// Compiles and loads all kernels.
    fn load(&mut self) -> Result<()> {
        // Instructions of one architecture alone have a name of their own.
        let suffix = if self.capability == (9, 0) { "a" } else { "" };
        let arch = format!("sm_{}{}{suffix}", self.capability.0, self.capability.1);
        for (source, compiled) in SOURCES.iter().zip(nvrtc::compile_all(&arch)?) {
            // SAFETY: the image is a whole cubin, which the driver copies.
            let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) };
            let module = module.map_err(fault("load the kernels"))?;
            self.modules.push(module);
            for name in source.kernels() {
                let symbol = CString::new(name.as_str()).expect("kernels have plain names");
                // SAFETY: the module was loaded above.
                let function = unsafe { result::module::get_function(module, symbol) };
                self.loaded.insert(name, function.map_err(fault("find a kernel"))?);
            }
            if source.name == "matmul.cu" {
                self.switches = global(module, c"elleci_switches")?;
            }
        }
        Ok(())
    }

    /// Makes the context that of the calling thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as the card.
        unsafe { result::ctx::set_current(self.context) }.map_err(fault("enter the device's context"))
    }

    fn address(&self, buf: Buf) -> u64 {
        assert!(buf.at + buf.bytes() <= self.bytes, "{buf:?} of {} bytes", self.bytes);
        self.memory + buf.at
    }

    fn value(&self, arg: &Arg) -> [u64; 2] {
        match arg {
            Arg::Buf(b) => [self.address(*b), 0],
            Arg::Null => [0, 0],
            Arg::Floats(b) => [self.address(*b), (b.dtype == Dtype::Bf16) as u64],
            Arg::Int(i) => [*i as u32 as u64, 0],
            Arg::Float(f) => [f.to_bits() as u64, 0],
        }
    }

    /// A kernel with at least this much shared memory allowed.
    fn kernel(&mut self, name: &'static str, shared: u32) -> Result<sys::CUfunction> {
        if !self.kernels.contains_key(name) {
            let missing = || DeviceError::Kernel { kernel: name, reason: "there is no kernel of this name".into() };
            let function = *self.loaded.get(name).ok_or_else(missing)?;
            self.kernels.insert(name, Kernel { function, shared: 48 << 10 });
        }
        let kernel = self.kernels.get_mut(name).expect("inserted above");
        if shared > kernel.shared {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            // SAFETY: the function belongs to a module that lives as long as the card.
            let set = unsafe { result::function::set_function_attribute(kernel.function, SHARED, shared as i32) };
            set.map_err(|e| DeviceError::Kernel {
                kernel: name,
                reason: format!("needs {shared} bytes of shared memory a block, which this card does not have ({e})"),
            })?;
            kernel.shared = shared;
        }
        Ok(kernel.function)
    }

    fn forget_recordings(&mut self) {
        for (graph, exec) in self.recordings.drain(..) {
            // SAFETY: both were made by `recorded` and are used by nothing else.
            unsafe {
                let _ = result::graph::exec_destroy(exec);
                let _ = result::graph::destroy(graph);
            }
        }
    }

    fn free(&mut self) {
        if self.memory != 0 {
            // SAFETY: the memory came from malloc_sync, and nothing is launched on it any more once the stream is idle.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::free_sync(self.memory);
            }
            (self.memory, self.bytes) = (0, 0);
        }
    }

    /// Waits until everything launched is done.
    ///
    /// # Errors
    /// A fault of any launch so far.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as the card.
        unsafe { result::stream::synchronize(self.stream) }.map_err(fault("run the step"))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        self.forget_recordings();
        self.free();
        if let Some(mut staging) = self.staging.take() {
            // SAFETY: the stream is idle, or has failed and runs nothing any more.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                staging.destroy();
            }
        }
        if let Ok(library) = &mut self.library {
            // SAFETY: the stream is idle, or has failed and runs nothing any more.
            unsafe { library.destroy() };
        }
        for module in self.modules.drain(..) {
            // SAFETY: loaded by this card; its functions are not used afterwards.
            let _ = unsafe { result::module::unload(module) };
        }
        // SAFETY: made by this card, used by nothing else.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Device for Card {
    fn describe(&self) -> String {
        let (major, minor) = self.capability;
        format!("cuda:{} {}, compute capability {major}.{minor}", self.ordinal, self.name)
    }

    fn room(&mut self) -> Result<u64> {
        self.enter()?;
        let (free, _) = result::mem_get_info().map_err(fault("ask for the free memory"))?;
        Ok((free as u64 + self.bytes).saturating_sub(SPARE))
    }

    fn reserve(&mut self, arena: &Arena) -> Result<()> {
        self.enter()?;
        self.forget_recordings();
        self.free();
        let (needed, free) = (arena.bytes(), self.room()?);
        if needed > free {
            return Err(DeviceError::Memory { needed, free });
        }
        // SAFETY: the memory is undefined until written, as the trait says.
        self.memory = unsafe { result::malloc_sync(needed as usize) }.map_err(fault("allocate the plan's memory"))?;
        self.bytes = needed;
        Ok(())
    }

    fn relabel(&mut self, arena: &Arena) -> Result<()> {
        match arena.bytes() <= self.bytes {
            true => Ok(()),
            false => Err(DeviceError::Memory { needed: arena.bytes(), free: self.bytes }),
        }
    }

    fn base(&self) -> u64 {
        self.memory
    }

    fn write(&mut self, to: Buf, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        assert_eq!(to.bytes(), bytes.len() as u64, "a copy of another size");
        let (at, stream) = (self.address(to), self.stream);
        let staging = self.staging.as_mut().expect("made when the card was opened");
        // SAFETY: the buffer lies in the card's memory and has the size of the bytes; the stream is the card's.
        unsafe { staging.copy(at, bytes, stream) }.map_err(fault("copy to the device"))
    }

    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        assert_eq!(from.bytes(), bytes.len() as u64, "a copy of another size");
        // SAFETY: the buffer lies in the card's memory and has the size of the bytes; the next line waits for the copy.
        unsafe { result::memcpy_dtoh_async(bytes, self.address(from), self.stream) }
            .map_err(fault("copy from the device"))?;
        self.synchronize()
    }

    fn zero(&mut self, buf: Buf) -> Result<()> {
        self.enter()?;
        // SAFETY: the buffer lies in the card's memory; zero bytes are valid for all of its types.
        unsafe { result::memset_d8_async(self.address(buf), 0, buf.bytes() as usize, self.stream) }
            .map_err(fault("set memory to zero"))
    }

    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        self.enter()?;
        let function = self.kernel(kernel, launch.shared)?;
        let mut values: Vec<[u64; 2]> = args.iter().map(|a| self.value(a)).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| v.as_mut_ptr().cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: each argument has the size and type of the kernel's parameter: every launch of the step is made by `ops`, and
        // the emulation holds each of them against the kernels' own types. Buffers lie in the card's memory.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared,
                self.stream,
                &mut pointers,
            )
        };
        launched.map_err(|e| DeviceError::Kernel { kernel, reason: e.to_string() })
    }

    fn offers(&self, ability: Ability) -> Result<()> {
        match ability {
            Ability::Library => self.library.as_ref().map(|_| ()).map_err(Clone::clone),
            Ability::Fp8 => has_fp8(self.capability),
        }
    }

    fn matmul(&mut self, p: &Matmul, workspace: Buf) -> Result<()> {
        self.enter()?;
        let switch = self.switches + 4 * u64::from(p.add);
        let places = Places {
            a: self.address(p.a.buf),
            b: self.address(p.b.buf),
            out: self.address(p.out),
            factors: p.alpha.map(|alpha| (self.address(alpha), switch)),
            workspace: (self.address(workspace), workspace.len),
        };
        let ends = [(p.a, p.m), (p.b, p.n)].map(|(o, rows)| (o.index(rows - 1, p.k - 1), o.buf.len));
        assert!(ends.iter().all(|(last, len)| last < len) && p.out.len == p.m * p.n, "{p:?}");
        // The algorithms that are chosen take this for granted.
        assert!([places.a, places.b, places.out, places.workspace.0].iter().all(|at| at % 256 == 0), "{p:?}");
        let stream = self.stream;
        let library = self.library.as_mut().map_err(|e| e.clone())?;
        // SAFETY: all buffers lie in the card's memory and have the sizes of the product; the stream is the card's.
        unsafe { library.matmul(p, &places, stream) }
    }

    fn record(&mut self) -> Result<()> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the card.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(fault("record a step"))
    }

    fn recorded(&mut self) -> Result<Recording> {
        self.enter()?;
        let failed = fault("record a step");
        // SAFETY: `record` began a capture on this stream.
        let graph = unsafe { result::stream::end_capture(self.stream) }.map_err(&failed)?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just made; both are destroyed by `forget_recordings`.
        unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.result().map_err(&failed)?;
        self.recordings.push((graph, exec));
        Ok(Recording(self.recordings.len() - 1))
    }

    fn replay(&mut self, recording: Recording) -> Result<()> {
        self.enter()?;
        let (_, exec) = self.recordings[recording.0];
        // SAFETY: the graph is one of this card's, and so is the stream.
        unsafe { result::graph::launch(exec, self.stream) }.map_err(fault("run a recorded step"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a card, the reason is named; on one with a card, it opens.
    #[test]
    fn a_missing_driver_is_named() {
        match Card::open(0) {
            Ok(card) => assert!(card.describe().contains("cuda:0")),
            Err(e @ (DeviceError::Missing { .. } | DeviceError::NoDevice { .. } | DeviceError::Driver { .. })) => {
                assert!(!e.to_string().is_empty());
            }
            Err(e) => panic!("{e}"),
        }
        assert_eq!(probe(0).is_ok(), Card::open(0).is_ok());
    }
}
