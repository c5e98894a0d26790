#!/usr/bin/env python3
"""`ploop reload` from the build of an early commit to this one keeps a disk under load; the other way round it is refused.

Needs that build: $OLD_BUILD names a folder with its `ploop` and `ploop-server`; else it is built here, which takes minutes, so that
without $OLD_BUILD only the full counts have this test."""
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, ploop, run  # noqa: E402

COMMIT = "c5f971e"
MIB = 1 << 20


def old_build(t):
    """The folder with the programs of COMMIT."""
    given = os.environ.get("OLD_BUILD")
    if given:
        return os.path.abspath(given)
    source, target = t.path("source"), os.path.join(devlib.TARGET, "old-build")
    run("git", "clone", "-q", devlib.ROOT, source)
    run("git", "-C", source, "checkout", "-q", COMMIT)
    run("cargo", "build", "--release", "--locked", "--bins", cwd=source, env=dict(os.environ, CARGO_TARGET_DIR=target), limit=1500)
    return os.path.join(target, "release")


def reload_between_versions(t):
    old = old_build(t)
    as_old = dict(os.environ, PLOOP_SERVER=os.path.join(old, "ploop-server"))

    def old_ploop(*args, **kw):
        return run(os.path.join(old, "ploop"), *args, env=as_old, limit=90, **kw)

    folder = t.mkdir("disk")
    image, dd = os.path.join(folder, "root.hdd"), os.path.join(folder, "DiskDescriptor.xml")
    old_ploop("init", "-s", "256m", "-t", "none", image)
    old_ploop("mount", dd)
    dev = t.device_of(dd)
    check(dev, "the old build mounted nothing")
    t.drop_later(dev)
    name = os.path.basename(dev)
    load = subprocess.Popen([
        "fio", "--name=load", f"--filename={dev}", "--size=192m", "--rw=randrw", "--bs=4k-64k", "--direct=1", "--ioengine=libaio",
        "--iodepth=8", "--verify=crc32c", "--verify_backlog=64", "--verify_state_save=0", "--time_based", "--runtime=12", "--output", t.path("fio.log")],
        stdin=subprocess.DEVNULL)
    t.later(lambda: load.poll() is None and (load.kill(), load.wait(30)))
    devlib.wait_for("some load", lambda: load.poll() is not None or os.path.getsize(image) > 16 * MIB, 30, 0.1)
    before = devlib.record(name)
    ploop("reload", dev)
    after = devlib.record(name)
    check(after["worker"] != before["worker"], "the worker is still the old one")
    program = os.stat(f"/proc/{after['worker']['pid']}/exe")
    wanted = os.stat(os.path.join(devlib.LIBDIR, "ploop-server"))
    check((program.st_dev, program.st_ino) == (wanted.st_dev, wanted.st_ino), "the worker does not run this build's program")
    # Once more, from this build to itself: the supervisor stays now.
    ploop("reload", dev)
    again = devlib.record(name)
    check(again["supervisor"] == after["supervisor"] and again["worker"] != after["worker"], "the second reload is no exec")
    # An older program does not replace this one.
    refused = run(devlib.PLOOP, "reload", dev, rc=38, env=as_old, limit=90)
    log(refused.text)
    check("version" in refused.text, f"refused without a reason: {refused.text}")
    check(load.wait(90) == 0, "the load failed: " + open(t.path("fio.log")).read()[-2000:])
    ploop("umount", dd)
    ploop("check", dd)


if devlib.FULL or os.environ.get("OLD_BUILD"):
    case_between_versions = devlib.limit(2400)(reload_between_versions)


if __name__ == "__main__":
    devlib.main()
