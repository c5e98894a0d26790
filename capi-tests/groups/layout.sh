#!/usr/bin/env bash
# Sizes, offsets and numbers of the header against the golden tables of the classic, at compile time.
. "$(dirname "$0")/../lib.sh"

layout=$ROOT/tests/abi/libploop.so.1.layout.tsv
constants=$ROOT/tests/abi/libploop.so.1.constants.tsv

{
    echo '#include <stddef.h>'
    echo '#include <ploop/libploop.h>'
    echo '#include <ploop/dynload.h>'
    echo '#ifdef __cplusplus'
    echo '#define _Static_assert static_assert'
    echo '#define _Alignof alignof'
    echo '#endif'
    awk -F'\t' -v headers="cat '$ROOT/include/ploop/libploop.h' '$ROOT/include/ploop/dynload.h'" '
        BEGIN { while ((headers | getline line) > 0) if (line ~ /^struct [a-z_]+ {$/) { split(line, w, " "); ours[w[2]] = 1 } }
        NR > 1 && ours[$1] {
            n++
            if ($2 == "__sizeof__") what = "sizeof(struct " $1 ") == " $4
            else if ($2 == "__alignof__") what = "_Alignof(struct " $1 ") == " $4
            else what = "offsetof(struct " $1 ", " $2 ") == " $3 " && sizeof(((struct " $1 " *)0)->" $2 ") == " $4
            print "_Static_assert(" what ", \"" $1 "." $2 "\");"
        }
        END { for (s in ours) structs++; print "/* structs: " structs " rows: " n " */" }' "$layout"
    awk -F'\t' '$4 == "libploop.h" { print "_Static_assert(" $1 " == " $2 ", \"" $1 "\");" }' "$constants"
    echo 'int main(void) { return 0; }'
} >"$SCRATCH/layout.c"

asserts=$(grep -c '^_Static_assert' "$SCRATCH/layout.c")
# 20 structs with 197 rows, 53 numbers: what libploop.h and dynload.h of the classic declare.
[ "$asserts" = 250 ] || fail "$asserts assertions instead of 250; is a struct missing in the header?"
gcc -std=gnu11 -Wall -Werror -I"$ROOT/include" -fsyntax-only "$SCRATCH/layout.c" || fail "layout differs in C"
if command -v g++ >/dev/null; then
    g++ -std=c++17 -Wall -Werror -Wno-invalid-offsetof -I"$ROOT/include" -fsyntax-only -x c++ "$SCRATCH/layout.c" ||
        fail "layout differs in C++"
fi
echo "$asserts assertions"
