#!/usr/bin/env python3
"""Temporary snapshots: mounted for a backup beside the running disk, gone when nobody uses them; by the command and by the
C function with a holder."""
import ctypes
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import MOUNT, PARAM, check, ploop, run  # noqa: E402
from snaptree import TOP, Tree  # noqa: E402

A, B, C = ("{aaaaaaaa-0000-4000-8000-00000000000%d}" % n for n in range(3))


def disk(t, name):
    folder = t.mkdir(name)
    ploop("init", "-s", "256m", os.path.join(folder, "root.hdd"))
    return os.path.join(folder, "DiskDescriptor.xml"), t.mkdir(name + ".mnt"), t.mkdir(name + ".old")


def put(folder, name, text):
    with open(os.path.join(folder, name), "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def get(folder, name):
    with open(os.path.join(folder, name)) as f:
        return f.read()


def case_command(t):
    dd, mnt, old = disk(t, "disk")
    dev = t.mount("-m", mnt, dd)
    put(mnt, "file", "before")
    r = ploop("tsnapshot", "-u", A, "-c", "backup", "-m", old, dd)
    t.later(lambda: ploop("umount", "-c", "~backup", dd, rc=None))
    node = t.device_of(dd, "~backup")
    check(node and node in r.out, f"the device {node} is not in the output: {r.out}")
    put(mnt, "file", "after")
    check(get(old, "file") == "before" and get(mnt, "file") == "after", "the snapshot changed")
    check(Tree(dd).temporary == {A}, f"temporary: {Tree(dd).temporary}")
    # In use it stays, whatever is done to the disk meanwhile; and nobody switches to it or has it twice.
    ploop("snapshot", "-u", B, dd)
    check(A in Tree(dd).parents, "a mounted temporary snapshot was merged")
    ploop("tsnapshot", "-u", A, "-c", "other", dd, rc=PARAM)
    check(get(old, "file") == "before", "the snapshot changed")
    frozen = Tree(dd).files[A]
    before = devlib.identity(frozen)
    put(mnt, "more", "x" * 1000000)
    devlib.unchanged(frozen, before, atime=False)
    t.umount("-c", "~backup", dd)
    # The next operation takes it away.
    ploop("snapshot", "-u", C, dd)
    check(set(Tree(dd).parents) == {B, C, TOP}, f"the tree is {Tree(dd).parents}")
    check(get(mnt, "file") == "after" and len(get(mnt, "more")) == 1000000, "the disk changed")
    t.umount("-m", mnt)
    ploop("check", dd)
    check(not devlib.is_mounted(mnt) and t.device_of(dd) is None and dev, "the disk is still there")


class Param(ctypes.Structure):
    _fields_ = [("guid", ctypes.c_char_p), ("component_name", ctypes.c_char_p), ("target", ctypes.c_char_p),
                ("device", ctypes.c_char * 64), ("snap_dir", ctypes.c_char_p), ("dummy", ctypes.c_char * 32)]


def case_holder(t):
    """The snapshot lives while the caller's descriptor is open, also when the caller's child has inherited nothing."""
    check(ctypes.sizeof(Param) == 128, f"struct of {ctypes.sizeof(Param)} bytes")
    dd, mnt, old = disk(t, "disk")
    t.mount("-m", mnt, dd)
    put(mnt, "file", "before")
    lib = ctypes.CDLL(os.path.join(devlib.LIBDIR, "libploop.so"))
    lib.ploop_get_last_error.restype = ctypes.c_char_p
    di = ctypes.c_void_p()
    check(lib.ploop_open_dd(ctypes.byref(di), dd.encode()) == 0, "ploop_open_dd")
    elsewhere = t.mkdir("elsewhere")
    param = Param(guid=A.encode(), component_name=b"backup", target=old.encode(), snap_dir=elsewhere.encode())
    fd = ctypes.c_int(-1)
    rc = lib.ploop_create_temporary_snapshot(di, ctypes.byref(param), ctypes.byref(fd))
    check(rc == 0, f"ploop_create_temporary_snapshot: {rc}: {lib.ploop_get_last_error()}")
    t.later(lambda: ploop("umount", "-d", param.device.decode(), rc=None))
    check(fd.value >= 0 and os.path.exists(param.device.decode()), f"holder {fd.value}, device {param.device}")
    check(os.get_inheritable(fd.value) is False, "the holder would be inherited")
    check(len(os.listdir(elsewhere)) == 1, "the new delta is not where it was asked for")
    put(mnt, "file", "after")
    check(get(old, "file") == "before", "the snapshot changed")
    run("umount", old)
    # Held by the descriptor alone.
    ploop("snapshot", "-u", B, dd)
    check(A in Tree(dd).parents, "a held snapshot was merged")
    os.close(fd.value)
    ploop("snapshot", "-u", C, dd)
    check(A not in Tree(dd).parents, f"a snapshot that nobody holds is still there: {Tree(dd).parents}")
    check(t.device_of(dd, "backup") is None, "its device is still there")
    check(get(mnt, "file") == "after", "the disk changed")
    lib.ploop_close_dd(di)
    t.umount("-m", mnt)
    ploop("check", dd)


def case_failure(t):
    """A mount that cannot be made takes the snapshot back."""
    dd, mnt, _ = disk(t, "disk")
    t.mount("-m", mnt, dd)
    before = Tree(dd).parents
    r = ploop("tsnapshot", "-u", A, "-c", "backup", "-m", os.path.join(t.dir, "nowhere"), dd, rc=None)
    check(r.rc in (PARAM, MOUNT), f"exit {r.rc}")
    check(Tree(dd).parents == before, f"the tree is {Tree(dd).parents}")
    put(mnt, "file", "x")
    t.umount("-m", mnt)
    ploop("check", dd)


if __name__ == "__main__":
    devlib.main()
