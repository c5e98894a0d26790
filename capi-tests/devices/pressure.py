#!/usr/bin/env python3
"""A host that is short of memory, by the device's own dirty pages; and file systems that are frozen by people who die."""
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import Failure, Skip, check, log, ploop, run  # noqa: E402

MIB = 1 << 20
LIMIT = 256 * MIB
SECONDS = devlib.pick(20, 300)
# Longest time in which nothing at all may be written.
STANDSTILL = 60


def put(path, value):
    with open(path, "w") as f:
        f.write(str(value))


class Group:
    """A memory cgroup with a limit, of version 1 or 2."""

    def __init__(self, t, limit):
        name = f"ploop-test-{os.getpid()}"
        if os.path.isdir("/sys/fs/cgroup/memory"):
            self.path, knob, self.fail = os.path.join("/sys/fs/cgroup/memory", name), "memory.limit_in_bytes", "memory.failcnt"
        elif "memory" in open("/sys/fs/cgroup/cgroup.controllers").read().split():
            self.path, knob, self.fail = os.path.join("/sys/fs/cgroup", name), "memory.max", None
            with open("/sys/fs/cgroup/cgroup.subtree_control", "w") as f:
                f.write("+memory")
        else:
            raise Skip("there is no memory controller for cgroups")
        os.mkdir(self.path)
        t.later(self.remove)
        self.write(knob, limit)

    def slow_writers_down(self, t, dev):
        """Version 2, like a host of that size, stops writers when a fifth of the memory is dirty; version 1 knows no such
        thing, and then not even the host's file system gets a page for its own tables. There the device has that limit."""
        if not self.fail:
            return
        bdi = f"/sys/class/bdi/{os.major(os.stat(dev).st_rdev)}:{os.minor(os.stat(dev).st_rdev)}"
        if not os.path.exists(f"{bdi}/strict_limit"):
            raise Skip("a limit for the dirty pages of one device needs Linux 6.2 (or version 2 of the cgroups)")
        # The device's number is used again by others.
        t.later(lambda: [os.path.exists(f"{bdi}/{k}") and put(f"{bdi}/{k}", v) for k, v in (("max_ratio", 100), ("strict_limit", 0))])
        put(f"{bdi}/max_bytes", LIMIT // 5)
        put(f"{bdi}/strict_limit", 1)

    def write(self, knob, value):
        put(os.path.join(self.path, knob), value)

    def read(self, knob):
        with open(os.path.join(self.path, knob)) as f:
            return f.read()

    def add(self, pid):
        self.write("cgroup.procs", pid)

    def stress(self):
        """How often something met the limit."""
        if self.fail:
            return int(self.read(self.fail))
        return int(dict(l.split() for l in self.read("memory.events").splitlines())["max"])

    def remove(self):
        parent = os.path.dirname(self.path)
        for pid in self.read("cgroup.procs").split():
            try:
                with open(os.path.join(parent, "cgroup.procs"), "w") as f:
                    f.write(pid)
            except OSError:
                pass
        for _ in range(50):
            try:
                return os.rmdir(self.path)
            except OSError:
                time.sleep(0.1)
        raise Failure(f"{self.path} cannot be removed")


@devlib.limit(SECONDS + 300)
def case_own_dirty_pages(t):
    """The server in the same small cgroup as the writers, whose pages can only be freed by writing them to its device."""
    group = Group(t, LIMIT)
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "3g", img)
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    rec = devlib.running_worker(os.path.basename(dev))
    for who in ("supervisor", "worker"):
        group.add(rec[who]["pid"])
    group.slow_writers_down(t, dev)
    before = heap(rec["worker"]["pid"])
    program = devlib.compile_c(t, "pressure.c")
    writers, outs = [], []
    for n in range(3):
        place = os.path.join(point, f"writer{n}")
        os.mkdir(place)
        out = open(t.path(f"writer{n}.out"), "w+")
        # Born in the group, so that every page is accounted for there.
        p = subprocess.Popen(["sh", "-c", 'echo $$ >"$0" && exec "$@"', os.path.join(group.path, "cgroup.procs"), program, place, "6",
                              str(64), str(n), str(SECONDS)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        t.later(lambda p=p: p.poll() is None and (devlib.kill(p.pid), p.wait(60)))
        writers.append(p)
        outs.append(out)

    def written():
        with open(f"/sys/dev/block/{os.major(os.stat(dev).st_rdev)}:{os.minor(os.stat(dev).st_rdev)}/stat") as f:
            return int(f.read().split()[6])
    flushes = may_be_io_flusher()
    if not flushes:
        # It would wait for pages to be written that only it can write; see PR_SET_IO_FLUSHER.
        log("root lacks CAP_SYS_RESOURCE here: no worker has to start under pressure")
    begin = moved = time.monotonic()
    last, longest, killed = written(), 0.0, 0
    while any(p.poll() is None for p in writers):
        time.sleep(0.2)
        now, sectors = time.monotonic(), written()
        if sectors != last:
            longest, last, moved = max(longest, now - moved), sectors, now
        check(now - moved < STANDSTILL, f"nothing was written for {STANDSTILL} s: " + states(rec, writers))
        check(now - begin < SECONDS + 240, "the writers do not come to an end: " + states(rec, writers))
        # Once, a worker has to start under pressure.
        if flushes and not killed and now - begin > SECONDS / 2:
            killed = rec["worker"]["pid"]
            os.kill(killed, signal.SIGKILL)
            rec = devlib.running_worker(os.path.basename(dev), killed, 60)
            group.add(rec["worker"]["pid"])
    passes = []
    for p, out in zip(writers, outs):
        out.seek(0)
        lines = out.read().splitlines()
        check(p.returncode == 0, f"a writer ended with {p.returncode}: {lines[-3:]}")
        passes.append(int(lines[-1].split()[1]))
    check(group.stress() > 0, "the limit was never met")
    still = devlib.running_worker(os.path.basename(dev))
    check(still["supervisor"] == rec["supervisor"], "the supervisor is another one")
    # What the worker would wait for under pressure it has from the start: its heap, and a thread in the kernel for each ring.
    pid = rec["worker"]["pid"]
    check(killed or heap(pid) == before, f"the worker's heap has grown from {before} to {heap(pid)} bytes")
    check(kernel_threads(pid) <= 2, f"the worker has {kernel_threads(pid)} threads in the kernel")
    t.umount("-m", point)
    t.judges(img)
    log(f"RESULT: {sum(passes)} passes over 384 MiB within {LIMIT >> 20} MiB of memory, {time.monotonic() - begin:.0f} s; "
        f"limit met {group.stress()} times; longest standstill {longest:.1f} s")


@devlib.limit(120)
def case_memory_follows_load(t):
    """An idle device's worker has few buffers; it gets more under load, and gives them back."""
    dev, _ = t.bare("256m")
    name = os.path.basename(dev)
    pid = devlib.running_worker(name)["worker"]["pid"]
    idle = resident(pid)
    check(idle < 24 * MIB, f"an idle worker has {idle >> 10} KiB in memory: less than 24 MiB wanted")
    run("dd", "if=/dev/zero", f"of={dev}", "bs=16M", "count=8", "oflag=direct")
    devlib.wait_for("more buffers", lambda: resident(pid) >= idle + 8 * MIB)
    loaded = resident(pid)
    check(loaded < 36 * MIB, f"a worker under load has {loaded >> 10} KiB in memory: less than 36 MiB wanted")
    # A successor begins as the first one did.
    devlib.kill(pid)
    pid = devlib.running_worker(name, pid)["worker"]["pid"]
    check(resident(pid) < idle + 4 * MIB, f"a successor has {resident(pid) >> 10} KiB in memory, its predecessor had {idle >> 10}")
    if devlib.pick(0, 1):
        run("dd", "if=/dev/zero", f"of={dev}", "bs=16M", "count=8", "oflag=direct")
        devlib.wait_for("more buffers", lambda: resident(pid) >= idle + 8 * MIB)
        devlib.wait_for("memory that is given back", lambda: resident(pid) < idle + 2 * MIB, limit=60)
    log(f"RESULT: an idle worker has {idle >> 10} KiB in memory, {loaded >> 10} under load")


def resident(pid):
    with open(f"/proc/{pid}/status") as f:
        return int([l.split()[1] for l in f if l.startswith("VmRSS:")][0]) << 10


def heap(pid):
    with open(f"/proc/{pid}/maps") as f:
        begin, end = [l.split()[0] for l in f if l.endswith("[heap]\n")][0].split("-")
    return int(end, 16) - int(begin, 16)


def kernel_threads(pid):
    names = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/comm") as f:
            names.append(f.read())
    return sum(name.startswith("iou-wrk") for name in names)


def may_be_io_flusher():
    with open("/proc/self/status") as f:
        held = [int(l.split()[1], 16) for l in f if l.startswith("CapEff:")][0]
    return held >> 24 & 1


def states(rec, writers):
    """Where everybody is, for the one who has to find out."""
    out = []
    for pid in [rec["supervisor"]["pid"], rec["worker"]["pid"], *(p.pid for p in writers)]:
        try:
            for task in sorted(os.listdir(f"/proc/{pid}/task")):
                with open(f"/proc/{pid}/task/{task}/stack") as f:
                    top = [l.split()[1] for l in f.read().splitlines()[:6]]
                with open(f"/proc/{pid}/task/{task}/comm") as f:
                    out.append(f"{pid} {f.read().strip()}: {' < '.join(top)}")
        except OSError as e:
            out.append(f"{pid}: {e}")
    return "\n  ".join(out)


def case_frozen_and_left(t):
    """Whoever freezes the file system for a snapshot dies before it is thawed."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    dd = os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "512m", img)
    point = t.mkdir("mnt")
    t.mount("-m", point, dd)
    worst = 0.0
    for n in range(devlib.pick(8, 40)):
        p = subprocess.Popen([devlib.PLOOP, "snapshot", dd], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(0.002 * (n * 7 % 40))
        devlib.kill(p.pid)
        p.wait(30)
        begin = time.monotonic()
        # The write is let through, though the one who froze it is dead.
        run("sh", "-c", f"echo {n} >{point}/pulse && sync -f {point}/pulse", limit=60, quiet=True)
        worst = max(worst, time.monotonic() - begin)
    # A user's own freeze is not ours to lift, and nothing breaks while it holds. The last snapshot may be under way still.
    devlib.wait_for("a freeze of our own", lambda: run("fsfreeze", "-f", point, rc=None, quiet=True).rc == 0, 30, 0.1)
    try:
        r = ploop("snapshot", dd, rc=None, limit=150)
        log(f"a snapshot of a file system that somebody holds frozen: exit {r.rc}: {r.err.strip().splitlines()[-1:]}")
        check(run("fsfreeze", "-f", point, rc=None).rc != 0, "the snapshot has lifted the freeze of somebody else")
    finally:
        run("fsfreeze", "-u", point, rc=None)
    run("sh", "-c", f"echo thawed >{point}/pulse && sync -f {point}/pulse", limit=60, quiet=True)
    with open(os.path.join(point, "pulse")) as f:
        check(f.read() == "thawed\n", "the last write is lost")
    ploop("snapshot-merge", "-A", dd, limit=120)
    t.umount("-m", point)
    dev = t.mount("-r", dd)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    log(f"RESULT: longest wait for a write after the death {worst:.2f} s")


if __name__ == "__main__":
    devlib.main()
