#!/usr/bin/env python3
"""Disks whose files lie where not everything is possible, and file systems inside that the kernel knows already."""
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, ploop, run  # noqa: E402


def case_read_only_host(t):
    """On a read-only file system what writes nothing works, also without a lock file; what writes is refused."""
    folder, point, m = t.mkdir("disk"), t.mkdir("ro"), t.mkdir("m")
    ploop("init", "-s", "200m", os.path.join(folder, "root.hdd"))
    guid = "{11111111-2222-4333-8444-555555555555}"
    ploop("snapshot", "-u", guid, os.path.join(folder, "DiskDescriptor.xml"))
    os.unlink(os.path.join(folder, "DiskDescriptor.xml.lck"))
    run("mount", "--bind", folder, point)
    t.later(run, "umount", point)
    run("mount", "-o", "remount,bind,ro", point)
    dd = os.path.join(point, "DiskDescriptor.xml")
    t.later(lambda: ploop("umount", dd, rc=None))
    for args in (("info", dd), ("info", "-s", dd), ("check", dd), ("snapshot-list", dd)):
        r = ploop(*args)
        check("Read-only" not in r.text and "warning" not in r.text.lower(), f"ploop {args}: {r.text}")
    for more in ((), ("-u", guid)):
        dev = t.mount("-r", *more, "-m", m, dd)
        check(os.path.isdir(os.path.join(m, "lost+found")), "nothing is mounted")
        check(dev in ploop("info", "-d", dd).out, "info -d")
        ploop("info", dd)
        r = t.umount(dd)
        check("Read-only" not in r.text, r.text)
    for args in (("mount", dd), ("snapshot", dd), ("snapshot-merge", dd), ("snapshot-delete", "-u", guid, dd)):
        r = ploop(*args, rc=23)
        check("Read-only file system" in r.text, r.text)
    check(not [n for n in os.listdir("/run") if n.startswith("ploop-info")], "a mount point is left in /run")
    # A user who may read the folder, but not change it.
    check(os.listdir(folder).count("DiskDescriptor.xml.lck") == 0, "a lock file was made")
    os.chmod(folder, 0o755)
    for n in os.listdir(folder):
        os.chmod(os.path.join(folder, n), 0o644)
    other = os.path.join(folder, "DiskDescriptor.xml")
    user = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
    # Whether the disk runs root alone may see, where any device does (4).
    for rc, args in (((0, 4), ("info", "-s", other)), ((23,), ("snapshot", other))):
        r = run(sys.executable, "-c", user, devlib.PLOOP, *args, rc=None)
        check(r.rc in rc, f"ploop {args} as another user: {r.rc}, {rc} wanted: {r.text}")


def disk(t, name, *options):
    """A new disk in a folder of its own: its descriptor and a mount point."""
    folder = t.mkdir(name)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "200m", *options, os.path.join(folder, "root.hdd"))
    t.later(lambda: ploop("umount", dd, rc=None))
    return dd, t.mkdir(name + "-m")


def case_other_namespace(t):
    """Mounted in a mount namespace of its own: its server does not keep that, and umount reaches what is left there."""
    dd, m = disk(t, "a")
    # That of process 1, or, where it cannot be looked at, of the kernel's threads.
    first = next((os.stat(f).st_ino for f in ("/proc/1/ns/mnt", "/proc/2/ns/mnt") if os.path.exists(f)), None)
    run("unshare", "-m", devlib.PLOOP, "mount", "-m", m, dd)
    name = os.path.basename(t.device_of(dd))
    for who in ("supervisor", "worker"):
        pid = devlib.record(name)[who]["pid"]
        check(os.stat(f"/proc/{pid}/ns/mnt").st_ino == first or not first, f"the {who} keeps the caller's namespace")
        comm = open(f"/proc/{pid}/comm").read().strip()
        line = open(f"/proc/{pid}/cmdline").read().split("\0")
        check(comm == "ploop-server:" + name[5:] and line[0] == "ploop-server" and name in line, f"{who}: {comm!r}, {line}")
    r = t.umount(dd)
    check(r.seconds < 3, f"umount took {r.seconds} s")
    # A process lives there, and uses the mount or not.
    p = subprocess.Popen(["unshare", "-m", "sh", "-c", f"{devlib.PLOOP} mount -m {m} {dd} && exec 5>{m}/used && echo up; read x; exec 5>&-; echo closed; read x"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    t.later(p.kill)
    while "up" not in p.stdout.readline():
        check(p.poll() is None, "the process in the namespace ended")
    r = t.umount(dd, rc=22)
    name = os.path.basename(t.device_of(dd))
    for part in (f"/dev/{name}", m, f"process {p.pid} (", "nsenter"):
        check(part in r.err, f"{part} is not named: {r.err}")
    check(not re.search(r"\bloop\d", r.err), r.err)
    p.stdin.write("\n")
    p.stdin.flush()
    while "closed" not in p.stdout.readline():
        check(p.poll() is None, "the process in the namespace ended")
    t.umount(dd)


def case_lazily_unmounted(t):
    """Unmounted lazily and in use: umount names device, process and the way out after some seconds."""
    dd, m = disk(t, "a")
    dev = t.mount("-m", m, dd)
    p = subprocess.Popen(["sleep", "100"], cwd=m)
    t.later(p.kill)
    run("umount", "-l", m)
    r = t.umount(dd, rc=22)
    check(r.seconds < 12, f"umount took {r.seconds} s")
    for part in (dev, f"process {p.pid} (sleep)", "umount -l", "end these processes"):
        check(part in r.err, f"{part} is not named: {r.err}")
    check(not re.search(r"\bloop\d", r.err), r.err)
    p.kill()
    p.wait()
    t.umount(dd)


def case_nested(t):
    """A disk inside a mounted disk is named, and nothing is changed."""
    dd, m = disk(t, "a")
    dev = t.mount("-m", m, dd)
    inner = os.path.join(m, "inner")
    os.mkdir(inner)
    ploop("init", "-s", "64m", "-t", "none", os.path.join(inner, "root.hdd"))
    inside = t.mount(os.path.join(inner, "DiskDescriptor.xml"))
    r = t.umount(dd, rc=22)
    for part in (dev, inside, os.path.join(inner, "root.hdd"), f"ploop umount -d {inside}"):
        check(part in r.err, f"{part} is not named: {r.err}")
    check(r.seconds < 2 and "process" not in r.err and devlib.is_mounted(m), r.err)
    t.umount("-d", inside)
    t.umount(dd)


def case_cut_off(t):
    """An image whose end is missing: the way out is named, what is there can be read, and reading the rest fails."""
    folder = t.mkdir("a")
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "64m", "-t", "none", img)
    dev = t.mount(dd)
    data = os.urandom(6 << 20)
    # One cluster after the other, so that they lie in this order.
    for i in range(6):
        with open(dev, "r+b") as f:
            f.seek(i << 20)
            f.write(data[i << 20:(i + 1) << 20])
            f.flush()
            os.fsync(f.fileno())
    t.umount(dd)
    os.truncate(img, os.path.getsize(img) - (3 << 20) + 5)
    for args in (("-r",), ()):
        r = t.mount(*args, dd, rc=11)
        check(f"ploop mount -r --force {img}" in r.err, r.err)
    check("3 clusters" in ploop("check", dd, rc=11).err, "check")
    before = devlib.sha(img)
    r = ploop("mount", "-r", "--force", img)
    check("3 clusters" in r.err, r.err)
    dev = t.device_of(img)
    t.drop_later(dev)
    with open(dev, "rb") as f:
        check(f.read(3 << 20) == data[:3 << 20], "what is there differs")
        for at in (4, 5):
            try:
                f.seek(at << 20)
                f.read(4096)
            except OSError:
                continue
            raise devlib.Failure(f"MiB {at}, which is missing, can be read")
        f.seek(20 << 20)
        check(f.read(4096) == bytes(4096), "what was never written is no zero")
    t.umount("-d", dev)
    check(devlib.sha(img) == before, "the image was changed")


def two_copies(t, fstype, *mkfs):
    """A disk of that file system with a file in it, its descriptor, and a copy of its files."""
    devlib.have(f"mkfs.{fstype}")
    if fstype not in open("/proc/filesystems").read():
        raise devlib.Skip(f"this kernel has no {fstype}")
    size = "400m"
    folder = t.mkdir("a")
    dd, m = os.path.join(folder, "DiskDescriptor.xml"), t.mkdir("a-m")
    ploop("init", "-s", size, "-t", "none", os.path.join(folder, "root.hdd"))
    t.later(lambda: ploop("umount", dd, rc=None))
    dev = t.mount(dd)
    run(f"mkfs.{fstype}", *mkfs, dev)
    t.umount(dd)
    t.mount("-m", m, dd)
    with open(os.path.join(m, "file"), "w") as f:
        f.write("before")
    t.umount(dd)
    copy = t.mkdir("b")
    for n in ("root.hdd", "DiskDescriptor.xml"):
        run("cp", "--sparse=always", os.path.join(folder, n), copy)
    t.mount("-m", m, dd)
    return dd, m, os.path.join(copy, "DiskDescriptor.xml")


def beside(t, dd, m):
    """The snapshot of a running disk is mounted beside it, shows what was there then, and does not stand in the disk's way."""
    guid, s = "{11111111-2222-4333-8444-555555555555}", t.mkdir("s")
    ploop("snapshot", "-u", guid, dd)
    with open(os.path.join(m, "file"), "w") as f:
        f.write("after")
    run("sync", "-f", m)
    shown = lambda: open(os.path.join(s, "file")).read()
    t.mount("-r", "-u", guid, "-m", s, dd)
    check(shown() == "before", shown())
    t.umount("-m", m)
    check(shown() == "before", shown())
    t.mount("-m", m, dd)
    check(open(os.path.join(m, "file")).read() == "after", "the disk shows the snapshot")
    t.umount("-m", s)
    guid = guid.replace("1111", "2222", 1)
    r = ploop("tsnapshot", "-u", guid, "-c", "bk", "-m", s, "-o", "noatime", dd)
    check(shown() == "after" and f" {s} " in open("/proc/self/mounts").read(), shown())
    check("noatime" in next(x for x in open("/proc/self/mounts") if f" {s} " in x), "noatime")
    t.umount("-m", s)


def case_xfs_beside_its_copies(t):
    """A snapshot beside the disk; a copy of the disk beside it, read-only or refused by name."""
    dd, m, copy = two_copies(t, "xfs", "-q", "-f")
    beside(t, dd, m)
    c = t.mkdir("c")
    t.mount("-r", "-m", c, copy)
    check(open(os.path.join(c, "file")).read() == "before", "the copy shows something else")
    t.umount(copy)
    r = t.mount("-m", c, copy, rc=21)
    check("xfs_admin -U generate" in r.err and m in r.err, r.err)
    t.mount("-m", c, "-o", "nouuid", copy)
    t.umount(copy)


def case_btrfs_beside_its_copies(t):
    """The same where the kernel tells copies of a btrfs apart (6.7); elsewhere they are refused."""
    dd, m, copy = two_copies(t, "btrfs", "-q", "-f")
    c = t.mkdir("c")
    if not os.path.exists("/sys/fs/btrfs/features/temp_fsid"):
        r = t.mount("-r", "-m", c, copy, rc=21)
        check("UUID" in r.err and "btrfstune" in r.err, r.err)
        return
    t.mount("-r", "-m", c, copy)
    check(open(os.path.join(c, "file")).read() == "before", "the copy shows something else")
    t.umount(copy)
    if devlib.FULL:
        beside(t, dd, m)


if __name__ == "__main__":
    devlib.main()
