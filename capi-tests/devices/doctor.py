#!/usr/bin/env python3
"""`ploop doctor` names each fault of a device with a command; that command, run by a shell as it is printed, mends it, and then
doctor is silent. And `ploop map` of a running disk."""
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

GUID = "aaaaaaaa-0000-4000-8000-000000000001"


def disk(t, fs=True):
    folder = t.mkdir("img")
    ploop("init", "-s", "64m", *([] if fs else ["-t", "none"]), os.path.join(folder, "root.hdd"))
    return os.path.join(folder, "DiskDescriptor.xml")


def findings(*operand):
    """All that doctor does not call good."""
    r = run(devlib.PLOOP, "doctor", "--json", *operand, rc=(0, 1), limit=60)
    found = json.loads(r.out)
    bad = [f for part in ("devices", "disk") for f in found[part] if f["grade"] != "good"]
    if operand:
        check(r.rc == (1 if bad else 0), f"exit {r.rc} with {bad}")
    return bad


def cured(words, *operand, about=None, until=None, after=None):
    """The finding that has these words goes by its command. `about`: only findings that have one of these count (other tests have
    devices, too). `until`: cures go on until this is so; doctor does not judge block devices while a process of another device may
    be their server, so that it is silent for a moment. `after`: what is asked about afterwards, where the device is gone then."""
    def seen(*operand):
        return [f for f in findings(*operand) if about is None or any(a in json.dumps(f) for a in about)]
    n = 0
    while n == 0 or (until and not until()):
        found = [f for f in seen(*operand) if n > 0 or all(w in f["text"] for w in words)]
        if n and not found:
            time.sleep(0.3)
            continue
        check(n < 8, f"doctor goes on: {found}")
        check(found and found[0]["cure"], f"no finding with {words} and a cure: {seen(*operand)}")
        cure = found[0]["cure"]
        if n == 0:
            page = run(devlib.PLOOP, "doctor", *operand, rc=1, quiet=True).out
            check(any(line.strip() == "$ " + cure for line in page.splitlines()), f"not on the page: {cure}\n{page}")
        env = dict(os.environ, PATH=os.path.dirname(devlib.PLOOP) + ":" + os.environ["PATH"])
        run("sh", "-c", cure, env=env, limit=60)
        n += 1
    try:
        devlib.wait_for("silence", lambda: not seen(*([after] if after else operand)), 10, 0.3)
    except Failure:
        raise Failure(f"doctor goes on: {seen(*operand)}") from None


def kill_both(dev):
    rec = devlib.running_worker(os.path.basename(dev))
    pids = [rec["supervisor"]["pid"], rec["worker"]["pid"]]
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for p in pids:
            os.kill(p, sig)
    devlib.wait_for("both are gone", lambda: not any(devlib.alive(rec[w]) for w in ("supervisor", "worker")), 10)
    return rec


@devlib.limit(120)
def case_dead_server(t):
    """Its processes are killed under a mounted file system: the cure mounts it again where it was, with all that was answered."""
    dd, point = disk(t), t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    check(findings(dd) == [], "a running disk is not in order")
    with open(os.path.join(point, "file"), "w") as f:
        f.write("kept")
        f.flush()
        os.fsync(f.fileno())
    kill_both(dev)
    cured(["dead of"], dd)
    t.drop_later(t.device_of(dd))
    check(open(os.path.join(point, "file")).read() == "kept", "the file is not what was written")
    # By its device, too.
    dev = t.device_of(dd)
    check(findings(dev) == [], "the device is not in order")
    page = ploop("doctor", dev).out
    check("supervisor" in page and "worker" in page and "level 0" in page, page)
    t.umount("-m", point)


@devlib.limit(120)
def case_leaks(t):
    """No record is left: of servers that live, of the block device, of the node."""
    dd = disk(t, fs=False)
    dev = t.mount(dd)
    rec = devlib.running_worker(os.path.basename(dev))
    pids = [rec["supervisor"]["pid"], rec["worker"]["pid"]]
    for p in pids:
        os.kill(p, signal.SIGSTOP)
    folder = f"/run/ploop/{os.path.basename(dev)}"
    run("rm", "-r", folder)
    if os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC:
        # Elsewhere the block device may be that of a server that is not seen.
        log("not in the initial PID namespace: only servers are looked at")
        for p in pids:
            check(any(str(p) in f["text"] and f["cure"] for f in findings()), f"{p} is not found")
            os.kill(p, signal.SIGKILL)
        run("losetup", "-d", "/dev/" + rec["backing"])
        os.unlink(dev)
        return
    about = [str(p) for p in pids] + ["/dev/" + rec["backing"], dev + " "]
    node = os.stat(dev).st_ino

    def gone():
        """The node of that name may be another test's by now."""
        served = any(devlib.alive(rec[w]) for w in ("supervisor", "worker"))
        return not served and not (os.path.exists(dev) and os.stat(dev).st_ino == node)
    cured(["/dev/fuse"], about=about, until=gone)
    check(not os.path.exists(f"/sys/block/{rec['backing']}/loop/backing_file"), f"{rec['backing']} is bound")
    # What was not closed is marked.
    cured(["marked in use"], dd)


@devlib.limit(120)
def case_left_mounted(t):
    """An operation that needed the file system for a moment was killed; unflushed changes of a device that is gone; a snapshot for a
    backup whose program is gone; an image that was renamed; `losetup -d`."""
    dd = disk(t)
    folder = os.path.dirname(dd)
    point = t.mkdir("img", "root.hdd.mnt")
    t.mount("-m", point, dd)
    cured(["left by an interrupted operation"], dd)
    if os.path.isdir(point):
        os.rmdir(point)
    # Unflushed.
    dev = t.mount(dd)
    d = devlib.Direct(dev)
    # Where nothing was: the entry of that cluster is not in the image yet.
    d.write(50 << 20, b"x" * (1 << 20))
    kill_both(dev)
    d.close()
    ploop("umount", "-d", dev, rc=None)
    left = findings(dd)
    check(left and any("wait" in f["text"] for f in left), f"{left}")
    cured(["wait"], dd)
    # A temporary snapshot.
    ploop("tsnapshot", "-u", GUID, "-c", "backup", dd)
    node = t.device_of(dd, "~backup")
    check(findings(dd) == [], "a snapshot that is held")
    ploop("umount", "-d", node)
    # It is merged by the next operation: until then it is there.
    if findings(dd):
        cured([GUID, "temporary"], dd)
    # Renamed.
    dev = t.mount(dd)
    os.rename(os.path.join(folder, "root.hdd"), os.path.join(folder, "other.hdd"))
    cured(["other.hdd"], dev)
    check(os.path.exists(os.path.join(folder, "root.hdd")), "the image has not its name back")
    t.umount(dd)
    # Deleted while the disk runs: its content is copied back.
    dev = t.mount(dd)
    os.unlink(os.path.join(folder, "root.hdd"))
    cured(["deleted"], dev, after=dd)
    # Asked to end with its last user.
    at = t.mkdir("mnt")
    dev = t.mount("-m", at, dd)
    run("losetup", "-d", "/dev/" + devlib.record(dev)["backing"], limit=20)
    cured(["losetup -d"], dd)
    check(devlib.is_mounted(at), f"nothing is mounted at {at}")
    t.umount(dd)


@devlib.limit(60)
def case_map(t):
    """The map of a running disk: by descriptor and by device the same, and the images are left alone."""
    dd, point = disk(t), t.mkdir("mnt")
    dev = t.mount("-m", point, dd)
    ploop("snapshot", "-u", GUID, dd)
    with open(os.path.join(point, "file"), "wb") as f:
        f.write(os.urandom(8 << 20))
        f.flush()
        os.fsync(f.fileno())
    run("sync", "-f", point)

    def of(what):
        return json.loads(run(devlib.PLOOP, "map", "--json", what).out)
    one, other = of(dd), of(dev)
    check(one["device"] == dev and one["cluster_bytes"] == 1 << 20, f"{one}")
    check(one["levels"][1]["allocated"] >= 8 and one["levels"][0]["allocated"] > 0, f"{one['levels']}")
    check(one["shadowed"] == one["levels"][0]["shadowed"], f"{one}")
    check(one["compact"]["bytes"] is not None, f"{one['compact']}")
    check([lv["allocated"] for lv in one["levels"]] == [lv["allocated"] for lv in other["levels"]], f"{one}\n{other}")
    page = t.path("page.svg")
    run(devlib.PLOOP, "map", "--svg", page, dev)
    check("</svg>" in open(page).read(), "no page")
    log(run(devlib.PLOOP, "map", dd).out)
    # The server merges, and tells its caller how far it is.
    told = [json.loads(line) for line in ploop("--progress", "json", "snapshot-merge", dd).err.splitlines() if line.startswith("{")]
    for one in told:
        check(one["schema"] == "ploop-progress-1" and one["operation"] and one["done"] <= one["total"], f"{one}")
    merging = [one for one in told if one["operation"] == "merging"]
    check(not merging or merging[-1]["end"] and merging[-1]["done"] == merging[-1]["total"] == 64 << 20, f"{merging}")
    t.umount("-m", point)


if __name__ == "__main__":
    devlib.main()
