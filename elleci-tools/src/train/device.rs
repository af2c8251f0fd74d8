//! Which device a run uses, and why; threads; memory.

use elleci_core::simd::Isa;
use elleci_cuda::driver::{Facts, probe};

use crate::exit::usage;

/// Where a run's arithmetic is to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Here.
    Cpu,
    /// On the card of this number.
    Cuda(usize),
}

impl Target {
    /// Reads `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for anything else.
    pub fn parse(device: &str) -> anyhow::Result<Target> {
        let ordinal = match device.strip_prefix("cuda") {
            None if device == "cpu" => return Ok(Target::Cpu),
            Some("") => Some(0),
            Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
            None => None,
        };
        let unknown = || usage(format!("device `{device}` is not known; use cpu, cuda or cuda:N"));
        ordinal.map(Target::Cuda).ok_or_else(unknown)
    }
}

/// What a run computes on.
#[derive(Clone, Debug)]
pub struct Device {
    /// Worker threads.
    pub threads: usize,
    /// What is announced at the start: device, threads, instruction set, and why each.
    pub announcement: String,
    /// The card, where there is to be one.
    pub card: Option<Facts>,
}

impl Device {
    /// The CPU, where nothing else is covered. `threads` 0 = all that the machine offers.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for another device.
    pub fn choose(device: &str, threads: usize) -> anyhow::Result<Device> {
        check(threads)?;
        match Target::parse(device)? {
            Target::Cpu => Ok(Device::cpu(threads)),
            Target::Cuda(_) => Err(usage(format!("device `{device}`: only training runs on a card; use --device cpu"))),
        }
    }

    /// The device that a training run asks for; a card is asked what it is.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a device that is not known; a card, a driver or NVRTC that is not there, by name.
    pub fn for_training(device: &str, threads: usize) -> anyhow::Result<Device> {
        check(threads)?;
        match Target::parse(device)? {
            Target::Cpu => Ok(Device::cpu(threads)),
            Target::Cuda(ordinal) => Ok(Device::with_card(probe(ordinal)?, threads)),
        }
    }

    /// A card, and the host's threads for what is done beside it.
    fn with_card(card: Facts, threads: usize) -> Device {
        let host = Device::cpu(threads);
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (major, minor) = card.capability;
        let announcement = format!(
            "device cuda:{} {} | compute capability {major}.{minor} | {:.1} of {:.1} GiB free | driver of CUDA {}.{} | host threads {}",
            card.ordinal,
            card.name,
            gib(card.free),
            gib(card.total),
            card.driver.0,
            card.driver.1,
            host.threads
        );
        Device { announcement, card: Some(card), ..host }
    }

    /// The CPU. `threads` 0 = all that the machine offers.
    pub fn cpu(threads: usize) -> Device {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let (threads, why) = match threads {
            0 => (all, "all that there are".to_string()),
            n => (n, format!("as asked, of {all}")),
        };
        let (isa, machine) = (Isa::detect(), Isa::machine());
        let isa_why = if isa == machine { "detected" } else { "lowered by ELLECI_ISA" };
        let plural = if threads == 1 { "" } else { "s" };
        let announcement = format!("device cpu | {threads} thread{plural} ({why}) | {} ({isa_why})", isa.name());
        Device { threads, announcement, card: None }
    }

    /// Runs `f` in a pool of the device's threads.
    ///
    /// # Errors
    /// When threads cannot be started; whatever `f` returns.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> anyhow::Result<R> + Send) -> anyhow::Result<R> {
        rayon::ThreadPoolBuilder::new().num_threads(self.threads).build()?.install(f)
    }
}

/// Threads that may be asked for, as in the C interface.
const THREADS: usize = 1024;

/// What has no meaning must not be passed over: whoever lowers the instruction set wants to know what runs.
fn check(threads: usize) -> anyhow::Result<()> {
    if threads > THREADS {
        return Err(usage(format!(
            "{threads} threads are asked for; it may be 1 to {THREADS}, or 0 for all that there are"
        )));
    }
    let name = std::env::var_os("ELLECI_ISA").filter(|name| !name.is_empty());
    let name = name.filter(|name| name.to_str().and_then(Isa::from_name).is_none());
    match name {
        Some(name) => {
            let known = Isa::ALL.map(Isa::name).join(", ");
            Err(usage(format!("ELLECI_ISA is `{}`; it may be one of {known}", name.display())))
        }
        None => Ok(()),
    }
}

/// Bytes of memory that this process may still take: what the machine has free, or its control group if that is less.
pub fn available_memory() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(group)
}
