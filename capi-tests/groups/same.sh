#!/usr/bin/env bash
# Debian's library and headers 1.15 beside ours: a C program says and leaves the same with each, and each header set describes the
# same interface.
. "$(dirname "$0")/../lib.sh"

for tool in apt-get dpkg-deb python3; do
    command -v $tool >/dev/null || skip "there is no $tool"
done
(cd "$SCRATCH" && apt-get -q download libploop1 libploop-dev) >"$SCRATCH/apt.log" 2>&1 ||
    skip "apt-get cannot download the packages libploop1 and libploop-dev: $(tail -n 1 "$SCRATCH/apt.log")"
for package in libploop1 libploop-dev; do
    dpkg-deb -x "$SCRATCH/$package"_*.deb "$SCRATCH/deb" || fail "the package $package cannot be unpacked"
done
debian=$(dirname "$(find "$SCRATCH/deb" -name 'libploop.so.1.*')")
case $(basename "$debian"/libploop.so.1.*) in libploop.so.1.15) ;; *) skip "Debian's libploop is not 1.15" ;; esac
LD_LIBRARY_PATH=$debian ldd "$debian/libploop.so.1" | grep -q 'not found' && skip "a library that Debian's needs is missing (package ploop)"
# It reads up to 4 KiB behind the end of arguments: not off the end of the stack.
export PADDING
PADDING=$(head -c 9000 /dev/zero | tr '\0' x)

for headers in debian ours; do
    case $headers in debian) include=$SCRATCH/deb/usr/include ;; *) include=$ROOT/include ;; esac
    # Debian's headers warn by themselves.
    [ $headers = ours ] && strict="-Wall -Wextra -Werror -Wno-missing-field-initializers" || strict=-w
    # shellcheck disable=SC2086 # a list of flags
    gcc -std=gnu99 -g $strict -I"$include" -o "$SCRATCH/same.$headers" "$ROOT/capi-tests/debian/same.c" \
        -L"$SCRATCH/lib" -lploop || fail "same.c does not build with the headers: $headers"
    gcc -g -w -fPIC -shared -I"$include" -o "$SCRATCH/stub.$headers.so" "$ROOT/capi-tests/debian/stub.c" ||
        fail "stub.c does not build with the headers: $headers"
    for library in debian ours; do
        [ $library = debian ] && path=$debian || path=$SCRATCH/lib
        mkdir "$SCRATCH/$headers.$library"
        LD_LIBRARY_PATH=$path ldd "$SCRATCH/same.$headers" | grep -q "libploop.so.1 => $path/" || fail "same.c would load another library than $path"
        LD_LIBRARY_PATH=$path timeout 100 "$SCRATCH/same.$headers" "$SCRATCH/$headers.$library" >"$SCRATCH/$headers.$library.out" 2>"$SCRATCH/log" ||
            fail "same.c, headers: $headers, library: $library, status $?: $(tail -n 3 "$SCRATCH/log")"
    done
done
compare=$ROOT/capi-tests/debian/compare.py
for library in debian ours; do
    python3 "$compare" "$SCRATCH/debian.$library.out" "$SCRATCH/ours.$library.out" || fail "the headers make a difference to the library: $library"
done
python3 "$compare" "$SCRATCH/ours.debian.out" "$SCRATCH/ours.ours.out" "$ROOT/capi-tests/debian/differences" || fail "our library differs from Debian's"

# Both lists are whole.
for name in $(sed -n 's/^struct \([A-Za-z0-9_]*\) {$/a_\1/p' "$ROOT"/include/ploop/*.h) \
    $(LC_ALL=C comm -23 "$ROOT/tests/abi/libploop.so.1.symbols" "$ROOT/capi-tests/symbols/undeclared" | sed 's/^/use_/'); do
    nm -D "$SCRATCH/stub.ours.so" | grep -q " $name\$" || fail "stub.c has no $name"
done
command -v abidiff >/dev/null || skip "no abidiff; apt-get install abigail-tools"
abidiff --harmless "$SCRATCH/stub.debian.so" "$SCRATCH/stub.ours.so" >"$SCRATCH/abidiff" || fail "the headers differ: $(cat "$SCRATCH/abidiff")"
grep -v '^$' "$SCRATCH/abidiff" | grep -v '0 Removed, 0 Changed, 0 Added' && fail "abidiff reports differences"
echo "abidiff: no difference"
