#!/usr/bin/env bash
# Sizes, offsets and numbers of the headers against the golden tables of the classic, at compile time.
. "$(dirname "$0")/../lib.sh"

layout=$ROOT/tests/abi/libploop.so.1.layout.tsv
constants=$ROOT/tests/abi/libploop.so.1.constants.tsv

{
    echo '#include <stddef.h>'
    echo '#include <ploop/libploop.h>'
    echo '#include <ploop/dynload.h>'
    echo '#include <ploop/ploop1_image.h>'
    echo '#include <ploop/ploop_if.h>'
    echo '#ifdef __cplusplus'
    echo '#define _Static_assert static_assert'
    echo '#define _Alignof alignof'
    echo '#endif'
    awk -F'\t' -v headers="cat '$ROOT'/include/ploop/*.h" '
        BEGIN { while ((headers | getline line) > 0) if (line ~ /^struct [A-Za-z0-9_]+ {$/) { split(line, w, " "); ours[w[2]] = 1 } }
        NR > 1 && ours[$1] {
            n++
            if ($2 == "__sizeof__") what = "sizeof(struct " $1 ") == " $4
            else if ($2 == "__alignof__") what = "_Alignof(struct " $1 ") == " $4
            else what = "offsetof(struct " $1 ", " $2 ") == " $3 " && sizeof(((struct " $1 " *)0)->" $2 ") == " $4
            print "_Static_assert(" what ", \"" $1 "." $2 "\");"
        }
        END { for (s in ours) structs++; print "/* structs: " structs " rows: " n " */" }' "$layout"
    awk -F'\t' 'NR > 1 && $4 ~ /\.h$/ { print "_Static_assert(" $1 " == " $2 ", \"" $1 "\");" }' "$constants"
    echo 'int main(void) { return 0; }'
} >"$SCRATCH/layout.c"

asserts=$(grep -c '^_Static_assert' "$SCRATCH/layout.c")
# All rows and numbers of the classic, but for its title lines, struct merge_info, which no header has, and the flags of
# ploop_check(), of which the same is true.
wanted=$(awk -F'\t' 'FNR > 1 && $1 != "merge_info" && (NF < 4 || FILENAME ~ /layout/ || $4 ~ /\.h$/)' "$layout" "$constants" | wc -l)
[ "$asserts" = "$wanted" ] || fail "$asserts assertions instead of $wanted; is a struct missing in the headers?"
gcc -std=gnu11 -Wall -Werror -I"$ROOT/include" -fsyntax-only "$SCRATCH/layout.c" || fail "layout differs in C"
if command -v g++ >/dev/null; then
    g++ -std=c++17 -Wall -Werror -Wno-invalid-offsetof -I"$ROOT/include" -fsyntax-only -x c++ "$SCRATCH/layout.c" ||
        fail "layout differs in C++"
fi
echo "$asserts assertions"
