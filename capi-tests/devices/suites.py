#!/usr/bin/env python3
"""Other projects' programs on our disks, while workers and supervisors are killed, servers replaced, snapshots taken and merged at random:
file systems with tar and diff, fio, stress-ng, fsx; SQLite while both servers are killed."""
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

MIB = 1 << 20
SECONDS = devlib.pick(8, 600)
ROUNDS = devlib.pick(2, 15)
FSX_OPERATIONS = devlib.pick(3000, 200000)
# Snapshots of a disk at the same time.
DEEPEST = 5


class Disk:
    def __init__(self, t, name, kind):
        self.t, self.kind = t, kind
        self.dd = os.path.join(t.mkdir(name), "DiskDescriptor.xml")
        self.point = t.mkdir(name + ".mnt")
        ploop("init", "-s", "512m", "-t", "none", os.path.join(t.dir, name, "root.hds"))
        self.attach()
        run(f"mkfs.{kind}", *{"ext4": ["-q", "-F"], "xfs": ["-q", "-f"], "btrfs": ["-q", "-f"]}[kind], self.dev)
        self.mount()

    def attach(self, *options):
        self.dev = self.t.mount(*options, self.dd)
        self.name = os.path.basename(self.dev)

    def mount(self, *options):
        self.t.user_mount(self.dev, self.point, self.kind, *options)

    def umount(self):
        self.t.user_umount(self.point)
        self.t.umount(self.dd)

    def judge(self):
        """The closed disk, by the file system's own check."""
        ploop("check", self.dd)
        self.attach("-r")
        run(*{"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}[self.kind], self.dev,
            limit=300)


class Disturber(threading.Thread):
    """Does one thing after another to the servers and chains of some disks until told to stop. `counts`: how often what was done."""

    def __init__(self, disks, seed):
        super().__init__(daemon=True)
        self.disks, self.rng, self.halt, self.error = disks, random.Random(seed), threading.Event(), None
        self.counts = {what.__name__: 0 for what in self.deeds()}
        self.depth = {d.name: 0 for d in disks}
        self.start()

    def deeds(self):
        return [self.kill_worker, self.kill_supervisor, self.reload, self.snapshot, self.merge]

    def run(self):
        rest = []
        try:
            while not self.halt.is_set():
                # Each of them, in a new order, again and again.
                rest = rest or self.rng.sample(self.deeds(), len(self.deeds()))
                deed, disk = rest.pop(), self.rng.choice(self.disks)
                if deed(disk):
                    self.counts[deed.__name__] += 1
                self.halt.wait(self.rng.uniform(0, 0.6))
        except Exception as e:  # noqa: BLE001 - told by end()
            self.error = e

    def kill_worker(self, disk):
        pid = devlib.running_worker(disk.name)["worker"]["pid"]
        devlib.kill(pid)
        return devlib.running_worker(disk.name, pid, 30)

    def kill_supervisor(self, disk):
        old = devlib.running_worker(disk.name, limit=30)["supervisor"]
        devlib.kill(old["pid"])

        def another():
            now = devlib.record(disk.name)["supervisor"]
            return now["pid"] != old["pid"] and devlib.alive(now)
        return devlib.wait_for(f"{disk.name} has another supervisor", another, 30)

    def reload(self, disk):
        ploop("reload", disk.dev, quiet=True)
        return True

    def snapshot(self, disk):
        if self.depth[disk.name] == DEEPEST:
            return self.merge(disk)
        ploop("snapshot", disk.dd, quiet=True)
        self.depth[disk.name] += 1
        return True

    def merge(self, disk):
        if not self.depth[disk.name]:
            return self.snapshot(disk)
        ploop("snapshot-merge", disk.dd, quiet=True, limit=300)
        self.depth[disk.name] -= 1
        return True

    def end(self):
        self.halt.set()
        self.join(330)
        if self.error:
            raise self.error
        check(not self.is_alive(), "what was done to the disks last does not end")
        log("RESULT:", ", ".join(f"{n} {what}" for what, n in self.counts.items()))
        return self


def forget(folder):
    """The page cache keeps nothing of these files."""
    for base, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(base, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class Copies(threading.Thread):
    """Unpacks a tree with tar, compares it with diff, past the cache, and removes an older one."""

    def __init__(self, disk, source):
        super().__init__(daemon=True)
        self.disk, self.source, self.halt, self.error, self.rounds = disk, source, threading.Event(), None, 0
        self.start()

    def targets(self):
        return [p for p in (os.path.join(self.disk.point, f"copy{n}") for n in range(3)) if os.path.exists(p)]

    def run(self):
        try:
            while not self.halt.is_set():
                target = os.path.join(self.disk.point, f"copy{self.rounds % 3}")
                shutil.rmtree(target, ignore_errors=True)
                run("sh", "-c", 'mkdir "$2" && tar -C "$1" -cf - . | tar -C "$2" -xf - && sync -f "$2"', "sh", self.source, target,
                    quiet=True, limit=180)
                forget(target)
                self.compare(target)
                self.rounds += 1
        except Exception as e:  # noqa: BLE001 - told by end()
            self.error = e

    def compare(self, target):
        run("diff", "-r", self.source, target, quiet=True, limit=180)

    def end(self):
        self.halt.set()
        self.join(400)
        if self.error:
            raise Failure(f"{self.disk.kind}: {self.error}")
        check(not self.is_alive(), f"{self.disk.kind}: I/O hangs")
        check(self.rounds, f"{self.disk.kind}: not one tree was copied")
        log(f"RESULT: {self.disk.kind}: {self.rounds} trees")


class Program:
    """A program in the background whose status tells whether all was right."""

    def __init__(self, t, name, *cmd):
        self.name, self.out = name, open(t.path(name + ".log"), "w+")
        self.p = subprocess.Popen([str(c) for c in cmd], stdout=self.out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=t.dir,
                                  start_new_session=True)
        t.later(lambda: self.p.poll() is None and (os.killpg(self.p.pid, signal.SIGKILL), self.p.wait(30)))

    def end(self, limit):
        try:
            rc = self.p.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} does not end within {limit} s") from None
        self.out.seek(0)
        text = self.out.read()
        check(rc == 0, f"{self.name}: status {rc}: {text[-3000:]}")
        return text


def fio(disk, *options):
    """A workload whose blocks are known again by a second call: what was written when the first one was ended."""
    return ["fio", "--name=state", f"--filename={disk.point}/fio", "--size=96m", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio",
            "--iodepth=8", "--randseed=7", "--verify=crc32c", "--verify_fatal=1", *options]


@devlib.limit(SECONDS * 2 + 180)
def case_file_systems(t):
    """ext4, XFS and btrfs, each on a disk, with tar and diff; on the first also fio, whose blocks are verified later, and stress-ng."""
    devlib.have("fio", "stress-ng", "mkfs.xfs", "mkfs.btrfs", "tar", "diff")
    for seed in devlib.seeds([5]):
        log(devlib.replay(t, seed))
        source = t.mkdir(f"source{seed}")
        devlib.fill_tree(source, seed, 12 * MIB, sizes=(100, 5000, 70000, 1000000))
        disks = [Disk(t, f"{kind}{seed}", kind) for kind in ("ext4", "xfs", "btrfs")]
        first = disks[0]
        copies = [Copies(disk, source) for disk in disks]
        blocks = Program(t, "fio", *fio(first, "--do_verify=0", "--verify_state_save=1", f"--rate_iops={24000 // (SECONDS * 2)}"))
        stress = Program(t, "stress-ng", "stress-ng", "--hdd", "1", "--hdd-bytes", "16m", "--hdd-opts", "wr-rnd,rd-rnd,fsync", "--seek", "1",
                         "--seek-size", "8m", "--verify", "--temp-path", first.point, "--timeout", f"{SECONDS}s")
        disturber = Disturber(disks, seed)
        stress.end(SECONDS + 120)
        # It tells which blocks were written, and so ends well.
        blocks.p.send_signal(signal.SIGINT)
        try:
            blocks.p.wait(60)
        except subprocess.TimeoutExpired:
            raise Failure("I/O hangs: fio does not end") from None
        for c in copies:
            c.end()
        counts = disturber.end().counts
        check(all(counts.values()), f"not all was done: {counts}")
        for disk in disks:
            disk.umount()
            disk.judge()
            disk.mount("ro")
        for c in copies:
            for target in c.targets():
                c.compare(target)
        # What fio knows to be written, after the disk was closed and opened again.
        first.umount()
        first.attach()
        first.mount()
        verify = Program(t, "fio-verify", *fio(first, "--verify_state_load=1", "--verify_only=1", "--verify_state_save=0"))
        check(re.search(r"^ +READ: .*io=[1-9]", verify.end(120), re.M), "fio verified nothing")
        first.umount()
        for disk in disks[1:]:
            disk.umount()


WRITER = """
import sqlite3, sys, zlib, random
db = sqlite3.connect(sys.argv[1], isolation_level=None)
mode = db.execute("pragma journal_mode=" + sys.argv[2]).fetchone()[0]
assert mode == sys.argv[2], mode
db.execute("pragma synchronous=EXTRA")
db.execute("create table if not exists t (n integer primary key, sum integer, data blob)")
n = db.execute("select coalesce(max(n), 0) from t").fetchone()[0]
rng = random.Random(n)
while True:
    db.execute("begin")
    for _ in range(rng.randint(1, 4)):
        n += 1
        data = rng.randbytes(rng.choice((20, 500, 9000)))
        db.execute("insert into t values (?, ?, ?)", (n, zlib.crc32(data), data))
    db.execute("commit")
    print(n, flush=True)
"""


def kill_both(name):
    """Both at once: neither may start the other again."""
    rec = devlib.running_worker(name)
    both = [rec["supervisor"]["pid"], rec["worker"]["pid"]]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in both:
            os.kill(pid, number)
    devlib.wait_for("both are gone", lambda: not any(devlib.alive(rec[w]) for w in ("supervisor", "worker")), 10)


@devlib.limit(60 + ROUNDS * 40)
def case_sqlite(t):
    """Each row whose transaction was acknowledged is there after both servers were killed: rollback journal and WAL, synchronous=EXTRA."""
    rng = random.Random(devlib.seeds([3])[0])
    disk = Disk(t, "sqlite", "ext4")
    known = {"delete": 0, "wal": 0}
    for n in range(ROUNDS):
        writers = {}
        for mode in known:
            writers[mode] = Program(t, f"{mode}.{n}", sys.executable, "-c", WRITER, os.path.join(disk.point, mode + ".db"), mode)

        def told(mode):
            with open(writers[mode].out.name) as f:
                lines = f.read().split("\n")[:-1]
            return int(lines[-1]) if lines and lines[-1].isdigit() else 0
        for mode in known:
            devlib.wait_for(f"{mode}: some rows", lambda m=mode: writers[m].p.poll() is not None or told(m) > known[m], 30)
        time.sleep(rng.uniform(0.1, 0.8))
        kill_both(disk.name)
        for mode, w in writers.items():
            w.p.kill()
            w.p.wait(30)
            known[mode] = max(known[mode], told(mode))

        ploop("umount", disk.dd, limit=90)
        disk.attach()
        disk.mount()
        for mode, last in known.items():
            db = sqlite3.connect(os.path.join(disk.point, mode + ".db"))
            check(db.execute("pragma integrity_check").fetchone()[0] == "ok", f"{mode}: damaged after round {n}")
            rows = db.execute("select n, sum, data from t order by n").fetchall()
            db.close()
            check([r[0] for r in rows] == list(range(1, len(rows) + 1)), f"{mode}: rows are missing")
            check(len(rows) >= last, f"{mode}: {last} rows were acknowledged, {len(rows)} are there")
            check(all(zlib.crc32(data) == total for _, total, data in rows), f"{mode}: wrong bytes")
    log(f"RESULT: {ROUNDS} rounds, rows: {known}")
    disk.umount()
    disk.judge()


def fsx_program():
    """$FSX, one in the PATH, or the crate's, built once below the target folder (minutes: full counts alone)."""
    found = os.environ.get("FSX") or shutil.which("fsx")
    root = os.path.join(devlib.TARGET, "tools")
    if not found and devlib.FULL and not os.path.exists(os.path.join(root, "bin/fsx")):
        run("cargo", "install", "fsx", "--locked", "--root", root, limit=1500)
    return found or os.path.join(root, "bin/fsx")


@devlib.limit(2400)
def fsx(t):
    """fsx's reads, writes, mappings, truncations, punched holes and copies, on each file system."""
    program = fsx_program()
    for seed in devlib.seeds([11]):
        log(devlib.replay(t, seed))
        disks = [Disk(t, f"{kind}{seed}", kind) for kind in ("ext4", "xfs", "btrfs")]
        running = [Program(t, f"fsx.{d.kind}", program, "-N", FSX_OPERATIONS, "-S", seed, os.path.join(d.point, "file")) for d in disks]
        disturber = Disturber(disks, seed)
        for p in running:
            p.end(900)
        disturber.end()
        for disk in disks:
            disk.umount()
            disk.judge()


# With the reduced counts it is not built.
if devlib.FULL or os.path.exists(fsx_program()):
    case_fsx = fsx


if __name__ == "__main__":
    devlib.main()
