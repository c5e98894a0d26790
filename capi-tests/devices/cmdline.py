#!/usr/bin/env python3
"""The command as scripts know it: exit codes, outputs, what a failed command leaves alone, init's results byte by byte."""
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, debian, log, ploop, run  # noqa: E402

MIB = 1 << 20


def listing(folder):
    return {n: devlib.identity(os.path.join(folder, n)) for n in os.listdir(folder) if os.path.isfile(os.path.join(folder, n))}


def same_listing(folder, before, allowed=(".lck",)):
    now = set(os.listdir(folder))
    new = {n for n in now - set(before) if not n.endswith(allowed)}
    check(not new, f"left behind in {folder}: {sorted(new)}")
    for n, was in before.items():
        check(n in now, f"{n} was deleted")
        devlib.unchanged(os.path.join(folder, n), was, atime=False)


def case_usage(t):
    """Usage errors: 38, text on stderr; --help and --version: 0, text on stdout."""
    for args in ((), ("--nope",), ("frobnicate",), ("init",), ("mount",), ("umount",), ("info",), ("list", "x"),
                 ("init", "-s", "10mb", "x"), ("init", "-s", "0", "x"), ("init", "-s", "1.5g", "x"), ("init", "-s", "1g"),
                 ("init", "-s", "1g", "a", "b"), ("init", "-s", "-1", "x"), ("init", "-s", "1g", "-f", "qcow2", "x"),
                 ("init", "-s", "1g", "-v", "3", "x"), ("init", "-s", "1g", "-t", "fat", "x"), ("mount", "-f", "qcow2", "x"),
                 ("init", "-s", "1g", "-b", "100", "-t", "none", "x"), ("init", "-s", "1g", "-b", "32", "-t", "none", "x"),
                 ("init", "-s", "1g", "-b", "262144", "-t", "none", "x"), ("mount", "-u", "{123}", "DiskDescriptor.xml")):
        r = ploop(*args, rc=devlib.PARAM, cwd=t.dir, limit=20)
        check(not os.listdir(t.dir), f"ploop {args} left {os.listdir(t.dir)}")
    for args in (("--help",), ("--version",), ("mount", "--help"), ("init", "--help"), ("umount", "--help"), ("list", "--help"), ("info", "--help")):
        r = ploop(*args, limit=20)
        check(r.out.strip() and not r.err.strip(), f"ploop {args}: stdout {r.out!r}, stderr {r.err!r}")
    # An unknown command runs ploop-NAME from PATH with the rest of the arguments.
    with open(t.path("ploop-frob"), "w") as f:
        f.write("#!/bin/sh\necho frob \"$@\"\nexit 7\n")
    os.chmod(t.path("ploop-frob"), 0o755)
    r = run(devlib.PLOOP, "frob", "a", "-b", rc=7, env=dict(os.environ, PATH=t.dir + ":" + os.environ["PATH"]))
    check(r.out == "frob a -b\n", f"external command: {r.out!r}")


def case_init_like_debian(t):
    """Images made without a file system equal those of 1.15 byte for byte, descriptor included (but for CIF_Empty of
    preallocated ones, which 1.15 leaves set)."""
    devlib.debian_is_debians()
    for version, bs, fmt, size in ((1, 2048, "ploop1", "1g"), (2, 64, "ploop1", "700m"), (2, 2048, "ploop1", "2100001"),
                                   (1, 128, "preallocated", "100m"), (2, 2048, "raw", "33m"),
                                   *(((2, 2048, "expanded", "1g"), (2, 131072, "ploop1", "1g"), (2, 2048, "preallocated", "100m"),
                                      (1, 64, "ploop1", "3g"), (1, 2048, "ploop1", "300g"), (2, 2048, "ploop1", "8t"),
                                      (1, 2048, "ploop1", "1t")) if devlib.FULL else ())):
        made = []
        for who in ("ours", "theirs"):
            folder = t.mkdir(f"{who}-{version}-{bs}-{fmt}-{size}")
            args = ["init", "-s", size, "-f", fmt, "-v", version, "-b", bs, "-t", "none", os.path.join(folder, "root.hdd")]
            ploop(*args) if who == "ours" else debian(*args, large=True)
            made.append(folder)
        ours, theirs = (os.path.join(f, "root.hdd") for f in made)
        a, b = os.stat(ours), os.stat(theirs)
        what = f"version {version}, cluster {bs}, {fmt}, {size}"
        check(a.st_size == b.st_size, f"{what}: {a.st_size} bytes, 1.15 makes {b.st_size}")
        check(a.st_mode == b.st_mode, f"{what}: mode {a.st_mode:o}, 1.15 makes {b.st_mode:o}")
        with open(ours, "rb") as f, open(theirs, "rb") as g:
            n = min(a.st_size, 70 * MIB)
            x, y = bytearray(f.read(n)), bytearray(g.read(n))
        if fmt == "preallocated":
            check(x[52] == 0, f"{what}: CIF_Empty is set though every cluster is mapped")
            y[52] = 0
        check(x == y, f"{what}: differs from 1.15's at byte {next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), None)}")
        dds = [open(os.path.join(f, "DiskDescriptor.xml")).read() for f in made]
        check(dds[0] == dds[1], f"{what}: descriptors differ:\n{dds[0]}\n1.15:\n{dds[1]}")
        check(sorted(n for n in os.listdir(made[0]) if not n.endswith(".lck")) == ["DiskDescriptor.xml", "root.hdd"], f"{os.listdir(made[0])}")
        if fmt != "raw":
            debian("check", "-f", "-r", ours)
        else:
            debian("check", "-f", "-r", "-R", "-b", bs, ours)
        for f in made:
            shutil.rmtree(f)


def case_init_refused(t):
    """init over something that exists: 38, and it stays as it is. 1.15 deletes it."""
    folder = t.mkdir("a")
    img = os.path.join(folder, "root.hdd")
    with open(img, "wb") as f:
        f.write(b"precious")
    for more in ([], ["-t", "none"], ["-f", "raw", "-t", "none"], ["-f", "preallocated", "-t", "none"]):
        before = listing(folder)
        ploop("init", "-s", "300m", *more, img, rc=devlib.PARAM)
        same_listing(folder, before, ())
    ploop("init", "-s", "64m", "-t", "none", os.path.join(t.mkdir("b"), "root.hdd"))
    folder = t.path("b")
    before = listing(folder)
    for name in ("root.hdd", "second.hdd"):
        for more in ([], ["-t", "none"]):
            ploop("init", "-s", "300m", *more, os.path.join(folder, name), rc=devlib.PARAM)
            same_listing(folder, before)
    os.symlink("nowhere", t.path("link"))
    ploop("init", "-s", "64m", "-t", "none", t.path("link"), rc=devlib.PARAM)
    check(os.readlink(t.path("link")) == "nowhere" and not os.path.exists(t.path("nowhere")), "a dangling link was followed")
    # Version 1 beyond its limit is refused, not wrapped.
    for size in ("3t", "2t"):
        ploop("init", "-s", size, "-v", "1", "-t", "none", t.path("big"), rc=(0, devlib.PARAM) if size == "2t" else devlib.PARAM)
    for n in os.listdir(t.dir):
        if n.startswith("big") or n.startswith("DiskDescriptor"):
            os.unlink(t.path(n))
    ploop("init", "-s", "17t", t.path("big"), rc=devlib.PARAM)
    r = ploop("init", "-s", "64m", "-t", "none", t.path("nofolder", "root.hdd"), rc=None)
    check(r.rc in (1, devlib.PARAM), f"a folder that does not exist: exit {r.rc}")
    # Too small for a partition between two clusters; nothing is left.
    folder = t.mkdir("small")
    for size in ("2m", "1m"):
        ploop("init", "-s", size, os.path.join(folder, "root.hdd"), rc=(24, devlib.PARAM))
        check(os.listdir(folder) == [], f"left behind: {os.listdir(folder)}")


def case_init_no_space(t):
    """A full host file system: an error, nothing left behind."""
    point = t.mkfs_mount("tmpfs", "40m")
    for fmt in ("preallocated", "raw"):
        ploop_rc = ploop("init", "-s", "100m", "-f", fmt, "-t", "none", os.path.join(point, "root.hdd"), rc=None)
        check(ploop_rc.rc in (1, 7, 20), f"{fmt}: exit {ploop_rc.rc}")
        check(os.listdir(point) == [], f"{fmt}: left behind: {os.listdir(point)}")


def case_init_interrupted(t):
    """init killed at any time leaves no image or descriptor under the final names, and runs again."""
    import random
    rng = random.Random(3)
    for i in range(devlib.pick(8, 25)):
        folder = t.mkdir(f"k{i}")
        img = os.path.join(folder, "root.hdd")
        p = subprocess.Popen([devlib.PLOOP, "init", "-s", "400m", img], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.random() * 0.4)
        os.killpg(p.pid, 9)
        p.wait(10)
        names = os.listdir(folder)
        if "DiskDescriptor.xml" in names:
            check("root.hdd" in names, f"a descriptor without its image: {names}")
            check(not ploopimg.validate(img, leaks_allowed=True), str(ploopimg.validate(img, leaks_allowed=True)))
            continue
        if "root.hdd" in names:
            check(not ploopimg.validate(img, leaks_allowed=True), f"unfinished under the final name: {ploopimg.validate(img, leaks_allowed=True)}")
            continue
        # A helper of the killed one may hold the folder for a moment.
        devlib.wait_for("init runs again", lambda: ploop("init", "-s", "400m", img, rc=(0, devlib.LOCK)).rc == 0, 20, 0.3)
        check(not ploopimg.validate(img, leaks_allowed=True), str(ploopimg.validate(img, leaks_allowed=True)))
        debian("check", "-f", "-r", img)


def case_init_unprivileged(t):
    """init with a file system needs neither root nor a device."""
    os.chmod(t.dir, 0o755)
    up = t.dir
    while up != "/":
        if os.stat(up).st_mode & 1 == 0:
            raise devlib.Skip(f"{up} cannot be entered by others")
        up = os.path.dirname(up)
    if not os.access(devlib.PLOOP, os.X_OK) or any(os.stat(p).st_mode & 1 == 0 for p in parents(devlib.PLOOP)):
        tool = t.path("ploop")
        shutil.copy(devlib.PLOOP, tool)
        for lib in os.listdir(devlib.LIBDIR):
            if lib.startswith("libploop.so"):
                shutil.copy(os.path.join(devlib.LIBDIR, lib), t.dir)
    else:
        tool = devlib.PLOOP
    folder = t.mkdir("user")
    os.chown(folder, 65534, 65534)
    img = os.path.join(folder, "root.hdd")
    run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", tool, "init", "-s", "300m", img)
    check(os.stat(img).st_uid == 65534, "made by somebody else")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    r = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", tool, "mount", dd, rc=None)
    check(r.rc not in (0, None) and r.err.strip(), f"mount without privileges: {r.rc} {r.err}")
    dev = t.mount(dd)
    run("e2fsck", "-fn", dev + "p1")
    t.umount(dd)


def parents(path):
    path = os.path.dirname(os.path.realpath(path))
    while path != "/":
        yield path
        path = os.path.dirname(path)


def case_codes(t):
    """Exit codes of mount, umount, info, check for what is wrong with their arguments."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "64m", "-t", "none", img)
    unknown = "{11111111-2222-4333-8444-555555555555}"
    nodd = t.path("none", "DiskDescriptor.xml")
    ploop("mount", "-u", unknown, dd, rc=devlib.NOSNAP)
    ploop("mount", nodd, rc=devlib.DISKDESCR)
    ploop("mount", t.path("none.hdd"), rc=devlib.MOUNT)
    ploop("umount", dd, rc=devlib.NOT_MOUNTED)
    ploop("umount", nodd, rc=devlib.DISKDESCR)
    ploop("umount", img, rc=devlib.PARAM)
    ploop("umount", "-m", folder, rc=devlib.PARAM)
    ploop("umount", "-d", "/dev/ploop99999", rc=devlib.DEVICE)
    ploop("info", nodd, rc=devlib.DISKDESCR)
    ploop("info", "-s", nodd, rc=devlib.DISKDESCR)
    ploop("check", nodd, rc=devlib.DISKDESCR)
    ploop("check", t.path("none.hdd"), rc=devlib.OPEN)
    ploop("check", "-u", unknown, dd, rc=devlib.NOSNAP)
    ploop("mount", "-m", t.path("no-folder"), dd, rc=devlib.PARAM)
    check(t.device_of(dd) is None, "a refused mount left its device")
    bad = t.path("bad.xml")
    for text in ("", "<a", "<?xml version='1.0'?><Parallels_disk_image/>", "\0\1\2", "<a>" * 5000):
        with open(bad, "w") as f:
            f.write(text)
        for cmd in (("mount", bad), ("info", "-s", bad), ("info", "-d", bad)):
            ploop(*cmd, rc=devlib.LOCK)
    # An image that the descriptor names is gone.
    gone = t.mkdir("gone")
    ploopimg.descriptor(os.path.join(gone, "DiskDescriptor.xml"), 131072, 2048, [(ploopimg.TOP, "root.hdd")])
    r = ploop("mount", os.path.join(gone, "DiskDescriptor.xml"), rc=devlib.MOUNT)
    check("root.hdd" in r.err, f"the missing file is not named: {r.err}")
    # Running already; the same with another component is fine, and each is ended by its own.
    dev = t.mount(dd)
    ploop("mount", dd, rc=devlib.MOUNT)
    ploop("check", dd, rc=devlib.IN_USE)
    r = ploop("mount", img, rc=None)
    check(r.rc in (devlib.IN_USE, devlib.MOUNT), f"a second writer by path: {r.rc}")
    two = t.mount("-r", "-c", "backup", "-u", ploopimg.TOP, dd, rc=None)
    log(f"the running top read-only for a component: {two if isinstance(two, str) else two.rc}")
    if isinstance(two, str):
        line = [l for l in ploop("list").out.splitlines() if l.startswith(os.path.basename(two) + " ")][0]
        check(line.endswith(" backup"), f"no component in: {line!r}")
        t.umount("-c", "backup", dd)
    check(t.device_of(dd) == dev, "the wrong device was taken away")
    # In use by somebody: busy, nothing changed.
    fd = os.open(dev, os.O_RDONLY)
    begin = time.monotonic()
    run("mkfs.ext4", "-q", "-F", dev)
    point = t.mkdir("busy")
    t.user_mount(dev, point)
    holder = open(os.path.join(point, "held"), "w")
    r = ploop("umount", "-d", dev, rc=None, limit=120)
    check(r.rc == 22, f"umount of a busy device: {r.rc} {r.err}")
    check(devlib.is_mounted(point) and t.device_of(dd) == dev, "a failed umount changed something")
    holder.write("still works")
    holder.close()
    os.close(fd)
    t.umount("-d", dev)
    check(not devlib.is_mounted(point), "still mounted")


def case_lock(t):
    """A descriptor locked by somebody else: 23 after 60 seconds; the byte ranges of the newer line are respected."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "64m", "-t", "none", img)
    with open(dd + ".lck", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        begin = time.monotonic()
        p = subprocess.Popen([devlib.PLOOP, "info", "-s", dd], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(1.5)
        check(p.poll() is None, "the lock was not waited for")
        fcntl.flock(f, fcntl.LOCK_UN)
        out = p.communicate(timeout=10)[0]
        check(p.returncode == 0 and "blocksize" in out, f"after the lock fell: {p.returncode} {out}")
        if not devlib.FULL:
            return
        fcntl.flock(f, fcntl.LOCK_EX)
        begin = time.monotonic()
        r = ploop("mount", dd, rc=devlib.LOCK, limit=90)
        took = time.monotonic() - begin
        check(55 <= took <= 75, f"gave up after {took:.0f} s, 60 wanted")


def case_outputs(t):
    """info, info -s, info -d and list, to the byte."""
    folder = t.mkdir("img dir")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "1g", img)
    r = ploop("info", "-s", dd)
    check(r.out.endswith("size:\t\t2097152\nblocksize:\t2048\nfmt_version:\t2\n"), f"info -s: {r.out!r}")
    r = ploop("info", "-d", dd)
    check(r.out.endswith("device:\t\t\n"), f"info -d of a disk that does not run: {r.out!r}")
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    name = os.path.basename(dev)
    r = ploop("info", "-d", dd)
    check(r.out.endswith(f"device:\t\t{dev}\n"), f"info -d: {r.out!r}")
    r = ploop("info", "-s", "-d", dd)
    check(r.out.endswith(f"fmt_version:\t2\ndevice:\t\t{dev}\n"), f"info -s -d: {r.out!r}")
    r = ploop("info", dd)
    lines = r.out.splitlines()[-3:]
    st = os.statvfs(point)
    size = st.f_blocks * st.f_frsize >> 10
    used = (st.f_blocks - st.f_bfree) * st.f_frsize >> 10
    check(lines[0] == "   resource           Size           Used", f"info: {lines[0]!r}")
    check(lines[1] == "  1k-blocks %14d %14d" % (size, used), f"info: {lines[1]!r}, df says {size} and {used}")
    check(lines[2] == "     inodes %14d %14d" % (st.f_files, st.f_files - st.f_ffree), f"info: {lines[2]!r}")
    line = [l for l in ploop("list").out.splitlines() if l.startswith(name + " ")]
    check(line == [f"{name:<12} {img}  "], f"list: {line}")
    line = [l for l in ploop("list", "-a").out.splitlines() if l.startswith(name + " ")]
    check(line == [f"{name:<12} {img} {point} "], f"list -a: {line}")
    t.umount(dd)
    check(os.path.getsize(os.path.join(folder, ".statfs")) == 40, ".statfs is not 40 bytes")
    r = ploop("info", dd)
    check(r.out.splitlines()[-2] == lines[1].replace(lines[1].split()[2], r.out.splitlines()[-2].split()[2]), f"info from .statfs: {r.out}")
    t.mount("-m", point, dd)
    check(not os.path.exists(os.path.join(folder, ".statfs")), ".statfs outlived a mount")
    t.umount("-m", point)
    # Levels: -v0 and lower print nothing but results.
    r = ploop("-v-1", "info", "-s", dd)
    check(r.out == "size:\t\t2097152\nblocksize:\t2048\nfmt_version:\t2\n", f"-v-1 info -s: {r.out!r}")


def case_mount_options(t):
    """-o, -t, -F, -d, -c, -b, -f raw, selectors of umount."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "300m", "-n", "-B", "1024", img)
    point = t.mkdir("mnt")
    dev = t.mount("-F", "-t", "ext4", "-o", "noatime,nodev", "-m", point, "-c", "me", dd)
    with open("/proc/mounts") as f:
        options = [l.split()[3] for l in f if l.split()[1] == point][0].split(",")
    check("noatime" in options and "nodev" in options, f"options {options}")
    r = run("dumpe2fs", "-h", dev + "p1")
    check(re.search(r"Block size:\s+1024", r.out), "-B 1024 was not used")
    ploop("umount", dd, rc=devlib.NOT_MOUNTED)
    t.umount("-c", "me", dd)
    dev = t.mount("-d", "/dev/ploop4711", dd)
    check(dev == "/dev/ploop4711", f"-d: {dev}")
    ploop("umount", "-d", "/dev/ploop4711p1")
    check(not os.path.exists(dev), "umount by the partition's name left the device")
    dev = t.mount(img)
    t.umount(img)
    check(not os.path.exists(dev), "umount by the base file left the device")
    raw = t.path("disk.raw")
    with open(raw, "wb") as f:
        f.truncate(64 * MIB)
    ploop("mount", raw, rc=None)
    check(t.device_of(raw) is None, "a raw file was taken for an image without -f raw")
    dev = t.mount("-f", "raw", "-b", 2048, raw)
    d = devlib.Direct(dev)
    d.write(MIB, b"r" * 4096)
    d.sync()
    d.close()
    t.umount("-d", dev)
    with open(raw, "rb") as f:
        f.seek(MIB)
        check(f.read(4096) == b"r" * 4096, "the raw file did not get the write")
    r = ploop("mount", "-f", "raw", "-b", 2048, img, rc=None)
    if r.rc == 0:
        t.umount(img)
    check(r.rc != 0, "-f raw on a file with a ploop signature was not refused")


def case_disk_named(t):
    """A disk given by its folder, stub, mount point or device; one that was moved while it runs; what is said of a disk that is
    only attached, and of a folder that is taken."""
    os.umask(0)
    folder, point = t.mkdir("a.hdd"), t.mkdir("mnt")
    img, dd, stub = (os.path.join(folder, name) for name in ("root.hds", "DiskDescriptor.xml", "a.hdd"))
    ploop("init", "-s", "64m", img)
    open(stub, "w").close()
    check(os.stat(dd).st_mode & 0o777 == 0o644, f"mode of the descriptor under umask 0: {os.stat(dd).st_mode:o}")
    for given in (folder, stub):
        dev = t.mount("-m", point, given)
        check(t.device_of(dd) == dev and ploop("info", "-d", given).out.split()[-1] == dev, f"not mounted by {given}")
        r = ploop("mount", dd, rc=devlib.MOUNT)
        check("mounted already" in r.err, r.err)
        t.umount(point)
    dev = t.mount(folder)
    r = ploop("mount", dd, rc=devlib.MOUNT)
    check("attached already" in r.err, r.err)
    t.umount(dev)
    dev = t.mount(folder)
    # Moved while it runs.
    moved = t.path("b.hdd")
    os.rename(folder, moved)
    line = [line for line in ploop("list").out.splitlines() if line.startswith(os.path.basename(dev) + " ")]
    check(line and line[0].split()[1] == os.path.join(moved, "root.hds"), f"list after a move: {line}")
    t.umount(moved)
    # Another disk on the same folder.
    ploop("init", "-s", "64m", t.path(t.mkdir("c"), "root.hds"))
    first = t.mount("-m", point, moved)
    r = ploop("mount", "-m", point, t.path("c"))
    check(f"{point} is the mount point of {first} already" in r.err, f"not told what is hidden: {r.err}")
    t.umount(t.path("c"))
    t.umount(moved)
    # A temporary snapshot is unmounted by the name that it was given.
    ploop("tsnapshot", "-u", "{11111111-2222-4333-8444-555555555555}", "-c", "bk", moved)
    t.umount("-c", "bk", moved)
    r = ploop("umount", t.mkdir("nothing"), rc=devlib.PARAM)
    check("no DiskDescriptor.xml" in r.err, r.err)
    # The descriptor names the image where it was.
    with open(os.path.join(moved, "DiskDescriptor.xml")) as f:
        text = f.read()
    with open(os.path.join(moved, "DiskDescriptor.xml"), "w") as f:
        f.write(text.replace("<File>root.hds<", f"<File>{img}<"))
    r = ploop("mount", moved, rc=devlib.MOUNT)
    check(img in r.err and "lies beside the descriptor" in r.err, r.err)


def case_json(t):
    """--json of list, info -d and doctor says what their text says."""
    folder, point = t.mkdir("img"), t.mkdir("mnt")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "64m", os.path.join(folder, "root.hds"))
    dev = t.mount("-m", point, dd)

    def object_of(schema, *args, rc=0):
        found = json.loads(run(devlib.PLOOP, *args, "--json", rc=rc).out)
        check(found["schema"] == schema, f"{args}: schema {found['schema']}")
        return found

    line = [d for d in object_of("ploop-list-1", "list")["devices"] if d["node"] == dev]
    check(line == [{"name": dev[5:], "node": dev, "base": os.path.join(folder, "root.hds"), "mount_points": [point], "component": "",
                    "state": "running", "deleted": [], "merging": None}], f"list: {line}")
    check(object_of("ploop-info-1", "info", "-d", dd)["device"] == dev, "info -d")
    fs = object_of("ploop-info-1", "info", dd)
    check(fs["blocks"] * fs["block_size"] < 64 * MIB and 0 < fs["free_inodes"] < fs["inodes"], f"info: {fs}")
    check(object_of("ploop-check-1", "check", dd, rc=devlib.IN_USE)["status"] == devlib.IN_USE, "check of a running disk")
    doctor = object_of("ploop-doctor-1", "doctor", rc=(0, 1))
    check(any(dev[5:] in f["subject"] + f["text"] and f["grade"] == "good" for f in doctor["devices"]), f"doctor: {doctor['devices']}")
    t.umount(dd)
    check(object_of("ploop-info-1", "info", "-d", dd)["device"] is None, "info -d of an unmounted disk")


def case_partitions(t):
    """Which partition is mounted: of a GPT and of an MBR, the first one without a file system, one by number; a disk that was cut."""
    folder, point = t.mkdir("img"), t.mkdir("mnt")
    img, dd = os.path.join(folder, "root.hds"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "300m", "-t", "none", img)
    sizes = (("1MiB", "17MiB"), ("17MiB", "81MiB"), ("81MiB", "281MiB"))
    for label in ("gpt", "msdos"):
        dev = t.mount(dd)
        parts = [word for i, ends in enumerate(sizes) for word in ("mkpart", "primary" if label == "msdos" else f"p{i}", *ends)]
        run("parted", "-s", dev, "mklabel", label, *parts)
        t.umount(dd)
        # The server gives the kernel the partitions that it has no parser for.
        dev = t.mount(dd)
        for n in (1, 2, 3):
            devlib.wait_for(f"partition {n}", lambda n=n: os.path.exists(f"{dev}p{n}"), 5)
            run("wipefs", "-aq", f"{dev}p{n}")
        for n in (2, 3):
            run("mkfs.ext4", "-q", "-F", f"{dev}p{n}")
        t.umount(dd)
        for options, want in (((), 3), (("-p", "2"), 2)) if label == "gpt" else ((("--partition", "2"), 2),):
            dev = t.mount("-m", point, *options, dd)
            with open("/proc/mounts") as f:
                seen = [line.split()[0] for line in f if line.split()[1] == point]
            check(seen == [f"{dev}p{want}"], f"{label}, {options}: {seen} is mounted")
            t.umount(dd)
        r = ploop("mount", "-m", point, "-p", "4", dd, rc=devlib.PARAM)
        check("no partition 4" in r.err and "2 (64 MiB, ext4)" in r.err and "1 (16 MiB, no file system" in r.err, r.err)
        check(t.device_of(dd) is None, "a refused mount left its device")
    # Cut: the table at the front names what is not there any more.
    raw = t.path("disk.raw")
    with open(raw, "wb") as f:
        f.truncate(64 * MIB)
    run("parted", "-s", raw, "mklabel", "gpt", "mkpart", "a", "40MiB", "60MiB")
    os.truncate(raw, 32 * MIB)
    begin = time.monotonic()
    r = ploop("mount", "-f", "raw", "-b", 2048, "-m", point, raw, rc=devlib.DEVICE)
    check("cut off" in r.err, r.err)
    check(time.monotonic() - begin < 2.5, f"a cut disk was refused after {time.monotonic() - begin:.1f} s")


def case_not_supported(t):
    """Encryption, volumes and stages of a reverse merge are refused by name, not ignored."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd, paths = ploopimg.write_chain(folder, 2, 2, 2048, 64 * 2048)
    img = paths[-1]
    plain = open(dd).read()
    was = devlib.identity(img)
    for word, old, new in (("ncrypt", "<Padding>0</Padding>", "<Padding>0</Padding><Encryption><KeyId>k1</KeyId></Encryption>"),
                           ("olume", "<StorageData>", "<StorageData><Volume><Parent>../p</Parent><SnapshotGUID>{11111111-2222-4333-8444-555555555555}</SnapshotGUID></Volume>"),
                           ("TemporaryZero", "</ParentGUID>", "</ParentGUID><TemporaryZero/>")):
        with open(dd, "w") as f:
            f.write(plain.replace(old, new, 1))
        r = ploop("mount", dd, rc=None)
        if r.rc == 0:
            t.umount(dd)
        check(r.rc != 0, f"{new} was ignored")
        check(word in r.err, f"not named: {r.err}")
        devlib.unchanged(img, was, atime=False)


def case_strangers_descriptor(t):
    """A descriptor from a stranger: links, devices and files of others are not opened."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "64m", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    plain = open(dd).read()
    outside = t.path("outside.hdd")
    shutil.copy(img, outside)
    os.chown(outside, 12345, 12345)
    fifo = os.path.join(folder, "fifo")
    os.mkfifo(fifo)
    os.symlink(outside, os.path.join(folder, "link"))
    for name in ("link", "fifo", "../outside.hdd", outside, "/dev/null", "/dev/zero", "."):
        with open(dd, "w") as f:
            f.write(plain.replace("<File>root.hdd</File>", f"<File>{name}</File>"))
        for more in ([], ["-r"]):
            r = ploop("mount", *more, dd, rc=None, limit=20)
            if r.rc == 0:
                t.umount(dd)
            check(r.rc != 0, f"an image called {name} was opened")
    with open(dd, "w") as f:
        f.write('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "/etc/passwd"><!ENTITY y "&x;&x;&x;">]>' + plain.split("?>", 1)[1].replace("root.hdd", "&x;"))
    ploop("mount", dd, rc=devlib.LOCK)


def case_tour(t):
    """The tour runs whole and leaves nothing."""
    r = ploop("tour", limit=300, env=dict(os.environ, TMPDIR=t.dir))
    for word in ("init", "mount", "umount"):
        check(word in r.out, f"the tour shows no {word}: {r.out}")
    check(os.listdir(t.dir) == [], f"left behind: {os.listdir(t.dir)}")
    log(r.out)


def case_queue(t):
    """Whether the disk rotates is that of the disk under the image, on a file system of any kind."""
    disk = t.path("host.img")
    with open(disk, "wb") as f:
        f.truncate(200 << 20)
    loop = run("losetup", "-f", "--show", disk).out.strip()
    t.later(lambda: run("losetup", "-d", loop, rc=None))
    point = t.mkdir("host")
    run("mkfs.btrfs", "-q", loop)
    run("mount", loop, point)
    t.later(lambda: run("umount", point, rc=None))
    for rotates in ("1", "0"):
        with open(f"/sys/block/{loop[5:]}/queue/rotational", "w") as f:
            f.write(rotates)
        folder = os.path.join(point, "r" + rotates)
        os.mkdir(folder)
        ploop("init", "-s", "32m", "-t", "none", os.path.join(folder, "root.hdd"))
        dd = os.path.join(folder, "DiskDescriptor.xml")
        dev = t.mount(dd)
        shown = f"/sys/block/{devlib.record(dev)['backing']}/queue/rotational"
        devlib.wait_for(f"rotational {rotates}", lambda: open(shown).read().strip() == rotates, 5)
        t.umount(dd)


def case_held(t):
    """What stands on the device is named before anything is changed; a wait for what is busy ends with a signal."""
    folder, point = t.mkdir("img"), t.mkdir("mnt")
    ploop("init", "-s", "64m", os.path.join(folder, "root.hdd"))
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount("-m", point, dd)
    loop = run("losetup", "-f", "--show", "-r", dev + "p1").out.strip()
    t.later(lambda: run("losetup", "-d", loop, rc=None))
    for _ in range(2):
        begin = time.monotonic()
        r = ploop("umount", dd, rc=devlib.UMOUNT)
        check(time.monotonic() - begin < 10, "the holder is waited for")
        check(loop in r.err and "losetup -d" in r.err and "nothing was changed" in r.err, f"the message: {r.err}")
        check(devlib.mount_source(point), "the file system is unmounted, though the device cannot be detached")
    run("losetup", "-d", loop)
    devlib.wait_for(f"{loop} is gone", lambda: not os.path.exists(f"/sys/block/{loop[5:]}/loop/backing_file"), 10)
    run("umount", point)
    # A process that has the device open exclusively, as mkfs has.
    held = os.open(dev, os.O_RDONLY | os.O_EXCL)
    p = subprocess.Popen([devlib.PLOOP, "umount", dd], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.5)
    check(p.poll() is None, "a busy device is not waited for")
    p.send_signal(signal.SIGTERM)
    check(p.wait(10) == 143, f"the status after SIGTERM: {p.returncode}")
    # The supervisor learns it, and the device stays as it is.
    time.sleep(1)
    os.close(held)
    time.sleep(0.5)
    check(dev in ploop("info", "-d", dd).out and os.path.exists(dev + "p1"), "the device is gone after its umount was ended")
    t.umount(dd)


if __name__ == "__main__":
    devlib.main()
