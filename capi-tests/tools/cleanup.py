"""Undoes what tests left on the machine, and says what is left.

"Ours" is decided by the scratch folder of the run: a device whose state record names files in it, a mount below it, a
loop device over a file in it. Everything that may hang has a time limit.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time

import devlib

# Places outside of the scratch folder where tests make images (containers by number).
CONTAINERS = ("/vz/private/99000", "/var/lib/vz/private/99000")


def quietly(*cmd, limit=30):
    try:
        return devlib.run(*cmd, rc=None, limit=limit, quiet=True)
    except devlib.Failure as e:
        return devlib.Result(-1, "", str(e), limit)


def below(path, scratch):
    path = str(path or "")
    return path == scratch or path.startswith(scratch + "/") or path.startswith(CONTAINERS)


def records():
    """{name: record or None}."""
    out = {}
    try:
        names = os.listdir(devlib.RUN)
    except OSError:
        return out
    for n in names:
        if not os.path.isdir(os.path.join(devlib.RUN, n)):
            continue
        try:
            out[n] = devlib.record(n)
        except (OSError, ValueError):
            out[n] = None
    return out


def stopped():
    """{name: record} of devices that `ploop stop` has stopped."""
    out = {}
    for n in os.listdir(devlib.RUN) if os.path.isdir(devlib.RUN) else []:
        if n.startswith(".stopped-"):
            try:
                with open(os.path.join(devlib.RUN, n)) as f:
                    out[n.removeprefix(".stopped-")] = json.load(f)["device"]
            except (OSError, ValueError, KeyError):
                pass
    return out


def is_ours(rec, scratch):
    return rec is not None and (below(rec.get("descriptor"), scratch) or any(below(l["path"], scratch) for l in rec.get("levels", [])))


def mounts():
    """[(mount point, source, "major:minor", type)] in the order of mounting."""
    out = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        for line in f:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, tail = left.split(), right.split()
            point = fields[4].encode("latin-1", "replace").decode("unicode_escape")
            out.append((point, tail[1] if len(tail) > 1 else "", fields[2], tail[0]))
    return out


def loops():
    """{loopN: backing file or None} of attached loop devices."""
    out = {}
    for n in os.listdir("/sys/block"):
        if n.startswith("loop"):
            try:
                with open(f"/sys/block/{n}/loop/backing_file", errors="surrogateescape") as f:
                    out[n] = f.read().strip()
            except OSError:
                pass
    return out


def nodes():
    """ploop nodes in /dev."""
    out = []
    for n in os.listdir("/dev"):
        if n.startswith("ploop"):
            out.append("/dev/" + n)
    return out


def servers():
    """{pid: executable} of processes that run a ploop-server."""
    out = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            exe = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        except OSError:
            continue
        if os.path.basename(exe) == "ploop-server":
            out[int(pid)] = exe
    return out


def our_server(exe):
    return os.path.realpath(exe) in (os.path.realpath(os.path.join(devlib.LIBDIR, "ploop-server")),
                                     os.path.realpath(os.path.join(devlib.TARGET, "debug", "ploop-server")),
                                     os.path.realpath(os.path.join(devlib.TARGET, "release", "ploop-server")))


def kill_stragglers(case):
    """Processes of a case that outlived it: they carry its name in their environment."""
    mark = f"PLOOP_TEST_CASE={case}".encode()
    killed = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            # Servers have another environment, and asking one that is being set up or taken down may wait for it.
            if os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("ploop-server"):
                continue
            with open(f"/proc/{pid}/environ", "rb") as f:
                if mark not in f.read().split(b"\0"):
                    continue
            if int(pid) != os.getpid():
                os.kill(int(pid), signal.SIGKILL)
                killed.append(pid)
        except OSError:
            continue
    if killed:
        time.sleep(0.3)
    return killed


def abort_connection(number):
    """Ends a FUSE connection whose server does not answer."""
    if number:
        quietly("unshare", "-m", "--propagation", "unchanged", "sh", "-c", "mount --make-rprivate /sys; mountpoint -q /sys/fs/fuse/connections || "
                f"mount -t fusectl none /sys/fs/fuse/connections; echo 1 > /sys/fs/fuse/connections/{number}/abort", limit=10)


def still_bound(rec):
    """The loop device of the record is still the one that the record means, not a later user of the number."""
    loop = rec.get("backing", "")
    try:
        with open(f"/sys/block/{loop}/diskseq") as f:
            seq = int(f.read())
        return os.stat("/dev/" + loop).st_rdev == rec["rdev"] and rec.get("diskseq") in (0, seq)
    except (OSError, ValueError):
        return False


def drop_device(name, rec):
    """Takes one of our devices away: politely, else by its record. Says what went wrong with the polite way."""
    said = []
    r = quietly(devlib.PLOOP, "umount", "--discard-deleted", "-d", "/dev/" + name, limit=45)
    if r.rc:
        said.append(f"`ploop umount -d /dev/{name}`: {r.rc} {r.err.strip()[-300:]}")
    if not os.path.exists(f"{devlib.RUN}/{name}"):
        return said
    for who in ("supervisor", "worker", "supervisor", "worker"):
        if rec and devlib.alive(rec[who]):
            devlib.kill(rec[who]["pid"])
        try:
            rec = devlib.record(name)
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    if rec:
        abort_connection(rec.get("connection"))
        if still_bound(rec):
            quietly("losetup", "-d", "/dev/" + rec["backing"], limit=10)
    for node in nodes():
        if node == "/dev/" + name or node.startswith(f"/dev/{name}p"):
            os.unlink(node)
    shutil.rmtree(f"{devlib.RUN}/{name}", ignore_errors=True)
    return said


def clean(scratch):
    """Undoes what is ours; returns what had to be undone, as text."""
    scratch = os.path.realpath(scratch)
    said = []
    ours = {n: r for n, r in records().items() if is_ours(r, scratch)}
    numbers = set()
    for name, rec in ours.items():
        if not still_bound(rec):
            continue
        rdev = rec.get("rdev", 0)
        numbers.add(f"{os.major(rdev)}:{os.minor(rdev)}")
        loop = rec.get("backing", "")
        for part in (os.listdir(f"/sys/block/{loop}") if loop and os.path.isdir(f"/sys/block/{loop}") else []):
            try:
                with open(f"/sys/block/{loop}/{part}/dev") as f:
                    numbers.add(f.read().strip())
            except OSError:
                pass
    for point, source, number, kind in reversed(mounts()):
        if number in numbers or (below(point, scratch) and source.startswith("/dev/ploop")):
            said.append(f"mount {point} ({source})")
            if quietly("umount", point, limit=15).rc:
                quietly("umount", "-l", point, limit=15)
    for name, rec in ours.items():
        said.append(f"device {name}")
        said += drop_device(name, rec)
    for name, rec in stopped().items():
        if is_ours(rec, scratch):
            said.append(f"stopped device {name}")
            quietly(devlib.PLOOP, "clear", "-d", name)
    for point, source, _, kind in reversed(mounts()):
        if below(point, scratch):
            said.append(f"mount {point} ({source})")
            if quietly("umount", point, limit=30).rc:
                quietly("umount", "-l", point, limit=15)
    for _ in range(20):
        # The loop device of an unmounted file system goes by itself, but not at once.
        of_ours = {l: b for l, b in loops().items() if below(b.removesuffix(" (deleted)"), scratch)}
        if not of_ours:
            break
        time.sleep(0.25)
    for loop, backing in of_ours.items():
        said.append(f"{loop} over {backing}")
        quietly("losetup", "-d", "/dev/" + loop, limit=10)
    for prefix in CONTAINERS:
        folder, begin = os.path.split(prefix)
        if os.path.isdir(folder):
            for n in os.listdir(folder):
                if n.startswith(begin):
                    shutil.rmtree(os.path.join(folder, n), ignore_errors=True)
    return said


def snapshot():
    """What there is before the run."""
    return {"loops": list(loops()), "nodes": nodes(), "records": list(records()),
            "mounts": [m[:3] for m in mounts()], "servers": list(servers())}


def leftovers(before, scratch, shared):
    """What is there now, was not before, and is not provably another's."""
    scratch = os.path.realpath(scratch)
    now = records()
    foreign = {n: r for n, r in now.items() if n not in before["records"] and shared and not is_ours(r, scratch)}
    out = []
    for n in now:
        if n not in before["records"] and n not in foreign:
            out.append(f"{devlib.RUN}/{n}: {sorted(os.listdir(os.path.join(devlib.RUN, n)))}")
    their_loops = {r["backing"] for r in foreign.values() if r}
    for n, backing in loops().items():
        if n not in before["loops"] and n not in their_loops and (not shared or below(backing.removeprefix("/ploop:"), scratch) or backing == "/"):
            out.append(f"/dev/{n} over {backing}")
    for n in nodes():
        base = os.path.basename(n)
        of = re.sub(r"p\d+$", "", base)
        # Another's device may have its record out of our sight (in a chroot).
        if n not in before["nodes"] and (of in now and of not in foreign if shared else True):
            out.append(n)
    old = {tuple(m) for m in before["mounts"]}
    for m in mounts():
        if m[:3] not in old and (not shared or below(m[0], scratch) or (m[3].startswith("fuse") and "ploop" in m[0] + m[1])):
            if not any(m[1].startswith("/dev/" + f) for f in foreign):
                out.append(f"mount {m[0]} ({m[1]}, {m[3]})")
    for pid, exe in servers().items():
        if pid not in before["servers"] and our_server(exe):
            pids = {w["pid"] for r in foreign.values() if r for w in (r["supervisor"], r["worker"])}
            if pid not in pids:
                out.append(f"process {pid} {exe}")
    with open("/proc/net/unix") as f:
        for line in f:
            words = line.split()
            if len(words) > 7 and "/run/ploop/" in words[7]:
                name = words[7].split("/run/ploop/")[1].split("/")[0]
                if name not in now and name not in before["records"]:
                    out.append(f"socket {words[7]}")
    return out
