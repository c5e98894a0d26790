#!/usr/bin/env python3
"""Users of the library that were not compiled for it: Python by ctypes alone, and what legacy vzctl does, by dlopen()."""
import ctypes
import errno
import os
import sys
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_uint, c_ulonglong, c_void_p

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, run  # noqa: E402

MIB = 1 << 20
SO = os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so"))
SNAPSHOT = b"{11111111-2222-3333-4444-555555555555}"


class CreateParam(Structure):
    _fields_ = [("size", c_ulonglong), ("mode", c_int), ("image", c_char_p), ("fstype", c_char_p), ("without_partition", c_int),
                ("blocksize", c_uint), ("fsblocksize", c_uint), ("fmt_version", c_int), ("flags", c_uint), ("dummy", c_char * 32)]


class MountParam(Structure):
    _fields_ = [("device", c_char * 64), ("ro", c_int), ("flags", c_int), ("unused1", c_int), ("fstype", c_char_p),
                ("target", c_char_p), ("guid", c_char_p), ("quota", c_int), ("mount_data", c_char_p), ("blocksize", c_uint),
                ("fsck", c_int), ("fsck_rc", c_int), ("dummy", c_char * 32)]


class SnapshotParam(Structure):
    _fields_ = [("guid", c_char_p), ("snap_dir", c_char_p), ("dummy", c_char * 32)]


class MergeParam(Structure):
    _fields_ = [("unused1", c_int), ("merge_all", c_int), ("guid", c_char_p), ("guid2", c_char_p), ("new_delta", c_char_p),
                ("dummy", c_char * 32)]


class ImageData(Structure):
    _fields_ = [("guid", c_char_p), ("file", c_char_p)]


class Disk(Structure):
    _fields_ = [("size", c_ulonglong), ("heads", c_uint), ("cylinders", c_uint), ("sectors", c_uint), ("mode", c_int),
                ("nimages", c_int), ("images", POINTER(POINTER(ImageData))), ("top_guid", c_char_p), ("nsnapshots", c_int),
                ("snapshots", c_void_p), ("runtime", c_void_p), ("blocksize", c_uint), ("max_delta_size", c_ulonglong),
                ("dummy", c_char * 32)]


def load():
    """Once in a process: the device's server is the one beside the library."""
    os.environ["PLOOP_SERVER"] = os.path.join(devlib.LIBDIR, "ploop-server")
    lib = ctypes.CDLL(SO)
    lib.ploop_get_last_error.restype = c_char_p
    lib.ploop_find_parent_by_guid.restype = c_char_p
    lib.ploop_close_dd.restype = None
    lib.ploop_set_max_delta_size.argtypes = [POINTER(Disk), c_ulonglong]
    for struct, size in ((CreateParam, 88), (MountParam, 168), (SnapshotParam, 48), (MergeParam, 64), (Disk, 120)):
        check(ctypes.sizeof(struct) == size, f"{struct.__name__} has {ctypes.sizeof(struct)} bytes, {size} wanted")
    return lib


def must(lib, rc, what, wanted=0):
    check(rc == wanted, f"{what}: {rc} instead of {wanted}: {lib.ploop_get_last_error().decode()}")


@devlib.limit(240)
def case_python(t):
    """Create, mount, snapshot, merge, unmount, with ctypes and no compiled part; and the limit of the top delta."""
    lib = load()
    folder, mnt = t.mkdir("disk"), t.mkdir("mnt")
    image = os.path.join(folder, "root.hds")
    must(lib, lib.ploop_create_image(byref(CreateParam(size=256 * 2048, image=image.encode(), fstype=b"ext4"))), "create")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    disk = POINTER(Disk)()
    must(lib, lib.ploop_open_dd(byref(disk), dd.encode()), "open")
    param = MountParam(target=mnt.encode())
    must(lib, lib.ploop_mount_image(disk, byref(param)), "mount")
    t.drop_later(param.device.decode())
    sums = devlib.fill_tree(mnt, 1, 8 * MIB)
    must(lib, lib.ploop_create_snapshot(disk, byref(SnapshotParam(guid=SNAPSHOT))), "snapshot")
    check(disk.contents.nimages == 2, f"{disk.contents.nimages} images")
    check(lib.ploop_find_parent_by_guid(disk, disk.contents.top_guid) == SNAPSHOT, "the snapshot is no parent of the top")
    top = disk.contents.images[1].contents.file.decode()

    # The top's file has clusters of 1 MiB: the header and ten more.
    must(lib, lib.ploop_set_max_delta_size(disk, 11 * 2048), "limit")
    check(disk.contents.max_delta_size == 11 * 2048, f"{disk.contents.max_delta_size} in the object")
    # The next worker has it from the one before.
    old = devlib.record(param.device.decode())["worker"]["pid"]
    devlib.kill(old)
    devlib.running_worker(param.device.decode(), old)
    error = write_until_refused(mnt)
    check(error == errno.EIO, f"beyond the limit a write fails with {error}")
    must(lib, lib.ploop_umount_image(disk), "unmount")
    # What was allocated ahead is cut off.
    check(os.path.getsize(top) <= 11 * MIB, f"the top's file has {os.path.getsize(top)} bytes")

    def mount(fsck):
        param = MountParam(target=mnt.encode(), fsck=fsck)
        must(lib, lib.ploop_mount_image(disk, byref(param)), "mount")
        t.drop_later(param.device.decode())

    must(lib, lib.ploop_set_max_delta_size(disk, 0), "no limit, while it does not run")
    mount(1)
    must(lib, lib.ploop_umount_image(disk), "unmount")
    must(lib, lib.ploop_set_max_delta_size(disk, os.path.getsize(top) // 512 + 2048), "a cluster more")
    mount(0)
    error = write_until_refused(mnt)
    check(error == errno.EIO, f"after a mount, beyond the limit a write fails with {error}")
    must(lib, lib.ploop_set_max_delta_size(disk, 0), "no limit, while it runs")
    must(lib, lib.ploop_umount_image(disk), "unmount")
    mount(1)
    devlib.compare_tree(mnt, sums)

    must(lib, lib.ploop_merge_snapshot(disk, byref(MergeParam())), "merge")
    check(disk.contents.nimages == 1 and not os.path.exists(top), f"{disk.contents.nimages} images after the merge")
    devlib.compare_tree(mnt, sums)
    must(lib, lib.ploop_umount_image(disk), "unmount")
    must(lib, lib.ploop_umount_image(disk), "unmount once more", devlib.NOT_MOUNTED)
    lib.ploop_close_dd(disk)
    t.judges(image)


def write_until_refused(folder):
    """The error of the write that fails; the file stays."""
    fd = os.open(os.path.join(folder, "large"), os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(32):
            os.write(fd, os.urandom(MIB))
            os.fsync(fd)
        return 0
    except OSError as e:
        return e.errno
    finally:
        os.close(fd)


def program(t, source, *libs):
    """A C program on our headers, and the environment in which it loads our library."""
    lib = t.mkdir("lib")
    for name in ("libploop.so.1", "libploop.so"):
        if not os.path.lexists(os.path.join(lib, name)):
            os.symlink(SO, os.path.join(lib, name))
    out = t.path(os.path.basename(source)[:-2])
    run("cc", "-std=gnu99", "-O1", "-Wall", "-I", os.path.join(devlib.ROOT, "include"), "-o", out,
        os.path.join(devlib.ROOT, "capi-tests", source), "-L", lib, *libs, "-ldl", "-lpthread", limit=120)
    env = dict(os.environ, LD_LIBRARY_PATH=lib, PLOOP_SERVER=os.path.join(devlib.LIBDIR, "ploop-server"), PLOOP_TEST_LIBRARY=SO)
    return out, env


@devlib.limit(300)
def case_vzctl4(t):
    """vzctl4.c: the calls of vzctl 4.x, in a thread that unloads the library, and with SIGCHLD ignored."""
    out, env = program(t, "vzctl4.c")
    for way in devlib.pick(("thread", "ignore"), ("plain", "thread", "ignore")):
        folder = t.mkdir(way)
        log(run(out, folder, SO, way, limit=120, env=env).out)
        check(t.device_of(os.path.join(folder, "root.hdd", "DiskDescriptor.xml")) is None, f"{way}: the program left a device")
        t.judges(os.path.join(folder, "root.hdd", "root.hdd"))


@devlib.limit(devlib.pick(120, 900))
def case_rounds(t):
    """rounds.c: descriptors and memory are the same after many objects and mounts."""
    out, env = program(t, "args/rounds.c", "-lploop")
    log(run(out, t.mkdir("disk"), devlib.pick(20, 1000), devlib.pick(5, 200), limit=devlib.pick(100, 850), env=env).out)


if __name__ == "__main__":
    devlib.main()
