#!/bin/sh
# Checks everything, cheapest first, and sets up what that needs (LibTorch and NVRTC included: see libtorch.sh, nvrtc.sh).
#
#   scripts/check.sh                  all stages
#   scripts/check.sh fmt lint         only these
#
# Stages: fmt lint nostd capi test isa neon fuzz cuda parity doc
#
# ELLECI_CHECK_ISA   instruction-set levels to run the core's tests under ("portable avx2 avx512"); the default is every
#                    level below this machine's own. A level that is named here and cannot run is a failure.
#
# ELLECI_CHECK_NEON  `require` makes a failure of a `neon` stage that finds no tools, which is skipped otherwise
# ELLECI_CHECK_FUZZ  seconds a fuzz target (5)
#
# Needs Rust, a C++ compiler and python3 with pip. LibTorch's wrapper alone takes
# 5 minutes to build, once.
set -eu
cd "$(dirname "$0")/.."

stages="fmt lint nostd capi test isa neon fuzz cuda parity doc"
for stage in "$@"; do
    case " $stages " in
    *" $stage "*) ;;
    *) echo "check.sh: unknown stage '$stage'; the stages are: $stages" >&2; exit 2 ;;
    esac
done

need() {
    command -v "$1" >/dev/null && return
    echo "check.sh: $1 is missing (Debian: apt install $2)" >&2
    exit 1
}

need cargo "cargo, or better https://rustup.rs"
need cc build-essential
need g++ build-essential
need python3 "python3 python3-pip"

# One profile and one target directory for every stage, so that nothing is built twice.
target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
export CARGO_TARGET_DIR="$target"

libtorch() {
    LIBTORCH=$(scripts/libtorch.sh)
    export LIBTORCH
}

stage_fmt() {
    cargo fmt --all --check
    cargo fmt --manifest-path tests/no-std/Cargo.toml --check
    cargo fmt --manifest-path fuzz/Cargo.toml --check
}

stage_lint() {
    cargo clippy --release --all-targets --locked -- -D warnings
}

# A static library without the standard library, linked into a C program that runs it against the ordinary build; and a
# program without it that runs the model in its own data.
stage_nostd() {
    cargo build --release --locked --manifest-path tests/no-std/Cargo.toml
    cc -O1 -Wall -Wextra -Werror -Ielleci-core/include -o "$target/no-std-probe" tests/no-std/main.c \
        "$target/release/libelleci_no_std.a" -lm
    expected=$(cargo run --release --quiet -p elleci-core --example probe)
    # shellcheck disable=SC2086  # four arguments
    "$target/no-std-probe" $expected
    "$target/release/tiny" || { echo "tests/no-std/src/bin/tiny.rs: failed with $?" >&2; return 1; }
}

# The C ABI: a program that calls all of it, with the shared and the static library, and the program of docs/embedding.md.
stage_capi() {
    cargo clippy --release --locked -p elleci-core --lib --tests --features capi -- -D warnings
    cargo test --release --locked --quiet -p elleci-core --features capi --lib capi
    cargo rustc --release --locked --quiet -p elleci-core --features capi --crate-type cdylib,staticlib
    libraries="$target/release" archives=fixtures/archive
    flags="-std=c11 -O1 -Wall -Wextra -Werror -Ielleci-core/include"
    # What `rustc --print native-static-libs` names for Linux, and harmless elsewhere.
    system="-lpthread -ldl -lm"
    # shellcheck disable=SC2086  # lists
    {
        cc $flags -o "$target/capi-static" tests/capi/main.c "$libraries/libelleci_core.a" $system
        cc $flags -o "$target/capi-shared" tests/capi/main.c -L"$libraries" -lelleci_core -Wl,-rpath,"$libraries" -lm
        sed -n '/^```c$/,/^```$/{/^```/d;p;}' docs/embedding.md > "$target/embedding.c"
        cc $flags -o "$target/embedding" "$target/embedding.c" "$libraries/libelleci_core.a" $system
    }
    for kind in static shared; do
        "$target/capi-$kind" "$archives/tiny-t5.elleci" "$archives/tiny-i2.elleci"
    done
    "$target/embedding" "$archives/tiny-t5.elleci"
}

stage_test() {
    python3 fixtures/generate.py --check
    cargo test --release --locked
}

# tests/isa.rs of the core fails where the level asked for is not the one that runs.
stage_isa() {
    levels=${ELLECI_CHECK_ISA:-$(cargo run --release --quiet -p elleci-core --example isa)}
    for level in $levels; do
        echo "-- ELLECI_ISA=$level"
        ELLECI_ISA=$level cargo test --release --locked --quiet -p elleci-core
    done
}

# The NEON kernels on an emulated ARM, with the dot product instructions and without, where a compiler for it can be had: that of
# the PATH with its target added (rustup target add aarch64-unknown-linux-gnu), or Debian's own beside it.
stage_neon() {
    arm=aarch64-unknown-linux-gnu missing=
    for compiler in "${RUSTC:-rustc}" /usr/bin/rustc none; do
        libraries=$("$compiler" --print target-libdir --target $arm 2>/dev/null) && [ -d "$libraries" ] && break
    done
    [ "$compiler" = none ] && missing="a standard library for $arm (rustup target add $arm, or Debian: dpkg --add-architecture arm64 &&
        apt update && apt install rustc-web libstd-rust-web-dev:arm64)"
    command -v aarch64-linux-gnu-gcc >/dev/null || missing="$missing aarch64-linux-gnu-gcc (apt install gcc-aarch64-linux-gnu)"
    command -v qemu-aarch64 >/dev/null || missing="$missing qemu-aarch64 (apt install qemu-user)"
    if [ -n "$missing" ]; then
        echo "check.sh: the NEON kernels were NOT tested. Missing:" $missing >&2
        [ "${ELLECI_CHECK_NEON:-}" != require ]
        return
    fi
    export RUSTC="$compiler" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    for cpu in max:neondot max:neon cortex-a53:neon; do
        echo "-- ${cpu%:*}, ELLECI_ISA=${cpu#*:}"
        ELLECI_ISA=${cpu#*:} CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu ${cpu%:*}" \
            cargo test --release --locked --quiet --target-dir "$target/arm" --target $arm -p elleci-core --lib --test isa \
            -- ternary the_level_asked_for
    done
}

# A short run of every fuzz target from its seeds; see fuzz/README.md for long ones.
stage_fuzz() {
    scripts/fuzz.sh -t "${ELLECI_CHECK_FUZZ:-5}"
}

# The CUDA kernels without a GPU: compiled by NVRTC for three generations (nvrtc.sh fetches it), and run on an emulated device
# against the core. A process has one emulated device, which keeps one processor busy: what is slow runs side by side.
stage_cuda() {
    nvrtc=$(scripts/nvrtc.sh)
    for script in scripts/gpu-bundle.sh scripts/gpu-bundle/run.sh; do
        sh -n "$script"
    done
    cargo clippy --release --all-targets --locked -p elleci-cuda-emulation -- -D warnings
    tests="cargo test --release --locked --quiet"
    $tests --no-run -p elleci-cuda --test nvrtc
    $tests --no-run -p elleci-cuda-emulation
    LD_LIBRARY_PATH="$nvrtc${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ELLECI_NVRTC=require \
        $tests -p elleci-cuda --test nvrtc > "$target/cuda-nvrtc.log" 2>&1 &
    compiling=$!
    $tests -p elleci-cuda-emulation --test emulated -- step:: > "$target/cuda-step.log" 2>&1 &
    stepping=$!
    $tests -p elleci-cuda-emulation -- --skip step::
    wait "$stepping" || { cat "$target/cuda-step.log"; return 1; }
    wait "$compiling" || { cat "$target/cuda-nvrtc.log"; return 1; }
}

stage_parity() {
    libtorch
    cargo clippy --release --all-targets --locked -p elleci-tests -- -D warnings
    cargo test --release --locked -p elleci-tests
}

stage_doc() {
    libtorch
    RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --workspace
}

# A stage runs in a shell of its own: inside `if` or `||`, `set -e` would not stop it at its first failure.
run() {
    echo "== $1"
    began=$(date +%s)
    set +e
    (set -e; "stage_$1")
    status=$?
    set -e
    if [ $status -ne 0 ]; then
        echo "check.sh: FAILED at stage $1"
        exit 1
    fi
    echo "== $1 passed in $(($(date +%s) - began)) s"
}

start=$(date +%s)
for stage in ${*:-$stages}; do
    run "$stage"
done
echo "check.sh: ok (${*:-$stages}) in $(($(date +%s) - start)) s"
