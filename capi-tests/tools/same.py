#!/usr/bin/env python3
"""same.py A B: compares two files or block devices byte for byte; prints the first difference, exit 1."""
import os
import sys

a, b = (os.open(p, os.O_RDONLY) for p in sys.argv[1:3])
sizes = [os.lseek(f, 0, os.SEEK_END) for f in (a, b)]
PIECE = 1 << 20
off = 0
while off < min(sizes):
    x, y = os.pread(a, PIECE, off), os.pread(b, PIECE, off)
    n = min(len(x), len(y))
    if not n:
        sys.exit(f"nothing read at {off}")
    if x[:n] != y[:n]:
        wrong = [i for i in range(n) if x[i] != y[i]]
        at = off + wrong[0]
        sys.exit(f"differs at byte {at} (sector {at // 512}, 1 MiB piece {at >> 20}): {x[wrong[0]:wrong[0] + 16].hex()} "
                 f"and {y[wrong[0]:wrong[0] + 16].hex()}; {len(wrong)} bytes of this piece, up to {off + wrong[-1]}")
    off += n
if sizes[0] != sizes[1]:
    sys.exit(f"sizes {sizes[0]} and {sizes[1]}")
