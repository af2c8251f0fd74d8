#!/bin/sh
# Prints the path of a LibTorch that the parity tests (crate `tch`) build and run against.
#
#   LIBTORCH=$(scripts/libtorch.sh)
#
# A valid $LIBTORCH is used as it is. Otherwise one is assembled once from the PyPI wheels into
# $ELLECI_CACHE (default ${XDG_CACHE_HOME:-$HOME/.cache}/elleci), where every clone of this machine finds it.
# The wheel carries 4 GB of CUDA dependencies; the CPU half needs none of them but two small libraries that
# libtorch_cpu.so is linked against, so those come from their own wheels. About 540 MB are downloaded, 480 MB kept.
# Needs python3 with pip, and nothing else.
set -eu

version=2.13.0
cuda_runtime=13.0.96
cuda_cupti=13.0.85

fail() {
    echo "libtorch.sh: $*" >&2
    exit 1
}

# The version that a LibTorch folder says it is, from its header; empty where there is none.
version_of() {
    header=include/torch/headeronly/version.h
    [ -e "$1/$header" ] || header=include/torch/csrc/api/include/torch/version.h
    [ -e "$1/$header" ] || return 0
    sed -n 's/^#define TORCH_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\).*/\2/p' "$1/$header" | paste -s -d .
}

# Says what is wrong with a LibTorch folder; silent where it is good.
complaint() {
    for file in lib/libtorch_cpu.so lib/libtorch.so lib/libc10.so include/torch/csrc/api/include/torch/torch.h; do
        [ -e "$1/$file" ] || { echo "$1/$file is missing"; return; }
    done
    found=$(version_of "$1")
    [ "$found" = "$version" ] || echo "$1 is LibTorch ${found:-of unknown version}; tch 0.26 needs $version"
}

if [ -n "${LIBTORCH:-}" ]; then
    problem=$(complaint "$LIBTORCH")
    [ -z "$problem" ] || fail "LIBTORCH: $problem (unset it to have one assembled)"
    echo "$LIBTORCH"
    exit 0
fi

cache=${ELLECI_CACHE:-${XDG_CACHE_HOME:-${HOME:?neither ELLECI_CACHE nor HOME is set}/.cache}/elleci}
dir=$cache/libtorch-$version
if [ -d "$dir" ]; then
    problem=$(complaint "$dir")
    [ -z "$problem" ] || fail "$problem (remove $dir and run again)"
    echo "$dir"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "only Linux x86-64 can be assembled from wheels: set LIBTORCH to a LibTorch $version"
command -v python3 >/dev/null || fail "python3 is missing (Debian: apt install python3 python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || fail "pip is missing (Debian: apt install python3-pip)"

mkdir -p "$cache"
work=$(mktemp -d "$cache/libtorch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

# The platform and interpreter are named so that the wheel found does not depend on the python3 that happens to be here.
echo "libtorch.sh: downloading LibTorch $version to $cache (540 MB, once)" >&2
python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary :all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --implementation cp --python-version 3.12 --dest "$work/wheels" \
    "torch==$version" "nvidia-cuda-runtime==$cuda_runtime" "nvidia-cuda-cupti==$cuda_cupti" >&2 ||
    fail "pip could not download the wheels (see above); or set LIBTORCH to a LibTorch $version"

python3 - "$work" >&2 <<'PY'
import glob, os, shutil, sys, zipfile

work = sys.argv[1]
out = os.path.join(work, "libtorch")


def extract(wheel, wanted):
    """Copies the members that `wanted` maps to a path below `out`."""
    (path,) = glob.glob(os.path.join(work, "wheels", wheel))
    count = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            target = None if name.endswith("/") else wanted(name)
            if target is None:
                continue
            target = os.path.join(out, target)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            count += 1
    os.remove(path)
    return count


LIBS = {"libtorch_cpu.so", "libc10.so", "libtorch.so", "libgomp.so.1"}


def torch_file(name):
    head, _, rest = name.partition("/")
    if head != "torch":
        return None
    if rest.startswith("include/"):
        return rest
    folder, _, file = rest.rpartition("/")
    return rest if folder == "lib" and file in LIBS else None


def library(file):
    return lambda name: f"lib/{file}" if name.rpartition("/")[2] == file else None


extract("torch-*.whl", torch_file)
for wheel, file in (("nvidia_cuda_runtime-*.whl", "libcudart.so.13"), ("nvidia_cuda_cupti-*.whl", "libcupti.so.13")):
    if extract(wheel, library(file)) != 1:
        sys.exit(f"libtorch.sh: {file} is not in the wheel {wheel}")
PY

problem=$(complaint "$work/libtorch")
[ -z "$problem" ] || fail "$problem"
# Renamed whole or not at all; another run may have been faster, and then its copy is as good.
mv -T "$work/libtorch" "$dir" 2>/dev/null || [ -d "$dir" ] || fail "cannot write $dir"
echo "$dir"
