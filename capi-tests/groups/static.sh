#!/usr/bin/env bash
# A program with the static library and just what the pkg-config file says it needs.
. "$(dirname "$0")/../lib.sh"

[ -n "$STATIC" ] || fail "no libploop.a beside $LIB; run: cargo build --release"
# shellcheck disable=SC2046 # a list of flags
gcc -std=gnu99 -g -Wall -Wextra -Wno-missing-field-initializers -Werror -I"$ROOT/include" -o "$SCRATCH/args" \
    "$ROOT/capi-tests/args/args.c" "$STATIC" $(static_libs) || fail "args.c does not link with $STATIC"
readelf -dW "$SCRATCH/args" 2>/dev/null | grep libploop && fail "the program needs a shared libploop after all"
mkdir "$SCRATCH/disks"
PLOOP_TEST_LIBRARY=$SCRATCH/args "$SCRATCH/args" "$SCRATCH/disks" || fail "args.c with the static library"
