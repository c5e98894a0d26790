#!/usr/bin/env python3
"""Merges of a disk in use: no request fails, whatever the size of its clusters, whether the merge is cancelled, and whichever
process is killed at which moment of it."""
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import blocks  # noqa: E402
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
HELPER = os.path.join(devlib.TOOLS, "blocks.py")
MERGE_LIMIT = 120


class Call:
    """A `ploop` command in the background."""

    def __init__(self, t, *args):
        self.args, self.began = [str(a) for a in args], time.monotonic()
        self.out = open(t.path(f"call.{time.monotonic_ns()}"), "w+")
        self.p = subprocess.Popen([devlib.PLOOP, *self.args], stdout=self.out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  start_new_session=True)
        t.later(lambda: self.p.poll() is None and (self.p.kill(), self.p.wait(30)))

    def send(self, number):
        """Sends a signal; tells whether the command was still running."""
        if self.p.poll() is not None:
            return False
        self.p.send_signal(number)
        return True

    def end(self, limit=MERGE_LIMIT):
        try:
            rc = self.p.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failure(f"no end after {limit} s: ploop {' '.join(self.args)}") from None
        seconds = time.monotonic() - self.began
        self.out.seek(0)
        text = self.out.read()
        log(f"$ ploop {' '.join(self.args)}  [{rc}, {seconds:.2f} s]")
        check("panicked" not in text, f"panic: {text[-2000:]}")
        return devlib.Result(rc, text, "", seconds)


class Churn:
    """`blocks.py churn` beside a merge. `end` fails with the first errors, hanging requests and wrong bytes."""

    def __init__(self, t, disk, threads=4, rate=0):
        self.disk, self.out = disk, open(t.path(f"churn.{time.monotonic_ns()}"), "w+")
        self.p = subprocess.Popen([sys.executable, HELPER, "churn", disk.dev, disk.state, str(threads), str(rate)], stdout=self.out,
                                  stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        t.later(lambda: self.p.poll() is None and (self.p.kill(), self.p.wait(10)))
        self.moves("the load begins")

    def lines(self):
        with open(self.out.name, errors="replace") as f:
            return f.read().splitlines()

    def ops(self):
        return max([int(line.split()[1]) for line in self.lines() if line.startswith("ops ") and line[4:].isdigit()] or [0])

    def moves(self, what, limit=30):
        """Requests are answered."""
        before = self.ops()
        devlib.wait_for(what, lambda: self.p.poll() is not None or self.ops() > before, limit, 0.05)

    def end(self):
        if self.p.poll() is None:
            self.moves("requests are answered at the end of the load")
        self.p.send_signal(signal.SIGTERM)
        try:
            rc = self.p.wait(blocks.HANGS + 30)
        except subprocess.TimeoutExpired:
            raise Failure("I/O hangs: the load does not end") from None
        lines = self.lines()
        log("load:", lines[-1] if lines else "no output")
        bad = [line for line in lines if not line.startswith(("ops ", "done"))]
        kinds = {kind: sum(line.startswith(kind) for line in bad) for kind in ("error read", "error write", "wrong")}
        check(rc == 0, f"the load on {self.disk.dev} failed ({kinds}): " + "; ".join(bad[:4]))


class Kmsg:
    """What the kernel says of a device from now on."""

    def __init__(self):
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)

    def judge(self, *names):
        said = []
        while True:
            try:
                said.append(os.read(self.fd, 16384).decode("utf-8", "replace").split(";", 1)[-1].splitlines()[0])
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue
        os.close(self.fd)
        about = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")(p\d+)?\b")
        bad = [line for line in said if about.search(line)
               and re.search(r"I/O error|potential data loss|lost (async|sync) page write|EXT4-fs (error|warning)|critical .* error|blocked for more", line)]
        check(not bad, f"the kernel's log tells of {len(bad)} errors: " + "; ".join(bad[:4]))


class Disk:
    """A disk of two or three levels, with data of known versions in them. kind: "descriptor", "files" (mounted as a list of
    images, changed by device) or "raw-files" (the same over a raw base)."""

    def __init__(self, t, name, kind, size, cluster_sectors, init=()):
        self.t, self.kind, self.size, self.bs, self.version = t, kind, size, cluster_sectors, 0
        self.folder, self.state = t.mkdir(name), t.path(name + ".blocks")
        self.dd = os.path.join(self.folder, "DiskDescriptor.xml")
        self.files, self.guid = [os.path.join(self.folder, "root.hdd")], None
        if kind == "descriptor":
            ploop("init", "-s", f"{size // KIB}k", "-t", "none", *(init or ("-b", self.bs)), self.files[0])
        elif kind == "files":
            ploopimg.write_image(self.files[0], 2, self.bs, size // 512, {})
        else:
            with open(self.files[0], "wb") as f:
                f.truncate(size)
        blocks.store(self.state, {})
        t.later(self.remove)
        self.mount()

    def remove(self):
        """The device goes, whatever its chain is by now, and the images with it."""
        try:
            ours = any(level["path"].startswith(self.folder + "/") for level in devlib.record(self.name)["levels"])
        except (AttributeError, OSError, ValueError):
            ours = False
        if ours and ploop("umount", "-d", self.dev, rc=None, limit=60).rc:
            ploop("umount", "--abort", "-d", self.dev, rc=None, limit=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def mount(self):
        if self.kind == "descriptor":
            words = [self.dd]
        else:
            words = (["-f", "raw", "-b", self.bs] if self.kind == "raw-files" else ["-f", "ploop1"]) + self.files
        self.dev = self.t.mount(*words)
        self.name = os.path.basename(self.dev)
        # The kernel knows the device by the name of its loop device.
        self.kernel_names = [self.name, devlib.record(self.name).get("backing") or self.name]

    def umount(self):
        self.t.umount("-d", self.dev, limit=60)

    def fill(self, start, step, count, length=4 * KIB):
        self.version += 1
        run(sys.executable, HELPER, "fill", self.dev, self.state, self.version, start, step, count, length, limit=120)

    def spare(self, start, step, count):
        run(sys.executable, HELPER, "spare", self.state, start, step, count)

    def put(self):
        """A snapshot; what was the top is a frozen level from now on."""
        if self.kind == "descriptor":
            ploop("snapshot", self.dd)
            self.guid = ploop("snapshot-list", "-H", "-s", "-o", "uuid", self.dd, quiet=True).out.split()[-1]
        else:
            self.files.append(os.path.join(self.folder, f"delta{time.monotonic_ns()}"))
            ploop("snapshot", "-d", self.dev, self.files[-1])

    def levels(self):
        """As the user sees them: of the descriptor, or of the device."""
        if self.kind == "descriptor":
            return len(ploop("snapshot-list", "-H", "-o", "uuid", self.dd, quiet=True).out.split())
        return len(devlib.record(self.name)["levels"])

    def merge(self, which):
        """The command: "frozen" merges the level below the top into the one below, "top" merges the top."""
        if self.kind == "descriptor":
            return ["snapshot-merge", *(["-u", self.guid] if which == "frozen" else []), self.dd]
        return ["merge", "-d", self.dev, "-l", "0..1"]

    def merged(self, which):
        """To be called after each merge that is done."""
        if self.kind != "descriptor":
            gone = self.files.pop(1)
            check([level["path"] for level in devlib.record(self.name)["levels"]] == self.files, f"{self.dev} has other levels than {self.files}")
            os.unlink(gone)

    def healthy(self):
        """The device runs, and says so."""
        def runs():
            text = run(devlib.PLOOP, "doctor", rc=None, quiet=True, limit=60).out
            line = re.search(rf"^(\S+) +{self.dev} (.*)$", text, re.M)
            seen[:] = [line.group(0) if line else "no line of it"]
            return line and line.group(1) == "ok"
        seen = []
        try:
            devlib.wait_for("the device runs", runs, 20, 0.2)
        except Failure:
            raise Failure(f"{self.dev} does not run: doctor says {seen[0]!r}") from None

    def judge(self):
        """Each block, as the device has it now."""
        r = run(sys.executable, HELPER, "check", self.dev, self.state, rc=None, limit=300, quiet=True)
        bad = [line for line in r.text.splitlines() if not line.startswith("checked")]
        check(r.rc == 0, f"{self.dev}: {r.out.splitlines()[-1:]}: " + "; ".join(bad[:4]))

    def close(self):
        """Umount, each byte by the independent reader, mount, and each block once more."""
        self.umount()
        state = blocks.load(self.state)
        if self.kind == "descriptor":
            chain = ploopimg.Chain(self.dd)
            ploop("check", self.dd)
        else:
            chain = ploopimg.Chain(self.files, self.bs if self.kind == "raw-files" else None)
        missing, zero = set(state), bytes(4 * KIB)
        for off, n, data in chain.pieces():
            if data is None:
                continue
            for at in range(0, n, 4 * KIB):
                piece = data[at:at + 4 * KIB]
                if off + at in state:
                    check(blocks.may_be(piece, off + at, state[off + at]), f"closed images: wrong bytes at {off + at}")
                    missing.discard(off + at)
                else:
                    check(piece == zero, f"closed images: bytes at {off + at}, where none were written")
        chain.close()
        check(not [off for off in missing if not blocks.may_be(zero, off, state[off])], f"closed images: {len(missing)} blocks are missing")
        for path in self.files if self.kind != "descriptor" else [p for _, p, raw in ploopimg.read_descriptor(self.dd)[1] if not raw]:
            if not (self.kind == "raw-files" and path == self.files[0]):
                bad = ploopimg.validate(path, leaks_allowed=True)
                check(not bad, f"{path}: {bad[:4]}")
        self.mount()
        self.judge()
        self.umount()


def each(t, variants, f):
    """Runs f(t, name, *variant) for all; what failed is told at the end, by name."""
    failed = []
    for name, *variant in variants:
        begin = time.monotonic()
        try:
            f(t, name, *variant)
            log(f"-- {name}: ok, {time.monotonic() - begin:.1f} s")
        except Failure as e:
            log(f"-- {name}: FAILED after {time.monotonic() - begin:.1f} s: {e}")
            failed.append(f"{name}: {e}")
        failed += [f"{name}: clearing up: {problem}" for problem in t.finish()]
    check(not failed, f"{len(failed)} of {len(variants)}\n  " + "\n  ".join(failed))


# name, init's arguments, sectors a cluster, size of the disk, distance of the blocks. A cluster of 64 MiB is allocated and copied
# whole, and a raw base has all its space from the beginning, so those disks are smaller.
ALL_SIZES = (
    ("b64", ("-b", "64"), 64, 16 * GIB, 32 * MIB),
    ("b2048", ("-b", "2048"), 2048, devlib.pick(4 * GIB, 16 * GIB), 32 * MIB),
    ("b131072", ("-b", "131072"), 131072, devlib.pick(512 * MIB, 4 * GIB), devlib.pick(16 * MIB, 32 * MIB)),
    ("raw", ("-f", "raw"), 2048, devlib.pick(1 * GIB, 16 * GIB), devlib.pick(8 * MIB, 32 * MIB)),
)
SIZES = devlib.pick(ALL_SIZES[:1], ALL_SIZES)


def spread(t, name, init, bs, size, stride):
    """The disk of the reproduction: two snapshots, 4 KiB in each stride written between them. More blocks of each stride are
    read and written later: some in clusters that are mapped by then, some in others."""
    disk = Disk(t, name, "descriptor", size, bs, init)
    count = size // stride
    disk.put()
    disk.fill(0, stride, count)
    disk.put()
    disk.spare(8 * KIB, stride, count)
    disk.spare(min(stride // 2, 3 * bs * 512), stride, count)
    return disk


def settle(disk, kmsg, levels):
    """After a merge: the device is well, its bytes and those of its images are right, and the kernel saw no error."""
    check(disk.levels() == levels, f"{disk.levels()} levels, {levels} wanted")
    disk.healthy()
    disk.judge()
    disk.close()
    kmsg.judge(*disk.kernel_names)


def under_writes(t, name, init, bs, size, stride):
    disk, kmsg = spread(t, name, init, bs, size, stride), Kmsg()
    load = Churn(t, disk)
    r = Call(t, *disk.merge("frozen")).end()
    time.sleep(1)
    load.end()
    check(r.rc == 0, f"snapshot-merge: exit {r.rc}: {r.text[-500:]}")
    settle(disk, kmsg, 2)


@devlib.limit(devlib.pick(240, 900))
def case_frozen_merge_under_writes(t):
    """A frozen level is merged while each 32 MiB is read and written."""
    each(t, SIZES, under_writes)


def cancelled(t, name, init, bs, size, stride):
    disk, kmsg = spread(t, name, init, bs, size, stride), Kmsg()
    early = 0
    for after in devlib.pick((0.1,), (0.1, 0.01, 0.02, 0.03, 0.05, 0.08, 0.15, 0.2, 0.3, 0.5)):
        load = Churn(t, disk)
        call = Call(t, *disk.merge("frozen"))
        time.sleep(after)
        early += call.send(signal.SIGINT)
        r = call.end(60)
        # Beyond the cancel: what failed for good would fail here.
        time.sleep(1)
        load.end()
        disk.healthy()
        disk.judge()
        if r.rc == 0 or "too late" in r.text:
            # Done before the signal arrived, or before it could stop the merge: the next one needs a level to merge.
            check(disk.levels() == 2, f"snapshot-merge was done, but there are {disk.levels()} levels")
            disk.fill(0, stride, size // stride)
            disk.put()
        else:
            check(r.rc == 130 and r.text.strip(), f"exit {r.rc} instead of 130, or without a message: {r.text[-500:]}")
    log(f"{name}: {early} signals arrived in time")
    load = Churn(t, disk)
    r = Call(t, *disk.merge("frozen")).end()
    load.end()
    check(r.rc == 0, f"snapshot-merge, done again: exit {r.rc}: {r.text[-500:]}")
    settle(disk, kmsg, 2)


@devlib.limit(devlib.pick(300, 1200))
def case_frozen_merge_cancelled(t):
    """SIGINT to snapshot-merge: no request fails then or later, and the merge can be done again."""
    each(t, SIZES, cancelled)


# --- kills -----------------------------------------------------------------------------------------------------------

# Bytes that a merge with kills has to move: long enough for moments to be chosen.
BULK = devlib.pick(64, 192) * MIB
MOMENTS = devlib.pick(1, 10)
DISK = GIB


def prepare(disk, which, anew):
    """A level full of new data to merge, two levels for "top", three for "frozen"; `anew`: mounted with all of them, so that
    no change of the chain came before the merge."""
    disk.fill(256 * MIB, BULK, 1, BULK)
    if which == "frozen":
        disk.put()
        # A part of it is covered by the top.
        disk.fill(256 * MIB, MIB, BULK // MIB // 2, 64 * KIB)
    if anew:
        disk.umount()
        disk.mount()


def victim_pid(disk, victim, call):
    if victim == "caller":
        return call.p.pid
    return devlib.record(disk.name)[victim]["pid"]


def finish(t, disk, which, call, levels, limit=MERGE_LIMIT):
    """The merge ends, or can be repeated until it has ended."""
    r = call.end(limit)
    end, said = time.monotonic() + limit, [f"{r.rc}: {r.text.strip()[-300:]}"]
    while disk.levels() != levels:
        check(r.rc != 0, f"the merge returned 0, but there are {disk.levels()} levels")
        check(time.monotonic() < end, f"the merge can not be repeated for {limit} s: " + " / ".join(said[-3:]))
        time.sleep(0.3)
        if disk.levels() == levels:
            break
        r = Call(t, *disk.merge(which)).end(limit)
        said.append(f"{r.rc}: {r.text.strip()[-300:]}")
    disk.merged(which)
    return said


def killed_at_steps(t, name, kind, which):
    disk, kmsg = Disk(t, name, kind, DISK, 64), Kmsg()
    levels = 2 if which == "frozen" else 1
    disk.fill(0, MIB, 200)
    disk.spare(512 * MIB, MIB, 100)
    disk.put()
    took, struck = None, 0
    for victim in ("worker", "supervisor", "caller"):
        # The first merge is not disturbed: it tells how long one takes.
        for i in range(MOMENTS) if took else range(-1, MOMENTS):
            prepare(disk, which, i % 2 == 0)
            load = Churn(t, disk, 2, 400)
            call = Call(t, *disk.merge(which))
            if i < 0:
                took = call.end().seconds
            else:
                at = took * (i + 0.4) / MOMENTS
                time.sleep(max(0.0, call.began + at - time.monotonic()))
                running = call.p.poll() is None
                struck += running
                log(f"{name}: {victim} killed after {at:.2f} of {took:.2f} s{'' if running else ', the merge had ended'}")
                devlib.kill(victim_pid(disk, victim, call))
            where = "undisturbed" if i < 0 else f"{victim} killed after {at:.2f} of {took:.2f} s"
            try:
                said = finish(t, disk, which, call, levels)
                if len(said) > 1 or not said[0].startswith("0:"):
                    log(f"{name}: {where}: " + " / ".join(said))
                load.end()
                devlib.running_worker(disk.name)
                disk.healthy()
                disk.judge()
            except Failure as e:
                raise Failure(f"{where}: {e}") from None
            if which == "top":
                disk.put()
    disk.close()
    kmsg.judge(*disk.kernel_names)
    log(f"{name}: {struck} of {3 * MOMENTS} kills while the merge ran")
    # On a fast host the last moments may come too late, all of them cannot.
    check(struck * 2 >= 3 * devlib.pick(0, MOMENTS), f"only {struck} of {3 * MOMENTS} kills came while the merge ran")


KINDS = tuple((f"{which}-{kind}", kind, which) for kind in ("descriptor", "files", "raw-files") for which in ("frozen", "top"))


@devlib.limit(devlib.pick(600, 3600))
def case_merge_killed_at_steps(t):
    """Worker, supervisor and caller killed in turn, at moments spread over the merge."""
    each(t, devlib.pick((KINDS[1], KINDS[2]), KINDS), killed_at_steps)


def goes_on(t, name, which):
    """A kill every 2 s; the first comes in the middle of a merge that is shorter."""
    bulk = devlib.pick(256, 1536) * MIB
    disk, kmsg = Disk(t, name, "descriptor", 3 * GIB, 64), Kmsg()
    levels = 2 if which == "frozen" else 1
    disk.fill(0, MIB, 100)
    disk.spare(100 * MIB, MIB, 100)
    seconds = []
    for disturbed in (False, True):
        disk.put()
        disk.fill(512 * MIB, bulk, 1, bulk)
        if which == "frozen":
            disk.put()
        load = Churn(t, disk, 2, 200)
        call, kills = Call(t, *disk.merge(which)), 0
        if disturbed:
            longest = 5 * seconds[0] + 20
            # The machine may be twice as fast now.
            every = min(2.0, seconds[0] / 6)
            while call.p.poll() is None and time.monotonic() - call.began < longest:
                try:
                    call.p.wait(every)
                except subprocess.TimeoutExpired:
                    devlib.kill(devlib.running_worker(disk.name)["worker"]["pid"])
                    kills += 1
                    every = 2.0
            check(call.p.poll() is not None, f"not done after {longest:.0f} s and {kills} kills; undisturbed it takes {seconds[0]:.1f} s")
        r = call.end()
        seconds.append(r.seconds)
        check(r.rc == 0, f"exit {r.rc} after {kills} kills: {r.text[-500:]}")
        load.end()
        check(disk.levels() == levels, f"{disk.levels()} levels, {levels} wanted")
        disk.healthy()
        disk.judge()
        if which == "frozen" and not disturbed:
            r = Call(t, *disk.merge("top")).end()
            check(r.rc == 0, f"merge of the top: exit {r.rc}: {r.text[-500:]}")
    log(f"RESULT: {name}: {bulk >> 20} MiB in {seconds[0]:.1f} s, in {seconds[1]:.1f} s with {kills} kills")
    check(kills, "the merge was over before the first kill")
    disk.close()
    kmsg.judge(*disk.kernel_names)


@devlib.limit(devlib.pick(420, 900))
def case_merge_goes_on_after_kills(t):
    """With the worker killed again and again a merge goes on where it was."""
    each(t, (("top", "top"), ("frozen", "frozen")), goes_on)


# --- memory ----------------------------------------------------------------------------------------------------------

class Memory(threading.Thread):
    """The largest locked and resident memory of a device's workers, each sampled every 50 ms."""

    def __init__(self, name):
        super().__init__(daemon=True)
        self.name, self.halt, self.most, self.seen = name, threading.Event(), {}, set()

    def processes(self):
        """The worker, and whatever the supervisor started beside it."""
        rec = devlib.record(self.name)
        pids = {rec["worker"]["pid"]}
        try:
            with open(f"/proc/{rec['supervisor']['pid']}/task/{rec['supervisor']['pid']}/children") as f:
                pids |= set(map(int, f.read().split()))
        except OSError:
            pass
        return pids

    def sample(self):
        try:
            pids = self.processes()
        except (OSError, ValueError):
            return
        for pid in pids:
            try:
                with open(f"/proc/{pid}/status") as f:
                    status = dict(line.split(":", 1) for line in f if ":" in line)
            except OSError:
                continue
            self.seen.add(pid)
            for key in ("VmLck", "VmRSS"):
                if key in status:
                    self.most[key] = max(self.most.get(key, 0), int(status[key].split()[0]) * KIB)

    def run(self):
        while not self.halt.wait(0.05):
            self.sample()

    def stop(self):
        self.halt.set()
        self.join(10)
        return self.most


@devlib.limit(240)
def case_merge_of_a_large_disk(t):
    """4 TiB of 32 KiB clusters, 8 MiB of data in the top: neither memory nor time goes by the size of the disk."""
    disk = Disk(t, "large", "descriptor", 4 * TIB, 64)
    disk.fill(0, 32 * GIB, 128, 32 * KIB)
    disk.put()
    disk.fill(16 * GIB, 32 * GIB, 128, 32 * KIB)
    disk.fill(64 * KIB, 32 * GIB, 128, 32 * KIB)
    before = Memory(disk.name)
    before.sample()
    check(before.most, f"no worker of {disk.name} is found")
    during = Memory(disk.name)
    during.start()
    r = Call(t, *disk.merge("top")).end(200)
    after = during.stop()
    grown = {key: after.get(key, 0) - before.most.get(key, 0) for key in before.most}
    told = ", ".join(f"{key} {before.most[key] / MIB:.0f} + {grown[key] / MIB:.0f} MiB" for key in grown)
    log(f"RESULT: {r.seconds:.1f} s, {told}, {len(during.seen)} processes")
    check(r.rc == 0, f"snapshot-merge: exit {r.rc}: {r.text[-500:]}")
    check(disk.levels() == 1, f"{disk.levels()} levels")
    disk.judge()
    disk.umount()
    ploop("check", disk.dd, limit=120)
    faults = [f"{key} grew by {more / MIB:.0f} MiB, 64 allowed" for key, more in grown.items() if more >= 64 * MIB]
    if r.seconds > 15:
        faults.append(f"it took {r.seconds:.1f} s, 15 allowed")
    check(not faults, "; ".join(faults))


# --- a file system on it ---------------------------------------------------------------------------------------------

@devlib.limit(devlib.pick(240, 900))
def case_online_with_ext4(t):
    """ext4 on the disk, files written and synced while frozen levels are merged."""
    folder, point = t.mkdir("img"), t.mkdir("mnt")
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", "16g", "-b", "64", img, limit=120)
    kmsg = Kmsg()
    dev = t.mount("-m", point, dd)
    t.later(lambda: devlib.is_mounted(point) and ploop("umount", "-m", point, rc=None, limit=60))
    names = [os.path.basename(dev), devlib.record(dev).get("backing") or os.path.basename(dev)]
    sums, faults, written, rng = {}, [], [0], random.Random(6)

    def write(name):
        path, data = os.path.join(point, name), rng.randbytes(rng.choice((3000, 40000, 200000)))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        sums[name] = hashlib.sha256(data).hexdigest()

    def churn(halt, tag):
        n = 0
        while not halt.is_set():
            # New folders, so that block groups all over the disk get their first data.
            try:
                write(f"{tag}/{n % 97}/f{n}")
                written[0] += 1
            except OSError as e:
                faults.append(f"{tag}/f{n}: {e.strerror}")
                if len(faults) > 200:
                    return
            n += 1
    for turn in range(devlib.pick(1, 12)):
        ploop("snapshot", dd)
        sums.update({f"bulk{turn}/{k}": v for k, v in devlib.fill_tree(os.path.join(point, f"bulk{turn}"), turn, 96 * MIB).items()})
        run("sync", "-f", point, rc=None, limit=120)
        ploop("snapshot", dd)
        guid = ploop("snapshot-list", "-H", "-s", "-o", "uuid", dd, quiet=True).out.split()[-1]
        halt = threading.Event()
        writer = threading.Thread(target=churn, args=(halt, f"turn{turn}"), daemon=True)
        writer.start()
        before = written[0]
        r = Call(t, "snapshot-merge", "-u", guid, dd).end()
        during = written[0] - before
        time.sleep(1)
        halt.set()
        writer.join(60)
        check(not writer.is_alive(), "writing files hangs")
        log(f"turn {turn}: {during} files during the merge, {written[0] - before} in all, {len(faults)} failed")
        check(r.rc == 0, f"snapshot-merge: exit {r.rc}: {r.text[-500:]}")
        check(not faults, f"{len(faults)} of {len(faults) + written[0] - before} files failed: " + "; ".join(faults[:3]))
    run("sync", "-f", point, limit=60)
    devlib.compare_tree(point, sums)
    kmsg.judge(*names)
    t.umount("-m", point, limit=60)
    ploop("check", dd)
    dev = t.mount("-r", dd)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    t.mount("-m", point, dd)
    devlib.compare_tree(point, sums)
    t.umount("-m", point)


if __name__ == "__main__":
    devlib.main()
