#!/usr/bin/env python3
"""Running devices changed by levels, without a descriptor: the command forms of the OpenVZ wiki page."""
import os
import random
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import DEVICE, OPEN, PARAM, check, log, ploop, run  # noqa: E402

SYSFS = 9
MIB = 1 << 20
NOBODY = "/dev/ploop-nobody"


class Stack:
    """A bare image on a device, deltas put on top of it, and what the device must contain."""

    def __init__(self, t, name, clusters=48, version=2, mkfs=False):
        self.t, self.rng = t, random.Random(name)
        self.files = [t.path(name + ".image")]
        self.bytes = clusters * MIB
        ploopimg.write_image(self.files[0], version, 2048, clusters * 2048, ploopimg.random_content(2048, clusters * 2048, 0.3, 1))
        chain = ploopimg.Chain(self.files[0])
        self.model = devlib.Model(t.path(name + ".model"), self.bytes, chain)
        chain.close()
        self.dev = t.mount(self.files[0])

    def scribble(self, count=30):
        devlib.scribble(self.dev, self.model, self.rng.random(), count)

    def put(self, *options):
        path = self.t.path(f"{os.path.basename(self.files[0])}.delta{self.rng.randrange(10 ** 9)}")
        ploop("snapshot", *options, "-d", self.dev, path)
        self.files.append(path)
        self.scribble()

    def levels(self):
        return [l["path"] for l in devlib.record(self.dev)["levels"]]

    def compare(self):
        devlib.flush_buffers(self.dev)
        self.model.compare(self.dev)
        check(self.levels() == self.files, f"{self.dev} runs {self.levels()}, wanted {self.files}")

    def merge(self, low, high, *options):
        """The files of the levels above `low` stay."""
        sums = {p: os.path.getsize(p) for p in self.files[low + 1:high + 1]}
        ploop("merge", "-d", self.dev, *options, limit=120)
        check(all(os.path.exists(p) for p in sums), "merged files are the user's to delete")
        del self.files[low + 1:high + 1]
        self.compare()
        self.scribble()

    def end(self):
        """Unmounted, the files say the same."""
        self.t.umount("-d", self.dev)
        chain = ploopimg.Chain(self.files)
        at = chain.compare(self.model.path)
        chain.close()
        check(at is None, f"the files differ from what was written at byte {at}")
        for p in self.files:
            bad = ploopimg.validate(p)
            check(not bad, f"{p}: {bad[:4]}")


@devlib.limit(240)
def case_forms(t):
    """snapshot -d, and merge -d by each kind of range."""
    for n, steps in enumerate(([(0, 2, "-l", "0..2")], [(0, 1, "-l", "0..1"), (0, 1, "-l", "0")], [(1, 2, "-l", "1..2"), (0, 1)],
                               [(0, 2)], [(1, 2, "-l", "1"), (0, 1, "-l", "0..1")])):
        s = Stack(t, f"forms{n}", version=1 + n % 2)
        s.scribble()
        s.put()
        s.put(*(["-F"] if n % 2 else []))
        s.compare()
        for low, high, *options in steps:
            s.merge(low, high, *options)
        s.put()
        s.compare()
        s.end()
        log(f"forms {n}: {steps}")


def case_replace(t):
    """An image below the top swapped for a copy; the top and other images are refused."""
    s = Stack(t, "replace")
    s.scribble()
    s.put()
    copy = t.path("copy")
    run("cp", "--sparse=never", s.files[0], copy)
    ploop("replace", "-d", s.dev, "-l", "1", "-i", copy, rc=PARAM)
    ploop("replace", "-d", s.dev, "-o", s.files[1], "-i", copy, rc=PARAM)
    ploop("replace", "-d", s.dev, "-l", "0", "-i", s.files[1], rc=PARAM)
    other = t.path("other")
    shutil.copy(copy, other)
    h = ploopimg.Image(other).header
    with open(other, "r+b") as f:
        f.seek(h.first * 512 + 4096)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))
    ploop("replace", "-d", s.dev, "-l", "0", "-i", other, rc=11)
    s.compare()
    ploop("replace", "-d", s.dev, "-o", s.files[0], "-i", copy)
    os.unlink(s.files[0])
    s.files[0] = copy
    s.scribble()
    s.compare()
    s.end()


def case_mistakes(t):
    """Devices, levels and files that are not there."""
    s = Stack(t, "mistakes")
    img = s.files[0]
    new = t.path("new")
    rows = [
        (SYSFS, ["snapshot", "-d", NOBODY, new]), (PARAM, ["snapshot", "-d", s.dev]), (PARAM, ["snapshot", "-d", s.dev, img]),
        (SYSFS, ["merge", "-d", NOBODY]), (PARAM, ["merge", "-d", s.dev]), (PARAM, ["merge", "-d", s.dev, "-l", "1..0"]),
        (PARAM, ["merge", "-d", s.dev, "-l", "x"]), (PARAM, ["merge", "-d", s.dev, "-f", "raw"]),
        (PARAM, ["merge", "-d", s.dev, img]), (OPEN, ["replace", "-d", NOBODY, "-l", "0", "-i", "/missing"]),
        (DEVICE, ["replace", "-d", NOBODY, "-l", "0", "-i", img]), (SYSFS, ["replace", "-d", NOBODY, "-o", img, "-i", img]),
        (PARAM, ["replace", "-d", s.dev, "-o", "/etc/hostname", "-i", img]), (PARAM, ["replace", "-m", t.dir, "-l", "0", "-i", img]),
        (PARAM, ["replace", "-d", s.dev, "-i", img]),
    ]
    for rc, words in rows:
        ploop(*words, rc=rc)
        check(not os.path.exists(new), f"{words} left {new}")
    s.put()
    for rc, words in ((SYSFS, ["merge", "-d", s.dev, "-l", "0..2"]), (SYSFS, ["merge", "-d", s.dev, "-l", "1"]),
                      (PARAM, ["merge", "-d", s.dev, "-n", new])):
        ploop(*words, rc=rc)
    s.compare()
    s.end()


def case_descriptor_is_not_told(t):
    """By device on a disk that has a descriptor: done, with a warning that names it."""
    folder = t.mkdir("disk")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "64m", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    top = os.path.join(folder, "by-device")
    r = ploop("snapshot", "-d", dev, top)
    check(dd in r.err, f"no warning that names the descriptor: {r.err}")
    # Such a device is not what the descriptor says: operations by descriptor keep off.
    ploop("snapshot", dd, rc=PARAM)
    r = ploop("merge", "-d", dev)
    os.unlink(top)
    t.umount("-d", dev)
    ploop("check", dd)


if __name__ == "__main__":
    devlib.main()
