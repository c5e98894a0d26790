#!/usr/bin/env python3
"""The ground of ploop_userspace and beyond: one image by path or container id, read-only means it, what may be inside."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

MIB = 1 << 20


def make(t, name="img", size="512m", *how, fstype="ext4"):
    folder = t.mkdir(name)
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", size, "-t", fstype, *how, img)
    return img, os.path.join(folder, "DiskDescriptor.xml")


def filled(t, name="img", size="512m", seed=1, amount=8 * MIB):
    """An image with ext4 and files in it; (image, descriptor, sums)."""
    img, dd = make(t, name, size)
    point = t.mkdir("fill-" + name)
    t.mount("-m", point, dd)
    sums = devlib.fill_tree(point, seed, amount)
    t.umount("-m", point)
    return img, dd, sums


def refuses_writes(dev):
    """A read-only device says so and takes no byte."""
    r = run("blockdev", "--getro", dev)
    check(r.out.strip() == "1", f"blockdev --getro {dev}: {r.out}")
    try:
        fd = os.open(dev, os.O_WRONLY)
    except OSError as e:
        check(e.errno in (1, 13, 30), f"open for writing: {e}")
        return
    try:
        os.pwrite(fd, b"x" * 512, 0)
        os.fsync(fd)
        raise Failure(f"{dev} is read-only and took a write")
    except OSError as e:
        check(e.errno in (1, 30), f"a write to a read-only device: {e}, EROFS or EPERM wanted")
    finally:
        os.close(fd)


def case_path_read_only(t):
    """By path alone: the device, the mount command to type, a mount; bytes and times of the image stay."""
    img, dd, sums = filled(t)
    os.unlink(dd)
    for leftover in (dd + ".lck", os.path.join(os.path.dirname(img), ".statfs")):
        if os.path.exists(leftover):
            os.unlink(leftover)
    was = devlib.identity(img)
    r = ploop("mount", "-r", img)
    dev = re.search(r"dev=(/dev/ploop\d+)", r.out).group(1)
    t.drop_later(dev)
    typed = re.search(r"^.*\bmount\b.*(/dev/ploop\S+)\s+\S+.*$", r.out, re.M)
    check(typed, f"no mount command to type is printed: {r.out}")
    refuses_writes(dev)
    check(ploopimg.Chain([img]).compare(dev) is None, "the device has other bytes than the image")
    point = t.mkdir("typed")
    # The printed command works as it is, but for its folder.
    words = typed.group(0).split()
    words = words[words.index("mount"):]
    run(*words[:-1], point)
    devlib.compare_tree(point, sums)
    t.user_umount(point)
    t.umount("-d", dev)
    devlib.unchanged(img, was)
    point = t.mkdir("mnt")
    dev = t.mount("-r", "-m", point, img)
    check(devlib.mount_source(point) == dev + "p1", f"/proc/mounts shows {devlib.mount_source(point)}, {dev}p1 wanted")
    devlib.compare_tree(point, sums)
    r = run("touch", os.path.join(point, "x"), rc=None)
    check(r.rc != 0, "a read-only mount took a file")
    t.umount("-m", point)
    devlib.unchanged(img, was)
    check(sorted(os.listdir(os.path.dirname(img))) == ["root.hdd"], f"left beside the image: {os.listdir(os.path.dirname(img))}")


def case_read_only_descriptor(t):
    """The same by descriptor, for a chain: no file of it changes, nor the descriptor."""
    dd, paths = ploopimg.write_chain(t.mkdir("img"), 4, 2, 256, 2000 * 256, seed=3, grow=True)
    files = paths + [dd]
    was = {p: devlib.identity(p) for p in files}
    chain = ploopimg.Chain(dd)
    dev = t.mount("-r", dd)
    refuses_writes(dev)
    check(chain.compare(dev) is None, "wrong bytes")
    t.umount(dd)
    for p in files:
        devlib.unchanged(p, was[p], atime=p != dd)
    # A snapshot under the top, by its GUID, and the base by its name.
    bs, names = ploopimg.read_descriptor(dd)
    for which, n in ((names[1][0], 2), ("base", 1)):
        dev = t.mount("-r", "-u", which, dd)
        part = ploopimg.Chain([p for _, p, _ in names[:n]])
        check(part.compare(dev) is None, f"-u {which}: wrong bytes")
        t.umount("-d", dev)
    for p in files:
        devlib.unchanged(p, was[p], atime=p != dd)


def container(t, number, where):
    """An image at one of the places of a container; (image, sums)."""
    img, dd, sums = filled(t, f"ct{number}", "300m", seed=number, amount=2 * MIB)
    target = where.format(number)
    top = target
    while not os.path.exists(os.path.dirname(top)):
        top = os.path.dirname(top)
    made = top if not os.path.exists(top) else None
    check(made, f"{top} exists already")
    os.makedirs(os.path.dirname(target))
    t.later(shutil.rmtree, made)
    shutil.move(img, target)
    return target, sums


def by_container(t, number, where):
    target, sums = container(t, number, where)
    was = devlib.identity(target)
    point = t.mkdir(f"mnt{number}")
    dev = t.mount("-r", "-m", point, str(number))
    devlib.compare_tree(point, sums)
    check(t.device_of(target) == dev, f"`ploop list` does not name {target}")
    t.umount("-m", point)
    devlib.unchanged(target, was)


def case_container_vz_hdd(t):
    by_container(t, 990001, "/vz/private/{}/root.hdd/root.hdd")


def case_container_vz_hds(t):
    by_container(t, 990002, "/vz/private/{}/root.hdd/root.hds")


def case_container_var_lib(t):
    by_container(t, 990003, "/var/lib/vz/private/{}/root.hdd/root.hdd")


def case_container_unknown(t):
    r = ploop("mount", "-r", "990009", rc=None)
    check(r.rc != 0, "a container that does not exist was mounted")
    check("/vz/private/990009" in r.err, f"the places looked at are not named: {r.err}")


def case_gpt_as_made(t):
    """What init puts into the device: the partition table and the balloon file."""
    img, dd = make(t)
    dev = t.mount(dd)
    sectors = 512 * 2048
    d = devlib.Direct(dev, write=False)
    head = d.read(0, 34 * 512)
    check(head[510:512] == b"\x55\xaa" and head[446 + 4] == 0xEE, "no protective MBR")
    check(head[512:520] == b"EFI PART", "no GPT header at sector 1")
    first, last = (int.from_bytes(head[1024 + 32 + 8 * i:1024 + 40 + 8 * i], "little") for i in (0, 1))
    check((first, last) == (2048, sectors - 2048 - 1), f"partition 1 from {first} to {last}")
    check(head[1024 + 56:1024 + 56 + 14].decode("utf-16-le") == "primary", "the partition's name is not `primary`")
    backup = d.read((sectors - 33) * 512, 33 * 512)
    check(backup[-512:-504] == b"EFI PART", "no backup header in the last sector")
    check(backup[:32 * 512] == head[1024:1024 + 32 * 512], "the backup entries differ")
    d.close()
    r = run("parted", "-s", "-m", dev, "unit", "s", "print")
    check(f"1:2048s:{sectors - 2049}s:" in r.out, f"parted reads: {r.out}")
    check(devlib.device_size(dev + "p1") == (sectors - 4096) * 512, f"{dev}p1 has {devlib.device_size(dev + 'p1')} bytes")
    st = os.stat(dev)
    check(st.st_mode & 0o777 == 0o660, f"{dev} has mode {st.st_mode & 0o777:o}, 660 wanted")
    run("e2fsck", "-fn", dev + "p1")
    point = t.mkdir("mnt")
    t.user_mount(dev + "p1", point)
    balloon = os.path.join(point, devlib.BALLOON)
    check(os.path.isfile(balloon) and os.stat(balloon).st_mode & 0o777 == 0o600, "no balloon file of mode 600")
    t.user_umount(point)
    r = run("dumpe2fs", "-h", dev + "p1")
    check("user_xattr acl" in r.out and re.search(r"Maximum mount count:\s+-1", r.out) and re.search(r"Check interval:\s+0 ", r.out)
          and re.search(r"Errors behavior:\s+Remount read-only", r.out), "tune2fs's settings are missing")
    t.umount(dd)


def case_bare_filesystem(t):
    """A file system on the whole device."""
    img, dd = make(t, fstype="none")
    dev = t.mount(dd)
    run("mkfs.ext4", "-q", "-F", dev, limit=120)
    t.umount(dd)
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    check(devlib.mount_source(point) == dev, f"/proc/mounts shows {devlib.mount_source(point)}, {dev} wanted")
    sums = devlib.fill_tree(point, 3, 20 * MIB)
    t.umount("-m", point)
    check(t.device_of(dd) is None, "umount -m left the device")
    was = devlib.identity(img)
    dev = t.mount("-r", "-m", point, img)
    devlib.compare_tree(point, sums)
    t.umount("-d", dev)
    devlib.unchanged(img, was)
    t.judges(img)


def case_three_partitions(t):
    """parted on the live device: the nodes follow within a second, also when a partition goes."""
    img, dd = make(t, size="1g", fstype="none")
    dev = t.mount(dd)

    def parted(*args):
        run("parted", "-s", dev, *args, limit=60)
        return time.monotonic()

    def nodes(numbers, since):
        want = {f"{dev}p{n}" for n in numbers}

        def now():
            return {f"/dev/{n}" for n in os.listdir("/dev") if n.startswith(os.path.basename(dev) + "p")}
        devlib.wait_for(f"nodes are {sorted(want)}", lambda: now() == want, max(0.05, since + 1.0 - time.monotonic()))
    parted("mklabel", "gpt")
    parted("mkpart", "one", "1MiB", "300MiB")
    parted("mkpart", "two", "300MiB", "600MiB")
    at = parted("mkpart", "three", "600MiB", "1000MiB")
    nodes((1, 2, 3), at)
    for n, mib in ((1, 299), (2, 300), (3, 400)):
        check(devlib.device_size(f"{dev}p{n}") == mib * MIB, f"{dev}p{n}: {devlib.device_size(f'{dev}p{n}')} bytes, {mib} MiB wanted")
    sums = {}
    for n in (1, 2, 3):
        run("mkfs.ext4", "-q", "-F", f"{dev}p{n}")
        point = t.mkdir(f"p{n}")
        t.user_mount(f"{dev}p{n}", point)
        sums[n] = devlib.fill_tree(point, n, 4 * MIB)
    # parted cannot change a table while a partition is mounted (it looks for the device's name in /sys/block).
    for n in (1, 2, 3):
        t.user_umount(t.path(f"p{n}"))
    at = parted("rm", "2")
    nodes((1, 3), at)
    at = parted("mkpart", "again", "300MiB", "450MiB")
    nodes((1, 2, 3), at)
    check(devlib.device_size(f"{dev}p2") == 150 * MIB, f"{dev}p2 has {devlib.device_size(f'{dev}p2')} bytes")
    for n in (1, 3):
        t.user_mount(f"{dev}p{n}", t.path(f"p{n}"))
        devlib.compare_tree(t.path(f"p{n}"), sums[n])
    r = ploop("umount", "-d", dev, rc=None)
    if r.rc:
        # Busy with a mount the command does not know to end: nothing changed.
        check(devlib.is_mounted(t.path("p1")) and devlib.is_mounted(t.path("p3")), "a failed umount changed something")
        for n in (1, 3):
            t.user_umount(t.path(f"p{n}"))
        t.umount("-d", dev)
    check(not [n for n in os.listdir("/dev") if n.startswith(os.path.basename(dev) + "p")], "partition nodes are left")
    was = devlib.identity(img)
    dev = t.mount("-r", img)
    nodes((1, 2, 3), time.monotonic())
    for n in (1, 3):
        t.user_mount(f"{dev}p{n}", t.path(f"p{n}"), "ext4", "ro")
        devlib.compare_tree(t.path(f"p{n}"), sums[n])
        t.user_umount(t.path(f"p{n}"))
    t.umount("-d", dev)
    devlib.unchanged(img, was)


def inside(t, kind):
    """A file system of a kind in the partition: used, closed, used read-only by path."""
    devlib.have(f"mkfs.{kind}")
    img, dd = make(t, size="768m", fstype="ext3" if kind == "ext3" else "ext4")
    if kind not in ("ext3", "ext4"):
        dev = t.mount(dd)
        run(f"mkfs.{kind}", "-q", "-f", dev + "p1", limit=120)
        t.umount(dd)
    point = t.mkdir("mnt")
    try:
        dev = t.mount("-t", kind, "-m", point, dd)
    except Failure:
        if kind not in open("/proc/filesystems").read().split():
            raise devlib.Skip(f"this kernel has no {kind}") from None
        raise
    with open("/proc/mounts") as f:
        kinds = [l.split()[2] for l in f if l.split()[1] == point]
    check(kinds == [kind], f"mounted as {kinds}")
    sums = devlib.fill_tree(point, 7, 40 * MIB)
    for name in list(sums)[::3]:
        os.unlink(os.path.join(point, name))
        del sums[name]
    run("sync", "-f", point)
    if kind != "ext3":
        run("fstrim", point, rc=None, limit=120)
    devlib.compare_tree(point, sums)
    t.umount("-m", point)
    t.judges(img)
    was = devlib.identity(img)
    dev = t.mount("-r", "-t", kind, "-m", point, img)
    devlib.compare_tree(point, sums)
    t.umount("-m", point)
    devlib.unchanged(img, was)
    if kind in ("ext3", "ext4"):
        dev = t.mount("-r", dd)
        run("e2fsck", "-fn", dev + "p1", limit=120)
        t.umount("-d", dev)


def case_inside_ext3(t):
    inside(t, "ext3")


def case_inside_ext4(t):
    inside(t, "ext4")


def case_inside_xfs(t):
    inside(t, "xfs")


def case_inside_btrfs(t):
    inside(t, "btrfs")


def dirty_copy(t):
    """A copy of an image taken while it is mounted and written: marked in use, journal not replayed."""
    img, dd = make(t)
    point = t.mkdir("live")
    t.mount("-m", point, dd)
    sums = devlib.fill_tree(point, 9, 10 * MIB)
    run("sync", "-f", point)
    with open(os.path.join(point, "late"), "wb") as f:
        f.write(b"l" * 100000)
        f.flush()
        os.fsync(f.fileno())
    copy = os.path.join(t.mkdir("copy"), "root.hdd")
    run("cp", "--sparse=never", img, copy)
    run("sync", copy)
    check(ploopimg.Image(copy).header.in_use == ploopimg.IN_USE, "a mounted image is not marked in use")
    return img, dd, point, copy, sums


def case_dirty_journal(t):
    """A journal that needs recovery is not replayed by a read-only mount; the mark on the copy is respected."""
    img, dd, point, copy, sums = dirty_copy(t)
    t.umount(dd)
    was = devlib.identity(copy)
    look = t.mkdir("look")
    r = ploop("mount", "-r", "-m", look, copy, rc=devlib.IN_USE)
    check("--force" in r.err, f"the option is not named: {r.err}")
    devlib.unchanged(copy, was)
    t.mount("-r", "--force", "-m", look, copy)
    with open("/proc/mounts") as f:
        options = [l.split()[3] for l in f if l.split()[1] == look][0]
    check("ro" in options.split(","), f"mounted with {options}")
    devlib.compare_tree(look, sums)
    t.umount("-m", look)
    devlib.unchanged(copy, was)
    # The same with the mark taken off (a copy of a crashed host, say).
    ploopimg.patch(copy, 44, bytes(4))
    was = devlib.identity(copy)
    t.mount("-r", "-m", look, copy)
    devlib.compare_tree(look, sums)
    t.umount("-m", look)
    devlib.unchanged(copy, was)
    # By descriptor, read-only: validated in memory, still marked afterwards.
    ploopimg.patch(copy, 44, ploopimg.struct.pack("<I", ploopimg.IN_USE))
    ddc = os.path.join(os.path.dirname(copy), "DiskDescriptor.xml")
    ploopimg.descriptor(ddc, 512 * 2048, 2048, [(ploopimg.TOP, "root.hdd")])
    was = devlib.identity(copy)
    t.mount("-r", "-m", look, ddc)
    devlib.compare_tree(look, sums)
    t.umount("-m", look)
    devlib.unchanged(copy, was)
    # And writable, by descriptor: recovered, journal replayed, all there.
    t.mount("-m", look, ddc)
    devlib.compare_tree(look, sums)
    check(open(os.path.join(look, "late"), "rb").read() == b"l" * 100000, "what was synced last is gone")
    t.umount("-m", look)
    t.judges(copy)


def case_written_by_another_qemu(t):
    """qemu holds the image open and writes: 37 without --force, a read-only look with it; qemu is not disturbed."""
    devlib.have("qemu-io")
    img = t.path("q.hds")
    run("qemu-img", "create", "-f", "parallels", img, "256M")
    q = subprocess.Popen(["qemu-io", "-f", "parallels", img], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    t.later(lambda: q.poll() is None and q.kill())

    def tell(cmd):
        q.stdin.write(cmd + "\n")
        q.stdin.flush()
    tell("write -P 0x11 0 4M")
    tell("flush")
    devlib.wait_for("qemu marked the image", lambda: os.path.getsize(img) >= 5 * MIB and ploopimg.Image(img).header.in_use == ploopimg.IN_USE)
    time.sleep(0.5)
    r = ploop("mount", "-r", img, rc=devlib.IN_USE)
    check("--force" in r.err, f"the option is not named: {r.err}")
    ploop("mount", img, rc=(devlib.IN_USE, devlib.MOUNT))
    dev = t.mount("-r", "--force", img)
    d = devlib.Direct(dev, write=False)
    check(d.read(0, 4 * MIB) == b"\x11" * (4 * MIB), "wrong bytes")
    tell("write -P 0x22 1M 1M")
    tell("flush")
    devlib.wait_for("the new bytes of a cluster known before are seen", lambda: d.read(MIB, MIB) == b"\x22" * MIB, 5)
    d.close()
    refuses_writes(dev)
    t.umount("-d", dev)
    tell("write -P 0x33 100M 1M")
    tell("quit")
    out = q.communicate(timeout=30)[0]
    check("wrote 1048576/1048576" in out and "error" not in out.lower(), out)
    run("qemu-img", "check", "-f", "parallels", img)


def case_written_by_another_ours(t):
    """An image that our own server writes is looked at read-only by a second one."""
    img, dd = make(t, fstype="none")
    dev = t.mount(dd)
    w = devlib.Direct(dev)
    t.later(w.close)
    w.write(3 * MIB, b"a" * MIB)
    w.sync()
    ploop("mount", "-r", img, rc=(devlib.IN_USE, devlib.MOUNT))
    r = ploop("mount", img, rc=None)
    check(r.rc in (devlib.IN_USE, devlib.MOUNT), f"a second writer: exit {r.rc}")
    r = ploop("mount", dd, rc=devlib.MOUNT)
    second = t.mount("-r", "--force", img)
    check(second != dev, "the same device")
    d = devlib.Direct(second, write=False)
    check(d.read(3 * MIB, MIB) == b"a" * MIB, "wrong bytes")
    for i in range(50):
        w.write(3 * MIB, bytes([i]) * MIB)
        got = d.read(3 * MIB + 4096, 4096)
        check(got == bytes([i]) * 4096, f"pass {i}: old bytes of a known cluster")
    d.close()
    t.umount("-d", second)
    w.write(9 * MIB, b"z" * MIB)
    w.sync()
    w.close()
    t.umount(dd)
    t.judges(img)


def large_bat(t, version):
    """A BAT of several clusters (32 KiB clusters; 2 GiB: nine), written at the borders of its clusters and pages."""
    folder = t.mkdir(f"v{version}")
    img = os.path.join(folder, "root.hdd")
    bats, size, n = devlib.pick((4, 800 * MIB, 32768), (9, 2 << 30, 32768))
    ploop("init", "-s", size // 512, "-b", 64, "-v", version, "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    h = ploopimg.Image(img).header
    check(h.l1 == bats, f"a BAT of {h.l1} clusters, {bats} wanted")
    model = devlib.Model(t.path(f"model{version}"), size)
    spots = [c * n for b in range(bats) for c in (8176 + 8192 * b - 1, 8176 + 8192 * b) if c * n < size]
    spots += [c * n for p in range(1, size // n // 1024, 3) for c in (1024 * p - 17, 1024 * p - 16)] + [0, size - n]
    dev = t.mount(dd)
    devlib.scribble(dev, model, version, devlib.pick(700, 2000), spots=spots)
    devlib.flush_buffers(dev)
    model.compare(dev)
    t.umount(dd)
    t.judges(img)
    check(ploopimg.Chain([img]).compare(model.path) is None, "wrong bytes in the closed image")
    was = devlib.identity(img)
    dev = t.mount("-r", img)
    model.compare(dev)
    t.umount("-d", dev)
    devlib.unchanged(img, was)


def case_bat_of_many_clusters_v2(t):
    large_bat(t, 2)


def case_bat_of_many_clusters_v1(t):
    large_bat(t, 1)


def beyond_4g(t, dense):
    """Version 1 with data beyond 4 GiB of the file: read, rewritten, new clusters after it."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    sectors, bs = 4096 * 2048, 2048
    content = ploopimg.random_content(bs, sectors, 0.01, 4)
    ploopimg.write_image(img, 1, bs, sectors, content, order="scattered", first_place=6000, dense=dense)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploopimg.descriptor(dd, sectors, bs, [(ploopimg.TOP, "root.hdd")])
    chain = ploopimg.Chain([img])
    was = os.stat(img)
    dev = t.mount("-r", img)
    d = devlib.Direct(dev, write=False)
    for c, data in content.items():
        check(d.read(c * MIB, MIB) == data, f"cluster {c}: wrong bytes")
    absent = next(c for c in range(4096) if c not in content)
    check(d.read(absent * MIB, MIB) == bytes(MIB), "an absent cluster is not zero")
    d.close()
    t.umount("-d", dev)
    st = os.stat(img)
    check((st.st_mtime_ns, st.st_ctime_ns, st.st_size, st.st_blocks) == (was.st_mtime_ns, was.st_ctime_ns, was.st_size, was.st_blocks), "changed")
    model = devlib.Model(t.path("model"), sectors * 512, chain)
    dev = t.mount(dd)
    devlib.scribble(dev, model, 5, 300, spots=[c * MIB for c in list(content)[:20] + [absent]])
    t.umount(dd)
    bad = ploopimg.validate(img, leaks_allowed=True, check_holes=dense)
    check(not bad, "; ".join(bad))
    at = ploopimg.Chain([img]).compare(model.path)
    check(at is None, f"differs at byte {at}")


def case_v1_beyond_4g(t):
    beyond_4g(t, True)


def case_v1_beyond_4g_sparse(t):
    beyond_4g(t, False)


def case_twenty_at_once(t):
    """Twenty devices, written all at once, listed in the order of their numbers."""
    disks = []
    for i in range(20):
        folder = t.mkdir(f"d{i}")
        img = os.path.join(folder, "root.hdd")
        ploop("init", "-s", "64m", "-b", 128, "-t", "none", img, quiet=True)
        disks.append((img, os.path.join(folder, "DiskDescriptor.xml")))
    devs, faults = {}, []
    begin = time.monotonic()

    def up(i):
        try:
            devs[i] = t.mount(disks[i][1], quiet=True)
        except Exception as e:  # noqa: BLE001
            faults.append(f"{i}: {e}")

    def all_of(f):
        threads = [threading.Thread(target=f, args=(i,)) for i in range(20)]
        for x in threads:
            x.start()
        for x in threads:
            x.join(150)
            check(not x.is_alive(), "hangs")
        check(not faults, "\n".join(faults[:5]))
    all_of(up)
    log(f"mounted after {time.monotonic() - begin:.1f} s")
    check(len(set(devs.values())) == 20, f"devices are not distinct: {devs}")
    listed = [l.split()[0] for l in ploop("list").out.splitlines()]
    numbers = [int(n[5:]) for n in listed if re.fullmatch(r"ploop\d+", n)]
    check(numbers == sorted(numbers), f"not in the order of numbers: {listed}")
    check(set(os.path.basename(d) for d in devs.values()) <= set(listed), "not all are listed")
    models = {i: devlib.Model(t.path(f"m{i}"), 64 * MIB) for i in range(20)}

    def write(i):
        try:
            devlib.scribble(devs[i], models[i], i, 150)
        except Exception as e:  # noqa: BLE001
            faults.append(f"{i}: {e}")
    all_of(write)
    memory = []
    for i in range(20):
        with open(f"/proc/{devlib.record(devs[i])['worker']['pid']}/status") as f:
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1)))
    log(f"RESULT: resident memory of a worker: {min(memory) >> 10} to {max(memory) >> 10} MiB")

    def down(i):
        try:
            t.umount("-d", devs[i], quiet=True)
        except Exception as e:  # noqa: BLE001
            faults.append(f"{i}: {e}")
    all_of(down)
    for i, (img, dd) in enumerate(disks):
        bad = ploopimg.validate(img, leaks_allowed=True)
        check(not bad, f"{i}: {bad}")
        check(ploopimg.Chain([img]).compare(models[i].path) is None, f"disk {i} has wrong bytes")


def case_trace_and_info(t):
    """`info --image` tells what the old tool told, without a device; --json is JSON."""
    img, dd, _ = filled(t, size="300m", amount=MIB)
    was = devlib.identity(img)
    h = ploopimg.Image(img)
    used = sum(1 for e in h.bat if e)
    r = ploop("info", "--image", img)
    for word in ("2048", "614400", str(used)):
        check(word in r.out, f"{word} is not told: {r.out}")
    data = json.loads(ploop("info", "--image", img, "--json").out)
    log(json.dumps(data))
    text = json.dumps(data)
    check("true" in text, "neither GPT nor ext4 was found")
    devlib.unchanged(img, was)


if __name__ == "__main__":
    devlib.main()
