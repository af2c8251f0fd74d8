#!/bin/sh
# Tests and times the CUDA backend on the first card. Part of the bundle that scripts/gpu-bundle.sh makes.
#
#   ./run.sh                 all parts, within 8 minutes
#   ./run.sh kernels steps   only these
#
# Parts, each with its own time limit:
#   kernels    every kernel against the CPU core                                        60 s
#   steps      whole training steps, 20 of them beside the core; moving checkpoints     60 s
#   rates      rates of plain bf16 and int8 products, by PyTorch where it is there      30 s
#   timing     elleci-1.5b, sequences of 1024: steps, kernels, memory                  120 s
#   torch      the same model in PyTorch, compiled; with mamba_ssm where it is there    90 s each, 120 s together
#   memcheck   the kernels under compute-sanitizer                                      60 s
#   racecheck  the same for shared memory                                               30 s
#
# Everything goes to results/: a log a part, JSON of what was measured, and table.md, which is printed last. A part that its limit
# ends says so; the exit code is 1 where a part failed.
set -u
cd "$(dirname "$0")" || exit 1
export LD_LIBRARY_PATH="$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ELLECI_CUDA_TEST=card
mkdir -p results
table=results/table.md
status=0

has() { command -v "$1" >/dev/null 2>&1; }
torch() { has python3 && python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; }

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

part_kernels() {
    limit kernels 60 ./cuda-tests --test-threads=1 kernels::
}

part_steps() {
    limit steps 60 ./cuda-tests --test-threads=1 --nocapture step:: training::
}

part_rates() {
    torch || { echo "rates: python3 has no torch with CUDA: MFU is not measured" >> "$table"; return; }
    limit rates 30 python3 rates.py results/rates.json
}

part_timing() {
    rates=
    [ -s results/rates.json ] && rates=$(python3 -c 'import json
r = json.load(open("results/rates.json"))
print("--int8", r["int8_tops"], "--bf16", r["bf16_tflops"])')
    command="./cuda-bench --preset elleci-1.5b --seq 1024 --batch 16,4,1 --products bf16,float32 --steps 10 --seconds 90 $rates"
    # shellcheck disable=SC2086  # a command line
    limit timing 120 $command --out results/timing.json
    printf '\n`%s`\n\n' "$command" >> "$table"
    grep '^|' results/timing.log >> "$table"
    echo >> "$table"
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
for part in "$@"; do
    case " $all " in
    *" $part "*) ;;
    *) echo "run.sh: unknown part '$part'; the parts are: $all" >&2; exit 2 ;;
    esac
done

{
    echo "# $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(cat commit.txt)"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>&1
    torch && python3 -c 'import torch; print("torch", torch.__version__)'
    echo
} > "$table"
for part in ${*:-$all}; do
    "part_$part"
done
cat "$table"
exit $status
