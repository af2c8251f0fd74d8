#!/bin/sh
# Builds the fuzz targets of fuzz/ with coverage counters, by plain cargo, and runs them one after the other.
#
#   scripts/fuzz.sh                     every target, 5 s each
#   scripts/fuzz.sh -t 600 archive pth  these, 10 minutes each
#
# ELLECI_FUZZ_SANITIZER=address   also finds what unsafe code does wrong (sets RUSTC_BOOTSTRAP=1: the flag is unstable)
# ELLECI_FUZZ_RUNS=1000           stop a target after that many inputs, should that come first
#
# The seeds (fuzz/corpus, fixtures, presets) are only read; what a run adds goes to TARGET_DIR/fuzz/corpus, and an input that fails
# to TARGET_DIR/fuzz/artifacts. To run one again: TARGET_DIR/fuzz/HOST/release/NAME FILE (TARGET_DIR/release after a short run).
set -eu
cd "$(dirname "$0")/.."

seconds=5
if [ "${1:-}" = -t ]; then
    seconds=${2:?fuzz.sh: -t wants seconds}
    shift 2
fi
all=$(sed -n 's/^\[\[bin\]\] *//;s/^path = "fuzz_targets\/\(.*\)\.rs"/\1/p' fuzz/Cargo.toml)
for name in "$@"; do
    [ -f "fuzz/fuzz_targets/$name.rs" ] || { echo "fuzz.sh: unknown target '$name'; the targets are:" $all >&2; exit 2; }
done
targets=${*:-$all}

target=${CARGO_TARGET_DIR:-target}
host=$(rustc -vV | sed -n 's/^host: //p')
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks"
if [ -n "${ELLECI_FUZZ_SANITIZER:-}" ]; then
    export RUSTC_BOOTSTRAP=1
    flags="$flags -Zsanitizer=$ELLECI_FUZZ_SANITIZER"
fi
bins=
for name in $targets; do bins="$bins --bin $name"; done
if [ "$seconds" -gt 60 ] || [ -n "${ELLECI_FUZZ_SANITIZER:-}" ]; then
    # With --target the flags stay away from build scripts and procedural macros.
    programs="$target/fuzz/$host/release"
    # shellcheck disable=SC2086  # lists
    RUSTFLAGS=$(echo $flags) cargo build --release --locked -p elleci-fuzz --target "$host" --target-dir "$target/fuzz" $bins
else
    # For a short run, building is what takes time: only our own crates have counters, and the others are those of the other checks.
    programs="$target/release"
    # shellcheck disable=SC2086  # lists
    ELLECI_FUZZ_FLAGS=$(echo $flags) RUSTC_WORKSPACE_WRAPPER="$PWD/scripts/fuzz-rustc.sh" cargo --config scripts/check.toml \
        --config profile.release.package.elleci-core.opt-level=1 build --release --locked --features elleci-core/capi --workspace $bins
fi
target="$target/fuzz"

# Seeds that are kept elsewhere in this repository.
seeds() {
    [ -d "fuzz/corpus/$1" ] && echo "fuzz/corpus/$1"
    case $1 in
    run_config) echo elleci-tools/presets ;;
    archive) echo fixtures/archive ;;
    esac
}

for name in $targets; do
    echo "-- $name"
    mkdir -p "$target/corpus/$name" "$target/artifacts/$name"
    log="$target/$name.log"
    status=0
    # shellcheck disable=SC2046  # a list
    "$programs/$name" -max_total_time="$seconds" -runs="${ELLECI_FUZZ_RUNS:--1}" -timeout=20 -rss_limit_mb=2048 \
        -artifact_prefix="$target/artifacts/$name/" "$target/corpus/$name" $(seeds "$name") >"$log" 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        tail -n 40 "$log" >&2
        echo "fuzz.sh: $name FAILED with $status; the whole log: $log" >&2
        exit 1
    fi
    grep -E '[[:space:]](INITED|DONE)[[:space:]]' "$log" | sed 's/^/   /'
done
