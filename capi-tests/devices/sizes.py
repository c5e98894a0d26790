#!/usr/bin/env python3
"""Disks that get another size, with what is inside."""
import os
import random
import signal
import subprocess
import sys
import threading
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
        # Once more changes nothing.
        ploop("resize", "-s", "3g", dd)
        if fs == "xfs":
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


# Prints how long the longest read of 4 KiB has taken, in milliseconds.
READER = """
import mmap, os, random, sys, time
fd, buf, longest = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096), 0
print("begun", flush=True)
while os.getppid() == int(sys.argv[2]) and not os.path.exists(sys.argv[3]):
    begin = time.monotonic()
    os.preadv(fd, [buf], random.randrange(1 << 17) * 4096)
    longest = max(longest, time.monotonic() - begin)
print(round(longest * 1000, 1))
"""


class Writer(threading.Thread):
    """Writes blocks of a file with direct I/O, and reads others back, until it is stopped."""
    SLOTS, BLOCK = 256, 65536

    def __init__(self, path, seed):
        super().__init__(daemon=True)
        with open(path, "wb") as f:
            f.truncate(self.SLOTS * self.BLOCK)
        self.file, self.rng, self.held = devlib.Direct(path), random.Random(seed), {}
        self.ends, self.error, self.done = threading.Event(), None, 0

    def verify(self, slot):
        value = self.held[slot]
        check(self.file.read(slot * self.BLOCK, self.BLOCK) == value * (self.BLOCK // 8), f"block {slot} holds something else")

    def run(self):
        try:
            while not self.ends.is_set():
                slot, value = self.rng.randrange(self.SLOTS), self.rng.randbytes(8)
                self.file.write(slot * self.BLOCK, value * (self.BLOCK // 8))
                self.held[slot] = value
                self.verify(self.rng.choice(list(self.held)))
                self.done += 1
        except Exception as e:
            self.error = e

    def stop(self):
        self.ends.set()
        self.join(60)
        check(self.error is None, f"the writer: {self.error}")
        for slot in self.held:
            self.verify(slot)
        self.file.close()


def longest_read(t, dev, act):
    """How long, in milliseconds, the longest read of the device took while something was done."""
    flag = t.path("end")
    p = subprocess.Popen([sys.executable, "-c", READER, dev, str(os.getpid()), flag], stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    try:
        act()
    finally:
        open(flag, "w").close()
        said = p.communicate(timeout=60)[0]
        os.remove(flag)
    return float(said)


@devlib.limit(900)
def case_grow_running(t):
    """A mounted disk of small clusters, whose table outgrows its place, gets larger under a verifying writer; a worker is killed."""
    seed = int(os.environ.get("PLOOP_SEED", time.time_ns() % 100000))
    log(f"replay: PLOOP_SEED={seed}")
    rng = random.Random(seed)
    dd = new_disk(t, "ext4", "running", "1g", 64)
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    sums = devlib.fill_tree(os.path.join(point, "data"), seed, 20 * MIB)
    writer = Writer(os.path.join(point, "writer"), seed)
    writer.start()
    stops = {}
    for gib in [4, 40] + devlib.pick([], sorted(rng.sample(range(41, 400), 20))):
        by = ["-d", dev] if rng.random() < 0.5 else [dd]
        grow = [devlib.PLOOP, "grow", "-s", f"{gib}g", *by]
        if gib != 40:
            p = subprocess.Popen(grow)
            time.sleep(rng.uniform(0, 0.1))
            devlib.kill(devlib.record(os.path.basename(dev))["worker"]["pid"])
            p.wait(120)
            check(p.returncode == 0, f"a grow whose worker was killed ended with {p.returncode}")
            devlib.running_worker(os.path.basename(dev))
        stops[gib] = longest_read(t, dev, lambda: run(*grow))
        check(devlib.device_size(dev) == gib << 30, f"the device has {devlib.device_size(dev)} bytes, {gib} GiB wanted")
    check(writer.done > 10, f"the writer has written {writer.done} blocks")
    writer.stop()
    r = ploop("grow", "-s", "1g", dd, rc=38)
    check("smaller" in r.text, r.text)
    devlib.compare_tree(os.path.join(point, "data"), sums)
    with open(dd) as f:
        check(f"<Disk_size>{gib << 21}</Disk_size>" in f.read(), "the descriptor has another size")
    t.umount("-m", point)
    ploop("check", dd)
    t.judges(os.path.join(os.path.dirname(dd), "root.hdd"))
    # Partition and file system follow.
    ploop("resize", "-s", f"{gib}g", dd)
    look(t, dd, sums, (gib << 30) * 9 // 10)
    dev = t.mount(dd)
    run("e2fsck", "-f", "-n", dev + "p1")
    t.umount(dd)
    log(f"RESULT: the longest read of 4 KiB in a grow from 4 to 40 GiB took {stops[40]} ms")


@devlib.limit(300)
def case_resize_running(t):
    """A mounted disk gets larger with what is on it, also where another mount namespace alone has it mounted."""
    for fs in devlib.pick(("xfs", "ext4"), ("xfs", "ext4", "btrfs")):
        dd = new_disk(t, fs, "running-" + fs)
        point = t.mkdir("mnt")
        dev = t.mount("-m", point, dd)
        sums = devlib.fill_tree(os.path.join(point, "data"), 7, 20 * MIB)
        r = ploop("resize", "-s", "1g", dd, rc=None)
        if fs == "ext4" and "CAP_SYS_RESOURCE" in r.text:
            log("this machine lets no process enlarge a mounted ext4")
            check(r.rc != 0 and devlib.device_size(dev) == 1 << 30, r.text)
        else:
            check(r.rc == 0, r.text)
            check(size_inside(point) > 850 * MIB, f"{fs} has {size_inside(point) >> 20} MiB")
            hidden = ["unshare", "-m", "sh", "-c", f"umount -l {point} && exec {devlib.PLOOP} resize -s 2g {dd}"]
            run(*hidden)
            check(size_inside(point) > 1800 * MIB, f"{fs} has {size_inside(point) >> 20} MiB")
        said = run("sfdisk", "-V", dev).text
        check("No errors detected" in said, said)
        devlib.compare_tree(os.path.join(point, "data"), sums)
        t.umount("-m", point)
        ploop("resize", "-s", "2g", dd)
        look(t, dd, sums, 1800 * MIB)
        ploop("check", dd)


@devlib.limit(300)
def case_shrink(t):
    """The file system of a disk gets smaller, and with it the image file; a resize that is killed is finished by another."""
    for kind in ("expanded", "raw"):
        folder, point = t.mkdir("shrink-" + kind), t.mkdir("mnt")
        img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
        ploop("init", "-s", "400m", "-f", kind, img)
        t.mount("-m", point, dd)
        devlib.fill_tree(os.path.join(point, "more"), 8, 60 * MIB)
        run("sync")
        sums = devlib.fill_tree(os.path.join(point, "data"), 7, 20 * MIB)
        run("rm", "-r", os.path.join(point, "more"))
        t.umount("-m", point)
        least = int(ploop("resize", "--minimum", dd).out.split()[-1])
        check(20 * MIB < least * 512 < 300 * MIB, f"the least size is {least} sectors")
        r = ploop("resize", "-s", str(least // 2), dd, rc=38)
        check(str(least) in r.text, r.text)
        wanted = (least * 512 // MIB + 16) * MIB
        before = os.stat(img).st_blocks * 512
        p = subprocess.Popen([devlib.PLOOP, "resize", "-s", str(wanted // 512), dd], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.15)
        p.kill()
        p.wait(60)
        devlib.wait_for("the end of resize2fs", lambda: not busy(dd), 30)

        def again():
            ploop("umount", dd, rc=None, quiet=True)
            return ploop("resize", "-s", str(wanted // 512), dd, rc=None).rc == 0
        devlib.wait_for("a resize that succeeds", again, 30)
        after = os.stat(img).st_blocks * 512
        check(after < before - 20 * MIB and os.path.getsize(img) <= wanted, f"the file took {before >> 20} MiB, and takes {after >> 20}")
        dev = t.mount("-m", point, dd)
        check(size_inside(point) < wanted, f"the file system has {size_inside(point) >> 20} MiB")
        check(devlib.device_size(dev) == (wanted if kind == "raw" else 400 * MIB), f"the device has {devlib.device_size(dev)} bytes")
        devlib.compare_tree(os.path.join(point, "data"), sums)
        said = run("sfdisk", "-V", dev).text
        check("No errors detected" in said, said)
        t.umount("-m", point)
        dev = t.mount(dd)
        run("e2fsck", "-f", "-n", dev + "p1")
        t.umount(dd)
        ploop("check", dd)
        ploop("resize", "-s", "500m", dd)
        look(t, dd, sums, 340 * MIB)
        log(f"RESULT: {kind}: {before >> 20} MiB before, {after >> 20} after")


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


def pattern(seed, size=64 << 10):
    return random.Random(seed).randbytes(size)


def put(dev, at, seed):
    fd = os.open(dev, os.O_WRONLY)
    try:
        os.pwrite(fd, pattern(seed), at)
        os.fsync(fd)
    finally:
        os.close(fd)


def has(dev, at, seed):
    fd = os.open(dev, os.O_RDONLY)
    try:
        check(os.pread(fd, 64 << 10, at) == pattern(seed), f"other content at {at} of {dev}, written was {seed}")
    finally:
        os.close(fd)


@devlib.limit(300)
def case_edges(t):
    """The smallest and the largest clusters, and 16 TiB: written at both ends through snapshot, merge, grow and compact."""
    for cluster, size in ((64, 64 << 30), (131072, 16 << 40), (2048, 16 << 40)):
        folder = t.mkdir(f"c{cluster}")
        img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
        first = size - (1 << 30)
        ploop("init", "-s", str(first >> 9), "-t", "none", "-b", str(cluster), img)
        dev = t.mount(dd)
        places = [0, first // 2, first - (64 << 10)]
        for n, at in enumerate(places):
            put(dev, at, n)
        ploop("snapshot", dd)
        put(dev, first // 2, 3)
        ploop("grow", "-s", str(size >> 9), dd)
        check(devlib.device_size(dev) == size, f"{dev} has {devlib.device_size(dev)} bytes, {size} wanted")
        put(dev, size - (64 << 10), 4)
        contents = list(zip(places + [size - (64 << 10)], (0, 3, 2, 4)))
        for at, seed in contents:
            has(dev, at, seed)
        ploop("snapshot-merge", dd)
        run("blkdiscard", "-f", "-o", "0", "-l", str(max(cluster << 9, 64 << 10)), dev)
        ploop("compact", dd)
        t.umount(dd)
        ploop("check", dd)
        # Nothing is as large as the disk: its table, and a cluster for each piece.
        blocks = os.stat(img).st_blocks << 9
        most = size // (cluster << 9) * 4 + 8 * max(cluster << 9, MIB)
        check(blocks <= most, f"clusters of {cluster} sectors: the image takes {blocks} bytes, at most {most} wanted")
        dev = t.mount("-r", dd)
        for at, seed in contents[1:]:
            has(dev, at, seed)
        t.umount(dd)
        # The limit of the format.
        if cluster == 2048:
            r = ploop("grow", "-s", str((0xffffffff << 9) // 512 * 512), dd, rc=None)
            check(r.rc in (11, 38), f"a size that no program can name: {r.rc}: {r.text}")


@devlib.limit(120)
def case_large_sectors(t):
    """A host whose disk has sectors of 4 KiB: each operation on an image there."""
    host, point = os.path.join(t.dir, "host"), t.mkdir("host-m")
    with open(host, "wb") as f:
        f.truncate(1 << 30)
    loop = run("losetup", "-f", "--show", "--sector-size", "4096", "--direct-io=on", host, rc=None)
    if loop.rc:
        loop = run("losetup", "-f", "--show", "--sector-size", "4096", host)
    loop = loop.out.strip()
    t.later(run, "losetup", "-d", loop)
    run("mkfs.xfs", "-q", "-s", "size=4096", loop, quiet=True)
    run("mount", loop, point)
    t.later(run, "umount", point)
    img, dd = os.path.join(point, "root.hdd"), os.path.join(point, "DiskDescriptor.xml")
    ploop("init", "-s", "300m", "-b", "64", img)
    m = t.mkdir("m")
    dev = t.mount("-m", m, dd)
    sums = devlib.fill_tree(os.path.join(m, "data"), 11, 20 * MIB)
    ploop("snapshot", dd)
    more = devlib.fill_tree(os.path.join(m, "more"), 12, 10 * MIB)
    ploop("resize", "-s", "400m", dd, rc=None)
    # One sector of 512 bytes, past every cache: what the device offers.
    fd = os.open(dev, os.O_RDONLY | os.O_DIRECT)
    os.close(fd)
    ploop("snapshot-merge", dd)
    run("rm", "-r", os.path.join(m, "more"))
    ploop("compact", dd)
    devlib.compare_tree(os.path.join(m, "data"), sums)
    t.umount("-m", m)
    ploop("resize", "-s", "350m", dd)
    ploop("convert", "-v", "1", dd)
    ploop("convert", "-f", "preallocated", dd)
    ploop("check", dd)
    t.judges(img)
    t.mount("-m", m, dd)
    devlib.compare_tree(os.path.join(m, "data"), sums)
    t.umount("-m", m)
    check(more, "nothing was written")


if __name__ == "__main__":
    devlib.main()
