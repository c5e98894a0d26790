#!/usr/bin/env bash
# Debian's own ploop and ploop-balloon 1.15 on our library. They are linked with BIND_NOW: one symbol missing and they do not start.
. "$(dirname "$0")/../lib.sh"

bin=/usr/sbin
if [ ! -x $bin/ploop ] || [ ! -x $bin/ploop-balloon ]; then
    for tool in apt-get dpkg-deb; do
        command -v $tool >/dev/null || skip "the package ploop is not installed, and there is no $tool"
    done
    (cd "$SCRATCH" && apt-get -q download ploop) >"$SCRATCH/apt.log" 2>&1 || skip "apt-get cannot download the package ploop"
    dpkg-deb -x "$SCRATCH"/ploop_*.deb "$SCRATCH/deb" || fail "the package ploop cannot be unpacked"
    bin=$SCRATCH/deb/usr/sbin
    [ -x "$bin/ploop" ] || bin=$SCRATCH/deb/sbin
fi
for program in ploop ploop-balloon; do
    # $PLOOP, our command, may be installed under the same name.
    readelf -dW "$bin/$program" 2>/dev/null | grep -q 'NEEDED.*libploop\.so\.1' ||
        skip "$bin/$program is not a program on libploop.so.1"
done
export LD_LIBRARY_PATH=$SCRATCH/lib LD_BIND_NOW=1

# run RC PROGRAM ARGUMENT...: its output is in $SCRATCH/out.
run() {
    local want=$1 program=$2 rc
    shift 2
    "$bin/$program" "$@" >"$SCRATCH/out" 2>&1
    rc=$?
    [ $rc = "$want" ] || fail "$program $*: status $rc instead of $want: $(cat "$SCRATCH/out")"
}

for program in ploop ploop-balloon; do
    ldd "$bin/$program" | grep -q "libploop.so.1 => $SCRATCH/lib/" || fail "$program would not load the library under test"
    run 38 $program
    grep -qi usage "$SCRATCH/out" || fail "$program without arguments prints no usage: $(cat "$SCRATCH/out")"
done

# What needs no device.
mkdir "$SCRATCH/disk" && cd "$SCRATCH/disk" || exit 1
run 0 ploop init -s 64M -t none root.hds
run 0 ploop snapshot -u '{11111111-2222-3333-4444-555555555555}' DiskDescriptor.xml
run 0 ploop snapshot-list -H -o uuid DiskDescriptor.xml
grep -q '^{11111111-2222-3333-4444-555555555555}' "$SCRATCH/out" || fail "snapshot-list: $(cat "$SCRATCH/out")"
run 0 ploop info -s DiskDescriptor.xml
grep -q '^size:[[:space:]]*131072$' "$SCRATCH/out" || fail "info -s: $(cat "$SCRATCH/out")"
run 0 ploop check DiskDescriptor.xml
run 0 ploop snapshot-delete -u '{11111111-2222-3333-4444-555555555555}' DiskDescriptor.xml
run 0 ploop grow -s 128M DiskDescriptor.xml
run 0 ploop info -s DiskDescriptor.xml
grep -q '^size:[[:space:]]*262144$' "$SCRATCH/out" || fail "info -s after grow: $(cat "$SCRATCH/out")"
run 0 ploop convert -f preallocated DiskDescriptor.xml
run 0 ploop convert -v 1 DiskDescriptor.xml
run 0 ploop check DiskDescriptor.xml
run 0 ploop convert -f raw DiskDescriptor.xml
run 38 ploop convert -f preallocated DiskDescriptor.xml
