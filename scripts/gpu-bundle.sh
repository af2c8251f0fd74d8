#!/bin/sh
# Makes a folder that tests and times the CUDA backend on a machine with an NVIDIA card and no Rust.
#
#   scripts/gpu-bundle.sh [DIR]      default: gpu-bundle
#
# Copy the folder to the machine and run its run.sh: within 9 minutes all kernels and 20 training steps on the card against the CPU
# core; the kernels again under compute-sanitizer, where that is installed; timings of elleci-1.5b; and PyTorch's beside them, where
# python3 has torch. Parts can be run alone: see the head of run.sh. The machine needs a driver for CUDA 13 and a glibc no older
# than this machine's. cuBLASLt is taken from there (a CUDA toolkit, or PyTorch's packages); with CUBLASLT=FOLDER it is put into the
# bundle (some 500 MB), and where there is none our own kernels multiply.
set -eu
cd "$(dirname "$0")/.."

dir=${1:-gpu-bundle}
nvrtc=$(scripts/nvrtc.sh)
mkdir -p "$dir/lib"

# As scripts/check.sh builds, so that nothing is built twice.
cargo() {
    command cargo --config scripts/check.toml "$@"
}

# The path of a program that cargo builds with these arguments.
built() {
    cargo "$@" --message-format json | python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["executable"])' | tail -n 1
}

features="--features elleci-core/capi"
# shellcheck disable=SC2086  # a list
{
    tests=$(built test --release --locked $features -p elleci-cuda-emulation --test emulated --no-run)
    # With the tools selected too, the core has the features that the tests have, and is not built again.
    bench=$(built build --release --locked $features -p elleci-cuda -p elleci-tools --example bench)
}
for program in "$tests" "$bench"; do
    [ -n "$program" ] || { echo "gpu-bundle.sh: cargo names no program" >&2; exit 1; }
done
cp "$tests" "$dir/cuda-tests"
cp "$bench" "$dir/cuda-bench"
cp "$nvrtc"/libnvrtc* "$dir/lib/"
if [ -n "${CUBLASLT:-}" ]; then
    cp "$CUBLASLT"/libcublasLt.so* "$dir/lib/" || { echo "gpu-bundle.sh: CUBLASLT: $CUBLASLT has no libcublasLt.so" >&2; exit 1; }
fi
cp reference/elleci_torch.py "$dir/"
cp scripts/gpu-bundle/run.sh scripts/gpu-bundle/rates.py "$dir/"
chmod +x "$dir/run.sh"
git log -1 --format=%H > "$dir/commit.txt" 2>/dev/null || echo unknown > "$dir/commit.txt"
echo "gpu-bundle.sh: $dir is ready ($(du -sh "$dir" | cut -f1)); run $dir/run.sh on the machine with the card"
