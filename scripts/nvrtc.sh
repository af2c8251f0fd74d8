#!/bin/sh
# Prints the folder of an NVRTC that compiles the CUDA kernels, for LD_LIBRARY_PATH. No GPU and no driver is needed.
#
#   LD_LIBRARY_PATH=$(scripts/nvrtc.sh) cargo test -p elleci-cuda --test nvrtc
#
# A folder in $NVRTC is used as it is. Otherwise NVIDIA's wheel is unpacked once into $ELLECI_CACHE (default
# ${XDG_CACHE_HOME:-$HOME/.cache}/elleci): 86 MB are downloaded, 109 MB kept. Needs python3 with pip.
set -eu

version=13.0.88

fail() {
    echo "nvrtc.sh: $*" >&2
    exit 1
}

if [ -n "${NVRTC:-}" ]; then
    ls "$NVRTC"/libnvrtc.so* >/dev/null 2>&1 || fail "NVRTC: $NVRTC has no libnvrtc.so (unset it to have one fetched)"
    echo "$NVRTC"
    exit 0
fi

cache=${ELLECI_CACHE:-${XDG_CACHE_HOME:-${HOME:?neither ELLECI_CACHE nor HOME is set}/.cache}/elleci}
dir=$cache/nvrtc-$version
if [ -d "$dir" ]; then
    [ -e "$dir/libnvrtc.so.13" ] || fail "$dir/libnvrtc.so.13 is missing (remove $dir and run again)"
    echo "$dir"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "only Linux x86-64 has this wheel: set NVRTC to a folder with libnvrtc.so"
command -v python3 >/dev/null || fail "python3 is missing (Debian: apt install python3 python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || fail "pip is missing (Debian: apt install python3-pip)"

mkdir -p "$cache"
work=$(mktemp -d "$cache/nvrtc.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

echo "nvrtc.sh: downloading NVRTC $version to $cache (86 MB, once)" >&2
# Downloading installs nothing, so that pip takes part where the distribution manages Python's packages, too (PEP 668).
python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --retries 2 --no-deps --only-binary :all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux2010_x86_64 --dest "$work/wheels" "nvidia-cuda-nvrtc==$version" >&2 ||
    fail "pip could not download nvidia-cuda-nvrtc==$version (its reason is above). Without a network: set NVRTC to a folder
    with libnvrtc.so (of a CUDA 13 toolkit, or the wheel unpacked), or copy $dir from a machine that has it"

python3 - "$work" >&2 <<'PY'
import glob, os, shutil, sys, zipfile

work = sys.argv[1]
out = os.path.join(work, "nvrtc")
os.makedirs(out)
(wheel,) = glob.glob(os.path.join(work, "wheels", "*.whl"))
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        file = os.path.basename(name)
        if file.startswith("libnvrtc") and ".alt." not in file:
            with archive.open(name) as source, open(os.path.join(out, file), "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
PY

[ -e "$work/nvrtc/libnvrtc.so.13" ] || fail "the wheel has no libnvrtc.so.13"
# Renamed whole or not at all; another run may have been faster, and then its copy is as good.
mv -T "$work/nvrtc" "$dir" 2>/dev/null || [ -d "$dir" ] || fail "cannot write $dir"
echo "$dir"
