"""Runs test programs that cargo has built, as cargo would: each in the folder of its package.

    cargo test --no-run --message-format json-render-diagnostics > tests.json
    python3 scripts/run_tests.py tests.json [--quiet] [--skip PROGRAM] [--apart PROGRAM] PACKAGE...

One build of all packages serves every stage of check.sh so, whatever environment its tests want. Stops at the first program that
fails, with exit code 1; 2 where a package has no test program. `--skip` leaves a program out. `--apart` gives every test of a program
a process of its own, as many at once as there are processors: for tests that would wait for one another in one process.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

options = argparse.ArgumentParser()
options.add_argument("listing")
options.add_argument("packages", nargs="+")
options.add_argument("--quiet", action="store_true")
options.add_argument("--skip", action="append", default=[])
options.add_argument("--apart", action="append", default=[])
options = options.parse_intermixed_args()
packages = {name: [] for name in options.packages}


def together(program, folder):
    """Runs a test program; whether it passed."""
    status = subprocess.run([program] + ["--quiet"] * options.quiet, cwd=folder, check=False).returncode
    if status:
        print(f"run_tests.py: exit status {status}", file=sys.stderr)
    return status == 0


def apart(program, folder):
    """Runs every test of a program in a process of its own; whether all passed."""
    listed = subprocess.run([program, "--list", "--format", "terse"], cwd=folder, check=True, capture_output=True, text=True)
    tests = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]

    def run(test):
        began = time.monotonic()
        ran = subprocess.run([program, "--exact", test], cwd=folder, check=False, capture_output=True, text=True)
        passed = ran.returncode == 0 and " 1 passed;" in ran.stdout
        print(f"test {test} ... {'ok' if passed else 'FAILED'} ({time.monotonic() - began:.1f} s)", flush=True)
        if not passed:
            print(ran.stdout, ran.stderr, f"exit status {ran.returncode}", sep="\n", file=sys.stderr, flush=True)
        return passed

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(run, tests))
    print(f"{sum(passed)} of {len(tests)} passed", flush=True)
    return bool(tests) and all(passed)


for line in open(options.listing, encoding="utf-8"):
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message.get("executable"):
        folder = pathlib.Path(message["manifest_path"]).parent
        # ".../elleci-core#0.1.0" or "...#elleci-core@0.1.0"
        package = message["package_id"].rpartition("#")[2].partition("@")
        name = package[0] if package[1] else message["package_id"].partition("#")[0].rpartition("/")[2]
        if name in packages:
            packages[name].append((message["target"]["name"], folder, message["executable"]))
targets = {target for programs in packages.values() for target, _, _ in programs}
for name in options.skip + options.apart:
    if name not in targets:
        print(f"run_tests.py: there is no test program {name} in {', '.join(packages)}", file=sys.stderr)
        sys.exit(2)
for name, programs in packages.items():
    if not programs:
        print(f"run_tests.py: {name} has no test program in {options.listing}", file=sys.stderr)
        sys.exit(2)
    for target, folder, program in sorted(programs):
        if target in options.skip:
            continue
        print(f"-- {name}, {target}", flush=True)
        if not (apart if target in options.apart else together)(program, folder):
            print(f"run_tests.py: {name}, {target}: FAILED: {program}", file=sys.stderr)
            sys.exit(1)
