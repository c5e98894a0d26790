#!/usr/bin/env bash
# A fresh, minimal Debian with nothing but a Rust toolchain and gcc added: the two commands of README's "Start" run there as
# they stand; then capi-tests/deb.sh builds, installs and removes the packages. The toolchain is that of the running user, bound
# read-only; crates come from `cargo vendor`, so that the package is also seen to build offline.
#
# $PLOOP_CHROOT_CACHE: folder that keeps the unpacked packages of debootstrap between runs (default: none).
# $PLOOP_CHROOT_SUITE: default bookworm. $PLOOP_CHROOT_COMMANDS: other commands than README's, one a line.
set -u
root=$(dirname "$(dirname "$(readlink -f "$0")")")
scratch=${PLOOP_TEST_SCRATCH:-/var/tmp}
fs=$(mktemp -d "$scratch/ploop-chroot.XXXXXX") && chmod 755 "$fs" || exit 1
suite=${PLOOP_CHROOT_SUITE:-bookworm}
cache=${PLOOP_CHROOT_CACHE:-}
begin=$SECONDS

skip() {
    echo "skip: $*"
    exit 77
}

cleanup() {
    local m
    # What commands in the chroot left running is ended by them or is a failure seen below; here only our own binds go.
    for m in $(awk -v d="$fs" '$2 == d || index($2, d "/") == 1 { print $2 }' /proc/mounts | sort -r); do
        umount "$m" 2>/dev/null || umount -l "$m"
    done
    if ! awk -v d="$fs" 'index($2, d "/") == 1 { exit 1 }' /proc/mounts; then
        echo "mounts are left in $fs: it is not removed"
    else
        rm -rf --one-file-system "$fs"
    fi
}
trap cleanup EXIT
trap 'exit 143' TERM INT HUP

[ "$(id -u)" = 0 ] || skip "not root"
command -v debootstrap >/dev/null || {
    command -v apt-get >/dev/null || skip "no debootstrap"
    DEBIAN_FRONTEND=noninteractive apt-get -q update >/dev/null 2>&1
    DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends debootstrap >/dev/null 2>&1 || skip "no debootstrap"
}
cargo_home=${CARGO_HOME:-$HOME/.cargo}
sysroot=$(rustc --print sysroot) || skip "no Rust toolchain"

step() {
    echo "=== $1 ($((SECONDS - begin)) s)"
}

# The machine's own archive of Debian, if it has one; else debootstrap's default.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -oE '^(URIs:|deb( \[[^]]*\])?) +https?://[^ ]+' |
    grep -oE 'https?://[^ ]+' | grep -E '/debian/?$' | head -n 1)

step "debootstrap $suite"
args=(--variant=minbase)
if [ -n "$cache" ]; then
    mkdir -p "$cache"
    args+=(--cache-dir="$(readlink -f "$cache")")
fi
debootstrap "${args[@]}" "$suite" "$fs" ${mirror:+"$mirror"} >"$fs.log" 2>&1 || { tail -n 20 "$fs.log"; rm -f "$fs.log"; exit 1; }
rm -f "$fs.log"

step "gcc, toolchain, sources"
cp /etc/resolv.conf /etc/hosts "$fs/etc/" 2>/dev/null
cp /etc/apt/apt.conf.d/*proxy* "$fs/etc/apt/apt.conf.d/" 2>/dev/null
bind() {
    mkdir -p "$fs$2"
    mount --bind "$1" "$fs$2" && { [ -z "${3-}" ] || mount -o remount,bind,"$3" "$fs$2"; } || exit 1
}
mount -t proc proc "$fs/proc" || exit 1
mount --rbind /sys "$fs/sys" && mount --make-rslave "$fs/sys" || exit 1
mount --rbind /dev "$fs/dev" && mount --make-rslave "$fs/dev" || exit 1
inside() {
    env -i HOME=/root TERM=dumb LC_ALL=C.UTF-8 PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        CARGO_TERM_COLOR=never DEBIAN_FRONTEND=noninteractive ${PLOOP_TEST:+PLOOP_TEST=$PLOOP_TEST} chroot "$fs" "$@"
}
inside sh -c 'apt-get -q update && apt-get -q install -y --no-install-recommends gcc libc6-dev' >"$fs/apt.log" 2>&1 || { tail -n 20 "$fs/apt.log"; exit 1; }
bind "$sysroot" /opt/rust ro
mkdir -p "$fs/src"
# What git knows, as a clone would have it, with changes not yet committed.
(cd "$root" && { git ls-files -z 2>/dev/null || find . -path ./target -prune -o -type f -print0; } | tar -c --null -T - --ignore-failed-read 2>/dev/null) | tar -x -C "$fs/src" || exit 1
mkdir -p "$fs/src/.cargo"
(cd "$root" && CARGO_HOME=$cargo_home cargo vendor --locked --versioned-dirs "$fs/src/vendor") >"$fs/src/.cargo/config.toml" 2>"$fs/vendor.log" ||
    { tail -n 20 "$fs/vendor.log"; exit 1; }
sed -i "s|$fs/src/||" "$fs/src/.cargo/config.toml"
printf '\n[net]\noffline = true\n' >>"$fs/src/.cargo/config.toml"

commands=${PLOOP_CHROOT_COMMANDS:-$(awk '/^## /{on = ($2 == "Start")} on && /^    /{sub(/^ +/, ""); sub(/ +#.*$/, ""); print}' "$root/README.md")}
[ -n "$commands" ] || { echo "README.md has no indented commands under \"## Start\""; exit 1; }
[ -n "${PLOOP_CHROOT_COMMANDS:-}" ] || commands="$commands
PLOOP_DISPOSABLE=1 capi-tests/deb.sh"
failed=0
while IFS= read -r line; do
    step "$line"
    start=$SECONDS
    inside sh -c "cd /src && $line" </dev/null
    rc=$?
    echo "=== exit $rc after $((SECONDS - start)) s: $line"
    [ $rc = 0 ] || failed=1
done <<<"$commands"

# Nothing that was started in there may hold on to it.
for p in /proc/[0-9]*; do
    if [ "$(readlink "$p/root" 2>/dev/null)" = "$fs" ]; then
        echo "still running from the chroot: ${p#/proc/} $(tr '\0' ' ' <"$p/cmdline" | head -c 300)"
        kill -9 "${p#/proc/}"
        failed=1
    fi
done
echo "RESULT: chroot $((SECONDS - begin)) s"
exit $failed
