#!/usr/bin/env python3
"""Everything in this folder against one random nano-sized model: run.py FOLDER

FOLDER keeps the model, and is where check.sh has put node_modules/openai. Run by an interpreter that has PyPI's `openai`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import Server, nano

HERE = Path(__file__).parent


def main():
    folder = Path(sys.argv[1])
    model = nano(folder)
    subprocess.run([sys.executable, HERE / "client.py", model], check=True)
    if shutil.which("node") and (folder / "node_modules" / "openai").exists():
        with Server(model) as server:
            environment = {**os.environ, "OPENAI_FROM": str(folder)}
            subprocess.run(["node", HERE / "client.mjs", server.url], check=True, env=environment)
    else:
        print("run.py: the JavaScript client was NOT tested: node or npm is missing")
    subprocess.run([sys.executable, HERE / "load.py", model, *sys.argv[2:]], check=True)


if __name__ == "__main__":
    main()
