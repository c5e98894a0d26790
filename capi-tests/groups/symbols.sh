#!/usr/bin/env bash
# What the library exports, what it is called, what it needs; and loading it by dlopen in a thread.
. "$(dirname "$0")/../lib.sh"

for tool in nm readelf; do
    command -v $tool >/dev/null || skip "no $tool; apt-get install binutils"
done
wanted=$ROOT/capi-tests/symbols/exported

nm -D --defined-only "$LIB" | awk '{ print $3 }' | LC_ALL=C sort >"$SCRATCH/exported"
diff -u "$wanted" "$SCRATCH/exported" || fail "exported symbols differ from $wanted"
strange=$(nm -D --defined-only "$LIB" | awk '$2 != "T" { print $3 " (" $2 ")" }')
[ -z "$strange" ] || fail "not plain functions: $strange"
extra=$(comm -13 "$ROOT/tests/abi/libploop.so.1.symbols" "$wanted")
[ -z "$extra" ] || fail "not symbols of the classic: $extra"

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

# Every function that the header declares, and no other, but for those that the classic exports without declaring them.
sed -n 's/^[a-z].*[ *]\(ploop_[a-z_]*\)(.*);$/\1/p' "$ROOT/include/ploop/libploop.h" | LC_ALL=C sort >"$SCRATCH/declared"
LC_ALL=C comm -23 "$wanted" "$ROOT/capi-tests/symbols/undeclared" | diff -u - "$SCRATCH/declared" || fail "declared and exported functions differ"

gcc -std=gnu99 -Wall -Werror -o "$SCRATCH/dlopen" "$ROOT/capi-tests/symbols/dlopen.c" -lpthread -ldl || exit 1
# shellcheck disable=SC2046 # one word a symbol
"$SCRATCH/dlopen" "$SCRATCH/lib/libploop.so.1" $(cat "$wanted") || fail "dlopen.c"
echo "$(wc -l <"$wanted") symbols, soname $soname"
