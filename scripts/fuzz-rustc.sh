#!/bin/sh
# The compiler for the crates of this workspace while scripts/fuzz.sh builds a short run: with libFuzzer's counters.
compiler=$1
shift
# shellcheck disable=SC2086  # a list
exec "$compiler" "$@" $ELLECI_FUZZ_FLAGS
