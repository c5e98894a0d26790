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

# gcc -static, which takes no shared library at all: -lgcc_s has no static form.
flags="$STATIC $(static_libs)"
if command -v pkg-config >/dev/null; then
    mkdir "$SCRATCH/static"
    ln -s "$STATIC" "$SCRATCH/static/libploop.a"
    sed -e "s|@libdir@|$SCRATCH/static|" -e "s|@version@|1.15|" "$ROOT/pkgconfig/ploop.pc.in" >"$SCRATCH/ploop.pc"
    flags=$(PKG_CONFIG_PATH=$SCRATCH pkg-config --static --libs ploop) || fail "pkg-config does not read ploop.pc"
fi
# No -Werror: the linker warns that getaddrinfo and the like need glibc's modules at run time.
# shellcheck disable=SC2086 # a list of flags
gcc -static -std=gnu99 -g -I"$ROOT/include" -o "$SCRATCH/args" "$ROOT/capi-tests/args/args.c" $flags >"$SCRATCH/log" 2>&1 ||
    fail "args.c does not link by gcc -static with $flags: $(grep -v warning "$SCRATCH/log" | tail -n 5)"
readelf -dW "$SCRATCH/args" 2>/dev/null | grep NEEDED && fail "the program needs shared libraries after all"
rm -rf "$SCRATCH/disks" && mkdir "$SCRATCH/disks"
PLOOP_TEST_LIBRARY=$SCRATCH/args "$SCRATCH/args" "$SCRATCH/disks" || fail "args.c, built by gcc -static"
