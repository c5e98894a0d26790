#!/usr/bin/env python3
"""A disk in /etc/fstab, used by mount(8) and umount(8) as an ordinary disk is. Each case runs in a mount namespace of its own, in
which our program stands at /sbin/mount.ploop and /sbin/umount.ploop."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, ploop, run  # noqa: E402

HELPERS = ("/sbin/mount.ploop", "/sbin/umount.ploop")


class World:
    """Runs shell commands in the namespace, each with its exit status."""

    def __init__(self, t, options):
        self.t = t
        self.folder = t.mkdir("disk")
        self.point = t.mkdir("m")
        self.dd = os.path.join(self.folder, "DiskDescriptor.xml")
        if not os.path.exists(self.dd):
            ploop("init", "-s", "200m", os.path.join(self.folder, "root.hdd"))
        t.later(lambda: ploop("umount", self.dd, rc=None))
        self.fstab = t.path("fstab")
        with open(self.fstab, "w") as f:
            f.write(f"{self.dd} {self.point} ploop {options} 0 0\n")

    def run(self, *steps):
        """Steps are pairs of a command and its status; what they print is returned."""
        program = os.path.realpath(devlib.PLOOP)
        lines = ["set -u", "mount --make-rprivate /", "mount -t tmpfs run /run/mount 2>/dev/null || { mkdir -p /run/mount; mount -t tmpfs run /run/mount; }"]
        lines += [f"[ -e {h} ] && mount --bind {program} {h} || {{ echo no {h}; exit 77; }}" for h in HELPERS]
        lines += [f"mount --bind {self.fstab} /etc/fstab || exit 77", "fail=0"]
        for command, rc in steps:
            lines.append(f"{command}; rc=$?; [ $rc = {rc} ] || {{ echo \"FAILED: {command.replace(chr(34), '')}: status $rc, {rc} wanted\"; fail=1; }}")
        lines.append("exit $fail")
        env = dict(os.environ, PLOOP_SERVER=os.path.join(os.path.dirname(program), "ploop-server"))
        script = self.t.path("steps")
        with open(script, "w") as f:
            f.write("\n".join(lines))
        r = run("unshare", "-m", "sh", script, rc=None, limit=90, env=env)
        if r.rc == 77:
            raise devlib.Skip(f"mount helpers cannot be put into place: {r.out}")
        check(r.rc == 0, f"{r.out}{r.err}")
        return r.out


def case_mount_and_umount(t):
    """mount, umount, again; mount -a twice; each leaves nothing, and the line's options do not matter."""
    w = World(t, "defaults,_netdev,nofail,noatime,x-systemd.device-timeout=5,x-systemd.requires=/run,comment=x,helper=ploop")
    m, list_ = w.point, f"{devlib.PLOOP} list -a | grep -q {w.folder}"
    w.run((f"mount {m}", 0), (f"echo first > {m}/file", 0), (f"grep -q ' {m} ext4 rw,noatime' /proc/self/mounts", 0),
          (f"umount {m}", 0), (list_, 1), ("grep -q ploop /run/mount/utab", 1),
          (f"mount {m}", 0), (f"grep -q first {m}/file", 0), (f"umount {m}", 0), (list_, 1),
          ("mount -a", 0), ("mount -a", 0), (f"grep -c ' {m} ' /proc/self/mounts | grep -qx 1", 0),
          (f"umount -v {m}", 0), (list_, 1), ("mount -a", 0), (f"umount {m}", 0), (list_, 1))


def case_remount(t):
    """Remounting read-only and back, as of a disk."""
    w = World(t, "defaults")
    m = w.point
    w.run((f"mount {m}", 0), (f"mount -o remount,ro {m}", 0), (f"touch {m}/no 2>/dev/null", 1),
          (f"mount -o remount,rw,noatime {m}", 0), (f"touch {m}/yes", 0), (f"grep -q ' {m} ext4 rw,noatime' /proc/self/mounts", 0),
          (f"umount {m}", 0), (f"mount -o ro {m}", 0), (f"mount -o remount,rw {m} 2>/dev/null", 32), (f"umount {m}", 0))
    # Where fstab has no line.
    m = t.mkdir("other")
    w.run((f"mount -t ploop {w.dd} {m}", 0), (f"mount -o remount,ro {m}", 0), (f"touch {m}/no 2>/dev/null", 1), (f"mount -o remount,rw {m}", 0),
          (f"touch {m}/yes", 0), (f"umount $(findmnt -n -o SOURCE {m})", 0), (f"mount -t ploop {os.path.join(w.folder, 'root.hdd')} {m}", 0),
          (f"{devlib.PLOOP} umount -m {m}", 0), ("grep -q ploop /run/mount/utab", 1))


def case_last_mount_ends_it(t):
    """Where umount(8) did not ask the helper, or was lazy, the device ends when its last mount has gone."""
    w = World(t, "defaults")
    m = w.point
    beside = t.mkdir("beside")
    gone = f"for i in $(seq 60); do {devlib.PLOOP} list -a | grep -q {w.folder} || break; sleep 0.1; done; {devlib.PLOOP} list -a | grep -q {w.folder}"
    list_ = f"{devlib.PLOOP} list -a | grep -q {w.folder}"
    w.run((f"mount {m}", 0), (f"mount --bind {m} {beside}", 0), (f"umount {m}", 0), (list_, 0), (f"umount -i {beside}", 0),
          # At once mounted again, whether the device has ended or not.
          (f"mount {m}", 0), (f"exec 5> {m}/held", 0), (f"umount -l {m}", 0), (f"mount {m}", 0), (f"[ -e {m}/held ]", 0), ("sleep 2.1", 0),
          (f"umount -i {m}", 0), (list_, 0), ("exec 5>&-", 0), (gone, 1))


def case_nofail(t):
    """A disk that is not there: 32, and with nofail it is passed over."""
    w = World(t, "nofail")
    os.rename(w.folder, t.path("away"))
    w.run((f"mount {w.point} 2>/dev/null", 0), ("mount -a", 0), (f"grep -q ' {w.point} ' /proc/self/mounts", 1))
    with open(w.fstab, "w") as f:
        f.write(f"{w.dd} {w.point} ploop defaults 0 0\n")
    w.run((f"mount {w.point} 2>/dev/null", 32))
    os.rename(t.path("away"), w.folder)


if __name__ == "__main__":
    devlib.main()
