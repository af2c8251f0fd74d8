//! What a card says of itself, and whether it can be used.

use std::panic::catch_unwind;

use cudarc::driver::{DriverError, result, sys};

use super::faults::fault;
use super::{SPARE, library};
use crate::device::{Ability, DeviceError, Result};
use crate::nvrtc;

/// The oldest compute capability with bf16 tensor cores.
const OLDEST: (i32, i32) = (8, 0);
/// The oldest with e4m3 tensor cores.
const OLDEST_FP8: (i32, i32) = (8, 9);

/// What a device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// Bytes of its memory that are free now.
    pub free: u64,
    /// Bytes of its memory.
    pub total: u64,
    /// The version of CUDA that the driver is for.
    pub driver: (i32, i32),
    /// Whether there is cuBLASLt, or why not.
    pub library: Result<()>,
}

impl Facts {
    /// Bytes that a plan may take.
    pub fn room(&self) -> u64 {
        self.free.saturating_sub(SPARE)
    }

    /// Whether the card can do what not all can.
    ///
    /// # Errors
    /// [`DeviceError::Lacks`] or [`DeviceError::Missing`] with the reason.
    pub fn offers(&self, ability: Ability) -> Result<()> {
        match ability {
            Ability::Library => self.library.clone(),
            Ability::Fp8 => has_fp8(self.capability),
        }
    }
}

/// Asks a device what it is, and whether kernels could be compiled for it; compiles nothing.
///
/// # Errors
/// A missing or old driver, a missing NVRTC, no such device, one that is too old, or a fault of it.
pub fn probe(ordinal: usize) -> Result<Facts> {
    guarded(|| {
        let (device, name, capability) = find(ordinal)?;
        let driver = driver_version()?;
        // SAFETY: the device is valid; the context is released below.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(fault("make a context on the device"))?;
        // SAFETY: the context was just retained.
        let entered = unsafe { result::ctx::set_current(context) };
        let memory = entered.and_then(|()| result::mem_get_info()).map_err(fault("ask for the free memory"));
        // SAFETY: retained above and not used after this.
        let _ = unsafe { result::primary_ctx::release(device) };
        let (free, total) = memory?;
        Ok(Facts {
            ordinal,
            name,
            capability,
            free: free as u64,
            total: total as u64,
            driver,
            library: library::available(),
        })
    })
}

/// Runs what calls the driver and NVRTC, where both are there and fit together.
pub(super) fn guarded<T>(f: impl FnOnce() -> Result<T> + std::panic::UnwindSafe) -> Result<T> {
    // SAFETY: `is_culib_present` only opens the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::Missing { library: "libcuda", reason: "no NVIDIA driver is installed".into() });
    }
    nvrtc::available()?;
    // cudarc panics where a library is there and lacks a function.
    let outcome = catch_unwind(|| {
        let (driver, nvrtc) = (driver_version()?, nvrtc::version()?);
        // Machine code of a newer minor version runs, of a newer major version does not.
        match driver.0 < nvrtc.0 {
            true => Err(DeviceError::OldDriver { driver, nvrtc }),
            false => f(),
        }
    });
    outcome.unwrap_or_else(|_| {
        Err(DeviceError::Missing { library: "libcuda", reason: "it is too old: it lacks functions".into() })
    })
}

fn driver_version() -> Result<(i32, i32)> {
    let mut version = 0;
    // SAFETY: the number outlives the call, which may come before any other.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    asked.map_err(fault("ask for the driver's version"))?;
    Ok((version / 1000, version % 1000 / 10))
}

/// A device with its name and compute capability.
pub(super) fn find(ordinal: usize) -> Result<(sys::CUdevice, String, (i32, i32))> {
    let count = match result::init() {
        Ok(()) => result::device::get_count().map_err(fault("count the devices"))? as usize,
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        Err(e) => return Err(fault("start the CUDA driver")(e)),
    };
    if ordinal >= count {
        return Err(DeviceError::NoDevice { ordinal, count });
    }
    let device = result::device::get(ordinal as i32).map_err(fault("find the device"))?;
    use sys::CUdevice_attribute::*;
    let attribute = |a| {
        // SAFETY: the device is one that the driver just named.
        unsafe { result::device::get_attribute(device, a) }.map_err(fault("ask for the device's properties"))
    };
    let capability = (
        attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < OLDEST {
        return Err(DeviceError::TooOld { capability });
    }
    let name = result::device::get_name(device).map_err(fault("ask for the device's name"))?;
    Ok((device, name, capability))
}

pub(super) fn has_fp8(capability: (i32, i32)) -> Result<()> {
    let (major, minor) = capability;
    let reason = || {
        format!("the card has compute capability {major}.{minor}, and e4m3 products take 8.9 or newer: set it to bf16")
    };
    if capability < OLDEST_FP8 {
        Err(DeviceError::Lacks { what: "cuda.products=fp8", reason: reason() })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_without_e4m3_is_told_what_to_set() {
        let text = has_fp8((8, 0)).unwrap_err().to_string();
        assert!(text.contains("cuda.products=fp8") && text.contains("8.0") && text.contains("bf16"), "{text}");
        assert!(has_fp8((8, 9)).is_ok() && has_fp8((9, 0)).is_ok());
    }
}
