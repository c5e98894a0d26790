#!/usr/bin/env python3
"""The balloon of a running disk."""
import errno
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import BALLOON, check, log, ploop, run  # noqa: E402

MIB = 1 << 20
BUSY = 17
NO_ROOM = 20


def new_disk(t, size="400m", name="disk", cluster=2048, fs="ext4"):
    """A mounted disk: its descriptor, mount point and device."""
    folder = t.mkdir(name)
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", size, "-b", str(cluster), *([] if fs == "ext4" else ["-t", "none"]), img)
    if fs == "xfs":
        run("mkfs.xfs", "-q", t.mount(dd))
        t.umount(dd)
    point = t.mkdir(name + ".mnt")
    return dd, point, t.mount("-m", point, dd)


def balloon(*args, rc=0, **kw):
    return ploop("balloon", *args, rc=rc, quiet=True, **kw)


def size(dd):
    return int(balloon("show", dd).out.split("balloon is ")[1].split()[0])


def state(dd):
    return balloon("status", dd).out.split(": ")[1].strip()


def free(point):
    s = os.statvfs(point)
    return s.f_bfree * s.f_frsize


def write(path, seed, length):
    """A file of random bytes, on the device when this returns, and not in memory: its sum."""
    data = random.Random(seed).randbytes(length)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        done = 0
        while done < length:
            done += os.write(fd, data[done:])
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return hashlib.sha256(data).hexdigest()


def read(path):
    """The sum of what the device has."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with os.fdopen(fd, "rb", closefd=False) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    finally:
        os.close(fd)


def close_and_judge(t, dd, point, fs="ext4"):
    t.umount(dd)
    dev = t.mount(dd)
    run(*(("e2fsck", "-fn", dev + "p1") if fs == "ext4" else ("xfs_repair", "-n", dev)))
    t.umount(dd)
    t.judges(os.path.join(os.path.dirname(dd), "root.hdd"))


@devlib.limit(120)
def case_change(t):
    """Up, down, by every target; what it lay on is used again by the image; the codes of wrong uses."""
    dd, point, dev = new_disk(t)
    img = os.path.join(os.path.dirname(dd), "root.hdd")
    kept = write(os.path.join(point, "kept"), 1, 30 * MIB)
    write(os.path.join(point, "gone"), 2, 100 * MIB)
    os.remove(os.path.join(point, "gone"))
    os.sync()
    before = os.stat(img).st_size
    check(size(dd) == 0 and state(dd) == "OFF", "a new disk has no balloon of size 0, or is not OFF")
    # All of it but a little: what was deleted lies in it.
    room = free(point) - 24 * MIB
    said = balloon("change", "-s", f"{room >> 10}k", dd).out
    check("Freed" in said, said)
    freed = int(said.split("Freed ")[1].split()[0])
    check(freed >= 70, f"{freed} clusters of about 100 were freed")
    check("TRUNCATED" in said and os.stat(img).st_size < before - 60 * MIB, f"{before} bytes became {os.stat(img).st_size}: {said}")
    check(size(dd) == room >> 10 << 10 and free(point) < 32 * MIB, f"{size(dd)} bytes, {free(point)} free")
    check(state(dd) == "OFF" and "no free blocks" in balloon("check", dd).out, "not all was given back")
    check(read(os.path.join(point, "kept")) == kept, "the file beside the balloon has changed")
    # A program of the name that mount -o balloon_ino was used with, by device and by mount point.
    link = t.path("ploop-balloon")
    os.symlink(devlib.PLOOP, link)
    for target in (["-d", dev], ["-m", point], ["-d", dev, "-m", point]):
        run(link, "change", "-s", "1m", *target)
        run(link, "show", "-f", *target)
        run(link, "complete", *target)
        run(link, "clear", *target)
        check("OFF" in run(link, "status", *target).out, "not OFF")
    # The space is used again: the image does not grow.
    write(os.path.join(point, "again"), 3, 80 * MIB)
    os.sync()
    check(os.stat(img).st_size <= before + 8 * MIB, f"{before} bytes became {os.stat(img).st_size}")
    balloon("change", "-s", "4g", dd, rc=NO_ROOM)
    check(size(dd) == MIB and state(dd) == "OFF", "a change that failed has changed something")
    balloon("change", "-s", "0", dd)
    balloon("change", dd, rc=devlib.PARAM)
    balloon("show", rc=devlib.PARAM)
    balloon("show", "-m", t.dir, rc=devlib.PARAM)
    balloon("show", "-d", "/dev/ploop99999", rc=devlib.PARAM)
    balloon("show", "-d", "/dev/ploop99999", "-m", point, rc=devlib.OPEN)
    run(link, "nonsense", dd, rc=devlib.PARAM)
    # What has its name is no balloon, or there is none.
    place = os.path.join(point, BALLOON)
    os.link(place, place + ".link")
    for command in ("show", "check", "repair", "clear", "complete"):
        balloon(command, dd, rc=devlib.OPEN)
    os.remove(place)
    os.symlink("kept", place)
    balloon("change", "-s", "8m", dd, rc=devlib.OPEN)
    os.remove(place)
    os.remove(place + ".link")
    for command in ("show", "check", "repair"):
        balloon(command, dd, rc=devlib.OPEN)
    for command in ("status", "clear", "complete"):
        balloon(command, dd)
    balloon("change", "-s", "8m", dd)
    now = os.stat(place)
    check((now.st_size, now.st_mode & 0o7777, now.st_uid, now.st_nlink) == (8 * MIB, 0o600, 0, 1), f"{now}")
    # A process has it locked.
    with open(place) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for command in (["change", "-s", "9m"], ["check"], ["repair"], ["clear"], ["complete"]):
            balloon(*command, dd, rc=BUSY)
        check(size(dd) == 8 * MIB and state(dd) == "OFF", "show and status take no lock")
    close_and_judge(t, dd, point)


@devlib.limit(120)
def case_snapshot_below(t):
    """What a snapshot has stays as it is, and a balloon over it does not make the top larger."""
    dd, point, dev = new_disk(t)
    write(os.path.join(point, "gone"), 2, 80 * MIB)
    os.remove(os.path.join(point, "gone"))
    ploop("snapshot", dd)
    base = devlib.sha(os.path.join(os.path.dirname(dd), "root.hdd"))
    write(os.path.join(point, "also"), 3, 30 * MIB)
    os.remove(os.path.join(point, "also"))
    os.sync()
    top = max((os.path.join(os.path.dirname(dd), n) for n in os.listdir(os.path.dirname(dd)) if "{" in n), key=os.path.getmtime)
    before = os.stat(top).st_size
    balloon("change", "-s", f"{(free(point) - 24 * MIB) >> 10}k", dd)
    os.sync()
    check(os.stat(top).st_size <= before + 8 * MIB, f"the top had {before} bytes, and has {os.stat(top).st_size}")
    check(devlib.sha(os.path.join(os.path.dirname(dd), "root.hdd")) == base, "the snapshot has changed")
    # In the namespace of another process alone.
    t.umount(dd)
    dev = t.mount(dd)
    inside = t.mkdir("inside")
    p = subprocess.Popen(["unshare", "-m", "sh", "-c", f"mount {dev}p1 {inside} && echo ready && read x"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
    try:
        p.stdout.readline()
        check(not os.path.exists(os.path.join(inside, BALLOON)), "the mount is seen outside")
        balloon("change", "-s", "12m", dd)
        check(size(dd) == 12 * MIB, "by the other namespace")
    finally:
        p.stdin.close()
        p.wait()
    run("e2fsck", "-fn", dev + "p1")
    t.umount(dd)


@devlib.limit(120)
def case_resize(t):
    """The largest balloon, and a mounted disk resized to less than its device: what its users have follows."""
    dd, point, dev = new_disk(t, "1g")
    kept = write(os.path.join(point, "kept"), 1, 100 * MIB)
    whole = free(point)
    ploop("resize", "-s", "512m", dd)
    taken = size(dd)
    users = free(point) + 100 * MIB
    check(taken > 300 * MIB and 480 * MIB < users < 560 * MIB, f"a balloon of {taken >> 20} MiB, {users >> 20} for users")
    said = ploop("resize", "-s", "90m", dd, rc=devlib.PARAM).err
    check("sectors at least" in said, said)
    least = int(said.split("resized to ")[1].split()[0])
    ploop("resize", "-s", str(least), dd)
    check(free(point) < 24 * MIB, f"{free(point)} bytes are free in a disk of the least size")
    ploop("resize", "-s", "8192", dd, rc=devlib.PARAM)
    ploop("resize", "-s", "1g", dd)
    check(size(dd) == 0 and free(point) == whole, "the balloon is not gone")
    ploop("resize", "-b", dd)
    check(size(dd) > whole - 32 * MIB and state(dd) == "OFF", f"{size(dd)} of {whole} bytes")
    ploop("resize", "-b", dd)
    check(read(os.path.join(point, "kept")) == kept, "the file beside the balloon has changed")
    balloon("change", "-s", "0", dd)
    t.umount(dd)
    ploop("resize", "-b", dd)
    t.mount("-m", point, dd)
    check(size(dd) > whole - 32 * MIB, f"{size(dd)} bytes, by a disk that was not mounted")
    # A disk that becomes larger has none.
    t.umount(dd)
    ploop("resize", "-s", "1100m", dd)
    t.mount("-m", point, dd)
    check(size(dd) == 0 and free(point) > whole, "the balloon is not gone after a resize to a larger size")
    close_and_judge(t, dd, point)


@devlib.limit(60)
def case_classic_program(t):
    """Debian's own ploop-balloon on our library."""
    program, lib = "/usr/sbin/ploop-balloon", os.path.join(devlib.LIBDIR, "libploop.so")
    if not os.path.exists(program) or not os.path.exists(lib):
        raise devlib.Skip(f"there is no {program} or no {lib}")
    devlib.debian_is_debians()
    os.symlink(lib, os.path.join(t.mkdir("lib"), "libploop.so.1"))
    env = dict(os.environ, LD_LIBRARY_PATH=t.path("lib"), PADDING="x" * 8192)
    dd, point, dev = new_disk(t)
    os.remove(os.path.join(point, BALLOON))

    def classic(command, *args, rc=0):
        return run(program, command, *args, "-d", dev, "-m", point, rc=rc, env=env, quiet=True).out

    classic("show", rc=devlib.OPEN)
    classic("change", "-s", "40m")
    check(f"{40 * MIB} bytes" in classic("show"), "show")
    check("maintenance: OFF" in classic("status"), "status")
    for command in ("check", "repair", "complete", "clear"):
        classic(command)
    classic("change", "-s", "4g", rc=NO_ROOM)
    classic("change", "-s", "0")
    check(" 0 bytes" in classic("show"), "show")


@devlib.limit(300)
def case_deleted_and_refilled(t):
    """Root inside deletes the balloon and fills its space while it is being given back: no byte of that is lost."""
    deleted_and_refilled(t, "ext4", devlib.pick(6, 150))


@devlib.limit(300)
def case_xfs(t):
    """The same on XFS; and a mounted disk is resized within its device, and beyond it."""
    deleted_and_refilled(t, "xfs", devlib.pick(3, 80))
    dd, point, dev = new_disk(t, "600m", "second", fs="xfs")
    img = os.path.join(os.path.dirname(dd), "root.hdd")
    kept = write(os.path.join(point, "kept"), 1, 30 * MIB)
    gone = os.path.join(point, "gone")
    write(gone, 2, 200 * MIB)
    os.remove(gone)
    run("sync", "-f", point)
    before, whole = os.stat(img).st_size, free(point)
    ploop("resize", "-s", "300m", dd)
    check(state(dd) == "OFF" and 250 * MIB < free(point) + 30 * MIB < 300 * MIB, f"{free(point)} bytes are free")
    ploop("resize", "-b", dd)
    check(free(point) < 24 * MIB and os.stat(img).st_size < before - 100 * MIB, f"{before} bytes became {os.stat(img).st_size}")
    ploop("resize", "-s", "32m", dd, rc=devlib.PARAM)
    check(read(os.path.join(point, "kept")) == kept, "the file beside the balloon has changed")
    balloon("show", "-m", t.mkdir("second.mnt", "sub"), rc=devlib.PARAM)
    ploop("resize", "-s", "800m", dd)
    check(size(dd) == 0 and free(point) > whole + 150 * MIB, f"{free(point)} bytes are free, {size(dd)} in the balloon")
    check(read(os.path.join(point, "kept")) == kept, "the file beside the balloon has changed")
    close_and_judge(t, dd, point, "xfs")


def deleted_and_refilled(t, fs, rounds):
    dd, point, dev = new_disk(t, "400m", cluster=64, fs=fs)
    place = os.path.join(point, BALLOON)
    # Free space in many pieces: it is discarded in many steps, with the file system frozen for each and not between them.
    piece = random.Random(1).randbytes(96 << 10)
    many = [os.path.join(point, f"piece{i}") for i in range(2000)]
    for name in many:
        with open(name, "wb") as f:
            f.write(piece)
    os.sync()
    for name in many[::2]:
        os.remove(name)
    os.sync()
    stop, errors, sums = threading.Event(), [], {}
    rng = random.Random(devlib.seeds([7])[0])
    pool = rng.randbytes(8 * MIB)

    def refill(seed):
        """As much as there is room for, on the device as soon as possible."""
        name, sum_ = f"file{seed}", hashlib.sha256()
        fd = os.open(os.path.join(point, name), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            for i in range(6):
                data = seed.to_bytes(4) + i.to_bytes(4) + pool
                if free(point) < len(data) + 6 * MIB:
                    break
                sum_.update(data[:os.write(fd, data)])
                os.fsync(fd)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
        finally:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        sums[name] = sum_.hexdigest()

    def inside():
        seed = 0
        while not stop.is_set():
            try:
                # As soon as it is inflated, or a moment later.
                if os.stat(place).st_size == 0:
                    continue
                time.sleep(rng.choice((0, 0, 0.01, 0.03)) * rng.random())
                # ploop has it open: its blocks are free at once if it is cut, and later if it is removed.
                fd = os.open(place, os.O_RDWR)
                try:
                    os.ftruncate(fd, 0)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                if rng.random() < 0.2:
                    os.remove(place)
                seed += 1
                refill(seed)
                while free(point) < 100 * MIB and sums:
                    name = next(iter(sums))
                    if read(os.path.join(point, name)) != sums[name]:
                        errors.append(f"{name} has lost bytes")
                        return
                    os.remove(os.path.join(point, name))
                    del sums[name]
            except FileNotFoundError:
                pass
            except Exception as e:  # noqa: BLE001 - seen by the main thread
                errors.append(f"the writer: {e!r}")
                return

    writer = threading.Thread(target=inside)
    writer.start()
    freed = 0
    try:
        done = 0
        # The writer inside can be the faster one in all of a few rounds.
        while done < rounds or (freed == 0 and done < rounds + 30):
            done += 1
            want = max(free(point) - 20 * MIB, 20 * MIB) >> 10
            said = balloon("change", "-s", f"{want}k", dd, rc=(0, NO_ROOM, devlib.OPEN)).out
            freed += int(said.split("Freed ")[1].split()[0]) if "Freed" in said else 0
            check(not errors, "; ".join(errors))
    finally:
        stop.set()
        writer.join(60)
    log(f"{done} rounds, {freed} clusters freed, {len(sums)} files")
    check(not errors, "; ".join(errors))
    check(freed > 0, "nothing was freed: nothing was tested")
    for name, want in sums.items():
        check(read(os.path.join(point, name)) == want, f"{name} has lost bytes")
    check(state(dd) == "OFF", "not OFF")
    close_and_judge(t, dd, point, fs)


@devlib.limit(600)
def case_killed(t):
    """`balloon change` and the worker are killed at any moment: the state tells the truth, and leads back to OFF."""
    dd, point, dev = new_disk(t, "300m")
    kept = write(os.path.join(point, "kept"), 1, 20 * MIB)
    seed = devlib.seeds([11])[0]
    rng = random.Random(seed)
    seen = {}
    name = dev.split("/")[-1]
    for i in range(devlib.pick(4, 100)):
        write(os.path.join(point, "gone"), i, 60 * MIB)
        os.remove(os.path.join(point, "gone"))
        os.sync()
        want = free(point) - 20 * MIB >> 10
        p = subprocess.Popen([devlib.PLOOP, "balloon", "change", "-s", f"{want}k", dd], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
        time.sleep(rng.random() * 0.15)
        # One of the two that serve the device, or none.
        victim = rng.choice(("worker", "supervisor", None, None))
        if victim:
            devlib.kill(devlib.record(name)[victim]["pid"])
        p.send_signal(signal.SIGKILL)
        p.wait(30)
        # It is not frozen, and its bytes are there.
        write(os.path.join(point, "small"), i, 4096)
        now, inflated = state(dd), size(dd)
        seen[now] = seen.get(now, 0) + 1
        check(now in ("OFF", "BALLOON", "FBLOADED", "RELOC"), f"{devlib.replay(t, seed)}: state {now}")
        if now == "OFF" and inflated:
            check("no free blocks" in balloon("check", dd).out, f"{devlib.replay(t, seed)}: OFF, but not given back")
        how = rng.choice((["repair"], ["clear"], ["complete"], ["change", "-s", "0"]))
        if now in ("FBLOADED", "RELOC"):
            if now == "FBLOADED" and how != ["complete"]:
                balloon(*how, dd, rc=BUSY)
            # In RELOC the worker finishes by itself, too.
            balloon("complete", dd)
        balloon(*how, dd)
        if how == ["complete"]:
            balloon("clear", dd)
        check(state(dd) == "OFF", f"{devlib.replay(t, seed)}: {state(dd)} after {how}")
        if how == ["repair"]:
            check("no free blocks" in balloon("check", dd).out, f"{devlib.replay(t, seed)}: repair has left something")
        balloon("change", "-s", "0", dd)
    log(f"states after the kills: {seen}")
    check(read(os.path.join(point, "kept")) == kept, "the file beside the balloon has changed")
    close_and_judge(t, dd, point)


if __name__ == "__main__":
    devlib.main()
