//! Every kernel compiles for every architecture that is supported, and spills no more registers than was agreed.
//!
//! Needs NVRTC in the loader's path, but no device: `LD_LIBRARY_PATH=$(scripts/nvrtc.sh) cargo test -p elleci-cuda --test nvrtc`.
//! (`-- --nocapture` prints the registers of each kernel). Without it the test passes with a note, unless ELLECI_NVRTC=require.

use elleci_cuda::nvrtc;
use elleci_cuda::source::SOURCES;

/// One machine of each generation: A100, H100 and H200, RTX 50. ELLECI_NVRTC_ARCH narrows it.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_120"];

/// Bytes that a thread may spill: one register stored and loaded, which the compiler prefers to one block less a
/// multiprocessor in a few kernels.
const AGREED: u32 = 8;

#[test]
fn all_kernels_compile_without_spills() {
    if let Err(e) = nvrtc::available() {
        assert!(std::env::var("ELLECI_NVRTC").as_deref() != Ok("require"), "{e}");
        eprintln!("skipped: {e}");
        return;
    }
    let chosen = std::env::var("ELLECI_NVRTC_ARCH").unwrap_or_else(|_| ARCHITECTURES.join(" "));
    let architectures: Vec<&str> = chosen.split_whitespace().collect();
    // Everything that is wrong in one report: a compilation takes seconds.
    let faults: Vec<String> = std::thread::scope(|scope| {
        let each: Vec<_> = architectures.into_iter().map(|arch| scope.spawn(move || faults(arch))).collect();
        each.into_iter().flat_map(|t| t.join().expect("the reason is above")).collect()
    });
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// What is wrong with the resources that the kernels take on an architecture.
fn faults(arch: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for source in SOURCES {
        let compiled = nvrtc::compile(&source, arch).unwrap_or_else(|e| panic!("{arch}: {e}"));
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{arch}: {} gave no machine code", source.name);
        let mut found: Vec<&str> = compiled.resources.iter().map(|r| r.kernel.as_str()).collect();
        let mut expected = source.kernels();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{arch}: {}", source.name);
        for r in compiled.resources {
            println!("{arch} {}: {} registers, {} bytes spilled", r.kernel, r.registers, r.spilled);
            if r.spilled > AGREED {
                faults.push(format!("{arch}: {} spills {} bytes ({} registers)", r.kernel, r.spilled, r.registers));
            }
            // A block of 256 threads has 65,536 registers at the most.
            if !(1..=255).contains(&r.registers) {
                faults.push(format!("{arch}: {} reports {} registers", r.kernel, r.registers));
            }
        }
    }
    faults
}
