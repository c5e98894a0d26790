#!/usr/bin/env python3
"""A stale name is never trusted: after a crash another loop device takes the number, and nobody touches the stranger."""
import os
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

MIB = 1 << 20


def statistics(loop):
    """Reads, sectors read, writes, sectors written, discards of a block device so far."""
    with open(f"/sys/block/{loop}/stat") as f:
        w = [int(x) for x in f.read().split()]
    return {"reads": w[0], "sectors read": w[2], "writes": w[4], "sectors written": w[6], "discards": w[11] if len(w) > 11 else 0}


def crash(t, dev, loop):
    """Both servers die at one instant, and an administrator frees the loop device."""
    rec = devlib.running_worker(os.path.basename(dev))
    pids = [rec["supervisor"]["pid"], rec["worker"]["pid"]]
    for p in pids:
        os.kill(p, signal.SIGSTOP)
    for p in pids:
        os.kill(p, signal.SIGKILL)
    devlib.wait_for("both are gone", lambda: not any(devlib.alive(rec[w]) for w in ("supervisor", "worker")), 10)
    run("losetup", "-d", f"/dev/{loop}", limit=20)
    devlib.wait_for(f"{loop} is free", lambda: not os.path.exists(f"/sys/block/{loop}/loop/backing_file"), 10)
    return rec


def scene(t, with_filesystem):
    """A dead device whose loop number now belongs to a stranger. (dev, descriptor, image, loop, stranger, record)"""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "512m", "-t", "ext4" if with_filesystem else "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    if not with_filesystem:
        d = devlib.Direct(dev)
        d.write(7 * MIB, b"O" * MIB)
        d.sync()
        d.close()
    loop = devlib.record(dev)["backing"]
    rec = crash(t, dev, loop)
    stranger = t.path("stranger.img")
    if with_filesystem:
        # The same size, partition table and file system: as like ours as can be.
        other = t.mkdir("other")
        ploop("init", "-s", "512m", os.path.join(other, "root.hdd"))
        chain = ploopimg.Chain([os.path.join(other, "root.hdd")])
        chain.export(stranger)
        chain.close()
    else:
        with open(stranger, "wb") as f:
            for i in range(64):
                f.write(bytes([i]) * MIB)
            f.truncate(512 * MIB)
    args = ["-P"] if with_filesystem else []
    run("losetup", *args, f"/dev/{loop}", stranger, limit=20)
    t.later(lambda: os.path.exists(f"/sys/block/{loop}/loop/backing_file") and run("losetup", "-d", f"/dev/{loop}", rc=None, limit=20))
    devlib.wait_for("the stranger is attached", lambda: stranger in open(f"/sys/block/{loop}/loop/backing_file").read(), 5)
    time.sleep(0.5)
    return dev, dd, img, loop, stranger, rec


class Stranger:
    def __init__(self, loop, path):
        self.loop, self.path, self.before, self.sum = loop, path, statistics(loop), devlib.sha(path)

    def untouched(self, after):
        now = statistics(self.loop)
        for k, v in self.before.items():
            check(now[k] == v, f"`{after}`: {now[k] - v} {k} on the stranger's disk")
        with open(f"/sys/block/{self.loop}/loop/backing_file") as f:
            check(f.read().strip() == self.path, f"`{after}` took the stranger's device away")
        check(devlib.sha(self.path) == self.sum, f"`{after}` changed the stranger's bytes")


def commands(t, with_filesystem):
    dev, dd, img, loop, stranger, rec = scene(t, with_filesystem)
    s = Stranger(loop, stranger)
    name, point = os.path.basename(dev), t.mkdir("mnt")

    def tell(*args):
        r = ploop(*args, rc=None, limit=60)
        log(f"  -> {r.rc} {r.text.strip()[-200:]}")
        s.untouched(" ".join(map(str, args)))
        return r
    listing = tell("list")
    listing_a = tell("list", "-a")
    r = tell("info", "-d", dd)
    check("device:\t\t/dev" not in r.out, f"info names a dead device as the running one: {r.out}")
    r = tell("info", dd)
    r = tell("info", "-s", dd)
    # Reading by our name must not reach the stranger either, once any command has seen the state.
    r = tell("umount", "-m", point)
    check(r.rc != 0, "umount of a folder that is no mount point succeeded")
    r = tell("mount", img)
    check(r.rc == devlib.IN_USE, f"mount of the marked image by path: {r.rc}")
    r = tell("mount", "-d", dev, img)
    check(r.rc != 0, "mount with the stale node's name of a marked image succeeded")
    r = tell("umount", "-d", dev)
    check(not os.path.exists(f"{devlib.RUN}/{name}"), "umount -d left the record")
    # Another's device may have the name by now.
    number = os.stat(f"/dev/{loop}").st_rdev
    check(not os.path.exists(dev) or os.stat(dev).st_rdev != number, f"{dev} still leads to the stranger's disk")
    check(not [n for n in os.listdir('/dev') if n.startswith(name + "p")], "partition nodes still lead to the stranger's disk")
    # The image itself comes back by its descriptor.
    r = tell("mount", dd)
    check(r.rc == 0, f"mount by descriptor: {r.text}")
    again = t.device_of(dd)
    t.drop_later(again)
    check(devlib.record(again)["backing"] != loop, "the stranger's loop device was taken")
    if not with_filesystem:
        d = devlib.Direct(again)
        check(d.read(7 * MIB, MIB) == b"O" * MIB, "flushed data is gone")
        d.close()
    t.umount(dd)
    s.untouched("umount DD")
    t.judges(img)


def case_commands(t):
    commands(t, False)


def case_commands_partitions(t):
    """The stranger has partitions, whose numbers may be those of our old ones."""
    commands(t, True)


def case_mount_cleans(t):
    """Mounting by descriptor with the stale record still there."""
    dev, dd, img, loop, stranger, rec = scene(t, True)
    s = Stranger(loop, stranger)
    point = t.mkdir("mnt")
    r = ploop("mount", "-m", point, dd, rc=None)
    if r.rc:
        check("umount" in r.err, f"refused, but no way out is named: {r.err}")
        s.untouched("mount DD")
        t.umount(dd)
        s.untouched("umount DD")
        ploop("mount", "-m", point, dd)
    t.later(lambda: devlib.is_mounted(point) and t.umount("-m", point))
    s.untouched("mount DD")
    check(devlib.is_mounted(point), "not mounted")
    back = devlib.record(t.device_of(dd))["backing"]
    check(back != loop, "the stranger's device was taken for ours")
    t.umount("-m", point)
    s.untouched("umount -m")
    t.judges(img)


def case_umount_by_descriptor(t):
    dev, dd, img, loop, stranger, rec = scene(t, False)
    s = Stranger(loop, stranger)
    r = ploop("umount", dd, rc=None, limit=60)
    check(r.rc in (0, devlib.NOT_MOUNTED), f"umount DD: {r.rc} {r.err}")
    s.untouched("umount DD")
    r = ploop("umount", dd, rc=devlib.NOT_MOUNTED)
    r = ploop("umount", img, rc=devlib.PARAM)
    s.untouched("umount BASE")
    if os.path.exists(f"{devlib.RUN}/{os.path.basename(dev)}"):
        # Refused, and the stale name is still there: by device it goes.
        log("umount by descriptor left the record")
        t.umount("-d", dev)
        s.untouched("umount -d")
    # Another's device may have the name by now.
    number = os.stat(f"/dev/{loop}").st_rdev
    check(not os.path.exists(dev) or os.stat(dev).st_rdev != number, f"{dev} still leads to the stranger's disk")


def case_strangers_mount(t):
    """The stranger's file system is mounted: umount by our stale names must not end that mount."""
    dev, dd, img, loop, stranger, rec = scene(t, True)
    theirs = t.mkdir("theirs")
    part = f"/dev/{loop}p1"
    if not os.path.exists(part):
        part = f"/dev/{loop}"
        run("losetup", "-d", part, limit=20)
        run("losetup", "-o", MIB, part, stranger, limit=20)
    run("mount", part, theirs)
    t.later(lambda: devlib.is_mounted(theirs) and run("umount", theirs))
    for args in (("umount", "-d", dev), ("umount", dd), ("umount", "-m", theirs)):
        ploop(*args, rc=None, limit=60)
        check(devlib.is_mounted(theirs), f"`ploop {' '.join(args)}` ended the stranger's mount")
    run("touch", os.path.join(theirs, "works"))


def case_registry(t):
    """A query that cannot look at processes drops nothing; a supervisor whose folder was removed makes it anew."""
    dev, dd = t.bare()
    name = os.path.basename(dev)
    state = f"/run/ploop/{name}/state"
    blind = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs t /proc && exec "$@"', "sh", devlib.PLOOP]
    for command in (["info", dd], ["info", "-d", dd], ["list"], ["list", "-a"], ["snapshot-list", dd], ["check", dd]):
        run(*blind, *command, rc=None, limit=60)
        check(os.path.exists(state), f"`ploop {' '.join(command)}` without /proc removes the record of a running device")
    check(dev in run(*blind, "info", "-d", dd, limit=60).out, "a running device is not found without /proc")
    for _ in range(2):
        for f in os.listdir(f"/run/ploop/{name}"):
            os.unlink(f"/run/ploop/{name}/{f}")
        os.rmdir(f"/run/ploop/{name}")
        devlib.wait_for("the record is back", lambda: os.path.exists(state), 10)
        check(dev in ploop("info", "-d", dd).out, "a device whose folder was removed is not found again")
    t.umount(dd)


if __name__ == "__main__":
    devlib.main()
