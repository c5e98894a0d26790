#!/usr/bin/env python3
"""A disk outlives the death of its worker, its supervisor, its caller; and the death of both servers is cleaned up."""
import errno
import json
import os
import pty
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

MIB = 1 << 20
KILLS = devlib.pick(8, 100)
LONGEST_PAUSE = 10.0


class Hot:
    """hot.c in the background; `pauses` tells what each kill cost."""

    def __init__(self, t, path, offset, threads=16, how="write"):
        self.program = t.path("hot")
        if not os.path.exists(self.program):
            devlib.compile_c(t, "hot.c")
        self.out = open(t.path(f"hot.out.{time.monotonic_ns()}"), "w+")
        self.p = subprocess.Popen([self.program, path, str(offset), str(threads), "3600", how], stdout=self.out,
                                  stderr=subprocess.STDOUT, start_new_session=True)
        t.later(lambda: devlib.kill(self.p.pid))

    def stop(self, limit=30):
        """Ends it and judges it; returns the slow operations."""
        self.p.send_signal(signal.SIGTERM)
        try:
            rc = self.p.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failure(f"I/O hangs: the hot-block writer does not end within {limit} s") from None
        self.out.seek(0)
        lines = self.out.read().splitlines()
        slow = [tuple(map(float, l.split()[1:])) for l in lines if l.startswith("slow ")]
        log("hot blocks:", lines[-1] if lines else "no output")
        bad = [l for l in lines if l.startswith(("error", "wrong"))]
        check(rc == 0, "hot blocks: " + "\n".join(bad[:10] + lines[-1:]))
        return slow


class Fio(threading.Thread):
    """Verified fio passes, one after another, each complete, until told to stop."""

    def __init__(self, t, target, offset, size, extra=()):
        super().__init__(daemon=True)
        devlib.have("fio")
        self.t, self.target, self.offset, self.size, self.extra = t, target, offset, size, extra
        self.halt, self.passes, self.error = threading.Event(), 0, None
        self.start()

    def run(self):
        try:
            while not self.halt.is_set():
                r = run("fio", "--name=verified", f"--filename={self.target}", f"--offset={self.offset}", f"--size={self.size}",
                        "--rw=randwrite", "--bssplit=4k/70:16k/20:256k/10", "--blockalign=4k", "--direct=1", "--ioengine=libaio",
                        "--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_dump=0",
                        f"--randseed={self.passes + 1}", "--fallocate=none", *self.extra, rc=None, limit=300, quiet=True,
                        cwd=self.t.dir)
                if r.rc:
                    raise Failure(f"fio: exit {r.rc}: {r.text[-3000:]}")
                self.passes += 1
        except Failure as e:
            self.error = str(e)

    def stop(self):
        self.halt.set()
        self.join(330)
        check(not self.is_alive(), "fio hangs")
        check(self.error is None, str(self.error))
        check(self.passes > 0, "no pass of fio was finished")
        log(f"fio: {self.passes} verified passes of {self.size >> 20} MiB")


def kill_workers(name, count, seed, also=None):
    """Kills the worker `count` times at random instants; returns the times. A fault of the load ends it early."""
    rng, times = random.Random(seed), []
    rec = devlib.running_worker(name)
    supervisor = rec["supervisor"]
    for i in range(count):
        time.sleep(rng.choice((0.15, 0.3, 0.6)) + rng.random() * 0.3)
        if also and also():
            break
        rec = devlib.running_worker(name)
        check(rec["supervisor"] == supervisor, "the supervisor is another one")
        old = rec["worker"]["pid"]
        times.append(time.monotonic())
        os.kill(old, signal.SIGKILL)
        devlib.running_worker(name, old, LONGEST_PAUSE)
    time.sleep(1.0)
    return times


def tell_pauses(what, times, slow):
    pauses = []
    for i, at in enumerate(times):
        until = times[i + 1] if i + 1 < len(times) else at + 60
        pauses.append(max([dur for began, dur in slow if began < until and began + dur > at and began > at - 0.5] or [0.0]))
    median, longest = statistics.median(pauses), max(pauses)
    log(f"RESULT: {len(times)} kills, pause median {median * 1000:.0f} ms, max {longest * 1000:.0f} ms")
    check(longest <= LONGEST_PAUSE, f"{what}: a pause of {longest:.1f} s")


@devlib.limit(devlib.pick(240, 900))
def case_worker_bare(t):
    """On the bare device of a chain of three (allocation, copy-on-write and rewriting all happen)."""
    dd, paths = ploopimg.write_chain(t.mkdir("img"), 3, 2, 2048, 1024 * 2048, seed=9, fill=0.2, base_fill=0.5)
    before = ploopimg.Chain(dd)
    dev = t.mount(dd)
    name = os.path.basename(dev)
    fio = Fio(t, dev, 0, 192 * MIB)
    hot = Hot(t, dev, 600 * MIB - 65536)
    times = kill_workers(name, KILLS, 1, lambda: fio.error or hot.p.poll() is not None)
    fio.stop()
    slow = hot.stop()
    check(len(times) == KILLS, f"only {len(times)} kills were survived")
    # What nobody wrote to is still what it was.
    d = devlib.Direct(dev, write=False)
    for c in range(200, 1024):
        if c in (599, 600):
            continue
        data = before.read_cluster(c) or bytes(MIB)
        check(d.read(c * MIB, MIB) == data, f"cluster {c}, which nobody wrote to, changed")
    d.close()
    devlib.flush_buffers(dev)
    now = devlib.sha(dev)
    t.umount(dd)
    check(ploopimg.Chain(dd).sha() == now, "the closed chain differs from the device")
    t.judges(paths[-1])
    devlib.debian("check", dd)
    tell_pauses("bare device", times, slow)


@devlib.limit(devlib.pick(240, 900))
def case_worker_ext4(t):
    """On a mounted ext4, with a file system's own traffic beside it."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "2g", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    name = os.path.basename(dev)
    sums = devlib.fill_tree(os.path.join(point, "before"), 4, 64 * MIB) if os.makedirs(os.path.join(point, "before")) is None else {}
    run("sync", "-f", point, limit=60)
    with open(os.path.join(point, "hot"), "wb") as f:
        f.write(bytes(MIB))
    fio = Fio(t, os.path.join(point, "fio"), 0, 128 * MIB)
    hot = Hot(t, os.path.join(point, "hot"), 0)
    halt, faults = threading.Event(), []

    def churn():
        rng, n = random.Random(2), 0
        while not halt.is_set():
            try:
                p = os.path.join(point, f"churn{n % 50}")
                data = rng.randbytes(rng.randrange(1, 200000))
                with open(p, "wb") as f:
                    f.write(data)
                    if n % 3 == 0:
                        f.flush()
                        os.fsync(f.fileno())
                with open(p, "rb") as f:
                    if f.read() != data:
                        faults.append(f"{p}: wrong bytes")
                if n % 5 == 0:
                    os.rename(p, p + ".r")
                n += 1
            except OSError as e:
                faults.append(str(e))
                return
    churner = threading.Thread(target=churn, daemon=True)
    churner.start()
    times = kill_workers(name, KILLS, 3, lambda: faults or fio.error or hot.p.poll() is not None)
    halt.set()
    churner.join(60)
    check(not churner.is_alive(), "file system traffic hangs")
    check(not faults, "; ".join(faults[:5]))
    fio.stop()
    slow = hot.stop()
    check(len(times) == KILLS, f"only {len(times)} kills were survived")
    run("sync", "-f", point, limit=60)
    devlib.compare_tree(os.path.join(point, "before"), sums)
    t.umount("-m", point)
    dev = t.mount("-r", dd)
    r = run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    t.judges(img)
    dev = t.mount("-m", point, dd)
    devlib.compare_tree(os.path.join(point, "before"), sums)
    t.umount(dd)
    tell_pauses("mounted ext4", times, slow)


def case_worker_read_only(t):
    """A read-only device takes over too."""
    img = t.path("a.hds")
    ploopimg.write_image(img, 2, 2048, 256 * 2048, ploopimg.random_content(2048, 256 * 2048, 0.5, 3))
    want = ploopimg.Chain([img])
    was = devlib.identity(img)
    dev = t.mount("-r", img)
    hot = Hot(t, dev, 0, 8, "read")
    times = kill_workers(os.path.basename(dev), 5, 5, lambda: hot.p.poll() is not None)
    slow = hot.stop()
    check(len(times) == 5, "not all kills were survived")
    check(want.compare(dev) is None, "wrong bytes")
    t.umount("-d", dev)
    devlib.unchanged(img, was)
    tell_pauses("read-only", times, slow)


def case_worker_raw(t):
    """A raw image under load and kills."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "512m", "-f", "raw", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    fio, hot = Fio(t, dev, 0, 64 * MIB), Hot(t, dev, 200 * MIB)
    times = kill_workers(os.path.basename(dev), 8, 6, lambda: fio.error or hot.p.poll() is not None)
    fio.stop()
    slow = hot.stop()
    devlib.flush_buffers(dev)
    now = devlib.sha(dev)
    t.umount(dd)
    check(devlib.sha(img) == now, "the file differs from the device")
    tell_pauses("raw", times, slow)


@devlib.limit(300)
def case_supervisor(t):
    """The supervisor dies alone: the disk goes on and gets another; after that a worker may die again."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "1g", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    name = os.path.basename(dev)
    fio, hot = Fio(t, dev, 0, 64 * MIB), Hot(t, dev, 500 * MIB)
    times = []
    for _ in range(devlib.pick(3, 10)):
        rec = devlib.running_worker(name)
        old = rec["supervisor"]["pid"]
        times.append(time.monotonic())
        os.kill(old, signal.SIGKILL)

        def another():
            try:
                r = devlib.record(name)
            except (OSError, ValueError):
                return None
            return r["supervisor"]["pid"] != old and devlib.alive(r["supervisor"]) and devlib.alive(r["worker"])
        devlib.wait_for("there is another supervisor, and a worker", another, 10)
        check(name in ploop("list").out, "the device is not listed any more")
        times += kill_workers(name, 1, 8)
        check(hot.p.poll() is None and not fio.error, "the load failed")
    fio.stop()
    slow = hot.stop()
    # Commands reach the new supervisor.
    t.umount(dd)
    check(not os.path.exists(f"{devlib.RUN}/{name}"), "the record is still there")
    t.judges(img)
    tell_pauses("supervisor", times, slow)


def kill_both(name):
    """Both at once: neither may start the other again."""
    rec = devlib.running_worker(name)
    pids = [rec["supervisor"]["pid"], rec["worker"]["pid"]]
    for p in pids:
        os.kill(p, signal.SIGSTOP)
    for p in pids:
        os.kill(p, signal.SIGKILL)
    devlib.wait_for("both are gone", lambda: not any(devlib.alive(rec[w]) for w in ("supervisor", "worker")), 10)
    return rec


def case_stopped(t):
    """A worker or a supervisor that stands still is seen by list and doctor; a stopped worker is replaced (full counts)."""
    dev, dd = t.bare()
    name = os.path.basename(dev)

    def state():
        lines = [l for l in ploop("list").out.splitlines() if l.split()[0] == name]
        return lines[0].split()[-1] if lines else "gone"

    calm = state()
    check(calm != "stalled", f"the state of a running device: {calm}")
    for which in ("worker", "supervisor"):
        process = devlib.record(dev)[which]
        pid = process["pid"]
        os.kill(pid, signal.SIGSTOP)
        t.later(lambda p=process: devlib.alive(p) and os.kill(p["pid"], signal.SIGCONT))
        begin = time.monotonic()
        devlib.wait_for(f"stalled, with its {which} stopped", lambda: state() == "stalled", 40)
        log(f"RESULT: {which} seen after {time.monotonic() - begin:.1f} s")
        found = [f for f in json.loads(run(devlib.PLOOP, "doctor", "--json", dd, rc=1).out)["disk"] if f["grade"] != "good"]
        cure = found[0]["cure"] if found else None
        check(len(found) == 1 and cure == f"kill -CONT {pid}", f"doctor does not say what to do: {found}")
        if which == "worker" and devlib.FULL:
            devlib.running_worker(name, pid, 120)
        if devlib.alive(process):
            run("sh", "-c", cure)
        devlib.wait_for("running again", lambda: state() == calm, 20)
        devlib.wait_for("doctor is silent", lambda: run(devlib.PLOOP, "doctor", dd, rc=None, quiet=True).rc == 0, 20, 0.3)
    d = devlib.Direct(dev)
    d.write(0, b"x" * 4096)
    d.sync()
    d.close()
    t.umount(dd)


def case_both_bare(t):
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    size = 512 * MIB
    ploop("init", "-s", "512m", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    name = os.path.basename(dev)
    model = devlib.Model(t.path("model"), size)
    devlib.scribble(dev, model, 21, 300, spots=[0, 100 * MIB, 300 * MIB])
    # Answered, not flushed, and elsewhere: it must be there.
    d = devlib.Direct(dev)
    late = {(400 + i) * MIB: random.Random(i).randbytes(8192) for i in range(20)}
    for at, data in late.items():
        d.write(at, data)
        model.write(at, data)
    begin = time.monotonic()
    kill_both(name)
    got = None
    script = ("import os,mmap,sys\nfd=os.open(sys.argv[1],os.O_RDONLY|os.O_DIRECT)\nb=mmap.mmap(-1,4096)\n"
              "try:\n os.preadv(fd,[b],int(sys.argv[2]))\nexcept OSError as e:\n sys.exit(10+e.errno)\n")
    r = run(sys.executable, "-c", script, dev, 0, rc=None, limit=20)
    check(r.rc == 10 + errno.EIO or r.rc, "a read succeeded though nobody serves the device")
    try:
        d.write(0, bytes(4096))
        raise Failure("a write succeeded though nobody serves the device")
    except OSError as e:
        log(f"a write fails: {e}")
    finally:
        d.close()
    listing = ploop("list", rc=None, limit=30)
    log("list says:", listing.out.strip())
    ploop("info", "-d", dd, rc=None, limit=30)
    t.umount("-d", dev, limit=60)
    check(not os.path.exists(dev), f"{dev} is still there")
    check(not os.path.exists(f"{devlib.RUN}/{name}"), "the record is still there")
    check(name not in ploop("list").out, "still listed")
    log(f"cleaned {time.monotonic() - begin:.1f} s after the kill")
    # Read-only by file list: in use, with a message that names the way out. What needs the content: refused. Nothing written.
    was = devlib.identity(img)
    r = ploop("mount", "-r", img, rc=devlib.IN_USE)
    check("DiskDescriptor.xml" in r.err or "ploop check" in r.err or "--force" in r.err, f"no way out is named: {r.err}")
    for args in (["check", "-d", img], ["check", dd], ["snapshot", dd]):
        r = ploop(*args, rc=17)
        check("ploop mount" in r.err, f"no way out is named: {r.err}")
    devlib.unchanged(img, was, atime=False)
    # By descriptor, after one more kill: everything that was answered.
    dev = t.mount(dd)
    model.compare(dev)
    kill_both(os.path.basename(dev))
    dev = t.mount(dd)
    model.compare(dev)
    devlib.scribble(dev, model, 22, 100)
    t.umount(dd)
    t.judges(img)
    chain = ploopimg.Chain(dd)
    check(chain.compare(model.path) is None, "the closed image has other bytes")


def case_both_mounted(t):
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "1g", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    name = os.path.basename(dev)
    sums = devlib.fill_tree(point, 31, 50 * MIB)
    run("sync", "-f", point, limit=60)
    with open(os.path.join(point, "unflushed"), "wb") as f:
        f.write(b"?" * 3000000)
    kill_both(name)
    r = run("dd", f"if=/dev/zero", f"of={point}/new", "bs=1M", "count=20", "conv=fsync", rc=None, limit=60)
    check(r.rc != 0, "writing with fsync succeeded though nobody serves the device")
    ploop("list", "-a", rc=None, limit=30)
    # A second mount while the dead device is still mounted: refused, or cleaned and mounted; never two writers, no hang.
    t.umount(dd, limit=90)
    check(not devlib.is_mounted(point), f"{point} is still mounted")
    check(not os.path.exists(f"{devlib.RUN}/{name}"), "the record is still there")
    check(not os.path.exists(dev), f"{dev} is still there")
    ploop("mount", "-r", img, rc=devlib.IN_USE)
    dev = t.mount("-m", point, dd)
    devlib.compare_tree(point, sums)
    t.umount(dd)
    dev = t.mount("-r", dd)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    t.judges(img)


def case_both_mounted_nothing_is_changed_beneath(t):
    """While what the killed servers left is mounted each command that would change an image or the descriptor is refused, and
    tells the way out; after that it works."""
    folder = t.mkdir("img")
    base = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "64m", base)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    ploop("snapshot", dd)
    ploop("snapshot", dd)
    first, second = (line.split()[0] for line in ploop("snapshot-list", "-H", "-s", "-o", "uuid", dd).out.splitlines())
    top = next(p for g, p, _ in ploopimg.read_descriptor(dd)[1] if g not in (first, second))
    copy = t.path("copy")
    shutil.copy(base, copy)
    kill_both(os.path.basename(dev))
    before = {f: devlib.sha(os.path.join(folder, f)) for f in os.listdir(folder)}
    for args in (("snapshot", dd), ("tsnapshot", "-u", "{cccccccc-0000-4000-8000-000000000001}", "-c", "x", dd), ("snapshot-merge", dd),
                 ("snapshot-merge", "-u", second, dd), ("snapshot-delete", "-u", first, dd), ("snapshot-switch", "-u", first, dd),
                 ("replace", "-u", first, "-i", copy, dd), ("check", dd), ("check", "-f", "-d", top), ("merge", top, base),
                 ("mount", "-c", "other", dd), ("mount", dd)):
        r = ploop(*args, rc=None, limit=30)
        check(r.rc and ("umount" in r.err or "unmount it" in r.err), f"{args[0]}: {r.rc}, {r.text}")
        check(before == {f: devlib.sha(os.path.join(folder, f)) for f in os.listdir(folder)}, f"{args[0]} has changed the disk")
    ploop("snapshot-list", dd)
    t.umount("-d", dev)
    t.mount(dd)
    t.umount(dd)
    ploop("snapshot-merge", "-A", dd)
    ploop("check", dd)


def case_both_mounted_elsewhere(t):
    """A dead device is mounted in another mount namespace, too: one that ends is waited for, one that stays is named."""
    img, other = (os.path.join(t.mkdir(name), "root.hdd") for name in ("img", "other"))
    for path in (img, other):
        ploop("init", "-s", "256m", path)
    point = t.mkdir("mnt")
    dev = t.mount("-m", point, os.path.join(os.path.dirname(img), "DiskDescriptor.xml"))
    name = os.path.basename(dev)
    keeper = subprocess.Popen(["unshare", "-m", "sh", "-c", 'cd "$0" && exec sleep 300', point], start_new_session=True)
    t.later(lambda: (devlib.kill(keeper.pid), keeper.wait(30)))
    own = os.readlink("/proc/self/ns/mnt")
    devlib.wait_for("a mount namespace", lambda: os.readlink(f"/proc/{keeper.pid}/ns/mnt") != own, 10)
    kill_both(name)
    run("umount", point, limit=60)
    r = ploop("umount", "-d", dev, rc=22, limit=30)
    check(f"in the mount namespace of process {keeper.pid}" in r.err, f"not told who has it mounted: {r.err}")
    # Others are not concerned.
    others = t.mount(os.path.join(os.path.dirname(other), "DiskDescriptor.xml"))
    t.umount("-d", others)
    check(os.path.exists(f"{devlib.RUN}/{name}"), "the record is gone while the device is mounted")
    ends = threading.Timer(0.7, lambda: devlib.kill(keeper.pid))
    ends.start()
    ploop("umount", "-d", dev, limit=30)
    ends.join()
    check(not os.path.exists(f"{devlib.RUN}/{name}"), "the record is still there")


def case_both_mount_again(t):
    """The next mount by descriptor cleans what the dead servers left, without an umount in between."""
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "512m", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount(dd)
    d = devlib.Direct(dev)
    d.write(5 * MIB, b"F" * 65536)
    d.sync()
    d.close()
    rec = kill_both(os.path.basename(dev))
    r = ploop("mount", dd, rc=None)
    if r.rc:
        # A refusal has to say what to do, and that has to work.
        check("umount" in r.err, f"refused without a way out: {r.err}")
        t.umount(dd)
        dev = t.mount(dd)
    else:
        dev = t.device_of(dd)
        check(dev, "mounted but not listed")
    d = devlib.Direct(dev)
    check(d.read(5 * MIB, 65536) == b"F" * 65536, "flushed data is gone")
    d.close()
    t.umount(dd)
    t.judges(img)
    check(rec["backing"] not in os.listdir("/sys/block") or not os.path.exists(f"/sys/block/{rec['backing']}/loop/backing_file"),
          f"/dev/{rec['backing']} of the dead device is still attached")


def cgroup_roots():
    """Folders in which a cgroup can be made: the unified hierarchy, and those of version 1 where they exist."""
    out = []
    for base in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.path.exists(os.path.join(base, "cgroup.procs")) and os.path.exists(os.path.join(base, "cgroup.controllers")):
            out.append(base)
    for one in ("memory", "pids", "systemd", "blkio"):
        base = f"/sys/fs/cgroup/{one}"
        if os.path.exists(os.path.join(base, "cgroup.procs")) and base not in out:
            out.append(base)
    return out


def goes_on(t, dev, dd, img):
    """The disk works after its caller is gone."""
    time.sleep(1.0)
    rec = devlib.running_worker(os.path.basename(dev))
    check(devlib.alive(rec["supervisor"]), "the supervisor is gone")
    model = devlib.Model(t.path("model"), devlib.device_size(dev))
    devlib.scribble(dev, model, 41, 200)
    devlib.flush_buffers(dev)
    model.compare(dev)
    t.umount(dd)
    t.judges(img)
    check(ploopimg.Chain(dd).compare(model.path) is None, "the closed image has other bytes")


def new_image(t):
    folder = t.mkdir("img")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "256m", "-t", "none", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    t.later(lambda: t.device_of(dd) and t.umount(dd))
    return img, dd


def case_caller_cgroup(t):
    """Everything in the caller's cgroup is killed; the caller has a mount namespace of its own, too."""
    roots = cgroup_roots()
    if not roots:
        raise devlib.Skip("no cgroup hierarchy can be written to")
    img, dd = new_image(t)
    groups = []
    for root in roots:
        g = os.path.join(root, f"ploop-test-{os.getpid()}")
        try:
            os.mkdir(g)
        except OSError as e:
            log(f"{g}: {e}")
            continue
        groups.append(g)

        def drop(g=g):
            for _ in range(50):
                try:
                    os.rmdir(g)
                    return
                except OSError:
                    time.sleep(0.1)
            raise Failure(f"{g} cannot be removed: " + open(g + "/cgroup.procs").read())
        t.later(drop)
    check(groups, "no cgroup could be made")
    ready = t.path("ready")
    script = "".join(f"echo $$ > {g}/cgroup.procs; " for g in groups)
    script += f"'{devlib.PLOOP}' mount '{dd}' > '{t.path('out')}' 2>&1; echo $? > '{ready}.tmp'; mv '{ready}.tmp' '{ready}'; sleep 1000 & sleep 1000"
    # From another namespace our records would be looked for below the root of process 1: not in a plain chroot.
    with open("/proc/self/mountinfo") as f:
        chroot = not any(line.split(" ")[4] == "/" for line in f)
    own = [] if chroot else ["unshare", "-m", "--propagation", "private"]
    shell = subprocess.Popen([*own, "bash", "-c", script], start_new_session=True)
    devlib.wait_for("the mount ended", lambda: os.path.exists(ready), 60)
    check(open(ready).read().strip() == "0", "mount failed: " + open(t.path("out")).read())
    dev = t.device_of(dd)
    check(dev, "not listed")
    rec = devlib.record(dev)
    for who in ("supervisor", "worker"):
        with open(f"/proc/{rec[who]['pid']}/cgroup") as f:
            text = f.read()
        check(f"ploop-test-{os.getpid()}" not in text, f"the {who} sits in the caller's cgroup: {text}")
    try:
        first = os.readlink("/proc/1/ns/mnt")
    except OSError:
        # A sandbox may forbid to look at process 1, and so to enter its namespace.
        first = None
    ns = os.readlink(f"/proc/{rec['supervisor']['pid']}/ns/mnt")
    check(first in (None, ns), f"the supervisor is in the mount namespace {ns}, process 1 in {first}")
    for g in groups:
        if os.path.exists(g + "/cgroup.kill"):
            with open(g + "/cgroup.kill", "w") as f:
                f.write("1")
        with open(g + "/cgroup.procs") as f:
            for pid in f.read().split():
                devlib.kill(int(pid))
    shell.wait(10)
    check(devlib.record(dev)["worker"] == rec["worker"], "the worker is another one")
    goes_on(t, dev, dd, img)


def case_caller_session(t):
    """A session as sshd makes it: own terminal, hung up, its groups signalled."""
    img, dd = new_image(t)
    ready = t.path("ready")
    pid, master = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "-c", f"'{devlib.PLOOP}' mount '{dd}'; echo $? > '{ready}.tmp'; mv '{ready}.tmp' '{ready}'; sleep 1000"])
    devlib.wait_for("the mount ended", lambda: os.path.exists(ready), 60)
    check(open(ready).read().strip() == "0", "mount failed: " + os.read(master, 10000).decode())
    dev = t.device_of(dd)
    check(dev, "not listed")
    rec = devlib.record(dev)
    for who in ("supervisor", "worker"):
        check(os.getsid(rec[who]["pid"]) != pid, f"the {who} is in the caller's session")
        cwd = os.readlink(f"/proc/{rec[who]['pid']}/cwd")
        check(cwd == "/", f"the {who} keeps {cwd} busy")
        for fd in os.listdir(f"/proc/{rec[who]['pid']}/fd"):
            try:
                to = os.readlink(f"/proc/{rec[who]['pid']}/fd/{fd}")
            except OSError:
                continue
            check(not to.startswith("/dev/pts/"), f"the {who} keeps the terminal {to} open")
    os.killpg(pid, signal.SIGHUP)
    os.close(master)
    time.sleep(0.3)
    for p in session_members(pid):
        devlib.kill(p)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
    goes_on(t, dev, dd, img)


def session_members(sid):
    out = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(p)) == sid:
                out.append(int(p))
        except OSError:
            pass
    return out


def case_fds_not_kept(t):
    """The server keeps no descriptor of its caller open (a pipe would never end) and no signal mask or limit of it."""
    img, dd = new_image(t)
    r, w = os.pipe()
    os.set_inheritable(w, True)
    p = subprocess.Popen([devlib.PLOOP, "mount", dd], pass_fds=(w,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         preexec_fn=lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1}), os.chdir(t.dir)))
    os.close(w)
    done = []
    reader = threading.Thread(target=lambda: done.append((os.read(r, 1), p.stdout.read())), daemon=True)
    reader.start()
    p.wait(60)
    reader.join(5)
    check(done, "somebody still holds the caller's pipes after `ploop mount` ended")
    dev = t.device_of(dd)
    rec = devlib.record(dev)
    for who in ("supervisor", "worker"):
        with open(f"/proc/{rec[who]['pid']}/status") as f:
            status = dict(l.rstrip("\n").split(":\t", 1) for l in f if ":\t" in l)
        check(int(status["SigBlk"], 16) & (1 << (signal.SIGUSR1 - 1)) == 0, f"the {who} inherited the signal mask {status['SigBlk']}")
    t.umount(dd)


if __name__ == "__main__":
    devlib.main()
