#!/bin/sh
# Checks everything, cheapest first, and sets up what that needs (LibTorch and NVRTC included: see libtorch.sh, nvrtc.sh).
#
#   scripts/check.sh                  all stages
#   scripts/check.sh fmt lint         only these
#
# Stages: fmt lint test isa nostd capi neon cuda parity server page fuzz doc
#
# ELLECI_CHECK_ISA   instruction-set levels to run the core's tests under ("portable avx2 avx512"); the default is every
#                    level below this machine's own. A level that is named here and cannot run is a failure.
#
# ELLECI_CHECK_NEON  `require` makes a failure of a `neon` stage that finds no tools, which is skipped otherwise
# ELLECI_CHECK_FUZZ  seconds a fuzz target (5)
# ELLECI_CHECK_PAGE  `require` makes a failure of a `page` stage that finds no Chromium or npm, which is skipped otherwise
# ELLECI_CHECK_SERVER  `judge` makes slow figures of the `server` stage a failure: for a machine that does nothing else
#
# Needs Rust, a C++ compiler and python3 with pip. LibTorch's wrapper alone takes
# 5 minutes to build, once.
set -eu
cd "$(dirname "$0")/.."

stages="fmt lint test isa nostd capi neon cuda parity server page fuzz doc"
for stage in "$@"; do
    case " $stages " in
    *" $stage "*) ;;
    *) echo "check.sh: unknown stage '$stage'; the stages are: $stages" >&2; exit 2 ;;
    esac
done

# The status of a stage that lacks what it needs, as in Automake.
skipped=77

need() {
    command -v "$1" >/dev/null && return
    echo "check.sh: $1 is missing (Debian: apt install $2)" >&2
    exit 1
}

need cargo "cargo, or better https://rustup.rs"
need cc build-essential
need g++ build-essential
need python3 "python3 python3-pip"

# One profile, one target directory and one set of features for every stage, so that nothing is built twice.
cargo() {
    command cargo --config scripts/check.toml "$@"
}
features="--features elleci-core/capi"
target=$(command cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
export CARGO_TARGET_DIR="$target"

# What is compiled: everything at once if several stages need it (LibTorch's wrapper, one long C++ file, beside the rest), else what
# the stage itself is about.
selection() {
    case ${everything:-} in
    yes) echo --workspace ;;
    *) echo "$@" ;;
    esac
}

libtorch() {
    LIBTORCH=$(scripts/libtorch.sh)
    export LIBTORCH LD_LIBRARY_PATH="$LIBTORCH/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

# Builds the tests of a selection, and with them its programs and examples.
# shellcheck disable=SC2086  # lists
build() {
    chosen=$(selection "$@")
    [ "$chosen" != --workspace ] || libtorch
    cargo test --release --locked $features $chosen --no-run --message-format json-render-diagnostics >"$target/tests.json"
}

# Builds the selection $1, and runs the tests of the packages that follow, each in its package's folder as cargo does; options of
# run_tests.py may stand among them.
tests() {
    # shellcheck disable=SC2086  # a list
    build $1
    shift
    python3 scripts/run_tests.py "$target/tests.json" "$@"
}

stage_fmt() {
    cargo fmt --all --check
    cargo fmt --manifest-path tests/no-std/Cargo.toml --check
}

# shellcheck disable=SC2046,SC2086  # lists
stage_lint() {
    # If all is to be built, that comes first: LibTorch's wrapper is one long C++ file, and the tests are compiled beside it.
    [ "${everything:-}" != yes ] || build
    # Clippy starts a cargo of its own, which is to be told the profile too: it would build LibTorch's wrapper again.
    command cargo clippy --config scripts/check.toml --release --all-targets --locked $features $(selection) -- -D warnings
}

# A static library without the standard library, linked into a C program that runs it against the ordinary build; and a
# program without it that runs the model in its own data.
stage_nostd() {
    # What is shown here does not depend on how it is optimised, and compiling the core takes long.
    command cargo --config profile.release.opt-level=1 build --release --locked --manifest-path tests/no-std/Cargo.toml
    cc -O1 -Wall -Wextra -Werror -Ielleci-core/include -o "$target/no-std-probe" tests/no-std/main.c \
        "$target/release/libelleci_no_std.a" -lm
    build -p elleci-core
    expected=$("$target/release/examples/probe")
    # shellcheck disable=SC2086  # four arguments
    "$target/no-std-probe" $expected
    "$target/release/tiny" || { echo "tests/no-std/src/bin/tiny.rs: failed with $?" >&2; return 1; }
}

# The C ABI: a program that calls all of it, with the shared and the static library, and the program of docs/embedding.md.
stage_capi() {
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
    tests "" elleci-core elleci-cuda elleci-tools
    # shellcheck disable=SC2046,SC2086  # lists
    cargo test --release --locked $features $(selection) --doc
}

# tests/isa.rs of the core fails where the level asked for is not the one that runs.
stage_isa() {
    build -p elleci-core
    levels=${ELLECI_CHECK_ISA:-$("$target/release/examples/isa")}
    for level in $levels; do
        echo "-- ELLECI_ISA=$level"
        # What is planned and allocated does not depend on the level, and takes the portable one more than a minute.
        (export ELLECI_ISA="$level"; tests "-p elleci-core" --quiet --skip memory elleci-core)
    done
}

# Whether the smallest program that starts a thread runs to its end on the emulated ARM.
arm_threads() {
    aarch64-linux-gnu-gcc -O1 -o "$target/arm-threads" tests/neon/threads.c -lpthread
    timeout 20 qemu-aarch64 -L /usr/aarch64-linux-gnu "$target/arm-threads"
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
        return $skipped
    fi
    # Sixty-four tokens of the bundled model, drawn: what an ARM is to choose too.
    text() {
        "$@" fixtures/model/talk-nano.elleci 17 44 9 5
    }
    want=$(text cargo run --release --locked --quiet -p elleci-core --example generate --)
    export RUSTC="$compiler" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # On some hosts threads never start under qemu-user, and every test of Rust's harness is a thread.
    threads=yes level=3
    if ! arm_threads; then
        threads= level=1
        echo "a program with a thread does not end within 20 s under qemu-aarch64 here: examples/levels in place of the tests" >&2
    fi
    arm_cargo() {
        command=$1 && shift
        cargo --config profile.release.opt-level=$level "$command" --release --locked --quiet --target-dir "$target/arm" --target $arm \
            -p elleci-core "$@"
    }
    for cpu in max:neondot max:neon cortex-a53:neon; do
        echo "-- ${cpu%:*}, ELLECI_ISA=${cpu#*:}"
        export ELLECI_ISA="${cpu#*:}" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu ${cpu%:*}"
        if [ -n "$threads" ]; then
            arm_cargo test --lib --test isa -- ternary the_level_asked_for
        else
            arm_cargo run --example levels
        fi
        [ "$(text arm_cargo run --example generate --)" = "$want" ] || {
            echo "check.sh: another text than on this machine" >&2
            return 1
        }
        echo "the bundled model's text is this machine's"
    done
}

# A short run of every fuzz target from its seeds; see fuzz/README.md for long ones.
stage_fuzz() {
    scripts/fuzz.sh -t "${ELLECI_CHECK_FUZZ:-5}"
}

# The CUDA kernels without a GPU: compiled by NVRTC for three generations (nvrtc.sh fetches it), and run on an emulated device
# against the core. A process has one emulated device, which keeps one processor busy.
stage_cuda() {
    nvrtc=$(scripts/nvrtc.sh)
    export LD_LIBRARY_PATH="$nvrtc${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ELLECI_NVRTC=require
    for script in scripts/gpu-bundle.sh scripts/gpu-bundle/run.sh; do
        sh -n "$script"
    done
    tests "-p elleci-cuda -p elleci-cuda-emulation" --apart emulated elleci-cuda elleci-cuda-emulation
    bundle_refuses
}

# The bundle on a machine without a card says what is missing and exits with 1. (Its parts are the tests and the bench from above.)
bundle_refuses() {
    "$target/release/examples/bench" --check >/dev/null 2>&1 && return # there is a card
    dir="$target/bundle-check"
    rm -rf "$dir"
    mkdir -p "$dir/lib"
    cp scripts/gpu-bundle/run.sh "$dir/"
    cp "$target/release/examples/bench" "$dir/cuda-bench"
    ! sh "$dir/run.sh" 2>"$dir/said" || { echo "check.sh: run.sh succeeds without a card" >&2; return 1; }
    grep -q 'no card can be used: .*libcuda\|no card can be used: .*driver' "$dir/said" || { cat "$dir/said" >&2; return 1; }
}

stage_parity() {
    libtorch
    tests "-p elleci-tests" elleci-tests
}

# The server against OpenAI's own clients, and under load. Their packages come from PyPI and npm.
stage_server() {
    build
    folder="$target/server-tests"
    mkdir -p "$folder"
    if ! [ -x "$folder/venv/bin/python" ]; then
        python3 -m venv "$folder/venv" || {
            rm -rf "$folder/venv"
            echo "check.sh: the server was NOT tested: python3 -m venv fails (Debian: apt install python3-venv)" >&2
            return $skipped
        }
    fi
    "$folder/venv/bin/python" -c 'import openai' 2>/dev/null || "$folder/venv/bin/pip" install --quiet 'openai>=2,<3' || {
        echo "check.sh: the server was NOT tested: pip cannot install openai" >&2
        return $skipped
    }
    if [ -d "$folder/node_modules/openai" ]; then
        :
    elif command -v npm >/dev/null; then
        npm install --silent --no-audit --no-fund --prefix "$folder" openai@6 ||
            echo "check.sh: npm cannot install openai" >&2
    fi
    judge=--report-only
    [ "${ELLECI_CHECK_SERVER:-}" = judge ] && judge=
    "$folder/venv/bin/python" tests/server/run.py "$folder" $judge
}

# The server's page in a headless Chromium, against a stand-in for the server.
stage_page() {
    tests/page/run.sh
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
    if [ "$1" = page ] && [ -n "${page:-}" ]; then
        wait "$page"
        status=$?
        page=
        cat "$target/page.log"
    else
        (set -e; "stage_$1")
        status=$?
    fi
    set -e
    if [ $status -eq $skipped ]; then
        untested="$untested $1"
        echo "== $1 skipped"
        return
    fi
    if [ $status -ne 0 ]; then
        echo "check.sh: FAILED at stage $1"
        exit 1
    fi
    echo "== $1 passed in $(($(date +%s) - began)) s"
}

start=$(date +%s) untested=
[ $# -eq 1 ] || everything=yes
chosen=${*:-$stages} page=
# The page needs nothing that is compiled here, and mostly waits: it is tried beside the compiling.
case "${everything:-}: $chosen " in
yes:*" page "*)
    mkdir -p "$target"
    (exec tests/page/run.sh) >"$target/page.log" 2>&1 &
    page=$!
    trap '[ -z "$page" ] || kill "$page" 2>/dev/null' EXIT
    ;;
esac
for stage in $chosen; do
    run "$stage"
done
echo "check.sh: ok (${*:-$stages}) in $(($(date +%s) - start)) s${untested:+; NOT tested:$untested}"
