#!/usr/bin/env python3
"""One mounted disk gets one size after the other, by the file system and by the balloon, while a program writes to it and
verifies what it reads. Where no process may enlarge a mounted ext4 it is unmounted for that (capi-tests/run oldkernel has a
kernel with that right)."""
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402
from sizes import MIB, Writer, size_inside  # noqa: E402

GIB = 1 << 30
# CAP_SYS_RESOURCE, which the kernel wants for that.
RESOURCE = 24


def may_enlarge_mounted():
    with open("/proc/self/status") as f:
        rights = next(line for line in f if line.startswith("CapEff:"))
    return bool(int(rights.split()[1], 16) >> RESOURCE & 1)


class Disk:
    def __init__(self, t, rng, size):
        self.t, self.rng, self.size = t, rng, size
        folder = t.mkdir("disk")
        self.img, self.dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
        self.point = t.mkdir("mnt")
        self.online = may_enlarge_mounted()
        ploop("init", "-s", str(size // 512), "-b", "64", self.img)
        self.mount()
        self.sums = devlib.fill_tree(os.path.join(self.point, "data"), rng.randrange(1 << 30), 20 * MIB)
        self.writer = None
        self.write()

    def mount(self):
        self.dev = self.t.mount("-m", self.point, self.dd)

    def write(self):
        self.writer = Writer(os.path.join(self.point, "writer"), self.rng.random())
        self.writer.start()

    def verify(self):
        self.writer.stop()
        check(self.writer.done > 0, "nothing was written")
        devlib.compare_tree(os.path.join(self.point, "data"), self.sums)

    def enlarge(self, size):
        """To more than the device has."""
        if not self.online:
            self.verify()
            self.t.umount(self.dd)
        ploop("resize", "-s", str(size // 512), self.dd)
        if not self.online:
            self.mount()
            self.write()
        self.size = size
        check(devlib.device_size(self.dev) == size, f"the device has {devlib.device_size(self.dev)} bytes, {size} wanted")
        check(size_inside(self.point) > size * 8 // 10, f"the file system has {size_inside(self.point)} bytes of {size}")

    def balloon(self):
        words = ploop("balloon", "show", self.dd, quiet=True).out.split("balloon is ")[1]
        return int(words.split()[0])

    def limit(self, size):
        """What its users have, within the device."""
        ploop("resize", "-s", str(size // 512), self.dd)
        s = os.statvfs(self.point)
        users = s.f_blocks * s.f_frsize - self.balloon()
        check(abs(users - size) < size // 4 + 24 * MIB, f"users have {users} bytes, {size} wanted")

    def step(self):
        """One change, and perhaps a killed worker in it."""
        victim = devlib.record(os.path.basename(self.dev))["worker"]["pid"] if self.rng.random() < 0.3 else None
        if victim:
            devlib.kill(victim)
        act = self.rng.choice(("limit", "limit", "enlarge", "change", "away", "compact"))
        if act == "enlarge":
            self.enlarge(self.size + self.rng.choice((3, 64, 1500)) * MIB)
        elif act == "limit":
            self.limit(self.rng.randrange(200 * MIB, self.size))
        elif act == "change":
            s = os.statvfs(self.point)
            most = self.balloon() + s.f_bfree * s.f_frsize - 40 * MIB
            ploop("balloon", "change", "-s", str(self.rng.randrange(0, most) // 512), self.dd)
        elif act == "away":
            ploop("resize", "-s", str(self.size // 512), self.dd)
            check(self.balloon() == 0, "the balloon is not gone")
        else:
            ploop("compact", self.dd)
        check("OFF" in ploop("balloon", "status", self.dd, quiet=True).out, "not OFF")
        return act


@devlib.limit(devlib.pick(180, 900))
def case_rounds(t):
    devlib.have("sgdisk")
    seed = devlib.seeds([int.from_bytes(os.urandom(3))])[0]
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    disk = Disk(t, rng, 200 * MIB)
    log("a mounted ext4 is enlarged" if disk.online else "no right to enlarge a mounted ext4: it is unmounted for that")
    # The table outgrows its clusters, and clusters of data are moved out of its way.
    sizes = (1 * GIB, 4 * GIB, 40 * GIB)
    for size in sizes:
        disk.enlarge(size)
    done = [disk.step() for _ in range(devlib.pick(5, 20))]
    disk.verify()
    t.umount(disk.dd)
    dev = t.mount(disk.dd)
    run("e2fsck", "-fn", dev + "p1")
    said = run("sgdisk", "-v", dev).text
    check("No problems found" in said, said)
    t.umount(disk.dd)
    ploop("check", disk.dd)
    t.judges(disk.img)
    log(f"RESULT: {disk.size >> 20} MiB by {len(sizes)} enlargements and {done}")


if __name__ == "__main__":
    devlib.main()
