#!/bin/sh
# Makes a folder that tests the CUDA backend on a machine with an NVIDIA card and no Rust.
#
#   scripts/gpu-bundle.sh [DIR]      default: gpu-bundle
#
# Copy the folder to the machine and run its run.sh: all kernels and whole training steps on the card, against the CPU core; then,
# where compute-sanitizer is installed, the kernels again under memcheck and racecheck. The machine needs a driver for CUDA 13
# and a glibc no older than this machine's.
set -eu
cd "$(dirname "$0")/.."

dir=${1:-gpu-bundle}
nvrtc=$(scripts/nvrtc.sh)
mkdir -p "$dir/lib"

test=$(cargo test --release --locked -p elleci-cuda-emulation --test emulated --no-run --message-format json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "emulated":
        print(message["executable"])')
[ -n "$test" ] || { echo "gpu-bundle.sh: cargo names no test binary" >&2; exit 1; }
cp "$test" "$dir/cuda-tests"
cp "$nvrtc"/libnvrtc* "$dir/lib/"

cat > "$dir/run.sh" <<'RUN'
#!/bin/sh
# Runs the CUDA tests on the first card; results are in results.txt.
set -u
cd "$(dirname "$0")"
export LD_LIBRARY_PATH="$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ELLECI_CUDA_TEST=card
status=0
{
    date -u
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
    ./cuda-tests --test-threads=1 kernels:: step:: || status=1
    for tool in memcheck racecheck; do
        if command -v compute-sanitizer >/dev/null; then
            compute-sanitizer --tool "$tool" --error-exitcode 9 ./cuda-tests --test-threads=1 kernels:: || status=1
        else
            echo "compute-sanitizer is not installed: no $tool"
        fi
    done
    echo "status $status"
} > results.txt 2>&1
tail -n 40 results.txt
exit $status
RUN
chmod +x "$dir/run.sh"
echo "gpu-bundle.sh: $dir is ready ($(du -sh "$dir" | cut -f1)); run $dir/run.sh on the machine with the card"
