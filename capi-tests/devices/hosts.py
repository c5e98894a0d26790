#!/usr/bin/env python3
"""Disks whose files lie where not everything is possible, and file systems inside that the kernel knows already."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, ploop, run  # noqa: E402


def case_read_only_host(t):
    """On a read-only file system what writes nothing works, also without a lock file; what writes is refused."""
    folder, point, m = t.mkdir("disk"), t.mkdir("ro"), t.mkdir("m")
    ploop("init", "-s", "200m", os.path.join(folder, "root.hdd"))
    guid = "{11111111-2222-4333-8444-555555555555}"
    ploop("snapshot", "-u", guid, os.path.join(folder, "DiskDescriptor.xml"))
    os.unlink(os.path.join(folder, "DiskDescriptor.xml.lck"))
    run("mount", "--bind", folder, point)
    t.later(run, "umount", point)
    run("mount", "-o", "remount,bind,ro", point)
    dd = os.path.join(point, "DiskDescriptor.xml")
    t.later(lambda: ploop("umount", dd, rc=None))
    for args in (("info", dd), ("info", "-s", dd), ("check", dd), ("snapshot-list", dd)):
        r = ploop(*args)
        check("Read-only" not in r.text and "warning" not in r.text.lower(), f"ploop {args}: {r.text}")
    for more in ((), ("-u", guid)):
        dev = t.mount("-r", *more, "-m", m, dd)
        check(os.path.isdir(os.path.join(m, "lost+found")), "nothing is mounted")
        check(dev in ploop("info", "-d", dd).out, "info -d")
        ploop("info", dd)
        r = t.umount(dd)
        check("Read-only" not in r.text, r.text)
    for args in (("mount", dd), ("snapshot", dd), ("snapshot-merge", dd), ("snapshot-delete", "-u", guid, dd)):
        r = ploop(*args, rc=23)
        check("Read-only file system" in r.text, r.text)
    check(not [n for n in os.listdir("/run") if n.startswith("ploop-info")], "a mount point is left in /run")
    # A user who may read the folder, but not change it.
    check(os.listdir(folder).count("DiskDescriptor.xml.lck") == 0, "a lock file was made")
    os.chmod(folder, 0o755)
    for n in os.listdir(folder):
        os.chmod(os.path.join(folder, n), 0o644)
    other = os.path.join(folder, "DiskDescriptor.xml")
    user = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
    # Whether the disk runs root alone may see, where any device does (4).
    for rc, args in (((0, 4), ("info", "-s", other)), ((23,), ("snapshot", other))):
        r = run(sys.executable, "-c", user, devlib.PLOOP, *args, rc=None)
        check(r.rc in rc, f"ploop {args} as another user: {r.rc}, {rc} wanted: {r.text}")


if __name__ == "__main__":
    devlib.main()
