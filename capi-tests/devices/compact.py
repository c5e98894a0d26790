#!/usr/bin/env python3
"""Space of mounted disks goes back to the host: under verified load, with kills, as the top of a chain, cancelled, for programs."""
import json
import os
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402
from kill import Fio  # noqa: E402

MIB = 1 << 20
FILL, KEEP = devlib.pick((240, 40), (3072, 512))


def disk(t, size="1g"):
    folder = t.mkdir("disk")
    img, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    ploop("init", "-s", size, img, limit=120)
    mnt = t.mkdir("mnt")
    return dd, img, mnt, t.mount("-m", mnt, dd)


def fill_and_delete(mnt):
    """Fills the disk, deletes most of it. {name: sha} of what stays."""
    sums = devlib.fill_tree(mnt, 7, FILL * MIB, sizes=(70000, 300000, 4000000))
    os.sync()
    names, kept = sorted(sums), 0
    for i, name in enumerate(names):
        size = os.path.getsize(os.path.join(mnt, name))
        if i % 6 == 0 and kept < KEEP * MIB:
            kept += size
        else:
            os.unlink(os.path.join(mnt, name))
            del sums[name]
    return sums


def used_clusters(dev, cluster=MIB):
    """Clusters that hold a block which the ext4 on the first partition uses, and those outside of the partition."""
    part = dev + "p1"
    text = run("dumpe2fs", part, quiet=True).out
    block = int(re.search(r"^Block size:\s+(\d+)", text, re.M).group(1))
    blocks = int(re.search(r"^Block count:\s+(\d+)", text, re.M).group(1))
    start = int(run("blkid", "-p", "-s", "PART_ENTRY_OFFSET", "-o", "value", part).out) * 512
    free = set()
    for line in re.findall(r"^  Free blocks: (.*)$", text, re.M):
        for a, b in re.findall(r"(\d+)(?:-(\d+))?", line):
            free.update(range(int(a), int(b or a) + 1))
    used = {(start + i * block) // cluster for i in range(blocks) if i not in free}
    return len(used) + 2


def check_closed(t, dd, img, mnt, sums, dev):
    t.umount("-m", mnt)
    dev = t.mount(dd)
    run("e2fsck", "-fn", dev + "p1", limit=120)
    used = used_clusters(dev)
    t.umount(dd)
    size = os.path.getsize(img)
    log(f"{size >> 20} MiB, {used} clusters of 1 MiB hold a used block")
    check(size <= 1.1 * used * MIB + MIB, f"the file has {size >> 20} MiB, {used} clusters are used")
    t.judges(img)
    t.mount("-m", mnt, dd)
    devlib.compare_tree(mnt, sums)
    t.umount("-m", mnt)


@devlib.limit(devlib.pick(150, 900))
def case_under_load_with_kills(t):
    dd, img, mnt, dev = disk(t, devlib.pick("1g", "8g"))
    name = os.path.basename(dev)
    sums = fill_and_delete(mnt)
    before = os.path.getsize(img)
    fio = Fio(t, os.path.join(mnt, "fio"), 0, devlib.pick(16, 128) * MIB)
    slow = subprocess.Popen([devlib.PLOOP, "compact", "--rate", "8M", dd], stdout=subprocess.DEVNULL)
    time.sleep(1.5)
    devlib.kill(devlib.running_worker(name)["worker"]["pid"])
    devlib.running_worker(name)
    time.sleep(1)
    check(slow.poll() is None, "the caller did not wait for the next worker")
    slow.kill()
    slow.wait(10)
    devlib.kill(devlib.record(name)["supervisor"]["pid"])
    said = ploop("compact", "--full-speed", dd, limit=120).out
    check(re.search(r"\d+ clusters moved; the file has \d+ MiB, it had \d+", said), said)
    fio.stop()
    os.unlink(os.path.join(mnt, "fio"))
    ploop("compact", "--full-speed", dd, limit=120)
    log(f"{before >> 20} -> {os.path.getsize(img) >> 20} MiB")
    check_closed(t, dd, img, mnt, sums, dev)


@devlib.limit(120)
def case_the_top_of_a_chain(t):
    dd, img, mnt, dev = disk(t)
    sums = devlib.fill_tree(mnt, 3, 60 * MIB)
    ploop("snapshot", dd)
    low = devlib.identity(img)
    gone = devlib.fill_tree(os.path.join(mnt, "gone"), 4, 80 * MIB)
    os.sync()
    top = [p for p in (os.path.join(os.path.dirname(img), n) for n in os.listdir(os.path.dirname(img)))
           if os.path.basename(p).startswith("root.hdd.") and not p.endswith(".xml")]
    check(len(top) == 1, f"deltas: {top}")
    before = os.path.getsize(top[0])
    for name in gone:
        os.unlink(os.path.join(mnt, "gone", name))
    for name in sorted(sums)[::2]:
        os.unlink(os.path.join(mnt, name))
        del sums[name]
    said = ploop("compact", "--full-speed", dev, limit=60).out
    after = os.path.getsize(top[0])
    log(f"top: {before >> 20} -> {after >> 20} MiB: {said.strip()}")
    check(after < before - 60 * MIB, f"{before} -> {after}")
    devlib.unchanged(img, low, atime=False)
    t.umount("-m", mnt)
    t.judges(top[0])
    t.mount("-m", mnt, dd)
    devlib.compare_tree(mnt, sums)
    t.umount("-m", mnt)


@devlib.limit(120)
def case_cancelled_estimated_all(t):
    dd, img, mnt, dev = disk(t)
    sums = fill_and_delete(mnt)
    os.sync()
    told = json.loads(ploop("compact", "--estimate", "--json", dd).out)
    check(told["schema"] == "ploop-compact-estimate-1" and told["bytes"] > 100 * MIB and told["seconds"] >= 0, str(told))
    slow = subprocess.Popen([devlib.PLOOP, "compact", "--rate", "2M", dd], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    # A second one waits for the end of the same work; who cancels first ends it for himself alone.
    other = subprocess.Popen([devlib.PLOOP, "compact", "--rate", "2M", dev], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    check(slow.poll() is None and other.poll() is None, "they did not keep to the rate")
    for p in (slow, other):
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=20)[1]
        check(p.returncode == 130 and "cancelled" in err, f"{p.returncode}: {err}")
        time.sleep(1)
        check(other.poll() is None or p is other, "the second client's work ended with the first client's")
    devlib.compare_tree(mnt, sums)
    stat = ploop("balloon", "discard", "--stat", dd).out.splitlines()
    want = [r"Balloon size: +0MB", r"Data size: +\d+MB", r"Ploop size: +\d+MB", r"Image size: +\d+MB"]
    check(len(stat) == 4 and all(re.fullmatch(w, s) and len(s) == 24 for w, s in zip(want, stat)), str(stat))
    # Of all disks on this machine, so nothing runs beside this test.
    said = ploop("compact", "--all", "--full-speed", rc=None, limit=60).out
    check(f"{dev}: " in said, said)
    check_closed(t, dd, img, mnt, sums, dev)
    check(ploop("balloon", "discard", dd, rc=None).rc == 38, "a disk that is not mounted was discarded")
    ploop("balloon", "discard", "--automount", "--defrag", "--to-free", "1M", dd, limit=60)
    check(t.device_of(dd) is None, "the device of --automount is left")


@devlib.limit(120)
def case_by_the_library(t):
    dd, img, mnt, dev = disk(t)
    sums = fill_and_delete(mnt)
    os.sync()
    so, lib = os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so")), t.mkdir("lib")
    os.symlink(so, os.path.join(lib, "libploop.so"))
    os.symlink(so, os.path.join(lib, "libploop.so.1"))
    program = t.path("discard")
    run("cc", "-O2", "-Wall", "-I", os.path.join(devlib.ROOT, "include"), "-o", program,
        os.path.join(devlib.DEVICES, "discard.c"), "-L", lib, "-lploop", "-ldl", limit=120)
    env = dict(os.environ, LD_LIBRARY_PATH=lib, PLOOP_SERVER=os.path.join(devlib.LIBDIR, "ploop-server"))
    log(run(program, dd, dev, mnt, os.path.join(lib, "libploop.so.1"), env=env, limit=100).out)
    devlib.compare_tree(mnt, sums)
    t.umount("-m", mnt)
    t.judges(img)


if __name__ == "__main__":
    devlib.main()
