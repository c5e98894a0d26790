#!/usr/bin/env python3
"""Call patterns of programs that use the command: vzmigrate and vzctl."""
import os
import socket
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, ploop  # noqa: E402


def disk(t):
    folder, mnt = t.mkdir("img"), t.mkdir("mnt")
    img = os.path.join(folder, "root.hdd")
    ploop("init", "-s", "131072", img)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    return dd, img, mnt, t.mount("-m", mnt, dd)


def case_vzmigrate(t):
    """Receiver and sender talk over one socket, descriptor 5 of each; the output of the stop command does not get into it."""
    dd, img, mnt, dev = disk(t)
    with open(os.path.join(mnt, "file"), "wb") as f:
        f.write(os.urandom(3 << 20))
        os.fsync(f.fileno())
    # It takes the device from the mount table.
    source = devlib.mount_source(mnt)
    check(source == dev + "p1", f"{source} is mounted, the device is {dev}")
    target = t.path("copy.hds")
    ours, theirs = socket.socketpair()

    def start(sock, *args):
        def five():
            os.dup2(sock.fileno(), 5)
            os.set_inheritable(5, True)
        return subprocess.Popen([devlib.PLOOP, *args], preexec_fn=five, close_fds=False, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    receiver = start(theirs, "-vvvv", "copy", "-d", target, "-i5", "-f5")
    sender = start(ours, "copy", "-s", dev, "-F", f"echo stopped 1>&2; touch {t.path('stopped')}", "-o5", "-f5")
    ours.close()
    theirs.close()
    for name, p in (("sender", sender), ("receiver", receiver)):
        out, err = p.communicate(timeout=100)
        check(p.returncode == 0, f"{name}: {p.returncode} {out} {err}")
    check(os.path.exists(t.path("stopped")), "the stop command was not run")
    # Frozen deltas it copies as files: all lines but the first.
    ploop("snapshot", "-u", "{11111111-2222-4333-8444-555555555555}", dd)
    rows = ploop("snapshot-list", "-u", "{5fbaabe3-6958-40ff-92a7-860e329aab41}", "-H", "-o", "fname", dd).out.splitlines()
    check(rows[1:] == [img] and len(rows) == 2, f"deltas: {rows}")
    t.umount("-d", source)
    copy = t.mount("-r", "--force", target)
    devlib.run("e2fsck", "-fn", copy + "p1")
    t.umount("-d", copy)


def case_vzctl(t):
    """Of `balloon discard` it looks at the status alone."""
    dd, img, mnt, dev = disk(t)
    ploop("balloon", "discard", dd)
    ploop("-v0", "-v-1", "balloon", "discard", dd)
    t.umount(dd)
    ploop("balloon", "discard", dd, rc=devlib.PARAM)


if __name__ == "__main__":
    devlib.main()
