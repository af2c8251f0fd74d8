//! Every kernel compiles for every architecture that is supported, and spills no more registers than was agreed.
//!
//! Needs NVRTC in the loader's path, but no device: `LD_LIBRARY_PATH=$(scripts/nvrtc.sh) cargo test -p elleci-cuda --test nvrtc`.
//! Without it the test passes with a note, unless ELLECI_NVRTC=require.

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
    std::thread::scope(|scope| {
        for arch in architectures {
            scope.spawn(move || check(arch));
        }
    });
}

fn check(arch: &str) {
    for source in SOURCES {
        let compiled = nvrtc::compile(&source, arch).unwrap_or_else(|e| panic!("{arch}: {e}"));
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{arch}: {} gave no machine code", source.name);
        let mut found: Vec<&str> = compiled.resources.iter().map(|r| r.kernel.as_str()).collect();
        let mut expected = source.kernels();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{arch}: {}", source.name);
        for r in compiled.resources {
            assert!(r.spilled <= AGREED, "{arch}: {} spills {} bytes ({} registers)", r.kernel, r.spilled, r.registers);
            // A block of 256 threads has 65,536 registers at the most.
            assert!((1..=255).contains(&r.registers), "{arch}: {} reports {} registers", r.kernel, r.registers);
        }
    }
}
