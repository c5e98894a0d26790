#!/usr/bin/env bash
# The headers compile in every dialect callers have, alone and in any order, without a warning, and C++ programs link.
. "$(dirname "$0")/../lib.sh"

source=$ROOT/capi-tests/compile/twice.c
n=0

# try COMPILER FLAG...
try() {
    "$@" -Wall -Wextra -Werror -I"$ROOT/include" || fail "$*"
    n=$((n + 1))
}

for std in gnu89 c99 gnu99 c11 gnu11 c17; do
    for header in "$ROOT"/include/ploop/*.h; do
        try gcc -std=$std -fsyntax-only -x c "$header"
    done
    try gcc -std=$std -fsyntax-only "$source"
done
for header in libploop dynload; do
    try gcc -std=c99 -pedantic -fsyntax-only -x c "$ROOT/include/ploop/$header.h"
    try gcc -std=c11 -pedantic -fsyntax-only -x c "$ROOT/include/ploop/$header.h"
done

# every_order COMPILER FLAG...: each header twice, in each order.
every_order() {
    local headers=(libploop dynload ploop_if ploop1_image) a b c d
    for a in 0 1 2 3; do for b in 0 1 2 3; do for c in 0 1 2 3; do
        d=$((6 - a - b - c))
        [ "$(printf '%s\n' $a $b $c $d | sort -u | tr -d '\n')" = 0123 ] || continue
        for i in $a $b $c $d $d $c $b $a; do echo "#include <ploop/${headers[i]}.h>"; done >"$SCRATCH/order.h"
        try "$@" -fsyntax-only "$SCRATCH/order.h"
    done; done; done
}
every_order gcc -std=gnu89 -x c
try gcc -std=gnu99 -DPLOOP_DEPRECATED= -fsyntax-only "$source"
if command -v clang >/dev/null; then
    try clang -std=gnu99 -fsyntax-only "$source"
fi
compile "$SCRATCH/twice" "$source"
"$SCRATCH/twice" || fail "twice.c, built in C, returned $?"
if command -v g++ >/dev/null; then
    every_order g++ -std=c++17 -x c++
    for std in gnu++98 c++11 c++17; do
        for header in "$ROOT"/include/ploop/*.h; do
            try g++ -std=$std -fsyntax-only -x c++ "$header"
        done
        try g++ -std=$std -fsyntax-only -x c++ "$source"
    done
    # Links only if the functions have C linkage.
    try g++ -x c++ "$source" -x none -o "$SCRATCH/twice++" -L"$SCRATCH/lib" \
        -Wl,-rpath,"$SCRATCH/lib" -lploop
    "$SCRATCH/twice++" || fail "twice.c, built in C++, returned $?"
else
    echo "no g++: C++ not tried"
fi

# The README's example is what people copy.
awk '/^    #include <ploop\/libploop.h>/ { on = 1 } on && /^[^ ]/ { exit } on' "$ROOT/README.md" | sed 's/^    //' |
    sed '/^cc example.c/d' >"$SCRATCH/example.c"
[ -s "$SCRATCH/example.c" ] || fail "README.md has no C example"
compile "$SCRATCH/example" "$SCRATCH/example.c"
echo "$((n + 1)) compilations"
