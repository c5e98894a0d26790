#!/usr/bin/env bash
# Each function with bad arguments: NULL, empty, short buffers, bad GUIDs; and what needs neither root nor a device.
. "$(dirname "$0")/../lib.sh"

compile "$SCRATCH/args" "$ROOT/capi-tests/args/args.c"
mkdir "$SCRATCH/disks"
"$SCRATCH/args" "$SCRATCH/disks" || fail "args.c"
# The classic read up to 4 KiB past the end of path arguments: nearly no environment puts them at the end of the stack.
rm -rf "$SCRATCH/disks" && mkdir "$SCRATCH/disks"
env -i PATH="$PATH" PLOOP_TEST_LIBRARY="$LIB" "$SCRATCH/args" "$SCRATCH/disks" || fail "args.c with a small environment"

compile "$SCRATCH/hostile" "$ROOT/capi-tests/args/hostile.c"
# hostile [COMMAND...]: in a folder of its own.
hostile() {
    rm -rf "$SCRATCH/hostile.d" && mkdir "$SCRATCH/hostile.d"
    # shellcheck disable=SC2046 # one word a symbol
    "$@" "$SCRATCH/hostile" "$SCRATCH/hostile.d" $(cat "$ROOT/tests/abi/libploop.so.1.symbols") </dev/null
}
hostile || fail "hostile.c"

compile "$SCRATCH/snapshots" "$ROOT/capi-tests/args/snapshots.c"
mkdir "$SCRATCH/tree"
"$SCRATCH/snapshots" "$SCRATCH/tree" || fail "snapshots.c"

compile "$SCRATCH/logging" "$ROOT/capi-tests/args/logging.c"
"$SCRATCH/logging" "$SCRATCH" || fail "logging.c"

compile "$SCRATCH/cancel" "$ROOT/capi-tests/args/cancel.c"
mkdir "$SCRATCH/cancelled"
"$SCRATCH/cancel" "$SCRATCH/cancelled" || fail "cancel.c"

if command -v pkg-config >/dev/null; then
    sed -e "s|@libdir@|$SCRATCH/lib|" -e "s|@version@|1.15|" "$ROOT/pkgconfig/ploop.pc.in" >"$SCRATCH/ploop.pc"
    libs=$(PKG_CONFIG_PATH=$SCRATCH pkg-config --libs ploop) || fail "pkg-config does not read ploop.pc"
    case " $libs " in *" -lploop "*) ;; *) fail "pkg-config --libs says '$libs'" ;; esac
    [ "$(PKG_CONFIG_PATH=$SCRATCH pkg-config --modversion ploop)" = 1.15 ] || fail "version of ploop.pc"
fi

compile "$SCRATCH/rounds" "$ROOT/capi-tests/args/rounds.c"
mkdir "$SCRATCH/rounds.d"
rounds=100
[ "${PLOOP_TEST:-}" != full ] || rounds=1000
"$SCRATCH/rounds" "$SCRATCH/rounds.d" $rounds || fail "rounds.c"

if command -v valgrind >/dev/null && [ "${PLOOP_TEST:-}" = full ]; then
    hostile valgrind -q --leak-check=full --errors-for-leak-kinds=definite --error-exitcode=9 || fail "hostile.c under valgrind"
    rm -rf "$SCRATCH/disks" && mkdir "$SCRATCH/disks"
    valgrind -q --leak-check=full --errors-for-leak-kinds=definite --error-exitcode=9 \
        "$SCRATCH/args" "$SCRATCH/disks" || fail "args.c under valgrind"
    rm -rf "$SCRATCH/tree" && mkdir "$SCRATCH/tree"
    valgrind -q --leak-check=full --errors-for-leak-kinds=definite --error-exitcode=9 \
        "$SCRATCH/snapshots" "$SCRATCH/tree" || fail "snapshots.c under valgrind"
fi
