#!/bin/sh
# The page of `elleci-run serve` in a headless Chromium, against a stand-in server or, with ELLECI_URL, against one that runs.
#
#   tests/page/run.sh                                        the stand-in server of mock.mjs
#   tests/page/run.sh hostile                                only the steps whose names hold this (see check.mjs)
#   ELLECI_URL=http://127.0.0.1:8080/ tests/page/run.sh      a server without an API key; use a model that has learnt to write
#
# ELLECI_CHECK_PAGE  `require` makes a failure of a machine without Chromium, Node or npm, which is skipped otherwise
# ELLECI_CHROMIUM    the browser; the default is the first of Chromium and Chrome in the path
# ELLECI_SHOTS       where screenshots go (light.png, dark.png, narrow-light.png, narrow-dark.png); the default is shots/ beside the packages
#
# Needs Chromium and Node 18 or newer with npm (Debian: apt install chromium npm). What package-lock.json names is installed
# into the target directory, once.
set -eu
cd "$(dirname "$0")"

skip() {
    echo "tests/page: the page was NOT tested: $1" >&2
    [ "${ELLECI_CHECK_PAGE:-}" != require ]
    exit 77
}

for name in chromium chromium-browser google-chrome-stable google-chrome; do
    [ -n "${ELLECI_CHROMIUM:-}" ] || ELLECI_CHROMIUM=$(command -v $name || true)
done
command -v "${ELLECI_CHROMIUM:-none}" >/dev/null || skip "Chromium is missing (Debian: apt install chromium)"
command -v node >/dev/null || skip "node is missing (Debian: apt install nodejs)"
command -v npm >/dev/null || skip "npm is missing (Debian: apt install npm)"
node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' || skip "Node $(node --version) is older than 18"

work=${CARGO_TARGET_DIR:-../../target}/page
mkdir -p "$work"
work=$(cd "$work" && pwd)
if ! cmp -s package-lock.json "$work/installed.json"; then
    cp package.json package-lock.json .npmrc "$work/"
    (cd "$work" && npm ci --no-audit --no-fund --ignore-scripts >&2) || skip "npm could not install what package-lock.json names"
    cp package-lock.json "$work/installed.json"
fi

export ELLECI_CHROMIUM ELLECI_PAGE_MODULES="$work" ELLECI_SHOTS="${ELLECI_SHOTS:-$work/shots}"
exec node check.mjs "$@"
