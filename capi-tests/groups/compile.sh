#!/usr/bin/env bash
# The header compiles in every dialect callers have, without a warning, and C++ programs link.
. "$(dirname "$0")/../lib.sh"

header=$ROOT/include/ploop/libploop.h
source=$ROOT/capi-tests/compile/twice.c
n=0

# try COMPILER FLAG...
try() {
    "$@" -Wall -Wextra -Werror -I"$ROOT/include" || fail "$*"
    n=$((n + 1))
}

for std in gnu89 c99 gnu99 c11 gnu11 c17; do
    try gcc -std=$std -fsyntax-only -x c "$header"
    try gcc -std=$std -fsyntax-only "$source"
done
try gcc -std=c99 -pedantic -fsyntax-only "$source"
try gcc -std=c11 -pedantic -fsyntax-only "$source"
try gcc -std=gnu99 -DPLOOP_DEPRECATED= -fsyntax-only "$source"
if command -v clang >/dev/null; then
    try clang -std=gnu99 -fsyntax-only "$source"
fi
compile "$SCRATCH/twice" "$source"
"$SCRATCH/twice" || fail "twice.c, built in C, returned $?"
if command -v g++ >/dev/null; then
    for std in gnu++98 c++11 c++17; do
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
