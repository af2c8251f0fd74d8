//! What is said of a driver, an NVRTC or a card that cannot be used: libraries of our own, with one fault each, in the loader's path.
//!
//! cudarc opens a library once a process, so that each case is a process: this test program again, with the library's folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use elleci_cuda::device::Ability;
use elleci_cuda::driver::probe;

/// Not a test by itself: prints what a probe says, for the test below.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    match probe(0) {
        Ok(card) => println!("said: usable, {} bytes of room, fp8: {:?}", card.room(), card.offers(Ability::Fp8)),
        Err(e) => println!("said: {e}"),
    }
}

/// Compiles the stub as a library of this name.
fn library(folder: &Path, name: &str, defines: &[&str]) {
    std::fs::create_dir_all(folder).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stub/driver.c");
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(folder.join(name))
        .args(defines)
        .arg(source)
        .status();
    assert!(made.expect("a C compiler: Debian: apt install build-essential").success());
}

/// What a probe says with these libraries and this fault.
fn said(folder: &Path, fault: &str) -> String {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .env("ELLECI_STUB", fault)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = text.lines().find_map(|l| l.split("said: ").nth(1));
    line.unwrap_or_else(|| panic!("{fault}: {text} {}", String::from_utf8_lossy(&out.stderr))).to_string()
}

#[test]
fn every_fault_is_named_with_what_to_do() {
    let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("stub");
    let (whole, broken, alone) = (root.join("whole"), root.join("broken"), root.join("alone"));
    library(&whole, "libcuda.so", &[]);
    library(&whole, "libnvrtc.so", &["-DNVRTC"]);
    library(&broken, "libcuda.so", &["-DBROKEN"]);
    library(&broken, "libnvrtc.so", &["-DNVRTC"]);
    library(&alone, "libcuda.so", &[]);
    let cases = [
        ("old driver", &whole, "update the driver"),
        ("no device", &whole, "the driver sees no CUDA device"),
        ("mismatch", &whole, "restart the machine"),
        ("old card", &whole, "compute capability 7.5; 8.0 or newer is needed"),
        ("taken", &whole, "another process has it"),
        ("ecc", &whole, "resume from the last checkpoint"),
        ("none", &broken, "it is too old"),
    ];
    for (fault, folder, expected) in cases {
        let text = said(folder, fault);
        assert!(text.contains(expected), "{fault}: {text}");
    }
    // A card that is sound but small has no room; that no plan fits it is said by `elleci-train`, with what would.
    assert!(said(&whole, "small card").starts_with("usable, 0 bytes of room"));
    let sound = said(&whole, "none");
    assert!(sound.starts_with("usable, 6174015488 bytes") && sound.contains("cuda.products=fp8"), "{sound}");
    // A machine may have an NVRTC beside the loader's path.
    let text = said(&alone, "none");
    assert!(text.starts_with("usable") || text.contains("libnvrtc cannot be loaded"), "{text}");
}
