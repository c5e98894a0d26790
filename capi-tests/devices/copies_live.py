#!/usr/bin/env python3
"""The sending end of `ploop copy`: mounted disks under load go to sockets, pipes and files; kills of sender and worker; refusals."""
import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402

MIB = 1 << 20
SIZE, FILL, ROUNDS, KILLS = devlib.pick(("512m", 60 * MIB, 3, 4), ("4g", 1536 * MIB, 10, 60))

# Writes until the file STOP is there, then makes STOPPED. What it has written it reads again.
LOAD = """
import os, random, sys
folder, stop, seed = sys.argv[1:]
rng = random.Random(int(seed))
data = {}
fd = os.open(os.path.join(folder, "blocks"), os.O_RDWR | os.O_CREAT)
n = 0
while not os.path.exists(stop):
    at, block = rng.randrange(3000), rng.randbytes(4096)
    os.pwrite(fd, block, at * 4096)
    data[at] = block
    n += 1
    if n % 50 == 0:
        name = os.path.join(folder, f"f{n % 700}")
        if os.path.exists(name):
            os.unlink(name)
        else:
            with open(name, "wb") as f:
                f.write(rng.randbytes(rng.randrange(300000)))
    if n % 120 == 0:
        os.fsync(fd)
for at, block in data.items():
    assert os.pread(fd, 4096, at * 4096) == block, at
open(stop + "PED", "w").close()
"""


def disk(t, name="disk", size=SIZE):
    folder = t.mkdir(name)
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", size, img, limit=120)
    mnt = t.mkdir(name + ".mnt")
    return dd, img, mnt, t.mount("-m", mnt, dd)


class Load:
    def __init__(self, t, mnt, seed):
        self.stop = t.path(f"STOP{seed}")
        self.process = subprocess.Popen([sys.executable, "-c", LOAD, mnt, self.stop, str(seed)])
        t.later(self.process.kill)
        # For the shell.
        self.command = f"touch {self.stop}; while [ ! -e {self.stop}PED ]; do sleep 0.05; done"

    def end(self):
        check(self.process.wait(30) == 0, "the load found other data than it had written")


def sums(folder):
    return {n: devlib.sha(os.path.join(folder, n)) for n in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, n))}


def writable(mnt):
    """Nothing is frozen: a write comes to its end."""
    run("timeout", "20", "dd", "if=/dev/zero", f"of={mnt}/probe", "bs=4k", "count=1", "conv=fsync", "status=none", limit=30)
    os.unlink(os.path.join(mnt, "probe"))


def check_copy(t, img, want):
    """It is a closed image, whose file system is whole and has these files."""
    t.judges(img)
    mnt = t.mkdir("copy.mnt")
    dev = t.mount("-m", mnt, img)
    got = sums(mnt)
    t.umount("-m", mnt)
    check(got == want, f"the copy has {len(got)} files, the source {len(want)}; other: {[n for n in want if got.get(n) != want[n]][:5]}")
    dev = t.mount(img)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    t.umount("-d", dev)
    os.unlink(img)


def transfer(form, dev, target, load, between=lambda: None):
    """Copies the device; `between` is called meanwhile. What the sender says of it."""
    said = tempfile.TemporaryFile(mode="w+")
    sender = [devlib.PLOOP, "copy", "-s", dev, "-F", load.command]
    if form == "file":
        processes = [subprocess.Popen([*sender, "-d", target], stdout=said)]
    else:
        receiver = devlib.DEBIAN_PLOOP if form == "pipe to 1.15" else devlib.PLOOP
        env = {k: v for k, v in os.environ.items() if not k.startswith("LD_")} | {"PADDING": "x" * 8192}
        if form == "socket":
            ours, theirs = (s.detach() for s in socket.socketpair())
            out, back, source, told = ours, ours, theirs, theirs
        else:
            source, out = os.pipe()
            back, told = os.pipe()
        processes = [
            subprocess.Popen([*sender, "-o", str(out), "-f", str(back)], pass_fds=(out, back), stdout=said),
            subprocess.Popen([receiver, "copy", "-d", target, "-i", str(source), "-f", str(told)], pass_fds=(source, told), env=env),
        ]
        for fd in {out, back, source, told}:
            os.close(fd)
    between()
    codes = [p.wait(300) for p in processes]
    check(not any(codes), f"{form}: {codes}")
    said.seek(0)
    return re.search(r"(\d+) bytes sent, (\d+) of them .* for (\d+) ms", said.read())


@devlib.limit(devlib.pick(180, 3600))
def case_under_load(t):
    """What arrives is the file system as it was frozen, whatever it goes through, and though the worker is killed."""
    devlib.debian_is_debians()
    dd, img, mnt, dev = disk(t)
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    devlib.fill_tree(mnt, 3, FILL, sizes=(70000, 3000000))
    forms = ["pipe to 1.15", "file", "socket", "file", "pipe"]
    for i in range(ROUNDS):
        form = forms[i % len(forms)]
        load = Load(t, mnt, seed * 100 + i)
        time.sleep(0.3)

        def kill_worker():
            if i % 2:
                time.sleep(rng.random() * 0.5)
                worker = devlib.running_worker(os.path.basename(dev))["worker"]["pid"]
                devlib.kill(worker)
        target = t.path(f"copy{i}.hdd")
        began = time.time()
        said = transfer(form, dev, target, load, kill_worker)
        check(said, "the sender does not tell what it has sent")
        log(f"{form}: {os.path.getsize(target) >> 20} MiB in {time.time() - began:.1f} s; {said.group(0)}")
        load.end()
        writable(mnt)
        check_copy(t, target, sums(mnt))
    t.umount("-m", mnt)
    t.judges(img)


@devlib.limit(devlib.pick(120, 900))
def case_sender_killed(t):
    """A sender that is killed at any moment leaves nothing frozen and nothing tracked, and the next one goes on."""
    dd, img, mnt, dev = disk(t)
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    devlib.fill_tree(mnt, 3, 20 * MIB, sizes=(70000, 3000000))
    load = Load(t, mnt, seed)
    target = t.path("copy.hdd")
    # How long one takes.
    began = time.time()
    ploop("copy", "-s", dev, "-d", target, "-F", "sleep 0.1", limit=100)
    whole = time.time() - began
    os.unlink(target)
    for i in range(KILLS):
        p = subprocess.Popen([devlib.PLOOP, "copy", "-s", dev, "-d", target, "-F", "sleep 0.1"])
        time.sleep(whole * (1.1 - rng.random() ** 2))
        p.send_signal(signal.SIGTERM if i % 3 == 2 else signal.SIGKILL)
        p.wait(60)
        writable(mnt)
        if os.path.exists(target):
            os.unlink(target)
    ploop("copy", "-s", dev, "-d", target, "-F", load.command, limit=100)
    load.end()
    check_copy(t, target, sums(mnt))
    check(not os.path.exists(target + ".receiving"), "left behind")
    ploop("snapshot", dd)
    t.umount("-m", mnt)


def case_library(t):
    """ploop_copy_send() writes an open file in place, and ploop_send() a pipe, without answers; what they refuse."""
    c = ctypes.CDLL(os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so")))

    class Param(ctypes.Structure):
        _fields_ = [("device", ctypes.c_char_p), ("ofd", ctypes.c_int), ("flush_cmd", ctypes.c_char_p),
                    ("feedback_fd", ctypes.c_int), ("dummy", ctypes.c_char * 32)]
    dd, img, mnt, dev = disk(t, size="64m")
    target, mark = t.path("copy.hdd"), t.path("mark")
    with open(target, "wb") as f:
        check(c.ploop_copy_send(ctypes.byref(Param(dev.encode(), f.fileno(), b"touch " + mark.encode(), -1))) == 0, "ploop_copy_send")
    check(os.path.exists(mark), "the command was not run")
    check_copy(t, target, sums(mnt))
    check(c.ploop_copy_send(None) == 38, "NULL")
    with open("/dev/null", "wb") as f:
        check(c.ploop_copy_send(ctypes.byref(Param(dev.encode(), f.fileno(), None, -1))) == 38, "to /dev/null")
    source, out = os.pipe()
    p = subprocess.Popen([devlib.PLOOP, "copy", "-d", target, "-i", str(source)], pass_fds=(source,))
    os.close(source)
    check(c.ploop_send(dev.encode(), out, None, 1) == 0, "ploop_send")
    os.close(out)
    check(p.wait(30) == 0, "the receiver failed")
    t.judges(target)
    t.umount("-m", mnt)


def case_excludes(t):
    """What would replace or move the top waits for the end of a copy, and the other way round; what a sender refuses."""
    dd, img, mnt, dev = disk(t, size="64m")
    target, go = t.path("copy.hdd"), t.path("go")
    stop = f"touch {go}.begun; while [ ! -e {go} ]; do sleep 0.05; done"
    p = subprocess.Popen([devlib.PLOOP, "copy", "-s", dev, "-d", target, "-F", stop])
    t.later(p.kill)
    devlib.wait_for("the stop command", lambda: os.path.exists(go + ".begun"), 60)
    for command in (["snapshot", dd], ["compact", dd], ["reload", dev], ["copy", "-s", dev, "-d", t.path("other")]):
        said = ploop(*command, rc=None)
        check(said.rc == 17 and "copied" in said.text, f"{command}: {said.rc} {said.text}")
    check(not os.path.exists(t.path("other")), "left behind")
    devlib.kill(devlib.running_worker(os.path.basename(dev))["worker"]["pid"])
    open(go, "w").close()
    check(p.wait(60) == 0, "the copy failed")
    check_copy(t, target, sums(mnt))
    said = ploop("copy", "-s", dev, "-d", target, "-F", "exit 3", rc=12)
    check("exit 3" in said.text and not os.path.exists(target), said.text)
    ploop("copy", "-s", "/dev/ploop997", "-d", target, rc=2)
    with open("/dev/null", "w", encoding="ascii") as null:
        check(subprocess.run([devlib.PLOOP, "copy", "-s", dev], stdout=null, stderr=null).returncode == 38, "to /dev/null")
    log("a supervisor that is killed: the copy fails, the device and the next copy do not")
    os.unlink(go)
    os.unlink(go + ".begun")
    p = subprocess.Popen([devlib.PLOOP, "copy", "-s", dev, "-d", target, "-F", stop])
    t.later(p.kill)
    devlib.wait_for("the stop command", lambda: os.path.exists(go + ".begun"), 60)
    old = devlib.record(os.path.basename(dev))["supervisor"]
    devlib.kill(old["pid"])
    devlib.wait_for("another supervisor", lambda: devlib.record(os.path.basename(dev))["supervisor"] != old, 20)
    open(go, "w").close()
    check(p.wait(60) not in (0, 38) and not os.path.exists(target), f"the copy ended with {p.returncode}")
    writable(mnt)
    ploop("copy", "-s", dev, "-d", target, "-F", "true")
    check_copy(t, target, sums(mnt))
    ploop("snapshot", dd)
    t.umount("-m", mnt)
    log("a device with nothing mounted")
    dev = t.mount(dd)
    ploop("copy", "-s", dev, "-d", target)
    t.umount("-d", dev)
    top = [f for f in os.listdir(os.path.dirname(img)) if f.startswith("root.hdd.{")][0]
    with open(target, "rb") as a, open(os.path.join(os.path.dirname(img), top), "rb") as b:
        ours, theirs = a.read(), b.read()
    check(ours[:len(theirs)] == theirs, "the copy of a quiet device differs from its image")


if __name__ == "__main__":
    devlib.main()
