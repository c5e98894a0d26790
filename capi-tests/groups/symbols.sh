#!/usr/bin/env bash
# What the library exports, what it is called, what it needs; and loading it by dlopen in a thread.
. "$(dirname "$0")/../lib.sh"

for tool in nm readelf; do
    command -v $tool >/dev/null || skip "no $tool; apt-get install binutils"
done
wanted=$ROOT/tests/abi/libploop.so.1.symbols

nm -D --defined-only "$LIB" | awk '{ print $3 }' | LC_ALL=C sort >"$SCRATCH/exported"
diff -u "$wanted" "$SCRATCH/exported" || fail "exported symbols differ from $wanted"
strange=$(nm -D --defined-only "$LIB" | awk '$2 != "T" { print $3 " (" $2 ")" }')
[ -z "$strange" ] || fail "not plain functions: $strange"

soname=$(readelf -dW "$LIB" | sed -n 's/.*Library soname: \[\(.*\)\]/\1/p')
[ "$soname" = libploop.so.1 ] || fail "soname is '$soname', want libploop.so.1"
versions=$(readelf -VW "$LIB" | grep -c 'Version definition section')
[ "$versions" = 0 ] || fail "the library defines symbol versions; the classic has none"
for needed in $(readelf -dW "$LIB" | sed -n 's/.*Shared library: \[\(.*\)\]/\1/p'); do
    case $needed in
    libc.so.6 | libgcc_s.so.1 | libm.so.6 | ld-linux-*.so.* | ld-linux.so.*) ;;
    *) fail "needs $needed, which the installed pkg-config file does not tell" ;;
    esac
done

# Every function that the headers declare, and no other, but for those that the classic exports without declaring them.
cat "$ROOT/include/ploop/libploop.h" "$ROOT/include/ploop/dynload.h" | sed -n 's/^[A-Za-z].*[ *]\(ploop_[a-z_]*\)(.*);$/\1/p' | LC_ALL=C sort >"$SCRATCH/declared"
LC_ALL=C comm -23 "$wanted" "$ROOT/capi-tests/symbols/undeclared" | diff -u - "$SCRATCH/declared" || fail "declared and exported functions differ"

gcc -std=gnu99 -Wall -Werror -o "$SCRATCH/dlopen" "$ROOT/capi-tests/symbols/dlopen.c" -lpthread -ldl || exit 1
# shellcheck disable=SC2046 # one word a symbol
"$SCRATCH/dlopen" "$SCRATCH/lib/libploop.so.1" $(cat "$wanted") || fail "dlopen.c"

gcc -std=gnu99 -Wall -Werror -DPLOOP_DEPRECATED= -I"$ROOT/include" -o "$SCRATCH/resolve" "$ROOT/capi-tests/symbols/resolve.c" -ldl || exit 1
slots=$(awk -F'\t' '$1 == "ploop_functions" && $2 !~ /^(padding|__.*)$/ { print $2 }' "$ROOT/tests/abi/libploop.so.1.layout.tsv")
# shellcheck disable=SC2086 # one word a slot
"$SCRATCH/resolve" "$LIB" $slots || fail "resolve.c: the table of ploop_resolve_functions() is wrong"

# The feature vz: a build of its own, and so with the full counts alone.
if [ "${PLOOP_TEST:-}" = full ]; then
    (cd "$ROOT" && cargo build --quiet --locked --lib --features vz --target-dir "$SCRATCH/vz") || fail "the feature vz does not build"
    nm -D --defined-only "$SCRATCH/vz/debug/libploop.so" | awk '{ print $3 }' | LC_ALL=C sort | diff -u "$ROOT/tests/abi/libploop.so.1.vz.symbols" - ||
        fail "exported symbols with the feature vz differ"
    gcc -std=gnu99 -Wall -Wextra -Werror -I"$ROOT/include" -fsyntax-only -x c "$ROOT/include/vz/libploop_vz.h" || fail "libploop_vz.h does not compile"
fi
echo "$(wc -l <"$wanted") symbols, soname $soname"
