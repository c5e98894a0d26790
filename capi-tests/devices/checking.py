#!/usr/bin/env python3
"""Checks and conversions of disks that run, and of what they leave."""
import os
import random
import struct
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, ploop  # noqa: E402

MIB = 1 << 20


class Writer:
    """Writes to random clusters of a device until it is stopped."""

    def __init__(self, dev, clusters):
        self.end, self.failed, self.writes = threading.Event(), None, 0
        self.thread = threading.Thread(target=self.run, args=(dev, clusters))
        self.thread.start()

    def run(self, dev, clusters):
        rng = random.Random(7)
        try:
            fd = os.open(dev, os.O_RDWR)
            try:
                while not self.end.is_set():
                    os.pwrite(fd, rng.randbytes(8192), rng.randrange(clusters) * MIB + rng.randrange(8) * 4096)
                    self.writes += 1
                    if self.writes % 16 == 0:
                        os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            self.failed = e

    def stop(self):
        self.end.set()
        self.thread.join(60)
        check(self.failed is None and self.writes > 0, f"{self.writes} writes, {self.failed}")


def case_live(t):
    """A disk is checked while it is written to: nothing is found, nothing changed; damage in its files is found."""
    dev, dd = t.bare("64m")
    image = os.path.join(os.path.dirname(dd), "root.hdd")
    writer = Writer(dev, 60)
    try:
        for n in range(devlib.pick(6, 60)):
            out = ploop("check", "-r", dd, limit=60)
            check("looked at as it runs" in out.out, out.out)
            if n % 3 == 1:
                ploop("snapshot", dd, limit=60)
        ploop("check", dd, rc=37, limit=60)
    finally:
        writer.stop()
    # The last cluster of the disk is never used: the worker does not look at its entry in the base.
    with open(image, "r+b") as f:
        f.seek(64 + 4 * 63)
        f.write(struct.pack("<I", 77777))
    out = ploop("check", "-r", dd, rc=11, limit=60)
    check("BAT entry of cluster 63" in out.err, out.err)
    with open(image, "r+b") as f:
        f.seek(64 + 4 * 63)
        f.write(struct.pack("<I", 0))
    ploop("check", "-r", dd, limit=60)
    t.umount(dd)
    ploop("check", "-r", dd, limit=60)
    ploop("check", dd, limit=60)


def case_convert(t):
    """A disk that runs is not converted; afterwards it is, to each format, and shows the same."""
    dev, dd = t.bare("64m")
    data = random.Random(3).randbytes(3 * MIB)

    def read(dev):
        with open(dev, "rb", buffering=0) as f:
            return os.pread(f.fileno(), len(data), 5 * MIB)

    with open(dev, "r+b", buffering=0) as f:
        os.pwrite(f.fileno(), data, 5 * MIB)
        os.fsync(f.fileno())
    for args in (("-f", "raw"), ("-f", "preallocated"), ("-f", "expanded"), ("-v", "1")):
        out = ploop("convert", *args, dd, rc=38, limit=60)
        check(dev in out.err, out.err)
    t.umount(dd)
    for args in (("-v", "1"), ("-f", "preallocated"), ("-v", "2"), ("-f", "expanded"), ("-f", "raw")):
        ploop("convert", *args, dd, limit=100)
        dev = t.mount(dd)
        check(read(dev) == data, f"convert {' '.join(args)}: the disk shows other data")
        t.umount(dd)
        ploop("check", dd, limit=60)


def case_restore(t):
    """The descriptor of a disk that runs is lost, or damaged: it is made from the device, and the disk goes on under it."""
    dev, dd = t.bare("64m")
    folder = os.path.dirname(dd)
    for n in range(2):
        ploop("snapshot", dd, limit=60)
    images = sorted(n for n in os.listdir(folder) if n.startswith("root.hdd"))
    check(len(images) == 3, images)
    os.unlink(dd)
    out = ploop("restore-descriptor", folder, limit=60)
    check(f"{dev} runs the disk" in out.out, out.out)
    with open(dd, encoding="utf-8") as f:
        text = f.read()
    check(all(f"<File>{name}</File>" in text for name in images), text)
    check(dev in ploop("info", "-d", dd, limit=60).out, "the device is not found by its new descriptor")
    with open(dd, "w", encoding="utf-8") as f:
        f.write(text[:200])
    ploop("restore-descriptor", folder, limit=60)
    check(os.path.getsize(dd + ".damaged") == 200, "the damaged one is not kept")
    ploop("snapshot", dd, limit=60)
    t.umount(dd)
    ploop("check", dd, limit=60)
    ploop("snapshot-merge", "-A", dd, limit=60)


if __name__ == "__main__":
    devlib.main()
