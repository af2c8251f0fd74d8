"""Runs test programs that cargo has built, as cargo would: each in the folder of its package.

    cargo test --no-run --message-format json-render-diagnostics > tests.json
    python3 scripts/run_tests.py tests.json [--quiet] PACKAGE...

One build of all packages serves every stage of check.sh so, whatever environment its tests want. Stops at the first program that
fails, with exit code 1; 2 where a package has no test program.
"""
import json
import pathlib
import subprocess
import sys

listing, *names = sys.argv[1:]
arguments = ["--quiet"] if "--quiet" in names else []
packages = {name: [] for name in names if name != "--quiet"}
for line in open(listing, encoding="utf-8"):
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message.get("executable"):
        folder = pathlib.Path(message["manifest_path"]).parent
        # ".../elleci-core#0.1.0" or "...#elleci-core@0.1.0"
        package = message["package_id"].rpartition("#")[2].partition("@")
        name = package[0] if package[1] else message["package_id"].partition("#")[0].rpartition("/")[2]
        if name in packages:
            packages[name].append((message["target"]["name"], folder, message["executable"]))
for name, programs in packages.items():
    if not programs:
        print(f"run_tests.py: {name} has no test program in {listing}", file=sys.stderr)
        sys.exit(2)
    for target, folder, program in sorted(programs):
        print(f"-- {name}, {target}", flush=True)
        status = subprocess.run([program, *arguments], cwd=folder, check=False).returncode
        if status != 0:
            print(f"run_tests.py: {name}, {target}: FAILED with {status}: {program}", file=sys.stderr)
            sys.exit(1)
