#!/usr/bin/env python3
"""A full host file system: writes wait, reads go on, nothing is lost; space, a limit or umount ends the wait."""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402

MIB = 1 << 20

WRITER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
b = mmap.mmap(-1, 1 << 20)
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    b[:] = bytes([i % 251 + 1]) * (1 << 20)
    os.pwrite(fd, b, i << 20)
    print(i, flush=True)
os.fsync(fd)
print("synced", flush=True)
"""


def full_host(t, kind, env=None):
    """A device whose host file system is full, and a writer that waits. (device, descriptor, ballast, writer)"""
    host = t.mkfs_mount(kind, 600 * MIB, name=kind)
    img = os.path.join(host, "root.hdd")
    ploop("init", "-s", "400m", "-t", "none", img)
    dd = os.path.join(host, "DiskDescriptor.xml")
    dev = t.mount(dd, env=env)
    ballast = os.path.join(host, "ballast")
    space = os.statvfs(host)
    free = space.f_bavail * space.f_frsize
    run("fallocate", "-l", str(free - 60 * MIB), ballast)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, dev, "0", "300"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    t.later(lambda: writer.poll() is None and (writer.kill(), writer.wait(30)))
    devlib.wait_for("the writer waits for space", lambda: waits(dev), 60, 0.2)
    return dev, dd, ballast, writer


def waits(dev):
    return "no-space" in run("timeout", "10", devlib.PLOOP, "list", rc=None, quiet=True).out


def case_space_ends_it(t):
    for kind in ("ext4", "xfs"):
        dev, dd, ballast, writer = full_host(t, kind)
        time.sleep(2)
        check(writer.poll() is None, "the writer got an answer though there is no space")
        check("no-space" in run(devlib.PLOOP, "doctor", rc=None).text, "doctor says nothing")
        d = devlib.Direct(dev, write=False)
        start = time.monotonic()
        for i in range(5):
            check(bytes(d.read(i * MIB, MIB)) == bytes([i % 251 + 1]) * MIB, f"MiB {i} is wrong")
        log(f"{kind}: 5 MiB read in {time.monotonic() - start:.2f} s while writes wait")
        d.close()
        os.unlink(ballast)
        out, err = writer.communicate(timeout=90)
        check(writer.returncode == 0 and out.endswith("synced\n"), f"the writer failed: {err[-300:]}")
        devlib.wait_for("the state goes when there is space", lambda: not waits(dev), 10)
        d = devlib.Direct(dev, write=False)
        for i in range(300):
            check(bytes(d.read(i * MIB, MIB)) == bytes([i % 251 + 1]) * MIB, f"MiB {i} is wrong")
        d.close()
        t.umount(dd)
        t.judges(os.path.join(os.path.dirname(dd), "root.hdd"))
        t._umount_host(os.path.dirname(dd))


def case_a_limit_ends_it(t):
    env = dict(os.environ, PLOOP_ENOSPC_TIMEOUT="3")
    dev, dd, ballast, writer = full_host(t, "ext4", env)
    start = time.monotonic()
    out, err = writer.communicate(timeout=60)
    check(writer.returncode != 0 and "OSError" in err, f"the writer should have failed: {out[-100:]} {err[-300:]}")
    log(f"failed {time.monotonic() - start:.1f} s after the state was seen")
    last = len(out.split())
    d = devlib.Direct(dev, write=False)
    for i in range(last):
        check(bytes(d.read(i * MIB, MIB)) == bytes([i % 251 + 1]) * MIB, f"MiB {i} is wrong")
    d.close()
    t.umount(dd)


def case_umount_ends_it(t):
    dev, dd, ballast, writer = full_host(t, "ext4")
    # The writer has the device open: not unmounted, but not held for ever either.
    said = ploop("umount", dd, rc=None, limit=120)
    writer.communicate(timeout=60)
    check(writer.returncode != 0, "the writer should have failed")
    if said.rc:
        t.umount(dd, limit=120)
    check(not os.path.exists(dev), "the device is still there")


if __name__ == "__main__":
    devlib.main()
