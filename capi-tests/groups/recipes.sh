#!/usr/bin/env bash
# The recipes of packages (debian/, packaging/) against install.sh, Cargo.toml, Cargo.lock and the golden symbols; the manual pages
# against the typesetter.
. "$(dirname "$0")/../lib.sh"
cd "$ROOT" || exit 1

# Versions.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
[ "$(sed -n '1s/^ploop (\(.*\)-[0-9]*) .*/\1/p' debian/changelog)" = "$version" ] || fail "debian/changelog does not begin with ploop ($version-...)"
[ "$(awk '$1 == "Version:" { print $2 }' packaging/ploop.spec)" = "$version" ] || fail "packaging/ploop.spec has another version than Cargo.toml, $version"
for page in man/*.[38]; do
    head -n 1 "$page" | grep -q " \"ploop $version\" " || fail "$page: the title has another version than Cargo.toml, $version"
done
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
for file in debian/control packaging/ploop.spec; do
    grep -q "cargo (\?>= $rust" "$file" || fail "$file does not want cargo $rust, as Cargo.toml does"
done

# The packages replace those of the classic, which have these names: Debian's, and OpenVZ's for rpm.
[ "$(awk '$1 == "Package:" { print $2 }' debian/control | sort | xargs)" = "libploop-dev libploop1 ploop" ] || fail "names in debian/control"
[ "$(awk '$1 == "%package" { print $2 }' packaging/ploop.spec | sort | xargs)" = "devel lib" ] || fail "names in packaging/ploop.spec"

# Symbols.
sed 1,2d debian/libploop1.symbols | sed 's/^ \(.*\)@Base 1\.15$/\1/' | diff -u tests/abi/libploop.so.1.symbols - || fail "debian/libploop1.symbols"

# The copyright of every crate, and of no other.
awk '/^name = /{ name = $3 } /^version = / && name { print name "-" $3 }' Cargo.lock | tr -d '"' | grep -v "^ploop-$version$" | LC_ALL=C sort >"$SCRATCH/crates"
sed -n 's|^Files: vendor/\(.*\)/\*$|\1|p' debian/copyright | LC_ALL=C sort | diff -u "$SCRATCH/crates" - ||
    fail "debian/copyright has other crates than Cargo.lock: packaging/copyright writes it anew"
awk '/^License: /{ sub("License: ", ""); gsub(", and | or ", "\n"); print }' debian/copyright | LC_ALL=C sort -u >"$SCRATCH/named"
awk '/^$/{ files = 0 } /^Files:/{ files = 1 } /^License: / && !files { sub("License: ", ""); print }' debian/copyright | LC_ALL=C sort |
    diff -u "$SCRATCH/named" - || fail "debian/copyright: licenses that are named, and texts"
! grep -q '^License: *@' packaging/ploop.spec || fail "packaging/ploop.spec has no license: packaging/copyright writes it"

# Each installed file is in exactly one package, and each line of a recipe has one.
libdir=/usr/lib/triple
./install.sh --list PREFIX=/usr LIBDIR=$libdir ZSHDIR=/usr/share/zsh/vendor-completions >"$SCRATCH/list" || fail "install.sh --list"
: >"$SCRATCH/used"
while IFS= read -r path; do
    owners=0
    for recipe in debian/*.install; do
        while IFS= read -r pattern; do
            # A folder that debian/rules names.
            pattern=${pattern/'${env:UNITDIR}'/usr/lib/systemd/system}
            # shellcheck disable=SC2254 # patterns
            case ${path#/} in
            $pattern | $pattern/*)
                owners=$((owners + 1))
                echo "$recipe $pattern" >>"$SCRATCH/used"
                ;;
            esac
        done <"$recipe"
    done
    [ $owners = 1 ] || fail "$path is in $owners packages of debian/"
done <"$SCRATCH/list"
grep -H . debian/*.install | sed 's/:/ /; s|${env:UNITDIR}|usr/lib/systemd/system|' | LC_ALL=C sort | diff -u - <(LC_ALL=C sort -u "$SCRATCH/used") || fail "lines of debian/*.install without a file"

sed -n '/^%files/,/^%changelog/p' packaging/ploop.spec | sed -n 's/^%{/{/p' |
    sed -e 's|{_sbindir}|/usr/sbin|; s|{_libexecdir}|/usr/libexec|; s|{_mandir}|/usr/share/man|; s|{_datadir}|/usr/share|; s|{_includedir}|/usr/include|' \
        -e "s|{_libdir}|$libdir|; s|{_unitdir}|/usr/lib/systemd/system|; s|{_tmpfilesdir}|/usr/lib/tmpfiles.d|; s|{_udevrulesdir}|/usr/lib/udev/rules.d|" \
        -e 's|site-functions|vendor-completions|; s|\([0-9]\)\*$|\1|' | while IFS= read -r path; do
    case $path in
    */) grep "^$path" "$SCRATCH/list" ;;
    *) echo "$path" ;;
    esac
done | LC_ALL=C sort | diff -u <(LC_ALL=C sort "$SCRATCH/list") - || fail "packaging/ploop.spec has other files than install.sh"
if command -v rpmspec >/dev/null; then
    rpmspec -P packaging/ploop.spec >/dev/null || fail "packaging/ploop.spec"
fi

# A page for each program, and nothing that the typesetter warns of.
sed -n 's|^/usr/sbin/||p' "$SCRATCH/list" | while IFS= read -r program; do
    grep -q "/man8/$program\.8$" "$SCRATCH/list" || fail "$program has no manual page"
done || exit 1
pages=0
for page in man/*.[38]; do
    if command -v groff >/dev/null; then
        groff -man -Tutf8 -ww -z "$page" 2>"$SCRATCH/log" && [ ! -s "$SCRATCH/log" ] || fail "groff: $(cat "$SCRATCH/log")"
    fi
    if command -v mandoc >/dev/null; then
        mandoc -T lint -W warning "$page" || fail "mandoc: $page"
    fi
    pages=$((pages + 1))
done
echo "$(wc -l <"$SCRATCH/list") files, $(wc -l <"$SCRATCH/crates") crates, $pages pages"
