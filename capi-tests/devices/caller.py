#!/usr/bin/env python3
"""C callers of every kind: with signal handlers, in threads, with components, naming their devices."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log, run  # noqa: E402


@devlib.limit(180)
def case_c_program(t):
    """caller.c: what a caller may be, and what it must get back unharmed."""
    so = os.path.realpath(os.path.join(devlib.LIBDIR, "libploop.so"))
    lib = t.mkdir("lib")
    for name in ("libploop.so.1", "libploop.so"):
        os.symlink(so, os.path.join(lib, name))
    program = t.path("caller")
    run("cc", "-O2", "-Wall", "-I", os.path.join(devlib.ROOT, "include"), "-o", program,
        os.path.join(devlib.DEVICES, "caller.c"), "-L", lib, "-lploop", "-ldl", "-lpthread", limit=120)
    folder = t.mkdir("disks")
    env = dict(os.environ, LD_LIBRARY_PATH=lib, PLOOP_SERVER=os.path.join(devlib.LIBDIR, "ploop-server"))
    log(run(program, folder, so, limit=150, env=env).out)
    for d, _, names in os.walk(folder):
        if "DiskDescriptor.xml" in names:
            check(t.device_of(os.path.join(d, "DiskDescriptor.xml")) is None, "the program left a device")
            t.judges(os.path.join(d, "root.hds"))


if __name__ == "__main__":
    devlib.main()
