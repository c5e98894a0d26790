# Sourced by the group scripts: finds the library that was built, gives it the names by which programs ask for it, in a
# scratch folder that is removed at the end, and compiles C programs against it.
#
# $PLOOP_TEST_LIB: folder with libploop.so and libploop.a (default: that of $PLOOP, the command under test; else the newer
# of target/release and target/debug).
# Set here: ROOT, SCRATCH, LIB (the shared library), STATIC (the static one or nothing).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export LC_ALL=C

# Ends a group: 77 is "skipped", with the reason.
skip() {
    echo "skipped: $*"
    exit 77
}

fail() {
    echo "failed: $*" >&2
    exit 1
}

command -v gcc >/dev/null || skip "no C compiler; apt-get install gcc libc6-dev"

if [ -n "${PLOOP_TEST_SCRATCH:-}" ]; then
    SCRATCH=$(mktemp -d "$PLOOP_TEST_SCRATCH/capi.XXXXXX") || exit 1
else
    SCRATCH=$(mktemp -d) || exit 1
fi
trap 'rm -rf "$SCRATCH"' EXIT

_find_library() {
    local target=${CARGO_TARGET_DIR:-$ROOT/target} folder found=
    if [ -z "${PLOOP_TEST_LIB:-}" ] && [ -n "${PLOOP:-}" ] && [ -e "$(dirname "$PLOOP")/libploop.so" ]; then
        PLOOP_TEST_LIB=$(dirname "$PLOOP")
    fi
    for folder in ${PLOOP_TEST_LIB:-"$target/release" "$target/debug"}; do
        [ -e "$folder/libploop.so" ] || continue
        if [ -z "$found" ] || [ "$folder/libploop.so" -nt "$found/libploop.so" ]; then
            found=$folder
        fi
    done
    [ -n "$found" ] || fail "no libploop.so in ${PLOOP_TEST_LIB:-$target/{release,debug\}}; run: cargo build --release"
    LIB=$(readlink -f "$found/libploop.so")
    STATIC=
    [ ! -e "$found/libploop.a" ] || STATIC=$(readlink -f "$found/libploop.a")
}
_find_library

# The loader asks for the soname, which a target folder does not have: without these links programs would silently run on a
# library that the system has installed.
mkdir "$SCRATCH/lib"
ln -s "$LIB" "$SCRATCH/lib/libploop.so.1"
ln -s libploop.so.1 "$SCRATCH/lib/libploop.so"
export PLOOP_TEST_LIBRARY=$LIB

# compile OUT SOURCE... [FLAG...]: a program on the shared library.
compile() {
    local out=$1
    shift
    gcc -std=gnu99 -g -Wall -Wextra -Wno-missing-field-initializers -Werror -I"$ROOT/include" -o "$out" "$@" \
        -L"$SCRATCH/lib" -Wl,-rpath,"$SCRATCH/lib" -lploop -lpthread -ldl || fail "$out does not compile"
}

# What a static link needs beside libploop.a: the private libraries of the pkg-config file.
static_libs() {
    sed -n 's/^Libs.private: *//p' "$ROOT/pkgconfig/ploop.pc.in"
}
