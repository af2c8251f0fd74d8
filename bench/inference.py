"""Inference of elleci-1.5b's shapes with random weights, beside llama.cpp (TQ2_0) and the layout of bitnet.cpp's I2_S.

    python3 -m venv V && V/bin/pip install numpy gguf llama-cpp-python      # builds llama.cpp
    python3 bench/inference.py --python V/bin/python [--threads 2] [--rounds 3] [--dir /tmp] [--only ours]

The model is packed as `elleci-convert` does by default: whichever packing this machine multiplies faster, a shape at a time.
Everything runs in turn, round by round, on the same machine; the best and the median of each figure count, as what disturbs
them only ever slows. Prints a table in Markdown; what each program said goes to standard error.
"""
import argparse, json, os, pathlib, re, statistics, subprocess, sys, tempfile

root = pathlib.Path(__file__).resolve().parent.parent
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--python", help="an interpreter with numpy, gguf and llama-cpp-python; without it the peer is left out")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--rounds", type=int, default=3)
ap.add_argument("--dir", default="/tmp", help="for the models, two of 430 and one of 490 MB")
ap.add_argument("--only", choices=["ours", "peer", "matvec"])
a = ap.parse_args()


def run(cmd):
    """Standard output, standard error, and the most memory in MB that the process itself ever had."""
    print("+", *cmd, file=sys.stderr)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([str(c) for c in cmd], cwd=root, text=True, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0), err.seek(0)
        texts = out.read(), err.read()
    print(*texts, file=sys.stderr)
    if status != 0:
        sys.exit(f"{cmd[0]}: status {status}\n{texts[1]}")
    return *texts, usage.ru_maxrss * 1024 / 1e6


def rows(argv):
    """The rows of `elleci-run bench -o json`, the times of opening and of the first logits in ms, and peak memory in MB."""
    out, err, peak = run([root / "target/release/elleci-run", "bench", "-m", model, "-t", a.threads, "-o", "json", *argv])
    times = re.search(r"opened in ([\d.]+) ms, first logits ([\d.]+) ms", err)
    return json.loads(out), float(times[1]), float(times[2]), peak


figures = {}


def note(name, value):
    figures.setdefault(name, []).append(value)


source, model = (pathlib.Path(a.dir) / f"elleci-1.5b-{name}.elleci" for name in ("random", "packed"))
if a.only in (None, "ours"):
    run(["cargo", "build", "--release", "--locked", "--bin", "elleci-run", "--bin", "elleci-convert"])
    if not source.exists():
        run([root / "target/release/elleci-run", "bench", "--preset", "elleci-1.5b", "--save", source, "-p", 0, "-n", 1, "-r", 1])
    out, _, _ = run([root / "target/release/elleci-convert", source, model, "--force", "--json"])
    packing = ", ".join(f"{n} tensors {name}" for name, n in json.loads(out)["packing"].items())
for _ in range(a.rounds):
    if a.only in (None, "ours"):
        tests, opened, first, _ = rows(["-p", 256, "-n", 32, "-r", 2])
        for t in tests:
            note("prefill 256, tok/s" if t["n_prompt"] else "decode, tok/s", max(t["samples_ts"]))
        note("open, ms", opened)
        note("open to first logits, ms", first)
        note("resident, 1024 tokens, MB", rows(["-p", 0, "-n", 8, "-r", 1, "-d", 1016])[3])
    if a.python and a.only in (None, "peer"):
        out, _, _ = run([a.python, root / "bench/llamacpp_ternary.py", "--threads", a.threads, "--dir", a.dir])
        peer = json.loads(out.strip().splitlines()[-1])
        note("llama.cpp TQ2_0 prefill 256, tok/s", peer["prefill_tok_s"])
        note("llama.cpp TQ2_0 decode, tok/s", peer["decode_max"])
    if a.only in (None, "matvec"):
        for threads in sorted({1, a.threads}):
            out, _, _ = run(["cargo", "bench", "--locked", "-p", "elleci-core", "--bench", "matvec", "--", threads])
            for line in out.splitlines():
                cells = [c.strip() for c in line.strip("|").split("|")]
                if len(cells) == 4 and cells[0] in ("reading", "i2", "t5", "I2_S"):
                    unit = "GB/s" if cells[0] == "reading" else "Gweight/s"
                    note(f"{cells[0]}, {threads} threads, {unit}", float(cells[2 if cells[0] == "reading" else 1]))

if a.only in (None, "ours"):
    print(f"packed: {packing}\n")
print(f"| {a.threads} threads, {a.rounds} rounds | best | median |\n|---|---|---|")
for name, values in figures.items():
    best = min(values) if "ms" in name or "MB" in name else max(values)
    print(f"| {name} | {best:.1f} | {statistics.median(values):.1f} |")
