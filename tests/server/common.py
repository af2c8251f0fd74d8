"""A server on a free port of this machine, for the scripts beside this file. Standard library only."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def binary(name):
    """A built binary of the workspace."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = target / "release" / name
    if not path.exists():
        sys.exit(f"{path} is missing: cargo build --release")
    return str(path)


def nano(folder):
    """A model of the size of `nano` with random weights and a tokenizer of its own, in `folder`."""
    folder = Path(folder)
    model = folder / "nano.elleci"
    if not model.exists():
        bare, tokenizer = folder / "bare.elleci", folder / "tokenizer.json"
        bare.unlink(missing_ok=True)
        run = lambda *args: subprocess.run(args, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        run(binary("elleci-run"), "bench", "--preset", "nano", "--save", bare, "-p", "0", "-n", "1", "-r", "1")
        texts = sorted((ROOT / "fixtures" / "text").glob("*.txt"))
        run(binary("elleci-data"), "tokenizer", "--vocab", "4000", "--pad-to", "4096", "--overwrite", "--out", tokenizer, *texts)
        run(binary("elleci-convert"), bare, model, "--tokenizer", tokenizer)
    return str(model)


class Server:
    """`elleci-run serve` with these options, and these variables besides our own; a context manager that stops it."""

    def __init__(self, model, *options, environment=None):
        self.process = subprocess.Popen(
            [binary("elleci-run"), "serve", "-m", model, "--port", "0", "--quiet", *options],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
        self.url = None
        for line in self.process.stderr:
            found = re.match(r"listening on (http://\S+)", line)
            if found:
                self.url = found[1]
            if line.startswith("ready"):
                return
        sys.exit(f"the server did not start: exit code {self.process.wait()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0, f"the server ended with {self.process.returncode}"

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def metric(self, name):
        """The value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics"), re.M)
        return float(found[1])

    def settle(self):
        """Waits until nothing is being computed."""
        while self.metric("elleci_active_sequences") > 0:
            time.sleep(0.05)
