#!/usr/bin/env python3
"""`ploop send` and `ploop receive`: disks with snapshots, mounted and under load or stopped; broken connections; kills of any process."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from copies_live import Load, writable  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402

MIB = 1 << 20
SIZE, FILL, ROUNDS, KILLS = devlib.pick(("96m", 6 * MIB, 2, 4), ("1g", 150 * MIB, 8, 30))


def sums(folder):
    """Of all files, by their paths."""
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(p, folder): devlib.sha(p) for p in sorted(paths)}


class Disk:
    """A mounted disk with two snapshots, and what was in it at each."""

    def __init__(self, t, name="disk"):
        self.folder = t.mkdir(name)
        self.dd, self.image = os.path.join(self.folder, "DiskDescriptor.xml"), os.path.join(self.folder, "root.hdd")
        ploop("init", "-s", SIZE, self.image, limit=120)
        self.mnt = t.mkdir(name + ".mnt")
        self.dev = t.mount("-m", self.mnt, self.dd)
        self.was = {}
        for n in range(2):
            devlib.fill_tree(self.mnt, n, FILL, sizes=(70000, 1500000))
            run("sync", "-f", self.mnt)
            before = sums(self.mnt)
            guid = re.search(r"(\{[-0-9a-f]{36}\})[^{}]* is created", ploop("snapshot", self.dd).out).group(1)
            self.was[guid] = before


def arrived(t, disk, target, want, snapshots=True):
    """The copy is a disk of its own: closed images, the same snapshots, and a file system that is whole."""
    dd = os.path.join(target, "DiskDescriptor.xml")
    rows = [ploop("snapshot-list", "-H", "-o", "uuid,parent_uuid", d, quiet=True).out for d in (disk.dd, dd)]
    check(rows[0] == rows[1], f"other snapshots: {rows}")
    for name in os.listdir(target):
        if name != "DiskDescriptor.xml" and not name.endswith(".lck"):
            t.judges(os.path.join(target, name))
    mnt = t.mkdir("copy.mnt")
    for guid, files in [*(disk.was.items() if snapshots else ()), (None, want)]:
        words = ["-r", "-u", guid, "-c", "look"] if guid else []
        t.mount("-m", mnt, *words, dd)
        got = sums(mnt)
        check(got == files, f"{guid}: other files: {[n for n in files if got.get(n) != files[n]][:5]}")
        t.umount("-m", mnt)
    dev = t.mount(dd)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    shutil.rmtree(target)


def pipe(sender, receiver, most=None):
    """Both at work, with what goes from one to the other: all, or the first bytes."""
    a = subprocess.Popen([devlib.PLOOP, *sender], stdout=subprocess.PIPE)
    b = subprocess.Popen([devlib.PLOOP, *receiver], stdin=subprocess.PIPE if most else a.stdout, stdout=subprocess.DEVNULL)
    if most:
        while most > 0 and (piece := a.stdout.read(min(most, 1 << 16))):
            b.stdin.write(piece)
            most -= len(piece)
        b.stdin.close()
    a.stdout.close()
    return a, b


@devlib.limit(devlib.pick(120, 1800))
def case_under_load(t):
    """A running disk arrives as it was frozen, with its snapshots, also those that are taken meanwhile."""
    disk = Disk(t)
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    for i in range(ROUNDS):
        load, target = Load(t, disk.mnt, seed * 100 + i), t.path(f"target{i}")
        time.sleep(0.2)
        if i % 2:
            said = ploop("copy", "--chain", "-s", disk.dd, "-d", target, "-F", load.command, limit=300)
            log(re.search(r".* bytes sent.*", said.out).group(0))
        else:
            words = [["-z"], []][i // 2 % 2]
            a, b = pipe(["send", *words, "-F", load.command, disk.dd], ["receive", target])
            check((a.wait(300), b.wait(300)) == (0, 0), f"{a.returncode} {b.returncode}")
        load.end()
        writable(disk.mnt)
        arrived(t, disk, target, sums(disk.mnt))
    t.umount("-m", disk.mnt)
    log("the same disk when it does not run")
    t.mount("-m", disk.mnt, disk.dd)
    want = sums(disk.mnt)
    t.umount("-m", disk.mnt)
    target = t.path("stopped")
    a, b = pipe(["send", disk.dd], ["receive", target])
    check((a.wait(300), b.wait(300)) == (0, 0), f"{a.returncode} {b.returncode}")
    arrived(t, disk, target, want)


@devlib.limit(devlib.pick(90, 600))
def case_resume(t):
    """A connection that breaks costs what had not come: the rest is sent when the sender knows what is there."""
    disk = Disk(t)
    target = t.path("target")
    half, kept = target + ".receiving", t.path("kept")
    size = len(subprocess.run([devlib.PLOOP, "send", disk.dd], stdout=subprocess.PIPE, check=True).stdout)
    for part in (0.5, 0.9):
        a, b = pipe(["send", disk.dd], ["receive", target], int(size * part))
        check(a.wait(100) == 7 and b.wait(100) == 6, f"{a.returncode} {b.returncode}, a broken connection")
        check(os.path.isdir(half) and not os.path.exists(target), "what has come is not kept")
        writable(disk.mnt)
    with open(os.path.join(disk.mnt, "later"), "wb") as f:
        f.write(random.Random(3).randbytes(300000))
    with open(kept, "wb") as f:
        subprocess.run([devlib.PLOOP, "receive", "--kept", target], stdout=f, check=True)
    a = subprocess.Popen([devlib.PLOOP, "send", "--kept", kept, disk.dd], stdout=subprocess.PIPE)
    stream = a.stdout.read()
    check(a.wait(100) == 0, f"{a.returncode}")
    log(f"{len(stream) >> 10} KiB instead of {size >> 10}")
    check(len(stream) < size * 0.7, f"{len(stream)} bytes of {size} went again")
    said = subprocess.run([devlib.PLOOP, "receive", target], input=stream, stdout=subprocess.PIPE, check=True)
    check(int(re.search(rb"(\d+) of them from an earlier", said.stdout).group(1)) > size * 0.3, said.stdout)
    check(not os.path.exists(half), "the half is still there")
    arrived(t, disk, target, sums(disk.mnt), snapshots=False)
    os.makedirs(target)
    a, b = pipe(["send", disk.dd], ["receive", target])
    check(b.wait(100) == 1 and a.wait(100) == 7, f"{a.returncode} {b.returncode}, a folder that exists")
    t.umount("-m", disk.mnt)


@devlib.limit(devlib.pick(120, 1200))
def case_killed(t):
    """Sender, receiver, worker or supervisor killed at any moment: the source is whole and not frozen, the target whole or absent."""
    disk = Disk(t)
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    target, name = t.path("target"), os.path.basename(disk.dev)
    load = Load(t, disk.mnt, seed)
    began = time.time()
    a, b = pipe(["send", disk.dd], ["receive", target])
    check((a.wait(100), b.wait(100)) == (0, 0), f"{a.returncode} {b.returncode}")
    whole = time.time() - began
    shutil.rmtree(target)
    ended = {}
    for i in range(KILLS):
        who = ["sender", "receiver", "worker", "supervisor"][i % 4]
        a, b = pipe(["send", "-F", "sleep 0.1", disk.dd], ["receive", target])
        time.sleep((whole + 0.1) * rng.random())
        if who == "sender":
            a.kill()
        elif who == "receiver":
            b.kill()
        else:
            devlib.kill(devlib.record(name)[who]["pid"])
        codes = a.wait(100), b.wait(100)
        ended.setdefault(who, []).append(codes)
        writable(disk.mnt)
        if os.path.exists(target):
            check(codes[1] in (0, -9), f"{who} killed: {codes}, and a disk is there")
            t.judges(os.path.join(target, "root.hdd"))
            shutil.rmtree(target)
        else:
            check(codes[1] != 0, f"{who} killed: {codes}, and no disk is there")
        devlib.running_worker(name)
    log(f"sender and receiver ended with {ended}")
    a, b = pipe(["send", "-F", load.command, disk.dd], ["receive", target])
    check((a.wait(100), b.wait(100)) == (0, 0), f"{a.returncode} {b.returncode}")
    load.end()
    arrived(t, disk, target, sums(disk.mnt), snapshots=False)
    ploop("snapshot", disk.dd)
    t.umount("-m", disk.mnt)
    check(sorted(n for n in os.listdir(t.dir) if n.startswith("target")) == [], "left behind")


if __name__ == "__main__":
    devlib.main()
