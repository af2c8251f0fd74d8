#!/bin/sh
# Checks everything, cheapest first, and sets up what that needs (LibTorch included: see libtorch.sh).
#
#   scripts/check.sh                  all stages
#   scripts/check.sh fmt lint         only these
#
# Stages: fmt lint nostd capi test isa parity doc
#
# ELLECI_CHECK_ISA   instruction-set levels to run the core's tests under ("portable avx2 avx512"); the default is every
#                    level below this machine's own. A level that is named here and cannot run is a failure.
#
# Needs Rust, a C++ compiler and python3 with pip. LibTorch's wrapper alone takes
# 5 minutes to build, once.
set -eu
cd "$(dirname "$0")/.."

stages="fmt lint nostd capi test isa parity doc"
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
