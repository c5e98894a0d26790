#!/usr/bin/env python3
"""Disks that get another size, with what is inside."""
import os
import random
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402

MIB = 1 << 20


def new_disk(t, fs, name, size="400m", cluster=None):
    """A disk with one partition that has a file system of this kind; its descriptor."""
    folder = t.mkdir(name)
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    options = ["-b", str(cluster)] if cluster else []
    if fs == "ext4":
        ploop("init", "-s", size, *options, img)
        return dd
    ploop("init", "-s", size, *options, "-t", "none", img)
    dev = t.mount(dd)
    run("parted", "-s", dev, "mklabel", "gpt", "mkpart", "disk", "1MiB", "399MiB")
    devlib.wait_for("the partition", lambda: os.path.exists(dev + "p1"))
    run(f"mkfs.{fs}", "-q", dev + "p1", quiet=True)
    t.umount(dd)
    return dd


def size_inside(point):
    s = os.statvfs(point)
    return s.f_blocks * s.f_frsize


def look(t, dd, sums, at_least):
    """The content is there, the file system has its size, and the table ends where the disk does."""
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    check(size_inside(point) > at_least, f"the file system has {size_inside(point) >> 20} MiB: more than {at_least >> 20} wanted")
    devlib.compare_tree(os.path.join(point, "data"), sums)
    said = run("sfdisk", "-V", dev).text
    check("Using 1 out of" in said and "No errors detected" in said, said)
    t.umount("-m", point)


@devlib.limit(300)
def case_resize(t):
    """Each file system, in a disk of one image and on a snapshot that stays as small as it was."""
    for fs in devlib.pick(("ext4", "xfs"), ("ext4", "xfs", "btrfs")):
        dd = new_disk(t, fs, fs)
        point = t.mkdir("mnt")
        t.mount("-m", point, dd)
        sums = devlib.fill_tree(os.path.join(point, "data"), 7, 20 * MIB)
        t.umount("-m", point)
        ploop("resize", "-s", "1g", dd)
        look(t, dd, sums, 850 * MIB)
        guid = "{11111111-2222-4333-8444-555555555555}"
        ploop("snapshot", "-u", guid, dd)
        base = os.path.getsize(os.path.join(os.path.dirname(dd), "root.hdd"))
        ploop("resize", "-s", "3g", dd)
        look(t, dd, sums, 2700 * MIB)
        check(base == os.path.getsize(os.path.join(os.path.dirname(dd), "root.hdd")), "the base has changed")
        # The snapshot has the former size.
        t.mount("-r", "-u", guid, "-m", point, dd)
        check(size_inside(point) < 1100 * MIB, "the snapshot has grown")
        devlib.compare_tree(os.path.join(point, "data"), sums)
        t.umount("-m", point)
        # Once more changes nothing; smaller is refused.
        ploop("resize", "-s", "3g", dd)
        r = ploop("resize", "-s", "1g", dd, rc=38)
        check("smaller" in r.text, r.text)
        ploop("snapshot-delete", "-u", guid, dd)
        look(t, dd, sums, 2700 * MIB)
        ploop("check", dd)
        t.judges(os.path.join(os.path.dirname(dd), "root.hdd"))


@devlib.limit(900)
def case_killed(t):
    """A resize is killed at any time: the same command finishes it, and nothing is lost."""
    rounds = devlib.pick(4, 100)
    seed = int(os.environ.get("PLOOP_SEED", time.time_ns() % 100000))
    log(f"replay: PLOOP_SEED={seed}")
    rng = random.Random(seed)
    dd = new_disk(t, "ext4", "killed", "64m", 64)
    point = t.mkdir("mnt")
    t.mount("-m", point, dd)
    sums = devlib.fill_tree(os.path.join(point, "data"), seed, 20 * MIB)
    t.umount("-m", point)
    size, killed = 64, 0
    for n in range(rounds):
        # The table outgrows its clusters again and again.
        size += rng.choice((32, 64, 200))
        p = subprocess.Popen([devlib.PLOOP, "resize", "-s", f"{size}m", dd], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        try:
            p.wait(rng.uniform(0, 0.35))
        except subprocess.TimeoutExpired:
            os.kill(p.pid, signal.SIGKILL)
            killed += 1
        p.wait(60)
        # The device of the killed command stays, and the program that resizes the file system may still run.
        devlib.wait_for("the end of resize2fs", lambda: not busy(dd), 30)

        def again():
            # The device of the killed command may only just appear.
            ploop("umount", dd, rc=None, quiet=True)
            return ploop("resize", "-s", f"{size}m", dd, rc=None).rc == 0
        devlib.wait_for("a resize that succeeds", again, 20)
        if n % 5 == 4 or n == rounds - 1:
            look(t, dd, sums, (size - 40) * MIB * 8 // 10)
    check(killed > 0 or rounds < 10, "no resize was killed")
    dev = t.mount(dd)
    run("e2fsck", "-f", "-n", dev + "p1")
    t.umount(dd)
    ploop("check", dd)
    t.judges(os.path.join(os.path.dirname(dd), "root.hdd"))
    log(f"RESULT: {rounds} resizes, {killed} of them killed, to {size} MiB")


@devlib.limit(300)
def case_compact(t):
    """What was deleted inside goes back to the host; what is below the top stays as it is."""
    for fs in devlib.pick(("ext4",), ("ext4", "xfs", "btrfs")):
        dd = new_disk(t, fs, "compact-" + fs, "1g")
        folder, point = os.path.dirname(dd), t.mkdir("mnt")
        img = os.path.join(folder, "root.hdd")
        t.mount("-m", point, dd)
        sums = devlib.fill_tree(os.path.join(point, "data"), 7, 20 * MIB)
        devlib.fill_tree(os.path.join(point, "more"), 8, 200 * MIB)
        run("sync")
        # The last thing in the file.
        late = devlib.fill_tree(os.path.join(point, "late"), 9, 20 * MIB)
        run("rm", "-r", os.path.join(point, "more"))
        t.umount("-m", point)
        before = os.stat(img).st_blocks * 512
        said = ploop("compact", dd).text
        after = os.stat(img).st_blocks * 512
        check(after < before - 150 * MIB, f"the file took {before >> 20} MiB, and takes {after >> 20} now: {said}")
        t.judges(img)
        dev = t.mount("-m", point, dd)
        devlib.compare_tree(os.path.join(point, "data"), sums)
        devlib.compare_tree(os.path.join(point, "late"), late)
        ploop("compact", dd, rc=38)
        # A delta that deletes what the base has keeps its zeroes over it.
        ploop("snapshot", dd)
        base = devlib.sha(img)
        run("rm", "-r", os.path.join(point, "late"))
        devlib.fill_tree(os.path.join(point, "more"), 8, 60 * MIB)
        run("sync")
        run("rm", "-r", os.path.join(point, "more"))
        t.umount("-d", dev)
        ploop("compact", dd)
        check(devlib.sha(img) == base, "the base has changed")
        t.mount("-m", point, dd)
        devlib.compare_tree(os.path.join(point, "data"), sums)
        check(not os.path.exists(os.path.join(point, "late")), "what was deleted is back")
        source = devlib.mount_source(point)
        t.umount("-m", point)
        dev = t.mount(dd)
        if fs == "ext4":
            run("e2fsck", "-f", "-n", dev + "p1")
        check(source, "it was mounted")
        t.umount(dd)
        ploop("check", dd)
        log(f"RESULT: {fs}: {before >> 20} MiB before, {after >> 20} after")


def busy(dd):
    """A program that the killed command has started works on the disk's partition."""
    words = ploop("info", "-d", dd, rc=None, quiet=True).text.split()
    node = next((w for w in words if w.startswith("/dev/ploop")), None)
    if not node:
        return False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                line = f.read().split("\0")
        except OSError:
            continue
        if os.path.basename(line[0]) in ("e2fsck", "resize2fs") and node + "p1" in line:
            return True
    return False


if __name__ == "__main__":
    devlib.main()
