#!/usr/bin/env python3
"""The commands of the OpenVZ wiki page, in its order and as printed there, but for the folder that the images lie in."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import PARAM, check, ploop, run  # noqa: E402

DEVICE = "/dev/ploop0"
MIB = 1 << 20


class Page:
    """Runs commands as they are printed."""

    def __init__(self, t):
        self.t, self.point = t, t.mkdir("mnt_ploop")
        devlib.check(not os.path.exists(DEVICE), f"{DEVICE} is another program's")
        t.later(lambda: os.path.exists(DEVICE) and ploop("umount", "-d", DEVICE, rc=None))
        t.later(lambda: devlib.is_mounted(self.point) and run("umount", self.point, rc=None))

    def __call__(self, line, rc=0):
        words = [self.path(w) for w in line.split()]
        if words[0] != "ploop":
            return run(*words, rc=rc, limit=90)
        return ploop(*words[1:], rc=rc)

    def path(self, word):
        """/ploop.image and /mnt_ploop lie in the folder of the test."""
        return self.t.path(word[1:]) if word.startswith(("/ploop", "/mnt_ploop", "/Disk")) else word

    def write(self, name, megabytes):
        data = os.urandom(megabytes * MIB)
        with open(os.path.join(self.point, name), "wb") as f:
            f.write(data)
            os.fsync(f.fileno())
        return data

    def same(self, name, data):
        run("sync", "-f", self.point)
        with open(os.path.join(self.point, name), "rb") as f:
            check(f.read() == data, f"{name} has another content")

    def size(self):
        return int(open(f"/sys/class/block/{os.path.basename(os.path.realpath(self.loop()))}/size").read()) * 512

    def loop(self):
        rdev = os.stat(DEVICE).st_rdev
        return f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}"


def case_init_and_mount(t):
    page = Page(t)
    r = page("ploop", rc=PARAM)
    check(r.err.startswith("Usage: ploop ") and not r.out, "the summary belongs on stderr")
    r = page("ploop init", rc=PARAM)
    check("Usage: ploop init" in r.err and not r.out, "the usage belongs on stderr")
    page("ploop init -s 1g -t ext4 /ploop.image")
    before = devlib.identity(t.path("ploop.image")), devlib.identity(t.path("DiskDescriptor.xml"))
    page("ploop init -s 1g -t ext4 /ploop.image", rc=PARAM)
    devlib.unchanged(t.path("ploop.image"), before[0])
    devlib.unchanged(t.path("DiskDescriptor.xml"), before[1])
    r = page("ploop mount /ploop.image")
    check("Adding delta dev=/dev/ploop" in r.out, f"mount does not name the device: {r.out}")
    t.umount("-d", t.device_of(t.path("ploop.image")))
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image")
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image", rc=(17, 21))
    page("mount -t ext4 /dev/ploop0p1 /mnt_ploop")
    # The page has the file system on the whole device, with an option of OpenVZ's kernel.
    page("umount /mnt_ploop")
    page("mkfs.ext4 -q -F /dev/ploop0")
    page("mount -t ext4 -o balloon_ino=12 /dev/ploop0 /mnt_ploop", rc=32)
    page("mount -t ext4 /dev/ploop0 /mnt_ploop")
    page.same("f", page.write("f", 3))
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")


def bare(page, size="1g"):
    """A disk without partition table on /dev/ploop0, its file system mounted."""
    page(f"ploop init -s {size} -t none /ploop.image")
    os.remove(page.path("/DiskDescriptor.xml"))
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image")
    page("mkfs.ext4 -q -F /dev/ploop0")
    page("mount -t ext4 /dev/ploop0 /mnt_ploop")


def case_snapshots_and_merges(t):
    page = Page(t)
    bare(page)
    a = page.write("a", 5)
    page("ploop snapshot -d /dev/ploop0 /ploop-d.image")
    b = page.write("b", 5)
    page("ploop snapshot -F -d /dev/ploop0 /ploop-d1.image")
    c = page.write("c", 5)
    page("ploop snapshot -d /dev/ploop0 /ploop-d2.image")
    page.write("a", 5)
    page("ploop merge -d /dev/ploop0 -l 1..2")
    page("ploop merge -d /dev/ploop0 -l 1..2")
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")
    # d1 and d2 are in d; what has the names is the user's.
    page("ploop merge /ploop-d.image /ploop.image")
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image")
    page("mount -t ext4 /dev/ploop0 /mnt_ploop")
    page.same("b", b)
    page.same("c", c)
    with open(os.path.join(page.point, "a"), "rb") as f:
        check(f.read() != a, "what was written last is lost")
    for name in ("d", "d1", "d2"):
        os.remove(page.path(f"/ploop-{name}.image"))
    page("ploop snapshot -d /dev/ploop0 /ploop-d.image")
    d = page.write("d", 2)
    page("ploop snapshot -d /dev/ploop0 /ploop-d1.image")
    page("ploop merge -d /dev/ploop0 -l 0..1")
    page.same("d", d)
    page("ploop merge -d /dev/ploop0 -l 0..1")
    os.remove(page.path("/ploop-d.image"))
    os.remove(page.path("/ploop-d1.image"))
    for name in ("d", "d1", "d2"):
        page(f"ploop snapshot -d /dev/ploop0 /ploop-{name}.image")
        page.write("e", 1)
    e = page.write("e", 2)
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")
    page("ploop merge /ploop-d2.image /ploop-d1.image /ploop-d.image /ploop.image")
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image")
    page("mount -t ext4 /dev/ploop0 /mnt_ploop")
    for name, data in (("b", b), ("c", c), ("d", d), ("e", e)):
        page.same(name, data)
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")


def case_merge_into_raw(t):
    page = Page(t)
    page("ploop init -s 64m -f raw -t none /ploop.image")
    page("ploop mount -f raw -d /dev/ploop0 /ploop.image")
    page("mkfs.ext4 -q -F /dev/ploop0")
    page("ploop snapshot -d /dev/ploop0 /ploop-d1.image")
    page("mount -t ext4 /dev/ploop0 /mnt_ploop")
    data = page.write("f", 3)
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")
    page("ploop merge -f raw /ploop-d1.image /ploop.image")
    page("mount -o loop,ro /ploop.image /mnt_ploop")
    page.same("f", data)
    page("umount /mnt_ploop")


def case_grow(t):
    page = Page(t)
    bare(page)
    data = page.write("f", 20)
    # The block device gets larger while the file system is mounted, and then the file system does.
    page("ploop grow -s 32g -d /dev/ploop0")
    check(page.size() == 32 << 30, f"{DEVICE} has {page.size()} bytes")
    if page("resize2fs /dev/ploop0 32g", rc=(0, 1)).rc:
        # Online it takes CAP_SYS_RESOURCE, which root of a container lacks.
        page("umount /mnt_ploop")
        page("e2fsck -fy /dev/ploop0", rc=(0, 1))
        page("resize2fs /dev/ploop0 32g")
        page("mount -t ext4 /dev/ploop0 /mnt_ploop")
    check(os.statvfs(page.point).f_blocks * 4096 > 30 << 30, "the file system is not larger")
    page.same("f", data)
    page("umount /mnt_ploop")
    page("ploop umount -d /dev/ploop0")
    page("ploop grow -s 40g /ploop.image")
    page("ploop grow -s 40000001 /ploop.image", rc=PARAM)
    page("ploop mount -f ploop1 -d /dev/ploop0 /ploop.image")
    check(page.size() == 40 << 30, f"{DEVICE} has {page.size()} bytes")
    page("e2fsck -fn /dev/ploop0")
    page("ploop umount -d /dev/ploop0")
    os.remove(t.path("ploop.image"))
    page("ploop init -s 1g -f raw -t none /ploop.image")
    page("ploop grow -s 32g -f raw /ploop.image")
    check(os.path.getsize(t.path("ploop.image")) == 32 << 30, "the raw image has another size")


def case_balloon(t):
    page = Page(t)
    bare(page)
    data = page.write("f", 20)
    page.write("g", 300)
    os.remove(os.path.join(page.point, "g"))
    run("sync", "-f", page.point)
    before = os.stat(t.path("ploop.image")).st_blocks * 512
    page("ploop balloon change -s 512m -d /dev/ploop0 -m /mnt_ploop")
    shown = page("ploop balloon show -m /mnt_ploop").out
    check(f"Current size of hidden balloon is {512 << 20} bytes" in shown, shown)
    after = os.stat(t.path("ploop.image")).st_blocks * 512
    check(after < before - (100 << 20), f"the image takes {after >> 20} MiB, {before >> 20} before")
    status = "Current state of in-kernel maintenance: OFF"
    check(status in page("ploop balloon status -d /dev/ploop0 -m /mnt_ploop").out, "the state is not OFF")
    page("ploop balloon clear -d /dev/ploop0 -m /mnt_ploop")
    page("ploop balloon complete -d /dev/ploop0 -m /mnt_ploop")
    page("ploop balloon check -d /dev/ploop0 -m /mnt_ploop")
    page("ploop balloon repair -d /dev/ploop0 -m /mnt_ploop")
    page("ploop balloon change -s 512m -d /dev/ploop0 -m /mnt_ploop")
    page("ploop balloon change -s 1g -d /dev/ploop0 -m /mnt_ploop", rc=20)
    page("ploop balloon change -s 0 -d /dev/ploop0 -m /mnt_ploop")
    check("balloon is 0 bytes" in page("ploop balloon show -m /mnt_ploop").out, "the balloon is still there")
    page.same("f", data)
    page("umount /mnt_ploop")
    page("e2fsck -fn /dev/ploop0")
    page("ploop umount -d /dev/ploop0")


if __name__ == "__main__":
    devlib.main()
