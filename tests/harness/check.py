"""Holds elleci-eval against lm-evaluation-harness, item by item.

    python3 -m venv V && V/bin/pip install "lm-eval[api]==0.4.13" datasets
    V/bin/python tests/harness/check.py --model MODEL.elleci [--bin target/release] [--work DIR]

`elleci-run serve` answers the real harness (`local-completions`, with token ids, echo and log-probabilities) on this machine only;
`elleci-eval` scores the same rows by itself. Both write their items in the harness's layout, and these are compared: the question, every
log-likelihood (within 1e-9), which continuations are greedy, and the metrics. The rows are small sets of our own in the columns of
public ones (rows.py); the tasks are the harness's own files with nothing changed but where the rows come from. Exit code 1 if one
item differs.
"""
import argparse
import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request

import rows

TOLERANCE = 1e-9
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="an archive with a tokenizer")
parser.add_argument("--bin", default="target/release", help="where elleci-run and elleci-eval are")
parser.add_argument("--work", help="keeps everything there, in place of a folder that is removed")
parser.add_argument("--max-length", type=int, default=256, help="tokens of a window, for both")
args = parser.parse_args()


def harness_files():
    """The harness's own definition of every task, by name."""
    folder = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    found = {}
    for path in glob.glob(f"{folder}/**/*.yaml", recursive=True):
        name = re.search(r"^task:\s*(\S+)\s*$", pathlib.Path(path).read_text(encoding="utf-8"), re.M)
        if name:
            found[name.group(1)] = path
    return found


def write_tasks(names, data, folder):
    """Tasks `elleci_NAME` that are the harness's NAME on our rows."""
    folder.mkdir(parents=True, exist_ok=True)
    files = harness_files()
    for name in names:
        splits = {split: str(data / f"{name}.jsonl") for split in ("train", "validation", "val", "test")}
        (folder / f"elleci_{name}.yaml").write_text(
            f"include: {files[name]}\n"
            f"task: elleci_{name}\n"
            "tag: null\n"
            "dataset_path: json\n"
            "dataset_name: null\n"
            f"dataset_kwargs:\n  data_files: {json.dumps(splits)}\n"
            "num_fewshot: 0\n",
            encoding="utf-8",
        )


class Server:
    """`elleci-run serve` on a free port, until the block ends."""

    def __enter__(self):
        command = [f"{args.bin}/elleci-run", "serve", "-m", args.model, "--port", "0", "--quiet", "--context", str(args.max_length + 8)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        address = None
        for line in self.process.stderr:
            sys.stderr.write(line)
            address = re.search(r"http://127\.0\.0\.1:\d+", line) or address
            if line.startswith("ready"):
                return address.group(0)
        sys.exit("the server did not start")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def run(command, **more):
    print("+", *command, file=sys.stderr)
    subprocess.run(command, check=True, **more)


def samples(pattern):
    (path,) = glob.glob(str(pattern), recursive=True)
    lines = [json.loads(line) for line in open(path, encoding="utf-8")]
    return {line["doc_id"]: line for line in lines}


def arguments(sample):
    given = sample["arguments"]
    return [(given[f"gen_args_{i}"]["arg_0"], given[f"gen_args_{i}"]["arg_1"]) for i in range(len(given))]


def compare(name, ours, theirs):
    """The largest difference of a log-likelihood, the number of them, and what differs."""
    worst, count, faults = 0.0, 0, []
    if ours.keys() != theirs.keys():
        faults.append(f"{name}: items {sorted(ours)} and {sorted(theirs)}")
    for doc in ours.keys() & theirs.keys():
        a, b = ours[doc], theirs[doc]
        if arguments(a) != arguments(b):
            faults.append(f"{name} {doc}: asked {arguments(a)} and {arguments(b)}")
            continue
        for (x, greedy), (y, theirs_greedy) in zip(a["filtered_resps"], b["filtered_resps"]):
            y, theirs_greedy = float(y), str(theirs_greedy) == "True"
            worst, count = max(worst, abs(x - y)), count + 1
            if not math.isfinite(x) or abs(x - y) > TOLERANCE or greedy != theirs_greedy:
                faults.append(f"{name} {doc}: {x} {greedy} and {y} {theirs_greedy}")
        for metric in b["metrics"]:
            x, y = a.get(metric), b.get(metric)
            same = x == y if metric.startswith("acc") else x is None or abs(x - y) <= TOLERANCE
            if metric in a and not same:
                faults.append(f"{name} {doc}: {metric} {x} and {y}")
    return worst, count, faults


def main(work):
    data, ours, theirs = work / "data", work / "ours", work / "theirs"
    # The harness never replaces what it wrote.
    shutil.rmtree(theirs, ignore_errors=True)
    names = rows.write(data)
    write_tasks(names, data, work / "tasks")
    shared = ["--max-length", str(args.max_length)]
    run([f"{args.bin}/elleci-eval", "-m", args.model, "--data", str(data), "--tasks", ",".join(names), "--shots", "0", "--no-cache",
         "--log", str(ours), *shared])
    with Server() as address:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as reply:
            model = json.load(reply)["data"][0]["id"]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
        model_args = f"model={model},base_url={address}/v1/completions,tokenizer_backend=remote,max_length={args.max_length},num_concurrent=2"
        run([sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args,
             "--include_path", str(work / "tasks"), "--tasks", ",".join(f"elleci_{n}" for n in names),
             "--output_path", str(theirs), "--log_samples"], env={**os.environ, **offline})
    failed = False
    print("| task | items | log-likelihoods | largest difference | |\n|---|---|---|---|---|")
    for name in names:
        mine, harness = samples(ours / f"samples_{name}.jsonl"), samples(theirs / "**" / f"samples_elleci_{name}_*.jsonl")
        worst, count, faults = compare(name, mine, harness)
        failed |= bool(faults) or count == 0
        print(f"| {name} | {len(mine)} | {count} | {worst:.1e} | {'equal' if not faults else f'{len(faults)} DIFFER'} |")
        for fault in faults[:5]:
            print(fault, file=sys.stderr)
    return 1 if failed else 0


if args.work:
    sys.exit(main(pathlib.Path(args.work)))
with tempfile.TemporaryDirectory() as folder:
    sys.exit(main(pathlib.Path(folder)))
