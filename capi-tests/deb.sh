#!/usr/bin/env bash
# In a Debian that is thrown away (capi-tests/chroot.sh calls it there): the .deb packages are built from vendor/, without a network
# for cargo; lintian finds no error; they take the place of Debian's own, work, and leave nothing when they are removed.
#
#   PLOOP_DISPOSABLE=1 capi-tests/deb.sh [FOLDER]     FOLDER: has packages that are built already
set -u
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
[ "${PLOOP_DISPOSABLE:-}" = 1 ] || { echo "capi-tests/deb.sh installs and removes packages: PLOOP_DISPOSABLE=1 says that this system is for that" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
log=$(mktemp)
debs=$(mktemp -d) && chmod 755 "$debs"
trap 'rm -rf "$log" "$debs"' EXIT

fail() {
    echo "failed: $*" >&2
    exit 1
}

quietly() {
    "$@" >"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; fail "$*"; }
}

# All files but those of the package manager and of the loader's cache, which each package changes.
files() {
    find / -xdev \( -path /src -o -path /proc -o -path /sys -o -path /dev -o -path /opt -o -path /tmp -o -path /root -o -path /var/cache -o \
        -path /var/log -o -path /var/lib/dpkg -o -path /var/lib/apt \) -prune -o -print | LC_ALL=C sort
}

apt() {
    quietly apt-get -q -o Dpkg::Options::=--force-confnew -y --no-install-recommends "$@"
}

apt install debhelper dpkg-dev lintian pkg-config man-db
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

if [ $# = 1 ]; then
    cp "$1"/*.deb "$1"/*.changes "$1"/*.buildinfo "$debs" || exit 1
else
    quietly packaging/build deb "$debs"
fi
grep -i 'dpkg-shlibdeps: warning\|dh_.*: warning' "$log"
echo "built: $(cd "$debs" && du -k *.deb | awk '{ print $2 " " $1 "k" }' | xargs)"

lintian --allow-root --fail-on error "$debs"/*.changes >"$log" 2>&1
rc=$?
grep -c '^W:' "$log" | sed 's/$/ warnings of lintian/'
cat "$log"
[ $rc = 0 ] || fail "lintian"

main=()
for name in ploop libploop1 libploop-dev; do
    main+=("$(echo "$debs/${name}"_*.deb)")
done
# What Debian's own need, and leave, is no leftover of ours.
apt install ploop libploop-dev
for before in nothing classic; do
    apt purge ploop libploop1 libploop-dev
    files >"$debs/before"
    [ $before = nothing ] || apt install ploop libploop-dev
    apt install "${main[@]}"
    for name in ploop libploop1 libploop-dev; do
        [ "$(dpkg-query -W -f '${Status} ${Version}' $name)" = "install ok installed $version-1" ] || fail "over $before: $name is $(dpkg-query -W $name)"
    done
    [ "$(ploop --version)" = "ploop $version" ] || fail "over $before: ploop --version: $(ploop --version)"
    [ "$(ldconfig -p | awk '$1 == "libploop.so.1" { print $NF }')" = "/lib/$(gcc -print-multiarch)/libploop.so.1" ] || fail "ldconfig -p: $(ldconfig -p | grep ploop)"
    for program in mount.ploop umount.ploop ploop-balloon; do
        [ "$(readlink -f "/sbin/$program")" = /usr/sbin/ploop ] || fail "over $before: /sbin/$program is not ours"
        man -w 8 $program >/dev/null || fail "no manual page of $program"
    done
    ploop doctor | grep -q 'ploop-server  */usr/libexec/ploop/ploop-server' || fail "ploop does not find its server"
    [ -z "$(dpkg --verify ploop libploop1 libploop-dev | grep -v '/usr/share/\(man\|doc\)')" ] || fail "dpkg --verify: $(dpkg --verify ploop libploop1 libploop-dev)"
    printf '#include <ploop/libploop.h>\n#include <stdio.h>\nint main(void) { return puts(ploop_get_last_error()) < 0; }\n' >"$debs/p.c"
    # shellcheck disable=SC2046 # lists of flags
    quietly gcc -o "$debs/p" "$debs/p.c" $(pkg-config --cflags --libs ploop)
    quietly "$debs/p"
    # shellcheck disable=SC2046
    quietly gcc -static -o "$debs/p" "$debs/p.c" $(pkg-config --static --cflags --libs ploop)
    quietly "$debs/p"

    # A disk that runs keeps the command that unmounts it.
    mkdir -p /run/ploop/ploop0 && touch /run/ploop/ploop0/state
    ! apt-get -q -y remove ploop >"$log" 2>&1 </dev/null || fail "ploop was removed while a disk runs"
    grep -q 'ploop umount --all' "$log" || fail "no way out is named: $(tail -n 5 "$log")"
    rm -r /run/ploop/ploop0
    apt install "${main[@]}"

    apt purge ploop libploop1 libploop-dev
    files | diff "$debs/before" - || fail "over $before: removing the packages leaves these (>)"
    echo "over $before: installed, used, removed"
done
