#!/usr/bin/env python3
"""ploop stop, start, clear, delete, stat, getdev, and the C functions about the state of a device."""
import ctypes
import json
import os
import random
import re
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import DEVICE, DEVIOC, IN_USE, MOUNT, PARAM, check, log, ploop, run  # noqa: E402

BUSY, SYSFS = 17, 9
MIB = 1 << 20


def pattern(n):
    return random.Random(n).randbytes(MIB)


def write(dev, at, data):
    d = devlib.Direct(dev)
    d.write(at, data)
    d.sync()
    d.close()


def holds(dev, at, data):
    d = devlib.Direct(dev, write=False)
    got = d.read(at, len(data))
    d.close()
    check(got == data, f"{dev} at {at}: the data is not what was written")


def clear_later(t, dev):
    t.later(lambda: ploop("clear", "-d", dev, rc=None))


def line_of(dev):
    name = os.path.basename(dev)
    return [line for line in ploop("list", quiet=True).out.splitlines() if line.startswith(name + " ")]


def other_disk(t, name="other"):
    folder = t.mkdir(name)
    ploop("init", "-s", "64m", "-t", "none", os.path.join(folder, "root.hdd"))
    return os.path.join(folder, "DiskDescriptor.xml")


def next_minor():
    return int(re.fullmatch(r"Next unused minor: (\d+)\n", ploop("getdev").out).group(1))


def case_life(t):
    """Stopped, a device keeps its name and nothing else; started, it is what it was."""
    dev, dd = t.bare()
    img = os.path.join(os.path.dirname(dd), "root.hdd")
    clear_later(t, dev)
    data = pattern(1)
    write(dev, 3 * MIB, data)
    # In use: nothing is changed.
    held = os.open(dev, os.O_RDONLY | os.O_EXCL)
    p = subprocess.Popen([devlib.PLOOP, "stop", "-d", dev], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1)
    check(p.poll() is None, "a busy device is not waited for")
    p.terminate()
    check(p.wait(20) == 143, f"the status after SIGTERM: {p.returncode}")
    time.sleep(0.5)
    os.close(held)
    holds(dev, 3 * MIB, data)
    ploop("start", "-d", dev, rc=DEVIOC)
    ploop("clear", "-d", dev, rc=DEVIOC)
    ploop("delete", "-d", dev, "-l", 0, rc=DEVIOC)
    ploop("stop", "-d", dev)
    check(not os.path.exists(dev), f"{dev} is still there")
    check(not ploopimg.validate(img, leaks_allowed=True), f"not closed: {ploopimg.validate(img, leaks_allowed=True)}")
    was = devlib.sha(img), os.stat(img).st_mtime_ns, os.stat(img).st_ctime_ns
    r = ploop("stop", "-d", dev, rc=DEVIOC)
    check("already" in r.err, r.err)
    check(line_of(dev) == [f"{os.path.basename(dev):<12} {img}   stopped"], f"list: {line_of(dev)}")
    [row] = [d for d in json.loads(ploop("list", "--json").out)["devices"] if d["node"] == dev]
    check(row["state"] == "stopped" and row["base"] == img, f"list --json: {row}")
    [told] = [line for line in run(devlib.PLOOP, "doctor", rc=(0, 1)).out.splitlines() if dev in line and line.startswith("ok ")]
    check(f"ploop start -d {dev}" in told, f"doctor: {told}")
    # What needs it running says what to do.
    for args, code in ((("snapshot", "-d", dev, t.path("x")), SYSFS), (("copy", "-s", dev, "-d", t.path("x")), DEVICE), (("stat", "-d", dev), SYSFS)):
        r = ploop(*args, rc=code)
        check(f"ploop start -d {dev}" in r.err, f"ploop {args}: {r.err}")
    # Its disk: not for writing, by descriptor or by file; but to be read.
    for what in (dd, img):
        r = ploop("mount", what, rc=MOUNT)
        check(f"ploop start -d {dev}" in r.err and f"ploop clear -d {dev}" in r.err, f"mount {what}: {r.err}")
    ploop("info", "-s", dd)
    ploop("check", "-r", dd)
    look = t.mount("-r", dd)
    check(look != dev, f"{dev} was given to another device")
    holds(look, 3 * MIB, data)
    r = ploop("start", "-d", dev, rc=MOUNT)
    check(look in r.err, f"started beside a reader of the top: {r.err}")
    t.umount("-d", look)
    # Its name is kept.
    minor = next_minor()
    check(minor % 16 == 0 and f"/dev/ploop{minor // 16}" != dev, f"the name of {dev} is free: {minor}")
    other = other_disk(t)
    r = ploop("mount", "-d", dev, other, rc=BUSY)
    check(f"ploop clear -d {dev}" in r.err, f"the name is given away: {r.err}")
    second = t.mount(other)
    # Devices of other tests come and go.
    check(second == f"/dev/ploop{minor // 16}" or os.path.exists(f"/dev/ploop{minor // 16}") or int(second[10:]) * 16 < minor,
          f"getdev told {minor}, and {second} was made")
    t.umount("-d", second)
    check((devlib.sha(img), os.stat(img).st_mtime_ns, os.stat(img).st_ctime_ns) == was, f"{img} was changed")
    ploop("start", "-d", dev)
    t.drop_later(dev)
    holds(dev, 3 * MIB, data)
    check(line_of(dev) == [f"{os.path.basename(dev):<12} {img}  "], f"list: {line_of(dev)}")
    write(dev, 9 * MIB, data)
    check(devlib.record(dev)["descriptor"] == dd, "the disk is not told any more")
    ploop("stop", "-d", dev)
    ploop("clear", "-d", dev)
    check(not line_of(dev), f"list: {line_of(dev)}")
    for command in ("start", "stop", "clear"):
        ploop(command, "-d", dev, rc=DEVICE)
    ploop("rm", "-d", dev, "-l", 0, rc=DEVICE)
    ploop("start", "-d", img, rc=DEVIOC)
    # Forgotten, its disk is like any other.
    dev = t.mount(dd)
    holds(dev, 9 * MIB, data)
    t.umount(dd)


def case_mounted(t):
    """A mounted file system is in use."""
    folder, mnt = t.mkdir("img"), t.mkdir("mnt")
    ploop("init", "-s", "64m", os.path.join(folder, "root.hdd"))
    dd = os.path.join(folder, "DiskDescriptor.xml")
    dev = t.mount("-m", mnt, dd)
    clear_later(t, dev)
    with open(os.path.join(mnt, "file"), "w") as f:
        f.write("kept")
    r = ploop("stop", "-d", dev + "p1", rc=DEVIOC)
    check(mnt in r.err and devlib.is_mounted(mnt), f"{r.err}")
    run("umount", mnt)
    ploop("stop", "-d", dev + "p1")
    check(not os.path.exists(dev + "p1"), f"{dev}p1 is still there")
    ploop("start", "-d", dev)
    t.drop_later(dev)
    devlib.wait_for("the partition is back", lambda: os.path.exists(dev + "p1"), 10)
    t.user_mount(dev + "p1", mnt)
    check(open(os.path.join(mnt, "file")).read() == "kept", "the file is lost")
    run("umount", mnt)
    # umount ends a stopped device, too.
    ploop("stop", "-d", dev)
    t.umount(dd)
    ploop("umount", dd, rc=devlib.NOT_MOUNTED)
    ploop("mount", dd)
    ploop("stop", "-d", dev)
    t.umount("-d", dev)
    ploop("clear", "-d", dev, rc=DEVICE)


def case_changed(t):
    """A start finds what has changed meanwhile, names it, and attaches nothing."""
    dev, dd = t.bare()
    img = os.path.join(os.path.dirname(dd), "root.hdd")
    clear_later(t, dev)

    def refused(*words):
        r = ploop("start", "-d", dev, rc=IN_USE)
        for word in (*words, f"ploop clear -d {dev}"):
            check(word in r.err, f"{word} is not told: {r.err}")
        check(not os.path.exists(dev) and line_of(dev), "the refused start changed something")

    def again(*mount):
        nonlocal dev
        ploop("clear", "-d", dev)
        dev = t.mount(*(mount or (dd,)))

    ploop("stop", "-d", dev)
    with open(img, "r+b") as f:
        byte = f.read(1)
        f.seek(0)
        f.write(byte)
    refused(img, "was written to")
    r = run(devlib.PLOOP, "doctor", rc=1)
    check(any(line.startswith("LOOK") and dev in line and img in line for line in r.out.splitlines()), f"doctor: {r.out}")
    again()
    ploop("stop", "-d", dev)
    os.rename(img, img + ".away")
    refused(img)
    with open(img, "wb") as f:
        f.write(open(img + ".away", "rb").read())
    refused(img, "is not the file")
    os.rename(img + ".away", img)
    refused(img)  # Its name is another one's entry now: who knows what was done to it.
    again()
    # The disk went on without it.
    ploop("stop", "-d", dev)
    ploop("snapshot", "-u", "{11111111-2222-4333-8444-555555555555}", dd)
    refused(dd)
    again()
    # A stopped device of frozen images, as they were.
    t.umount(dd)
    dev = t.mount("-r", "-u", "{11111111-2222-4333-8444-555555555555}", dd)
    clear_later(t, dev)
    ploop("stop", "-d", dev)
    ploop("start", "-d", dev)
    check(devlib.record(dev)["read_only"], "it is not read-only any more")
    ploop("stop", "-d", dev)
    os.rename(dd, dd + ".away")
    refused(dd)
    os.rename(dd + ".away", dd)


def case_delete(t):
    """Levels are dropped from a stopped device; the files stay."""
    folder = t.mkdir("img")
    base = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "64m", "-t", "none", base)
    os.unlink(os.path.join(folder, "DiskDescriptor.xml"))
    dev = t.mount(base)
    clear_later(t, dev)
    files = [base]
    for n in (1, 2):
        write(dev, n * 8 * MIB, pattern(n))
        files.append(os.path.join(folder, f"d{n}.hdd"))
        ploop("snapshot", "-d", dev, files[-1])
    write(dev, 8 * MIB, pattern(9))
    ploop("delete", "-d", dev, "-l", 2, rc=DEVIOC)
    ploop("stop", "-d", dev)
    sums = [devlib.sha(f) for f in files]
    ploop("delete", "-d", dev, rc=PARAM)
    ploop("delete", "-d", dev, "-l", 128, rc=PARAM)
    ploop("delete", "-d", dev, "-l", 3, rc=DEVIOC)
    r = ploop("delete", "-d", dev, "-l", 2)
    check("read-only" in r.out, f"the new top is not said to be read-only: {r.out}")
    ploop("start", "-d", dev)
    t.drop_later(dev)
    check(open(f"/sys/block/{devlib.record(dev)['backing']}/ro").read() == "1\n", "a frozen image is written to")
    for n in (1, 2):
        holds(dev, n * 8 * MIB, pattern(n))
    ploop("stop", "-d", dev)
    # The upper of the two alone: what the base has is not there.
    ploop("rm", "-d", dev, "-l", 0)
    ploop("start", "-d", dev)
    holds(dev, 16 * MIB, pattern(2))
    holds(dev, 8 * MIB, bytes(MIB))
    ploop("stop", "-d", dev)
    ploop("rm", "-d", dev, "-l", 0)
    check(not line_of(dev), f"without images: {line_of(dev)}")
    check([devlib.sha(f) for f in files] == sums, "files were changed")


@devlib.limit(devlib.pick(180, 900))
def killed_in_a_stop_or_a_start(t):
    """A process is killed in a stop or a start: the device runs or is stopped, and has its data."""
    _, dd = t.bare()
    t.umount(dd)
    # A name that no other test takes when it is free for a moment.
    dev = f"/dev/ploop{20000 + os.getpid() % 10000}"
    t.mount("-d", dev, dd)
    clear_later(t, dev)
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    data = pattern(seed)
    write(dev, 5 * MIB, data)
    seen = {"running": 0, "stopped": 0, "gone": 0}
    for i in range(devlib.pick(12, 200)):
        stops = os.path.exists(dev)
        p = subprocess.Popen([devlib.PLOOP, "stop" if stops else "start", "-d", dev], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.random() * (0.06 if i % 3 else 0.25))
        try:
            record = devlib.record(dev)
        except (OSError, ValueError):
            record = None
        victims = [p.pid] if i % 2 else []
        if record and i % 4 < 3:
            # Supervisor, or all of its processes.
            victims += [record["supervisor"]["pid"]] + ([record["worker"]["pid"]] if i % 4 == 2 else [])
        # A device that is being started has no worker yet (0, which would be the test's own group).
        for pid in filter(None, victims):
            devlib.kill(pid)
        p.wait(60)

        def settled():
            state = ploop("list", "--json", quiet=True).out
            rows = [d["state"] for d in json.loads(state)["devices"] if d["node"] == dev]
            if rows == ["running"] and devlib.alive(devlib.record(dev)["worker"]):
                return "running"
            if rows == ["stopped"] and not os.path.exists(os.path.join(devlib.RUN, os.path.basename(dev))):
                return "stopped"
            return "dead" if rows == ["dead"] else "gone" if not rows else None

        def steady():
            """A start whose caller was killed is undone by its server, also when the device was there for a moment."""
            state = settled()
            time.sleep(0.5)
            return state if state == settled() and (state != "running" or os.path.exists(dev)) else None
        state = devlib.wait_for(f"round {i}: the device is running, stopped or dead", steady, 30, 0.1)
        log(f"round {i}: {'stop' if stops else 'start'}, victims {victims}: {state}")
        if state == "dead":
            ploop("umount", "-d", dev, rc=(0, DEVICE, devlib.NOT_MOUNTED))
            state = settled()
        seen[state] += 1
        if state == "stopped":
            # A start that was killed with all processes has touched the image: then it is refused.
            r = ploop("start", "-d", dev, rc=(0, IN_USE, BUSY))
            if r.rc == BUSY:
                # The server of the start whose caller was killed goes on meanwhile, or undoes it.
                state = devlib.wait_for("the end of the other start", steady, 30, 0.1)
                if state == "stopped":
                    ploop("start", "-d", dev)
            elif r.rc == IN_USE:
                ploop("clear", "-d", dev)
                state = "gone"
            elif rng.random() < 0.5:
                holds(dev, 5 * MIB, data)
                ploop("stop", "-d", dev)
                continue
        if state == "gone":
            t.mount("-d", dev, dd)
        devlib.wait_for("the node is there", lambda: os.path.exists(dev), 10)
        holds(dev, 5 * MIB, data)
        ploop("stop", "-d", dev, rc=0) if rng.random() < 0.3 else None
    log(f"states after a kill: {seen}")
    if not os.path.exists(dev):
        ploop("start", "-d", dev)
    holds(dev, 5 * MIB, data)
    t.umount(dd)
    check(not line_of(dev), f"left: {line_of(dev)}")
    ploop("check", dd)


# Which of two ends a kill has depends on the moment: with the full counts, and to replay a seed.
if devlib.FULL or os.environ.get("PLOOP_SEED"):
    case_killed = killed_in_a_stop_or_a_start


def case_numbers(t):
    """stat, getdev, ploop_get_attr, ploop_getdevice."""
    dev, dd = t.bare()
    clear_later(t, dev)

    def counters():
        text = ploop("stat", "-d", dev, quiet=True).out
        rows = [re.fullmatch(r"(\S+ *)\t(\d+)", line) for line in text.splitlines()]
        check(all(rows) and all(len(r.group(1)) == 20 for r in rows), f"stat: {text!r}")
        return {r.group(1).strip(): int(r.group(2)) for r in rows}
    first = counters()
    check({"bio_in", "bio_out", "bio_alloc", "bio_cows"} <= set(first), f"names: {first}")
    write(dev, 8 * MIB, pattern(1))
    devlib.wait_for("writes are counted", lambda: counters()["writes"] > first["writes"] and counters()["bio_alloc"] > first["bio_alloc"], 10)
    check(counters()["bio_in"] >= counters()["bio_out"] > 0, f"{counters()}")
    ploop("stat", "-c", "-d", os.path.basename(dev))
    check(counters()["writes"] == 0 and counters()["bio_alloc"] == 0, f"after -c: {counters()}")
    values = t.path("values")
    with open(values, "w") as f:
        f.write("writes 100\nno_such 5\nbio_cows 7\nwhat is this\n")
    with open(values) as f:
        r = ploop("stat", "-l", "-d", dev, stdin=f)
    check("no_such" in r.err and "what is this" in r.err, f"unknown lines are not told: {r.err}")
    check(counters()["writes"] == 100 and counters()["bio_cows"] == 7, f"after -l: {counters()}")
    devlib.kill(devlib.running_worker(dev)["worker"]["pid"])
    write(dev, 8 * MIB, pattern(2))
    devlib.wait_for("a new worker goes on counting", lambda: counters()["writes"] > 100, 10)
    ploop("stat", "-d", "/dev/ploop99999", rc=SYSFS)
    c = ctypes.CDLL(os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so")))

    def attr(name, device=dev):
        value = ctypes.c_int(-7)
        rc = c.ploop_get_attr(device.encode(), name.encode(), ctypes.byref(value))
        return value.value if rc == 0 else f"{rc}"
    want = {"top": 0, "running": 1, "block_size": 2048, "fmt_version": 2, "aborted": 0, "locked": 0, "no_such": "-1"}
    check({n: attr(n) for n in want} == want, f"attributes: { {n: attr(n) for n in want} }")
    check(attr("top", "ploop99999") == "-1" and attr("top", "") == "-1", "a device that is not there")
    check(c.ploop_get_attr(None, b"top", None) == -1 and c.ploop_get_attr(dev.encode(), b"top", None) == -1, "NULL")
    ploop("snapshot", dd)
    check(attr("top") == 1, f"after a snapshot: {attr('top')}")
    ploop("stop", "-d", dev)
    check([attr("running"), attr("top"), attr("block_size")] == [0, 1, 2048], "of a stopped device")
    # The descriptor keeps the minor.
    minor = ctypes.c_int(-1)
    fd = c.ploop_getdevice(ctypes.byref(minor))
    check(fd >= 0 and minor.value >= 0 and minor.value % 16 == 0, f"{fd}, {minor}")
    told = f"Next unused minor: {minor.value}\n"
    check(ploop("getdev").out != told, "the minor is given out twice")
    other = other_disk(t)
    second = t.mount(other)
    check(second != f"/dev/ploop{minor.value // 16}", f"{second} is reserved")
    t.umount("-d", second)
    os.close(fd)
    check(ploop("getdev").out == told or os.path.exists(f"/dev/ploop{minor.value // 16}") or next_minor() < minor.value, "the minor is not free again")
    check(c.ploop_getdevice(None) == -1, "NULL")
    ploop("getdev", "x", rc=PARAM)
    t.umount(dd)


if __name__ == "__main__":
    devlib.main()
