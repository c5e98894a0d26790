#!/usr/bin/env python3
"""compare.py DEBIAN OURS [DIFFERENCES]: what same.c has said on two libraries. The lines must be the same but for those of
DIFFERENCES: "part: Debian's line", TAB, "part: our line" (nothing: there is none), TAB, the reason; such a difference must be
there. Random GUIDs count as equal."""
import difflib
import re
import sys

GIVEN = ("11111111-2222-", "22222222-2222-", "33333333-2222-", "99999999-2222-", "5fbaabe3-6958-", "00000000-0000-")


def lines(path):
    text = open(path, errors="surrogateescape").read()
    return re.sub(r"\{([0-9a-f]{8}-[0-9a-f-]{27})\}",
                  lambda m: m.group(0) if m.group(1).startswith(GIVEN) else "{random}", text).splitlines()


def differences(a, b):
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            left, right = a[a0:a1], b[b0:b1]
            for i in range(max(len(left), len(right))):
                yield left[i] if i < len(left) else "", right[i] if i < len(right) else ""


def main():
    a, b = lines(sys.argv[1]), lines(sys.argv[2])
    allowed = {}
    for line in open(sys.argv[3]) if len(sys.argv) > 3 else ():
        if line.strip() and not line.startswith("#"):
            left, right, reason = line.rstrip("\n").split("\t")
            allowed[left, right] = reason
    found = list(differences(a, b))
    bad = [d for d in found if d not in allowed]
    gone = [d for d in allowed if d not in found]
    for left, right in bad:
        print(f"Debian's: {left}\n    ours: {right}")
    for left, right in gone:
        print(f"listed as different, and is not: {left} / {right}")
    if bad or gone:
        sys.exit(1)
    print(f"{len(b)} lines, {len(found)} deliberate differences")


main()
