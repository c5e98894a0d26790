#!/usr/bin/env python3
"""Programs that wait for a lock on an image of a running disk: none gets it while the device lives, whichever of its processes
is killed and whatever becomes of its chain; when the device has ended each gets it."""
import fcntl
import os
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Direct, check, log, ploop  # noqa: E402

MIB = 1 << 20
F_OFD_SETLK, F_OFD_SETLKW = 37, 38
# What a process that reads an image has locked, as qemu does, and one that writes to it.
USES_READ, USES_WRITE = 100, 101


def byte_lock(kind, start, length):
    return struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0)


WAYS = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
    "whole": lambda fd: fcntl.fcntl(fd, F_OFD_SETLKW, byte_lock(fcntl.F_WRLCK, 0, 0)),
    "whole-shared": lambda fd: fcntl.fcntl(fd, F_OFD_SETLKW, byte_lock(fcntl.F_RDLCK, 0, 0)),
    "posix": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX),
    "reader": lambda fd: fcntl.fcntl(fd, F_OFD_SETLKW, byte_lock(fcntl.F_WRLCK, USES_READ, 1)),
    "writer": lambda fd: fcntl.fcntl(fd, F_OFD_SETLKW, byte_lock(fcntl.F_WRLCK, USES_WRITE, 1)),
}
TOP = ("flock", "whole", "whole-shared", "posix", "writer")
LOWER = ("whole", "posix", "reader")


class Stranger:
    """A process that waits for a lock."""

    def __init__(self, t, path, way):
        self.what = f"{way} on {os.path.basename(path)}"
        self.p = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--wait", path, way], stdout=subprocess.PIPE)
        check(self.p.stdout.readline() == b"waits\n", f"{self.what}: does not wait")
        t.later(lambda: (self.p.kill(), self.p.wait(10)))

    def has_it(self):
        return self.p.poll() is not None


class Strangers:
    def __init__(self, t):
        self.t, self.all = t, []

    def wait_for(self, path, ways):
        self.all += [Stranger(self.t, path, way) for way in ways]
        # Python has printed before it waits.
        time.sleep(0.1)

    def none(self, when):
        got = [s.what for s in self.all if s.has_it()]
        check(not got, f"{when}: got by strangers: {got}")

    def leave(self):
        for s in self.all:
            s.p.kill()
            s.p.wait(10)
        self.all = []


def kill_often(dev, strangers, victim, count, when):
    """I/O goes on under the kills, and no stranger gets in."""
    longest = 0
    for i in range(count):
        old = devlib.record(dev)[victim]["pid"]
        devlib.kill(old)
        with_io = time.monotonic()
        d = Direct(dev)
        d.write((i % 32) * MIB, bytes([i + 1]) * 4096)
        d.sync()
        d.close()
        longest = max(longest, time.monotonic() - with_io)
        devlib.wait_for(f"another {victim}", lambda: devlib.record(dev)[victim]["pid"] != old and devlib.alive(devlib.record(dev)[victim]))
        strangers.none(f"{when}, {victim} killed, the {i + 1}. time")
    log(f"{when}: {victim} killed {count} times, a write took {longest:.2f} s at most")
    check(longest < 3, f"{when}: a write took {longest:.1f} s")


@devlib.limit(150)
def case_kills(t):
    """Worker, supervisor, and both in turn; a snapshot and a merge in between."""
    dev, dd = t.bare()
    folder = os.path.dirname(dd)
    base = os.path.join(folder, "root.hdd")
    strangers = Strangers(t)
    strangers.wait_for(base, TOP)
    kill_often(dev, strangers, "worker", 20, "one image")
    kill_often(dev, strangers, "supervisor", 2, "one image")
    kill_often(dev, strangers, "worker", 2, "after other supervisors")
    strangers.leave()

    ploop("snapshot", dd)
    top = next(p for _, p, _ in ploopimg.read_descriptor(dd)[1] if p != base)
    # What was the top can be read by anybody from now on, who locks it meanwhile.
    with open(base, "rb") as f:
        devlib.wait_for("the former top is free for readers", lambda: not is_locked(f.fileno()), 10)
    strangers.wait_for(base, LOWER)
    strangers.wait_for(top, TOP)
    kill_often(dev, strangers, "worker", 3, "after a snapshot")
    kill_often(dev, strangers, "supervisor", 1, "after a snapshot")
    kill_often(dev, strangers, "worker", 1, "after a snapshot")
    strangers.leave()

    ploop("snapshot-merge", dd)
    strangers.wait_for(base, ("flock", "whole", "posix", "writer"))
    kill_often(dev, strangers, "worker", 3, "after the merge")
    ploop("reload", dev)
    kill_often(dev, strangers, "worker", 2, "after a reload")

    both = devlib.record(dev)
    devlib.kill(both["supervisor"]["pid"])
    devlib.kill(both["worker"]["pid"])
    devlib.wait_for("the device is dead", lambda: not devlib.alive(both["worker"]) and not devlib.alive(both["supervisor"]), 10)
    ploop("umount", dd, rc=None)
    # Each after the other: they exclude one another, too.
    devlib.wait_for("each gets its lock", lambda: all(s.has_it() for s in strangers.all), 20)
    t.mount(dd)
    ploop("umount", dd)
    ploop("check", dd)


def is_locked(fd):
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wait"]:
        file = os.open(sys.argv[2], os.O_RDWR)
        print("waits", flush=True)
        WAYS[sys.argv[3]](file)
    else:
        devlib.main()
