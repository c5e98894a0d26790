#!/usr/bin/env bash
# install.sh, into a package's tree and under a prefix of its own: what is there, what programs build and run with it, and that
# it is gone afterwards.
. "$(dirname "$0")/../lib.sh"

command -v pkg-config >/dev/null || skip "no pkg-config; apt-get install pkg-config"
[ -n "$STATIC" ] || fail "no libploop.a beside $LIB; run: cargo build --release"
awk '/^    #include <ploop\/libploop.h>/ { on = 1 } on && /^[^ ]/ { exit } on' "$ROOT/README.md" | sed 's/^    //' |
    sed '/^cc example.c/d' >"$SCRATCH/example.c"

# try NAME=VALUE...: one installation, in the tree $tree (or / as the tree) with the prefix $prefix.
try() {
    local tree=$1 prefix=$2 libdir flags file
    shift 2
    "$ROOT/install.sh" DESTDIR="$tree" PREFIX="$prefix" TARGET="$(dirname "$LIB")" "$@" || fail "install.sh failed"
    libdir=$(dirname "$(find "$tree$prefix" -name libploop.so.1.15)")
    # Exactly these files, whatever install.sh itself believes.
    local zsh=site-functions
    [ "$prefix" != /usr ] || [ ! -e /etc/debian_version ] || zsh=vendor-completions
    sed "s|^LIB|${libdir#"$tree$prefix"/}|; s|ZSH|$zsh|" "$ROOT/capi-tests/tools/installed" | LC_ALL=C sort |
        diff -u - <(cd "$tree$prefix" && find . ! -type d | sed 's|^\./||' | LC_ALL=C sort) || fail "other files were installed (+) than in capi-tests/tools/installed (-)"
    "$ROOT/install.sh" --list DESTDIR="$tree" PREFIX="$prefix" "$@" | sed "s|^$prefix/||" | LC_ALL=C sort |
        diff -u - <(cd "$tree$prefix" && find . ! -type d | sed 's|^\./||' | LC_ALL=C sort) || fail "install.sh --list has other files (-) than it installs (+)"
    case $(${CC:-cc} -print-multiarch):$prefix in
    ?*:/usr) [ "$libdir" = "$tree/usr/lib/$(cc -print-multiarch)" ] || fail "the libraries are in $libdir" ;;
    esac

    [ "$(ls "$tree$prefix/include/ploop")" = "$(ls "$ROOT/include/ploop")" ] || fail "other headers: $(ls "$tree$prefix/include/ploop")"
    # Modes, links, sizes.
    [ "$(stat -c %a "$tree$prefix"/include/ploop/*.h "$libdir/libploop.so.1.15" "$libdir/libploop.a" | sort -u)" = 644 ] ||
        fail "headers and libraries are not 0644: $(ls -lR "$tree$prefix")"
    for file in "$tree$prefix"/sbin/{ploop,mount.ploop,umount.ploop,ploop-balloon} "$tree$prefix/libexec/ploop/ploop-server"; do
        [ -x "$file" ] || fail "$file is not there, or no program"
        readelf -SW "$file" | grep -q '\.symtab' && fail "$file is not stripped"
    done
    [ "$(readlink -f "$libdir/libploop.so")" = "$(readlink -f "$libdir/libploop.so.1.15")" ] || fail "libploop.so leads elsewhere"
    # The loader's tool makes the link that the soname asks for, if it is missing.
    rm "$libdir/libploop.so.1" && /sbin/ldconfig -n "$libdir" && [ "$(readlink "$libdir/libploop.so.1")" = libploop.so.1.15 ] ||
        fail "ldconfig -n does not resolve libploop.so.1"
    readelf -dW "$libdir/libploop.so.1" | grep -q 'SONAME.*libploop\.so\.1\]' || fail "the soname is not libploop.so.1"
    for file in share/man/man8/{ploop,ploop-balloon,mount.ploop,umount.ploop}.8 share/man/man3/libploop.3 share/bash-completion/completions/ploop lib/systemd/system/ploop-{shutdown,compact}.service lib/systemd/system/ploop-compact.timer lib/tmpfiles.d/ploop.conf lib/udev/rules.d/59-ploop.rules; do
        [ -s "$tree$prefix/$file" ] || fail "$file is not there"
    done
    grep -q "ExecStop=$prefix/sbin/ploop umount" "$tree$prefix/lib/systemd/system/ploop-shutdown.service" || fail "the unit names another program"
    find "$tree$prefix" -name '*.new' | grep . && fail "temporary files are left"

    # The server is the one of this installation.
    PLOOP_SERVER='' "$tree$prefix/sbin/ploop" doctor | grep -q "ploop-server  *$(readlink -f "$tree$prefix")/libexec/ploop/ploop-server" ||
        fail "ploop does not find its server: $("$tree$prefix/sbin/ploop" doctor | grep -A 1 ploop-server)"

    # Programs, with what pkg-config says and nothing more.
    export PKG_CONFIG_LIBDIR=$libdir/pkgconfig PKG_CONFIG_SYSROOT_DIR=$tree
    [ "$(pkg-config --modversion ploop)" = 1.15 ] || fail "pkg-config does not read ploop.pc"
    flags=$(pkg-config --cflags --libs ploop) || fail "pkg-config does not read ploop.pc"
    # shellcheck disable=SC2086 # a list of flags
    gcc -std=gnu99 -Wall -Werror -o "$SCRATCH/example" "$SCRATCH/example.c" $flags || fail "the README's example does not build with $flags"
    LD_LIBRARY_PATH=$libdir ldd "$SCRATCH/example" | grep -q "libploop.so.1 => $libdir/" || fail "the example is on another library"
    LD_LIBRARY_PATH=$libdir "$SCRATCH/example" 2>/dev/null && fail "the example mounted a disk that is not there"
    # gcc -static takes no shared library at all. No -Werror: the linker warns that getaddrinfo and the like need glibc's modules
    # at run time.
    flags=$(pkg-config --static --cflags --libs ploop)
    # shellcheck disable=SC2086 # a list of flags
    gcc -static -std=gnu99 -g -o "$SCRATCH/args" "$ROOT/capi-tests/args/args.c" $flags >"$SCRATCH/log" 2>&1 ||
        fail "args.c does not link by gcc -static with $flags: $(grep -v warning "$SCRATCH/log" | tail -n 5)"
    readelf -dW "$SCRATCH/args" 2>/dev/null | grep NEEDED && fail "the program needs shared libraries after all"
    rm -rf "$SCRATCH/disks" && mkdir "$SCRATCH/disks"
    PLOOP_TEST_LIBRARY=$SCRATCH/args "$SCRATCH/args" "$SCRATCH/disks" || fail "args.c, built by gcc -static"
    unset PKG_CONFIG_LIBDIR PKG_CONFIG_SYSROOT_DIR

    "$ROOT/install.sh" --uninstall DESTDIR="$tree" PREFIX="$prefix" "$@" || fail "install.sh --uninstall failed"
    find "${tree:-$prefix}" ! -type d 2>/dev/null | grep . && fail "--uninstall left these files"
    return 0
}

mkdir "$SCRATCH/tree"
try "$SCRATCH/tree" /usr
find "$SCRATCH/tree" -mindepth 1 | grep . && fail "--uninstall left these folders"
try "" "$SCRATCH/own" STRIP="$(command -v strip)"
"$ROOT/install.sh" TARGET="$SCRATCH" DESTDIR="$SCRATCH/tree" 2>"$SCRATCH/log" && fail "what was not built was installed"
grep -q "cargo build --release" "$SCRATCH/log" || fail "no way out is named: $(cat "$SCRATCH/log")"
echo "two installations"
