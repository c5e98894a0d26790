#!/usr/bin/env bash
# What reads strangers' images, descriptors and messages, under valgrind: the fuzzers' corpora and what they make of them.
. "$(dirname "$0")/../lib.sh"

command -v valgrind >/dev/null || {
    [ "${PLOOP_TEST:-}" != full ] || fail "valgrind is missing; capi-tests/run --install --full installs it"
    echo "valgrind is not installed: nothing was done"
    exit 0
}
cd "$ROOT" || exit 1
fuzz=$(cargo test --locked --no-run --test fuzz --message-format=json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/fuzz-[^"]*\)".*/\1/p' | tail -n 1)
[ -x "$fuzz" ] || fail "the fuzzers cannot be built"
seconds=5
[ "${PLOOP_TEST:-}" != full ] || seconds=120
PLOOP_FUZZ_WATCHED=1 PLOOP_FUZZ_SECONDS=$seconds valgrind -q --leak-check=full --show-leak-kinds=definite \
    --errors-for-leak-kinds=definite --error-exitcode=9 "$fuzz" --test-threads=1 --nocapture || fail "the fuzzers under valgrind"
