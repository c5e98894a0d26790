#!/usr/bin/env python3
"""Merges that no caller waits for: they keep neither the owner of the disk from unmounting it nor a mount waiting."""
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import Failure, check, log, ploop, run  # noqa: E402

MIB = 1 << 20
# Enough that a merge of it is under way for some seconds where files are not shared by reflink.
BULK = devlib.pick(384, 2048) * MIB


def tree(dd):
    """Snapshots as `snapshot-list` shows them: GUID to mark."""
    rows = ploop("snapshot-list", "-H", "-o", "uuid,current", dd, quiet=True).out.splitlines()
    return {row.split()[0]: (row.split() + [""])[1] for row in rows}


def guids(dd):
    return ploop("snapshot-list", "-H", "-s", "-o", "uuid", dd, quiet=True).out.split()


def disk(t):
    """A mounted disk whose first snapshot is empty and whose second has the bulk, and the sum of its content."""
    dev, dd = t.bare(f"{2 * BULK // MIB}m")
    ploop("snapshot", dd)
    pattern = os.urandom(MIB)
    with open(dev, "r+b") as f:
        for at in range(0, BULK, MIB):
            f.seek(at)
            f.write(at.to_bytes(8, "big") + pattern[8:])
        f.flush()
        os.fsync(f.fileno())
    ploop("snapshot", dd)
    return dev, dd, devlib.sha(dev)


def merging(dd):
    return json.loads(ploop("info", "-d", "--json", dd, quiet=True).out)["merging"]


def interrupted(t, dd, offline):
    """Begins the merge of the second snapshot into the first one, and kills the caller in the midst of it."""
    guid = guids(dd)[-1]
    args = [devlib.PLOOP, "snapshot-merge", "-u", guid, dd]
    caller = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    t.later(lambda: caller.poll() is None and (caller.kill(), caller.wait(30)))

    def begun():
        if caller.poll() is not None:
            raise Failure("the merge ended before it could be killed: more data are needed")
        return "!" in tree(dd).values() if offline else merging(dd)
    devlib.wait_for("the merge has begun", begun, 20)
    caller.send_signal(signal.SIGKILL)
    caller.wait(30)
    return guid


@devlib.limit(120)
def case_umount_of_a_merge_whose_caller_was_killed(t):
    """The server goes on with the merge and holds the disk's lock. Queries answer, umount ends the device, and the next mount
    goes on with the merge."""
    dev, dd, content = disk(t)
    interrupted(t, dd, False)
    check(merging(dd), "the merge does not go on without its caller")
    line = next(x for x in ploop("list").out.splitlines() if x.startswith(os.path.basename(dev) + " "))
    check(" merging:" in line, f"list does not show the merge: {line!r}")
    check("merging:" in ploop("info", "-d", dd).out, "info -d does not show the merge")
    r = ploop("mount", dd, rc=21)
    check("already" in r.text, f"a second mount: {r.text}")
    r = ploop("umount", dd)
    check(r.seconds < 10, f"umount took {r.seconds:.1f} s")
    check("!" in tree(dd).values(), "the merge had ended before umount: more data are needed")
    goes_on(t, dd, content)


def goes_on(t, dd, content):
    """The next mount returns at once, and the merge comes to its end while the disk runs."""
    r = ploop("mount", dd)
    log(f"mount took {r.seconds:.2f} s")
    dev = t.device_of(dd)
    t.drop_later(dev)
    check("!" in tree(dd).values() and merging(dd) is None or merging(dd), "the merge was made before the mount returned")
    check(devlib.sha(dev) == content, "the content is another one while the merge goes on")
    devlib.wait_for("the merge has ended", lambda: "!" not in tree(dd).values(), 60, 0.1)
    check(len(guids(dd)) == 1, f"snapshots left: {tree(dd)}")
    devlib.flush_buffers(dev)
    check(devlib.sha(dev) == content, "the content is another one after the merge")
    ploop("umount", dd)
    r = ploop("check", dd)
    check("orphan" not in r.text and "not used" not in r.text, f"files are left: {r.text}")
    files = [f for f in os.listdir(os.path.dirname(dd)) if f.startswith("root.hdd")]
    check(len(files) == 2, f"files of the merge are left: {files}")


@devlib.limit(120)
def case_mount_after_an_offline_merge_was_killed(t):
    """The mount does not wait for what is left of the merge; a mount of the half merged snapshot is refused; umount in the
    midst of it, and the mount after that, go on as well."""
    dev, dd, content = disk(t)
    ploop("umount", dd)
    guid = interrupted(t, dd, True)
    half = [g for g, mark in tree(dd).items() if mark == "!"]
    check(half and guid not in half, f"half merged: {half}")
    ploop("mount", "-r", "-u", half[0], dd, rc=devlib.PARAM)
    # Looking changes nothing.
    dev = t.mount("-r", dd)
    check(devlib.sha(dev) == content and "!" in tree(dd).values(), "a read-only mount")
    ploop("umount", dd)
    t.mount(dd)
    devlib.wait_for("the merge goes on", lambda: merging(dd) or "!" not in tree(dd).values(), 20)
    check("!" in tree(dd).values(), "the merge had ended: more data are needed")
    r = ploop("umount", dd)
    check(r.seconds < 10, f"umount took {r.seconds:.1f} s")
    goes_on(t, dd, content)


if __name__ == "__main__":
    devlib.main()
