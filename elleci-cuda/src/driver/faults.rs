//! Errors of the driver, with what to do about them.

use cudarc::driver::{DriverError, sys};

use crate::device::DeviceError;

/// What to do about an error of the driver.
fn remedy(error: sys::CUresult) -> &'static str {
    use sys::CUresult::*;
    match error {
        CUDA_ERROR_OUT_OF_MEMORY => "another process may have taken the memory (nvidia-smi lists them)",
        CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "the card is in exclusive mode and another process has it (nvidia-smi lists them)"
        }
        CUDA_ERROR_ECC_UNCORRECTABLE | CUDA_ERROR_NVLINK_UNCORRECTABLE | CUDA_ERROR_HARDWARE_STACK_ERROR => {
            "the card has a hardware fault (nvidia-smi -q tells more): resume from the last checkpoint on another card, or on this \
             one after a reset"
        }
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_CONTEXT_IS_DESTROYED => {
            "this process can use the card no more: the last checkpoint is good, resume from it"
        }
        CUDA_ERROR_LAUNCH_TIMEOUT => {
            "the card also drives a screen, which ends long kernels: use another, or smaller micro-batches"
        }
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "the driver and its kernel module are of different versions: restart the machine"
        }
        CUDA_ERROR_SYSTEM_NOT_READY => {
            "a service of the driver does not run yet (nvidia-fabricmanager, where there is NVSwitch)"
        }
        CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUDA_ERROR_INVALID_IMAGE => {
            "the driver is older than NVRTC: update it"
        }
        _ => "",
    }
}

/// The driver's error with what to do about it.
pub(super) fn fault(action: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |e| {
        let remedy = remedy(e.0);
        let colon = if remedy.is_empty() { "" } else { "; " };
        DeviceError::Driver { action, reason: format!("{e}{colon}{remedy}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sticky_errors_and_hardware_faults_say_what_to_do() {
        use sys::CUresult::*;
        assert!(remedy(CUDA_ERROR_ILLEGAL_ADDRESS).contains("last checkpoint is good"));
        assert!(remedy(CUDA_ERROR_ECC_UNCORRECTABLE).contains("resume from the last checkpoint on another card"));
        assert!(remedy(CUDA_ERROR_OUT_OF_MEMORY).contains("nvidia-smi"));
        assert_eq!(remedy(CUDA_SUCCESS), "");
    }
}
