#!/bin/sh
# Tests and times the CUDA backend on the first card. Part of the bundle that scripts/gpu-bundle.sh makes.
#
#   ./run.sh                               all parts, within 9 minutes
#   ./run.sh kernels steps                 only these
#   ELLECI_CUDA_TEST=emulated ./run.sh     kernels and steps on the emulated device, which needs no card (some minutes)
#
# Parts, each with its own time limit:
#   kernels    every kernel against the CPU core                                        60 s
#   steps      whole training steps, 20 of them beside the core; moving checkpoints     60 s
#   rates      rates of plain bf16 and int8 products, by PyTorch where it is there      30 s
#   timing     elleci-1.5b, sequences of 1024: steps, kernels, memory                   90 s, and twice 35 s for other forms
#   torch      the same model in PyTorch, compiled; with mamba_ssm where it is there    90 s and 30 s
#   memcheck   the kernels under compute-sanitizer                                      60 s
#   racecheck  the same for shared memory                                               30 s
#
# Everything goes to results/: a log a part, JSON of what was measured, and table.md, which is printed last and copied to a name of
# device and date, ready for docs/benchmarks/. A part that its limit ends says so. The exit code is 1 where a part failed, or where
# there is no card that can be used: what is missing is said.
set -u
cd "$(dirname "$0")" || exit 1
mode=${ELLECI_CUDA_TEST:-card}
mkdir -p results
table=results/table.md
status=0

has() { command -v "$1" >/dev/null 2>&1; }
torch() { has python3 && python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }

# cuBLASLt: of the system, or that of PyTorch's packages, whose folder the loader does not know.
cublas() {
    has python3 && python3 - 2>/dev/null <<'PY'
import glob, os, site, sys
for root in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
    for found in sorted(glob.glob(os.path.join(root, "nvidia", "*", "lib", "libcublasLt.so*"))):
        print(os.path.dirname(found))
        sys.exit()
PY
}
folder=$(cublas)
export LD_LIBRARY_PATH="$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}${folder:+:$folder}"

# limit NAME SECONDS COMMAND...: its output goes to results/NAME.log.
limit() {
    name=$1 seconds=$2
    shift 2
    echo "-- $name" >&2
    timeout -k 5 "$seconds" "$@" > "results/$name.log" 2>&1
    code=$?
    case $code in
    0) echo "$name: passed" >> "$table" ;;
    124 | 137) echo "$name: NOT FINISHED, ended after $seconds s (results/$name.log)" >> "$table" ;;
    *) echo "$name: FAILED with $code (results/$name.log)" >> "$table" ;;
    esac
    [ $code -eq 0 ] || status=1
    return $code
}

# Seconds for what an emulated device does some hundred times slower.
patience() {
    if [ "$mode" = card ]; then echo "$1"; else echo 1800; fi
}

part_kernels() {
    limit kernels "$(patience 60)" ./cuda-tests --test-threads=1 kernels::
}

part_steps() {
    limit steps "$(patience 60)" ./cuda-tests --test-threads=1 --nocapture step:: forms:: training::
}

part_rates() {
    torch || { echo "rates: python3 has no torch with CUDA: MFU is not measured" >> "$table"; return; }
    limit rates 30 python3 rates.py results/rates.json
}

# bench NAME SECONDS ARGUMENTS...: rows of the table.
bench() {
    name=$1 seconds=$2
    shift 2
    rates=
    [ -s results/rates.json ] && rates=$(python3 -c 'import json
r = json.load(open("results/rates.json"))
print("--int8", r["int8_tops"], "--bf16", r["bf16_tflops"])')
    command="./cuda-bench --preset elleci-1.5b --seq 1024 --steps 10 --seconds $((seconds - 20)) $* $rates"
    # shellcheck disable=SC2086  # a command line
    limit "$name" "$seconds" $command --out "results/$name.json"
    printf '\n`%s`\n\n' "$command" >> "$table"
    grep '^|\|^products' "results/$name.log" >> "$table"
    echo >> "$table"
}

part_timing() {
    bench timing 90 --batch 16,4,1 --products bf16,fp8
    bench timing-own 35 --batch 16 --products bf16 --gemm own
    bench timing-stream 35 --batch 16 --products bf16 --stream bf16
}

part_torch() {
    torch || { echo "torch: python3 has no torch with CUDA" >> "$table"; return; }
    for ssd in chunked mamba_ssm; do
        [ $ssd = chunked ] || python3 -c 'import mamba_ssm' 2>/dev/null || { echo "torch: no mamba_ssm" >> "$table"; continue; }
        seconds=90
        [ $ssd = chunked ] || seconds=30
        limit "torch-$ssd" $seconds python3 elleci_torch.py bench --preset elleci-1.5b --batch 4 --seq 1024 --steps 10 \
            --device cuda --compile --ssd $ssd &&
            grep '^{' "results/torch-$ssd.log" | tee "results/torch-$ssd.json" >> "$table"
    done
}

sanitizer() {
    has compute-sanitizer || { echo "$1: compute-sanitizer is not installed" >> "$table"; return; }
    limit "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 ./cuda-tests --test-threads=1 kernels::
}
part_memcheck() { sanitizer memcheck 60; }
part_racecheck() { sanitizer racecheck 30; }

all="kernels steps rates timing torch memcheck racecheck"
[ "$mode" = card ] || all="kernels steps"
for part in "$@"; do
    case " $all " in
    *" $part "*) ;;
    *) echo "run.sh: unknown part '$part'; the parts are: $all" >&2; exit 2 ;;
    esac
done

device="the emulated device"
if [ "$mode" = card ]; then
    export ELLECI_CUDA_TEST=card
    if ! device=$(./cuda-bench --check 2>results/check.log); then
        sed 's/^error: /run.sh: no card can be used: /' results/check.log >&2
        echo "run.sh: ELLECI_CUDA_TEST=emulated runs the parts that need none" >&2
        exit 1
    fi
else
    unset ELLECI_CUDA_TEST
fi

{
    echo "# $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(cat commit.txt)"
    echo
    echo "$device"
    [ "$mode" = card ] && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>&1
    torch && python3 -c 'import torch; print("torch", torch.__version__)'
    echo
} > "$table"
for part in ${*:-$all}; do
    "part_$part"
done
cat "$table"
name=$(echo "$device" | head -n 1 | cut -d, -f1 | tr -cs 'A-Za-z0-9\n' '-' | sed 's/-*$//')
cp "$table" "results/cuda-$name-$(date -u +%Y-%m-%d).md"
exit $status
