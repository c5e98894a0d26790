#!/usr/bin/env bash
# xfstests on two of our disks and on raw loop devices of the same size; only the differences are printed.
#
#   capi-tests/run xfstests FOLDER [CHECK_ARGUMENT...]
#
# FOLDER is a built xfstests tree, which is not changed but for its local.config (put back at the end) and results/. The arguments
# go to its `check` (default: -g quick). $FSTYP is the file system (ext4), $SIZE the size of each disk (4g), $PLOOP the command.
# Logs and results are left in target/test-logs/xfstests. Exit 0: both fail the same tests.
set -u
root=$(dirname "$(dirname "$(readlink -f "$0")")")
fail() {
    echo "xfstests: $*" >&2
    exit 1
}

tree=$(readlink -f "${1:-}") && [ -x "$tree/check" ] && [ -d "$tree/tests" ] ||
    fail "${1:-no folder} is not a built xfstests tree (with ./check): capi-tests/run xfstests FOLDER"
shift
[ $# != 0 ] || set -- -g quick
[ "$(id -u)" = 0 ] || fail "must be root"
ploop=${PLOOP:-${CARGO_TARGET_DIR:-$root/target}/release/ploop}
[ -x "$ploop" ] || fail "$ploop is not built; cargo build --release --locked"
fstyp=${FSTYP:-ext4} size=${SIZE:-4g}
command -v "mkfs.$fstyp" >/dev/null || fail "mkfs.$fstyp is not installed"
logs=${CARGO_TARGET_DIR:-$root/target}/test-logs/xfstests
rm -rf "$logs" && mkdir -p "$logs" || exit 1
scratch=$(mktemp -d "${PLOOP_TEST_TMP:-/var/tmp}/ploop-xfstests.XXXXXX") || exit 1
mkdir "$scratch/test" "$scratch/scratch"
saved=$tree/local.config.before-ploop
loops=()

finish() {
    umount "$scratch/test" "$scratch/scratch" 2>/dev/null
    for name in a b; do
        [ ! -e "$scratch/$name/DiskDescriptor.xml" ] || "$ploop" umount "$scratch/$name/DiskDescriptor.xml" >/dev/null 2>&1
    done
    for loop in "${loops[@]}"; do
        losetup -d "$loop"
    done
    rm -f "$tree/local.config"
    [ ! -e "$saved" ] || mv "$saved" "$tree/local.config"
    rm -rf "$scratch"
}
# The user's own settings come back at the end; what an interrupted run has left is never overwritten.
[ ! -e "$saved" ] || { echo "$saved: of an earlier run, move it to local.config or away first" >&2; rm -rf "$scratch"; exit 1; }
[ ! -e "$tree/local.config" ] || mv "$tree/local.config" "$saved" || exit 1
trap finish EXIT
trap 'exit 130' INT TERM

# suite NAME TEST_DEV SCRATCH_DEV CHECK_ARGUMENT...: the result of each test in $logs/NAME, one a line.
suite() {
    local name=$1 test=$2 other=$3
    shift 3
    "mkfs.$fstyp" "$([ "$fstyp" = ext4 ] && echo -F || echo -f)" "$test" >"$logs/$name.mkfs" 2>&1 || fail "mkfs.$fstyp $test: $(cat "$logs/$name.mkfs")"
    cat >"$tree/local.config" <<END
export FSTYP=$fstyp TEST_DEV=$test TEST_DIR=$scratch/test SCRATCH_DEV=$other SCRATCH_MNT=$scratch/scratch
export RESULT_BASE=$logs/$name.results
END
    mkdir "$logs/$name.results"
    echo "$name: ./check $*"
    (cd "$tree" && ./check "$@") >"$logs/$name.log" 2>&1 </dev/null
    umount "$scratch/test" "$scratch/scratch" 2>/dev/null
    # "generic/001 3s ...  4s", "generic/002 [not run] why", "generic/003 - output mismatch (see ...)", "[failed, exit status 1]".
    sed -nE 's@^([a-z0-9]+/[0-9]+) (.*)@\1\t\2@p' "$logs/$name.log" | awk -F '\t' '
        { result = "passed" }
        $2 ~ /\[not run\]/ { result = "not run" }
        $2 ~ /\[expunged\]/ { result = "left out" }
        $2 ~ /output mismatch|\[failed|_check_|inconsistent/ { result = "FAILED" }
        { print $1 "\t" result }' | sort >"$logs/$name"
    [ -s "$logs/$name" ] || fail "no test ran on $name: $(tail -n 5 "$logs/$name.log")"
}

devices=()
for name in a b; do
    mkdir "$scratch/$name"
    "$ploop" init -s "$size" -t none "$scratch/$name/root.hds" >/dev/null || fail "no disk can be made"
    device=$("$ploop" mount "$scratch/$name/DiskDescriptor.xml" | grep -o 'dev=/dev/[^ ]*') || fail "no disk can be mounted"
    devices+=("${device#dev=}")
done
suite ploop "${devices[@]}" "$@"
"$ploop" umount -d "${devices[0]}" >/dev/null && "$ploop" umount -d "${devices[1]}" >/dev/null || fail "the disks cannot be unmounted"
for name in a b; do
    "$ploop" check "$scratch/$name/DiskDescriptor.xml" >/dev/null || fail "the image of ${devices[0]} or ${devices[1]} is not sound"
    rm -rf "${scratch:?}/$name"
    truncate -s "${size^^}" "$scratch/$name.raw"
    loops+=("$(losetup --find --show --direct-io=on "$scratch/$name.raw")") || fail "no loop device"
done
suite raw "${loops[@]}" "$@"

for name in ploop raw; do
    echo "$name: $(cut -f 2 "$logs/$name" | sort | uniq -c | sed 's/^ *//' | paste -sd, | sed 's/,/, /g')"
done
if join -t "$(printf '\t')" -a 1 -a 2 -e "did not come" -o 0,1.2,2.2 "$logs/ploop" "$logs/raw" |
    awk -F '\t' '$2 != $3 { print "  " $1 ": " $2 " on ploop, " $3 " on raw"; n++ } END { exit n != 0 }'; then
    echo "no differences"
else
    exit 1
fi
