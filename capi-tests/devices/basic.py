#!/usr/bin/env python3
"""A disk from its making to its closing: by a C program through our header, and by the command over a table of versions,
cluster sizes, modes and host file systems in which every pair occurs."""
import os
import re
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import check, debian, log, ploop, run  # noqa: E402

MIB = 1 << 20


def compare_with_device(t, img, dd, raw_bs=None):
    """The closed image and the device's content, by qemu (which shares nothing with us) or, for raw, directly."""
    was = devlib.identity(img)
    dev = t.mount("-r", dd)
    if raw_bs:
        r = run(sys.executable, os.path.join(devlib.TOOLS, "same.py"), img, dev, rc=None, limit=300)
    else:
        devlib.have("qemu-img")
        # Our server holds its lock on the image, so qemu is told not to ask for one.
        r = run("qemu-img", "compare", "--image-opts", f"driver=parallels,file.driver=file,file.filename={img},file.locking=off",
                f"driver=raw,file.driver=host_device,file.filename={dev}", rc=None, limit=600)
        check("Images are identical" in r.out, f"qemu-img compare: {r.text}")
    check(r.rc == 0, f"the closed image and the device differ: {r.text}")
    part = dev + "p1"
    if os.path.exists(part):
        run("e2fsck", "-fn", part, limit=300)
    t.umount("-d", dev)
    devlib.unchanged(img, was, atime=False)


def library_path(t):
    """A folder in which the loader finds our library by its soname."""
    lib = t.mkdir("lib")
    so = os.path.join(devlib.LIBDIR, "libploop.so")
    os.symlink(so, os.path.join(lib, "libploop.so.1"))
    os.symlink(so, os.path.join(lib, "libploop.so"))
    return lib


@devlib.limit(900)
def case_c_program(t):
    """basic.c: 10 GiB with ext4, 1 GiB (in CI a quarter) in many files, compared after a second mount. It first asserts that the library
    loaded is ours (its path is the second argument)."""
    lib = library_path(t)
    program = t.path("basic")
    run("cc", "-O2", "-Wall", "-I", os.path.join(devlib.ROOT, "include"), "-o", program, os.path.join(devlib.DEVICES, "basic.c"),
        "-L", lib, "-lploop", "-ldl", "-lpthread", limit=120)
    folder = t.mkdir("disk")
    env = dict(os.environ, LD_LIBRARY_PATH=lib, PLOOP_SERVER=os.path.join(devlib.LIBDIR, "ploop-server"))
    data = devlib.pick(256, 1024)
    env["BASIC_SIZE_MIB"], env["BASIC_DATA_MIB"] = "10240", str(data)
    r = run(program, folder, os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so")), limit=800, env=env)
    log(r.out)
    dds = [os.path.join(d, n) for d, _, names in os.walk(folder) for n in names if n == "DiskDescriptor.xml"]
    check(len(dds) == 1, f"descriptors: {dds}")
    bs, names = ploopimg.read_descriptor(dds[0])
    img = names[-1][1]
    check(t.device_of(dds[0]) is None, "the program left its device")
    check(ploopimg.Image(img).sectors == 10 << 21, "not 10 GiB")
    used = sum(1 for e in ploopimg.Image(img).bat if e)
    check(used >= data, f"only {used} clusters in use after {data} MiB of files")
    t.judges(img)
    debian("check", dds[0])
    compare_with_device(t, img, dds[0])


#        version, cluster, mode, host file system; every pair of two columns occurs
TABLE = ((1, 64, "expanded", "ext4"), (2, 2048, "expanded", "xfs"), (1, 131072, "expanded", "btrfs"), (2, 64, "expanded", "tmpfs"),
         (2, 2048, "preallocated", "ext4"), (1, 64, "preallocated", "xfs"), (2, 64, "preallocated", "btrfs"), (1, 131072, "preallocated", "tmpfs"),
         (2, 131072, "raw", "ext4"), (1, 131072, "raw", "xfs"), (2, 2048, "raw", "btrfs"), (1, 64, "raw", "tmpfs"),
         (1, 2048, "expanded", "tmpfs"), (2, 131072, "expanded", "ext4"))


def pair(t, version, bs, mode, host):
    size = devlib.pick(512, 2048)
    point = t.mkfs_mount(host, (size * 2 + 1024) * MIB)
    folder = os.path.join(point, "disk")
    os.mkdir(folder)
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", f"{size}m", "-f", mode, "-v", version, "-b", bs, img, limit=180)
    mnt = t.mkdir("mnt")
    t.mount("-m", mnt, dd)
    sums = devlib.fill_tree(mnt, bs + version, devlib.pick(48, 300) * MIB)
    for name in list(sums)[::4]:
        os.unlink(os.path.join(mnt, name))
        del sums[name]
    sums.update({f"more/{k}": v for k, v in devlib.fill_tree(os.path.join(mnt, "more"), 5, 10 * MIB).items()})
    run("fstrim", mnt, rc=None, limit=120)
    t.umount("-m", mnt)
    t.mount("-m", mnt, dd)
    devlib.compare_tree(mnt, sums)
    t.umount(dd)
    raw = mode == "raw"
    t.judges(img, raw_bs=bs if raw else None)
    debian("check", dd)
    compare_with_device(t, img, dd, bs if raw else None)
    if raw:
        check(os.path.getsize(img) == -(-size * 2048 // bs) * bs * 512, f"a raw file of {os.path.getsize(img)} bytes")
    else:
        h = ploopimg.Image(img).header
        check((h.version, h.bs) == (version, bs), f"version {h.version}, cluster {h.bs}")


def _make(row):
    def case(t):
        pair(t, *row)
    case.limit = devlib.pick(240, 600)
    case.__doc__ = "%s %s %s on %s" % row
    return case


for _row in TABLE:
    globals()["case_v%d_%s_%s_%s" % (_row[0], {64: "32k", 2048: "1m", 131072: "64m"}[_row[1]], _row[2], _row[3])] = _make(_row)

if __name__ == "__main__":
    devlib.main()
