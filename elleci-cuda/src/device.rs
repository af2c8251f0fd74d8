//! What the training step needs of a device. [`driver`](crate::driver) is a card; the emulation in tests/ is another.

use std::fmt;

use crate::arena::{Arena, Buf};

/// Why a device could not do something. The step that was under way has not happened as far as checkpoints go: nothing of
/// the host's state was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The driver library, NVRTC or a symbol of them is missing.
    Missing {
        /// Which library.
        library: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// There is no such device.
    NoDevice {
        /// The ordinal asked for.
        ordinal: usize,
        /// Devices that there are.
        count: usize,
    },
    /// The driver is of an older major version than NVRTC, whose machine code it does not load.
    OldDriver {
        /// The version of CUDA that the driver is for.
        driver: (i32, i32),
        /// NVRTC's.
        nvrtc: (i32, i32),
    },
    /// The device cannot run the kernels.
    TooOld {
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// The plan does not fit.
    Memory {
        /// Bytes that the plan asks for.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The device cannot do what was asked for, and something else can be asked for.
    Lacks {
        /// The setting.
        what: &'static str,
        /// Why not, and what can.
        reason: String,
    },
    /// The config has sizes that the kernels do not cover.
    Unsupported(String),
    /// A kernel did not compile.
    Compile {
        /// The file.
        source: &'static str,
        /// The compiler's log.
        log: String,
    },
    /// A kernel failed, or did what it must not.
    Kernel {
        /// Its name.
        kernel: &'static str,
        /// What happened.
        reason: String,
    },
    /// Anything else that the driver says.
    Driver {
        /// What was asked of it.
        action: &'static str,
        /// Its answer.
        reason: String,
    },
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: &u64| *bytes as f64 / (1u64 << 30) as f64;
        match self {
            DeviceError::Missing { library, reason } => {
                write!(f, "{library} cannot be loaded ({reason}); install it, or {}", without(library))
            }
            DeviceError::NoDevice { ordinal, count: 0 } => {
                write!(
                    f,
                    "device cuda:{ordinal} asked for, but the driver sees no CUDA device (nvidia-smi -L lists them)"
                )
            }
            DeviceError::NoDevice { ordinal, count } => {
                write!(f, "device cuda:{ordinal} asked for, but the devices are cuda:0 to cuda:{}", count - 1)
            }
            DeviceError::OldDriver { driver, nvrtc } => write!(
                f,
                "the driver is for CUDA {}.{} and libnvrtc is of {}.{}: update the driver (nvidia-smi shows it), or put a libnvrtc \
                 of CUDA {} into the loader's path",
                driver.0, driver.1, nvrtc.0, nvrtc.1, driver.0
            ),
            DeviceError::TooOld { capability: (major, minor) } => {
                write!(
                    f,
                    "the device has compute capability {major}.{minor}; 8.0 or newer is needed (bf16 tensor cores)"
                )
            }
            DeviceError::Memory { needed, free } => write!(
                f,
                "the plan takes {:.2} GiB and the device has {:.2} GiB free (nvidia-smi lists the processes on it)",
                gib(needed),
                gib(free)
            ),
            DeviceError::Lacks { what, reason } => write!(f, "{what}: {reason}"),
            DeviceError::Unsupported(what) => write!(f, "the CUDA kernels do not cover this config: {what}"),
            DeviceError::Compile { source, log } => write!(f, "{source} does not compile: {log}"),
            DeviceError::Kernel { kernel, reason } => write!(f, "kernel {kernel}: {reason}"),
            DeviceError::Driver { action, reason } => write!(f, "{action}: {reason}"),
        }
    }
}

/// How to do without a library.
fn without(library: &str) -> &'static str {
    match library {
        "libcublasLt" => "set cuda.gemm=own",
        _ => "train with --device cpu",
    }
}

impl std::error::Error for DeviceError {}

/// What a call on a device returns.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A pointer to a buffer.
    Buf(Buf),
    /// A null pointer.
    Null,
    /// A buffer of float32 or bf16, passed with which of them it is (`Floats`).
    Floats(Buf),
    /// `int`
    Int(i32),
    /// `float`
    Float(f32),
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// How an operand of a product lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// `[row][k]`
    K,
    /// `[k][row]`
    Row,
}

/// An operand of a [`Matmul`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// bf16, int8 or e4m3
    pub buf: Buf,
    /// Elements from one of its lines to the next
    pub pitch: usize,
    /// What a line is
    pub order: Order,
}

impl Operand {
    /// The element of a row and a k.
    pub fn index(&self, row: usize, k: usize) -> usize {
        match self.order {
            Order::K => row * self.pitch + k,
            Order::Row => k * self.pitch + row,
        }
    }
}

/// A product of matrices: `out` `[m, n]` (= or +=) `alpha · Σ_k a(m, k) · b(n, k)`.
///
/// Operands of bf16 give float32 or bf16 by sums in float32; int8 (both by k) gives int32; e4m3 (both by k) gives float32.
/// `alpha` and `add` are those of bf16 alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matmul {
    /// First operand
    pub a: Operand,
    /// Second operand
    pub b: Operand,
    /// Rows of `a`
    pub m: usize,
    /// Rows of `b`
    pub n: usize,
    /// Products in a sum
    pub k: usize,
    /// A factor in the device's memory; 1 where there is none
    pub alpha: Option<Buf>,
    /// += instead of =
    pub add: bool,
    /// `[m, n]`
    pub out: Buf,
}

/// What not every device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// Products of e4m3 on tensor cores.
    Fp8,
    /// [`Device::matmul`].
    Library,
}

/// Names a recorded sequence of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recording(pub usize);

/// A device: one block of memory, and kernels that are run on it in order.
pub trait Device {
    /// What it is, for people.
    fn describe(&self) -> String;

    /// Bytes that a plan may take, what is allocated already included.
    ///
    /// # Errors
    /// A fault of the device.
    fn room(&mut self) -> Result<u64>;

    /// Allocates the memory of a plan, undefined. What was allocated before is dropped, recordings with it.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], or a fault of the device.
    fn reserve(&mut self, arena: &Arena) -> Result<()>;

    /// From here on, the memory is cut as this plan says, which is no larger than what is allocated. Buffers of both plans that are
    /// the same keep their contents. Only devices that check accesses need to know.
    ///
    /// # Errors
    /// A plan that is larger than what is allocated.
    fn relabel(&mut self, arena: &Arena) -> Result<()> {
        let _ = arena;
        Ok(())
    }

    /// Address of the allocated memory on the device.
    fn base(&self) -> u64;

    /// Copies host bytes into a buffer, behind everything launched so far. They have been read when this returns; the copy need not
    /// have been made.
    ///
    /// # Errors
    /// A fault of the device.
    fn write(&mut self, to: Buf, bytes: &[u8]) -> Result<()>;

    /// Copies a buffer to the host, when everything launched so far is done.
    ///
    /// # Errors
    /// A fault of the device, which may be that of an earlier launch.
    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> Result<()>;

    /// Sets a buffer to zero bytes.
    ///
    /// # Errors
    /// A fault of the device.
    fn zero(&mut self, buf: Buf) -> Result<()>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// A fault of the device. The emulation also finds accesses out of bounds, reads of undefined memory and races.
    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()>;

    /// Whether the device can do what not all can.
    ///
    /// # Errors
    /// [`DeviceError::Lacks`] or [`DeviceError::Missing`] with the reason.
    fn offers(&self, ability: Ability) -> Result<()>;

    /// A product by the device's library; `workspace` is the library's own for as long as it takes.
    ///
    /// # Errors
    /// A library that is missing or does not take the product, or a fault of the device.
    fn matmul(&mut self, product: &Matmul, workspace: Buf) -> Result<()>;

    /// From here on, launches, products and zeroings are recorded and not run.
    ///
    /// # Errors
    /// A fault of the device.
    fn record(&mut self) -> Result<()>;

    /// Ends the recording.
    ///
    /// # Errors
    /// A fault of the device.
    fn recorded(&mut self) -> Result<Recording>;

    /// Runs a recording.
    ///
    /// # Errors
    /// A fault of the device.
    fn replay(&mut self, recording: Recording) -> Result<()>;
}

/// A device behind a pointer is a device.
impl<D: Device + ?Sized> Device for Box<D> {
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn room(&mut self) -> Result<u64> {
        (**self).room()
    }
    fn reserve(&mut self, arena: &Arena) -> Result<()> {
        (**self).reserve(arena)
    }
    fn relabel(&mut self, arena: &Arena) -> Result<()> {
        (**self).relabel(arena)
    }
    fn base(&self) -> u64 {
        (**self).base()
    }
    fn write(&mut self, to: Buf, bytes: &[u8]) -> Result<()> {
        (**self).write(to, bytes)
    }
    fn read(&mut self, from: Buf, bytes: &mut [u8]) -> Result<()> {
        (**self).read(from, bytes)
    }
    fn zero(&mut self, buf: Buf) -> Result<()> {
        (**self).zero(buf)
    }
    fn launch(&mut self, kernel: &'static str, launch: Launch, args: &[Arg]) -> Result<()> {
        (**self).launch(kernel, launch, args)
    }
    fn offers(&self, ability: Ability) -> Result<()> {
        (**self).offers(ability)
    }
    fn matmul(&mut self, product: &Matmul, workspace: Buf) -> Result<()> {
        (**self).matmul(product, workspace)
    }
    fn record(&mut self) -> Result<()> {
        (**self).record()
    }
    fn recorded(&mut self) -> Result<Recording> {
        (**self).recorded()
    }
    fn replay(&mut self, recording: Recording) -> Result<()> {
        (**self).replay(recording)
    }
}
