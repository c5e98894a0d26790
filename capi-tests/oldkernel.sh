#!/usr/bin/env bash
# Device tests on an older stock kernel: Debian's user-mode-linux (6.1 in Debian 12), which runs the tests that are built here
# as a process, with this machine's files as its root. There a killed server's requests are found in slots, since that kernel
# cannot send them again. As root; takes about five minutes.
#
#   capi-tests/oldkernel.sh [BINARY[:TEST...]...]    test binaries, and perhaps which of their tests
#   capi-tests/oldkernel.sh SCRIPT.py:CASE...        cases of capi-tests/devices
#
# A mounted ext4 is enlarged here, as it is on real machines and not in all places where tests are run: the kernel asks for
# CAP_SYS_RESOURCE.
#
# Workers are not killed under load by default: user-mode Linux copies a request to its reader by a slower way than real machines
# (no HAVE_FAST_GUP), which gives up when the reader is being killed, and the request ends with EIO whatever a server does.
#
# $PLOOP_UML_DEB: a package file to take instead of downloading one.
set -u
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
root=$PWD
tests=("$@")
[ ${#tests[@]} != 0 ] || tests=(
    device_attach device_external_changes device_temporary device_partitions
    device_kill:both_killed:no_worker_can_serve:mounted_and_dead
    device_merge:merged_under_load:cancelled:without_space
    device_switch:a_chain_grows_under_load:reload_under_load:what_cannot_be_served
    worker:data:delta:read_only:one_writer:marks:new_supervisor:no_space:struck_out
    sizes_rounds.py:rounds sizes.py:resize_running
)
[ "$(id -u)" = 0 ] || { echo "skip: not root"; exit 77; }

dir=$(mktemp -d "${PLOOP_TEST_TMP:-/var/tmp}/ploop-oldkernel.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/deb" "$dir/disk"
deb=${PLOOP_UML_DEB:-}
if [ -z "$deb" ]; then
    (cd "$dir/deb" && apt-get download user-mode-linux) >"$dir/apt.log" 2>&1 || { cat "$dir/apt.log"; echo "skip: no package user-mode-linux here"; exit 77; }
    deb=$(echo "$dir"/deb/*.deb)
fi
dpkg-deb -x "$deb" "$dir/uml" || exit 1
modules=$(echo "$dir"/uml/usr/lib/uml/modules/*/kernel)

binaries=$(cargo test --locked --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/debug\/deps\/[^"]*\)".*/\1/p')
chosen=()
for t in "${tests[@]}"; do
    case $t in
    *.py:*)
        [ -f "capi-tests/devices/${t%%:*}" ] || { echo "there is no script ${t%%:*}"; exit 1; }
        chosen+=("$root/capi-tests/devices/$t")
        continue
        ;;
    esac
    found=$(grep "/${t%%:*}-[0-9a-f]*$" <<<"$binaries" | tail -n 1)
    [ -n "$found" ] || { echo "there is no test binary ${t%%:*}"; exit 1; }
    names=
    [ "$t" = "${t#*:}" ] || names=:${t#*:}
    chosen+=("$found$names")
done

# Images lie on an ext4 in memory: the root, which is this machine's by way of hostfs, knows no direct I/O.
cat >"$dir/init" <<END
#!/bin/bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=0
mount -t proc proc /proc; mount -t sysfs sys /sys
grep -q ' /dev devtmpfs' /proc/mounts || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run
mkdir -p /run/lock
{
    insmod $modules/fs/fuse/fuse.ko && insmod $modules/drivers/block/loop.ko || exit 1
    truncate -s 1500M /dev/shm/disk && mkfs.ext4 -q /dev/shm/disk && mount -o loop /dev/shm/disk "$dir/disk" &&
        mount --bind "$dir/disk" "$root/target/tmp" || exit 1
    echo "Linux \$(uname -r)"
    cd "$root"
    for chosen in ${chosen[*]}; do
        IFS=: read -r binary names <<<"\$chosen"
        echo "=== \$chosen"
        case \$binary in
        *.py)
            mkdir -p "$dir/disk/scripts"
            PLOOP_TEST=ci PLOOP="$root/target/debug/ploop" PLOOP_TEST_SCRATCH="$dir/disk/scripts" timeout -k 5 900 python3 \$binary \${names//:/ } && echo ok ;;
        *) PLOOP_TEST=ci timeout -k 5 900 \$binary --nocapture --test-threads=1 \${names//:/ } ;;
        esac
        rc=\$?
        echo "\$rc \$binary" >>"$dir/results"
    done
} >"$dir/log" 2>&1 </dev/null
sync
echo o >/proc/sysrq-trigger
sleep 10
END
chmod +x "$dir/init"
mkdir -p "$root/target/tmp"
: >"$dir/results"
timeout -k 10 3000 "$dir/uml/usr/bin/linux.uml" mem=3072M root=/dev/root rootfstype=hostfs rootflags=/ rw "init=$dir/init" \
    con=null con0=fd:0,fd:1 quiet </dev/null >"$dir/console" 2>&1
cat "$dir/log"
[ "$(wc -l <"$dir/results")" = ${#chosen[@]} ] || { tail -n 20 "$dir/console"; echo "FAILED: the tests did not come to their end"; exit 1; }
if grep -v '^0 ' "$dir/results"; then
    echo "FAILED on $(sed -n 's/^Linux /Linux /p' "$dir/log" | head -n 1)"
    exit 1
fi
echo "RESULT: ${tests[*]}: ok on $(grep -m1 '^Linux ' "$dir/log"), $(grep -c ' \.\.\. ok\|^ok$' "$dir/log") tests and scenes"
