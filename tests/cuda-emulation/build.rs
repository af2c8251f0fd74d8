//! Compiles the kernels of elleci-cuda for the emulated machine: the same text, under another header.

use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

#[path = "../../elleci-cuda/src/source.rs"]
#[allow(dead_code, reason = "the library's own file, of which a build needs a part")]
mod source;

/// What a compiler must not change: every operation rounds by itself, as the core's do.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("cxx").flag("-ffp-contract=off").flag("-Wno-unknown-pragmas");
    build.flag("-Wno-unused-parameter").flag("-Wno-unused-function").define("ELLECI_EMULATION", None);
    build
}

/// The text of a file for the host, and a table of its kernels.
fn host_text(name: &str, stem: &str, text: &str, kernels: &[String]) -> String {
    let mut out = format!("#line 1 \"{name}\"\n{text}\n#include \"registry.h\"\n");
    writeln!(out, "extern const EmulatedKernel emulated_{stem}[] = {{").expect("a string");
    for k in kernels {
        writeln!(out, "    {{\"{k}\", Entry<{k}>::call, Entry<{k}>::signature, threads_of_{k}}},").expect("a string");
    }
    out + "};\n"
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cxx");
    println!("cargo:rerun-if-changed=../../elleci-cuda/kernels");
    println!("cargo:rerun-if-changed=../../elleci-cuda/src/source.rs");
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo"));
    // Faults of our own making, which the emulation must find.
    let faults = source::Source::for_tests("faults.cu", include_str!("cxx/faults.cu"));
    let mut kernels = compiler();
    kernels.flag("-fsanitize=thread");
    let (mut declarations, mut lists, mut count) = (String::new(), String::new(), 0);
    for s in source::SOURCES.iter().chain([&faults]) {
        let stem = s.name.trim_end_matches(".cu");
        let file = out.join(format!("{stem}.cpp"));
        let names = s.kernels();
        fs::write(&file, host_text(s.name, stem, &s.expanded(), &names)).expect("OUT_DIR can be written");
        kernels.file(file);
        writeln!(declarations, "extern const EmulatedKernel emulated_{stem}[];").expect("a string");
        writeln!(lists, "    {{emulated_{stem}, {}}},", names.len()).expect("a string");
        count += 1;
    }
    kernels.compile("emulated_kernels");
    let registry = format!(
        "typedef unsigned int u32;\ntypedef long long i64;\ntypedef unsigned long long u64;\nstruct Floats;\n\
         #include \"registry.h\"\n{declarations}extern const KernelList emulated_lists[] = {{\n{lists}}};\n\
         extern const u32 emulated_list_count = {count};\n"
    );
    fs::write(out.join("registry.cpp"), registry).expect("OUT_DIR can be written");
    compiler().file(out.join("registry.cpp")).file("cxx/machine.cpp").compile("emulated_machine");
}
