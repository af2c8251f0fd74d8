//! Compiling the kernels with NVRTC, which needs neither a device nor a driver.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::panic::catch_unwind;
use std::sync::{Mutex, PoisonError};

use cudarc::nvrtc::{result, sys};

use crate::device::DeviceError;
use crate::source::Source;

/// What a compilation gave: machine code, and what the assembler says of it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// A cubin.
    pub cubin: Vec<u8>,
    /// A line for each kernel, from the log.
    pub resources: Vec<Resources>,
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes a thread that registers were spilled to, stores and loads together.
    pub spilled: u32,
}

/// Whether NVRTC can be loaded.
///
/// # Errors
/// [`DeviceError::Missing`].
pub fn available() -> Result<(), DeviceError> {
    // cudarc panics where the library is missing, with the names that it tried; there is no other way to ask.
    // SAFETY: `is_culib_present` only opens the library.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(DeviceError::Missing {
            library: "libnvrtc",
            reason: "no libnvrtc.so of CUDA 12 or 13 in the loader's path".into(),
        }),
    }
}

/// The version of the library.
///
/// # Errors
/// [`DeviceError::Missing`].
pub fn version() -> Result<(i32, i32), DeviceError> {
    available()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both numbers outlive the call.
    let asked = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
    asked.map_err(|e| DeviceError::Missing { library: "libnvrtc", reason: e.to_string() })?;
    Ok((major, minor))
}

/// Compiles a file of kernels for an architecture, e.g. `sm_90a`.
///
/// # Errors
/// [`DeviceError::Compile`] with the compiler's log; [`DeviceError::Missing`].
pub fn compile(source: &Source, arch: &str) -> Result<Compiled, DeviceError> {
    available()?;
    let failed = |log: String| DeviceError::Compile { source: source.name, log };
    let options = [
        format!("--gpu-architecture={arch}"),
        "--fmad=false".to_string(),
        "--std=c++17".to_string(),
        "--ptxas-options=-v".to_string(),
    ];
    let text = CString::new(source.expanded()).map_err(|e| failed(e.to_string()))?;
    let name = CString::new(source.name).map_err(|e| failed(e.to_string()))?;
    let program = result::create_program(&text, Some(&name)).map_err(|e| failed(e.to_string()))?;
    // SAFETY: the program was made above and lives until the last line; `text` and `name` live as long.
    let outcome = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above; the log is there whether or not the compilation succeeded.
    let log = unsafe { result::get_program_log(program) }.map(|l| text_of(&l)).unwrap_or_default();
    let cubin = match outcome {
        Ok(()) => cubin(program).map_err(|e| failed(e.to_string())),
        Err(e) => Err(failed(format!("{e}\n{log}"))),
    };
    // SAFETY: nothing uses the program afterwards.
    let _ = unsafe { result::destroy_program(program) };
    Ok(Compiled { cubin: cubin?, resources: resources(&log) })
}

fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0usize;
    // SAFETY: the caller's program has been compiled; `size` outlives the call.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result()?;
    let mut code = vec![0u8; size];
    // SAFETY: the buffer has the size that the line above gave.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast::<c_char>()) }.result()?;
    Ok(code)
}

fn text_of(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads the assembler's report: an "entry function" line, then spills, then registers.
fn resources(log: &str) -> Vec<Resources> {
    let mut out: Vec<Resources> = Vec::new();
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line.split(what).next().filter(|head| head.len() < line.len())?.split_whitespace().last()?.parse().ok()
    };
    for line in log.lines() {
        if let Some(rest) = line.split("entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            out.push(Resources { kernel, registers: 0, spilled: 0 });
        }
        let Some(last) = out.last_mut() else { continue };
        let spills = [" bytes spill stores", " bytes spill loads"].map(|what| number_before(line, what).unwrap_or(0));
        last.spilled += spills.iter().sum::<u32>();
        if let Some(registers) = number_before(line, " registers") {
            last.registers = registers;
        }
    }
    out
}

/// What has been compiled in this process, by architecture.
static COMPILED: Mutex<BTreeMap<String, Vec<Compiled>>> = Mutex::new(BTreeMap::new());

/// Compiles all files, once a process; the order is that of [`crate::source::SOURCES`].
///
/// # Errors
/// The first that does not compile.
pub fn compile_all(arch: &str) -> Result<Vec<Compiled>, DeviceError> {
    // A panic in another thread leaves a map that is whole: entries are inserted in one piece.
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(all) = compiled.get(arch) {
        return Ok(all.clone());
    }
    let all = compile_each(arch)?;
    compiled.insert(arch.to_string(), all.clone());
    Ok(all)
}

fn compile_each(arch: &str) -> Result<Vec<Compiled>, DeviceError> {
    // A library that is there but broken makes cudarc panic while it looks up symbols.
    let all = catch_unwind(|| crate::source::SOURCES.iter().map(|s| compile(s, arch)).collect());
    all.unwrap_or_else(|_| {
        Err(DeviceError::Missing { library: "libnvrtc", reason: "it lacks functions that are needed".into() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : 4 bytes gmem\n\
                   ptxas info    : Compiling entry function 'first' for 'sm_90a'\n\
                   ptxas info    : Function properties for first\n\
                   ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size\n\
                   ptxas info    : Compiling entry function 'second' for 'sm_90a'\n\
                   ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                   ptxas info    : Used 30 registers, used 0 barriers\n";
        let of = |kernel: &str, registers, spilled| Resources { kernel: kernel.into(), registers, spilled };
        assert_eq!(resources(log), [of("first", 64, 16), of("second", 30, 0)]);
    }
}
