#!/bin/sh
# Installs what `cargo build --release` built: library, command, server, headers, manual pages, completions, units.
#
#   ./install.sh [--uninstall | --list] [--force] [NAME=VALUE...]
#
#   PREFIX=/usr         DESTDIR=        root of a package's tree, before all other paths
#   LIBDIR              PREFIX/lib/TRIPLE on Debian and the like, PREFIX/lib64 where that is a folder of its own, else PREFIX/lib
#   SBINDIR=PREFIX/sbin LIBEXECDIR=PREFIX/libexec      INCLUDEDIR=PREFIX/include   MANDIR=PREFIX/share/man
#   DATADIR=PREFIX/share   completions of shells
#   ZSHDIR              DATADIR/zsh/site-functions; below /usr on Debian and the like DATADIR/zsh/vendor-completions
#   UNITDIR, TMPFILESDIR, UDEVDIR       systemd/system, tmpfiles.d and udev/rules.d below PREFIX/lib
#   TARGET              the folder with the built files ($CARGO_TARGET_DIR/release, else target/release)
#   STRIP=strip         `STRIP=:` keeps the names of functions
#
#   --uninstall   removes what the same call without it installs
#   --list        prints the paths that it installs, without DESTDIR
#   --force       also over files that belong to a package of the distribution (Debian's ploop and libploop)
#
# The same names are read from the environment. mount(8) looks for mount.ploop in /sbin alone, and systemd and udev for their
# files below /usr/lib, /usr/local/lib and /etc: with another PREFIX name SBINDIR, UNITDIR and UDEVDIR.
set -eu
umask 022

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

action= force=
for argument; do
    case $argument in
    --uninstall | --list) action=$argument ;;
    --force) force=1 ;;
    -h | --help)
        sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    PREFIX=* | DESTDIR=* | LIBDIR=* | SBINDIR=* | LIBEXECDIR=* | INCLUDEDIR=* | MANDIR=* | DATADIR=* | ZSHDIR=* | UNITDIR=* | TMPFILESDIR=* | UDEVDIR=* | TARGET=* | STRIP=*)
        # The value is not looked at by the shell again.
        eval "${argument%%=*}=\${argument#*=}"
        ;;
    *) fail "unknown argument $argument; --help shows them" ;;
    esac
done

case ${DESTDIR:-/} in
/*) ;;
*) fail "DESTDIR=$DESTDIR: want an absolute path" ;;
esac
cd "$(dirname "$0")"

# Where the distribution has its libraries.
libdir() {
    case $PREFIX in
    /usr | /usr/local)
        triple=$(${CC:-cc} -print-multiarch 2>/dev/null || dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || :)
        if [ -n "$triple" ] && [ -d "/usr/lib/$triple" ]; then
            echo "$PREFIX/lib/$triple"
            return
        fi
        if [ -d /usr/lib64 ] && [ ! -L /usr/lib64 ] && [ "$(getconf LONG_BIT 2>/dev/null || echo 64)" = 64 ]; then
            echo "$PREFIX/lib64"
            return
        fi
        ;;
    esac
    echo "$PREFIX/lib"
}

DESTDIR=${DESTDIR:-} PREFIX=${PREFIX:-/usr}
PREFIX=${PREFIX%/}
LIBDIR=${LIBDIR:-$(libdir)}
SBINDIR=${SBINDIR:-$PREFIX/sbin}
LIBEXECDIR=${LIBEXECDIR:-$PREFIX/libexec}
INCLUDEDIR=${INCLUDEDIR:-$PREFIX/include}
MANDIR=${MANDIR:-$PREFIX/share/man}
DATADIR=${DATADIR:-$PREFIX/share}
# Debian's zsh looks below /usr in this folder alone.
case $PREFIX in
/usr) [ ! -e /etc/debian_version ] || ZSHDIR=${ZSHDIR:-$DATADIR/zsh/vendor-completions} ;;
esac
ZSHDIR=${ZSHDIR:-$DATADIR/zsh/site-functions}
UNITDIR=${UNITDIR:-$PREFIX/lib/systemd/system}
TMPFILESDIR=${TMPFILESDIR:-$PREFIX/lib/tmpfiles.d}
UDEVDIR=${UDEVDIR:-$PREFIX/lib/udev/rules.d}
TARGET=${TARGET:-${CARGO_TARGET_DIR:-target}/release}
STRIP=${STRIP:-strip}
version=$(sed -n 's/^version = "\([0-9]*\.[0-9]*\).*"/\1/p' Cargo.toml | head -n 1)

for dir in "$PREFIX" "$LIBDIR" "$SBINDIR" "$LIBEXECDIR" "$INCLUDEDIR" "$MANDIR" "$DATADIR" "$ZSHDIR" "$UNITDIR" "$TMPFILESDIR" \
    "$UDEVDIR"; do
    case $dir in
    /*) ;;
    *) fail "$dir: want an absolute path" ;;
    esac
done

# All that is installed, one path a line.
list() {
    so=$LIBDIR/libploop.so
    printf '%s\n' "$so.$version" "$so.1" "$so" "$LIBDIR/libploop.a" "$LIBDIR/pkgconfig/ploop.pc" \
        "$SBINDIR/ploop" "$SBINDIR/mount.ploop" "$SBINDIR/umount.ploop" "$SBINDIR/ploop-balloon" "$LIBEXECDIR/ploop/ploop-server" \
        "$INCLUDEDIR/ploop/libploop.h" "$INCLUDEDIR/ploop/dynload.h" "$INCLUDEDIR/ploop/ploop_if.h" "$INCLUDEDIR/ploop/ploop1_image.h" \
        "$MANDIR/man3/libploop.3" "$MANDIR/man8/ploop.8" "$MANDIR/man8/ploop-balloon.8" "$MANDIR/man8/mount.ploop.8" \
        "$MANDIR/man8/umount.ploop.8" "$DATADIR/bash-completion/completions/ploop" "$DATADIR/bash-completion/completions/ploop-balloon" \
        "$ZSHDIR/_ploop" "$DATADIR/fish/vendor_completions.d/ploop.fish" "$DATADIR/fish/vendor_completions.d/ploop-balloon.fish" \
        "$UNITDIR/ploop-shutdown.service" "$UNITDIR/ploop-compact.service" "$UNITDIR/ploop-compact.timer" "$TMPFILESDIR/ploop.conf" "$UDEVDIR/59-ploop.rules"
}

# Run by the package's tools, or over them: their next upgrade would bring their files back one by one.
refuse_packages() {
    [ -z "$DESTDIR$force" ] && command -v dpkg-query >/dev/null || return 0
    owner=$(list | xargs dpkg-query -S 2>/dev/null | sed 's/: .*//' | sort -u | tr '\n' ' ')
    [ -z "$owner" ] || fail "files of the package ${owner% } are in the way: remove it, choose another PREFIX, or give --force"
}

loader() {
    if [ -z "$DESTDIR" ] && [ "$(id -u)" = 0 ] && command -v ldconfig >/dev/null; then
        ldconfig
    fi
}

# Without the program and the unit disks would not be closed at shutdown.
refuse_running() {
    [ -z "$DESTDIR$force" ] || return 0
    for device in /run/ploop/*/state; do
        [ ! -e "$device" ] || fail "disks are mounted (ploop list -a): ploop umount --all first, or give --force"
    done
}

if [ "$action" = --list ]; then
    list
    exit 0
fi
if [ "$action" = --uninstall ]; then
    refuse_packages
    refuse_running
    if [ -z "$DESTDIR" ] && command -v systemctl >/dev/null; then
        systemctl disable ploop-shutdown ploop-compact.timer >/dev/null 2>&1 || :
    fi
    list | while IFS= read -r path; do
        rm -f "$DESTDIR$path"
        # Folders that only this package has; in a tree of its own all that are empty.
        dir=${path%/*}
        while [ -n "$dir" ]; do
            case $DESTDIR:$dir in
            :*/ploop | ?*:*) rmdir "$DESTDIR$dir" 2>/dev/null || break ;;
            *) break ;;
            esac
            dir=${dir%/*}
        done
    done
    loader
    exit 0
fi

for file in libploop.so libploop.a ploop ploop-server; do
    [ -e "$TARGET/$file" ] || fail "there is no $TARGET/$file; cargo build --release --locked makes it"
done
refuse_packages
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# put MODE SOURCE PATH: a new file takes the place of an old one, which programs may be running.
put() {
    mkdir -p "$DESTDIR${3%/*}"
    cp "$2" "$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}

# stripped FLAG FILE: the path of a copy without what only debuggers need.
stripped() {
    cp "$TARGET/$2" "$scratch/$2"
    "$STRIP" "$1" "$scratch/$2" || fail "$STRIP failed; install binutils, or give STRIP=:"
    echo "$scratch/$2"
}

# Paths in text files are those of this installation.
adapted() {
    sed -e "s|@prefix@|$PREFIX|g; s|@libdir@|$LIBDIR|g; s|@includedir@|$INCLUDEDIR|g; s|@version@|$version|g" \
        -e "s|/usr/sbin/ploop|$SBINDIR/ploop|g" "$1" >"$scratch/${1##*/}"
    echo "$scratch/${1##*/}"
}

link() {
    ln -sf "$1" "$DESTDIR$2"
}

put 644 "$(stripped --strip-unneeded libploop.so)" "$LIBDIR/libploop.so.$version"
link "libploop.so.$version" "$LIBDIR/libploop.so.1"
link libploop.so.1 "$LIBDIR/libploop.so"
put 644 "$(stripped --strip-debug libploop.a)" "$LIBDIR/libploop.a"
put 644 "$(adapted pkgconfig/ploop.pc.in)" "$LIBDIR/pkgconfig/ploop.pc"
put 755 "$(stripped --strip-all ploop-server)" "$LIBEXECDIR/ploop/ploop-server"
put 755 "$(stripped --strip-all ploop)" "$SBINDIR/ploop"
for name in mount.ploop umount.ploop ploop-balloon; do
    link ploop "$SBINDIR/$name"
done
for header in libploop.h dynload.h ploop_if.h ploop1_image.h; do
    put 644 "include/ploop/$header" "$INCLUDEDIR/ploop/$header"
done
put 644 man/libploop.3 "$MANDIR/man3/libploop.3"
for page in ploop.8 ploop-balloon.8 mount.ploop.8; do
    put 644 "man/$page" "$MANDIR/man8/$page"
done
link mount.ploop.8 "$MANDIR/man8/umount.ploop.8"
put 644 src/bin/ploop/completion/ploop.bash "$DATADIR/bash-completion/completions/ploop"
link ploop "$DATADIR/bash-completion/completions/ploop-balloon"
put 644 src/bin/ploop/completion/ploop.zsh "$ZSHDIR/_ploop"
put 644 src/bin/ploop/completion/ploop.fish "$DATADIR/fish/vendor_completions.d/ploop.fish"
link ploop.fish "$DATADIR/fish/vendor_completions.d/ploop-balloon.fish"
for unit in ploop-shutdown.service ploop-compact.service ploop-compact.timer; do
    put 644 "$(adapted "systemd/$unit")" "$UNITDIR/$unit"
done
put 644 systemd/ploop.tmpfiles "$TMPFILESDIR/ploop.conf"
put 644 systemd/59-ploop.rules "$UDEVDIR/59-ploop.rules"
loader
