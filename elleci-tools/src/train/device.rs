//! Which device a run uses, and why; threads; memory.

use elleci_core::simd::Isa;

use crate::exit::usage;

/// What a run computes on.
#[derive(Clone, Debug)]
pub struct Device {
    /// Worker threads.
    pub threads: usize,
    /// What is announced at the start: device, threads, instruction set, and why each.
    pub announcement: String,
}

impl Device {
    /// The device that a configuration asks for. `threads` 0 = all that the machine offers.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a device that this build does not have.
    pub fn choose(device: &str, threads: usize) -> anyhow::Result<Device> {
        if device == "cuda" || device.starts_with("cuda:") {
            return Err(usage(format!("device `{device}`: this build has no CUDA backend; use --device cpu")));
        }
        if device != "cpu" {
            return Err(usage(format!("device `{device}` is not known; use cpu or cuda[:N]")));
        }
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let (threads, why) = match threads {
            0 => (all, "all that there are".to_string()),
            n => (n, format!("as asked, of {all}")),
        };
        let (isa, machine) = (Isa::detect(), Isa::machine());
        let isa_why = if isa == machine { "detected" } else { "lowered by ELLECI_ISA" };
        let plural = if threads == 1 { "" } else { "s" };
        let announcement = format!("device cpu | {threads} thread{plural} ({why}) | {} ({isa_why})", isa.name());
        Ok(Device { threads, announcement })
    }

    /// Runs `f` in a pool of the device's threads.
    ///
    /// # Errors
    /// When threads cannot be started; whatever `f` returns.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> anyhow::Result<R> + Send) -> anyhow::Result<R> {
        rayon::ThreadPoolBuilder::new().num_threads(self.threads).build()?.install(f)
    }
}

/// Bytes of memory that this process may still take: what the machine has free, or its control group if that is less.
pub fn available_memory() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    system.available_memory().min(group)
}
