#!/usr/bin/env python3
"""Times our training step beside PyTorch's, in one run on one machine: same model, batch, sequence and threads.

    python3 bench/train_step.py                              # nano 8 x 256 and mini 4 x 256, two threads
    python3 bench/train_step.py --only nano --rounds 5

A step is forward, backward, clipping and AdamW on random tokens; "elleci" computes the gradients of its projections, and
the head, in int16, as the presets do. The contenders take turns, `--rounds` times; the table shows the best and the median round of
each (tokens per second) and the peak resident memory of its process (VmHWM). The PyTorch side is
reference/elleci_torch.py, eager and with --compile (which needs a C++ compiler), run by --python, or by a virtual
environment that is made once in $ELLECI_CACHE. pip's own settings apply there: with PIP_INDEX_URL at PyTorch's index of
CPU builds, 4 GB of CUDA packages are spared.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
SHAPES = {"nano": (8, 256), "mini": (4, 256)}


def cache():
    base = os.environ.get("ELLECI_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "elleci"


def torch_python():
    """The interpreter of a virtual environment with PyTorch, made if it is not there."""
    folder = cache() / f"torch-{TORCH}"
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode if python.exists() else True:
        print(f"installing PyTorch {TORCH} into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        packages = [f"torch=={TORCH}", "numpy", "safetensors", "setuptools"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def ours():
    """The path of our timer, freshly built."""
    command = ["cargo", "build", "--release", "-p", "elleci-core", "--example", "train_step", "--message-format=json"]
    build = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = (json.loads(line) for line in build.stdout.splitlines())
    found = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "train_step"]
    return found[-1]


def run(command, threads):
    """The last line of the command's output as JSON, and its peak resident memory in MiB."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return json.loads(output.splitlines()[-1]), usage.ru_maxrss / 1024


def contenders(preset, a, python, binary):
    batch, seq = SHAPES[preset]
    shape = ["--preset", preset, "--batch", batch, "--seq", seq, "--threads", a.threads, "--steps", a.steps]
    torch = [python, ROOT / "reference" / "elleci_torch.py", "bench", *shape]
    return {
        "elleci": [binary, *shape],
        "elleci, float32 head": [binary, *shape, "--head", "f32"],
        "elleci, all float32": [binary, *shape, "--gradients", "f32", "--head", "f32"],
        "elleci, checkpointing": [binary, *shape, "--checkpoint"],
        "PyTorch eager": torch,
        "PyTorch compiled": [*torch, "--compile"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help="one preset")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round, after two of warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", type=Path, help="an interpreter that has PyTorch")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    a = parser.parse_args()
    python, binary = a.python or torch_python(), ours()
    results = {}
    for preset in [a.only] if a.only else SHAPES:
        commands = contenders(preset, a, python, binary)
        rounds = {name: [] for name in commands}
        for _ in range(a.rounds):
            for name, command in commands.items():
                figures, memory = run(command, a.threads)
                rounds[name].append((figures["tokens_per_s"], memory))
                print(f"{preset} {name}: {figures['tokens_per_s']:.0f} tok/s, {memory:.0f} MiB", file=sys.stderr)
        results[preset] = {
            name: {
                "best": max(speed for speed, _ in values),
                "median": statistics.median(speed for speed, _ in values),
                "peak_mib": max(memory for _, memory in values),
            }
            for name, values in rounds.items()
        }
    for preset, table in results.items():
        batch, seq = SHAPES[preset]
        peer = max(row["best"] for name, row in table.items() if name.startswith("PyTorch"))
        print(f"\n{preset}, {batch} x {seq}, {a.threads} threads, {a.rounds} rounds of {a.steps} steps\n")
        print("| | tokens/s, best | median | of the faster PyTorch | peak MiB |\n|---|---|---|---|---|")
        for name, row in table.items():
            print(f"| {name} | {row['best']:.0f} | {row['median']:.0f} | {row['best'] / peer:.2f}x | {row['peak_mib']:.0f} |")
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
