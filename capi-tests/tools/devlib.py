"""What every device test needs: commands under a time limit, scratch folders, mounts that are undone, the judges.

A test file defines functions `case_NAME(t)` and ends with `devlib.main()`. `FILE --list` prints the cases with their time
limits, `FILE CASE` runs one: exit 0 passed, 77 skipped (the reason on the last line), anything else failed. The scratch
folder is $PLOOP_TEST_SCRATCH/FILE.CASE; the runner removes it and undoes what a killed case left (see cleanup.py).

Nothing here waits without a limit: a device whose server is gone may hang whoever touches it.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ploopimg  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOLS = os.path.join(ROOT, "capi-tests", "tools")
DEVICES = os.path.join(ROOT, "capi-tests", "devices")
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
PLOOP = os.environ.get("PLOOP", os.path.join(TARGET, "release", "ploop"))
LIBDIR = os.path.dirname(PLOOP)
RUN = "/run/ploop"
FULL = os.environ.get("PLOOP_TEST", "ci") == "full"
DEBIAN_PLOOP = "/usr/sbin/ploop"
BALLOON = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8"
OURS_SINCE = time.time()

# Exit codes of the command.
DEVICE, DEVIOC, OPEN, FMT, SYS, MOUNT, UMOUNT, LOCK, IN_USE, PARAM, DISKDESCR, NOT_MOUNTED, NOSNAP = 2, 3, 4, 11, 12, 21, 22, 23, 37, 38, 39, 40, 43


class Failure(Exception):
    pass


class Skip(Exception):
    pass


def check(ok, message):
    if not ok:
        raise Failure(message)


def log(*args):
    print(*args, flush=True)


def pick(ci, full):
    """A count: the reduced one, or the one of PLOOP_TEST=full."""
    return full if FULL else ci


def seeds(usual, alias=None):
    """The seeds of a case: the one that PLOOP_SEED (or an older name) asks for, else all of `usual`."""
    one = os.environ.get("PLOOP_SEED") or (os.environ.get(alias) if alias else None)
    return [int(one)] if one else list(usual)


def replay(t, seed):
    """The command that replays a seed of a case."""
    return f"replay: PLOOP_SEED={seed} capi-tests/run {os.path.basename(t.dir)}"


class Result:
    def __init__(self, rc, out, err, seconds):
        self.rc, self.out, self.err, self.seconds = rc, out, err, seconds

    @property
    def text(self):
        return self.out + self.err


def run(*cmd, rc=0, limit=60, quiet=False, env=None, cwd=None, stdin=None):
    """Runs a command under a limit. rc: the wanted status, a tuple of them, or None for any. A command that does not end
    even when killed (it sits in the kernel) is left behind and is a failure."""
    cmd = [str(c) for c in cmd]
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        p = subprocess.Popen(cmd, stdout=out, stderr=err, stdin=stdin or subprocess.DEVNULL, start_new_session=True, env=env,
                             cwd=cwd)
        late = False
        try:
            p.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(p.pid, signal.SIGKILL)
            try:
                p.wait(3)
            except subprocess.TimeoutExpired:
                pass
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read().decode("utf-8", "replace"))
    r = Result(p.returncode, *texts, time.monotonic() - begin)
    if not quiet:
        log(f"$ {' '.join(cmd)}  [{r.rc}, {r.seconds:.2f} s]")
    if late:
        where = ""
        if p.returncode is None:
            try:
                where = "; it cannot be killed: " + open(f"/proc/{p.pid}/stack").read()
            except OSError as e:
                where = f"; it cannot be killed ({e})"
        raise Failure(f"no end after {limit} s: {' '.join(cmd)}{where}\n{r.text[-3000:]}")
    wanted = rc if isinstance(rc, tuple) else (rc,)
    if rc is not None and r.rc not in wanted:
        raise Failure(f"{' '.join(cmd)}: exit {r.rc}, wanted {' or '.join(map(str, wanted))}\n"
                      f"stdout: {r.out[-3000:]}\nstderr: {r.err[-3000:]}")
    return r


def ploop(*args, **kw):
    """Our command. A non-zero status must come with a message."""
    kw.setdefault("limit", 90)
    r = run(PLOOP, *args, **kw)
    if r.rc:
        check(r.err.strip(), f"ploop {' '.join(map(str, args))}: exit {r.rc} without a message on stderr")
        check("panicked" not in r.text, f"panic: {r.text[-2000:]}")
        check(not (r.rc < 0 or r.rc > 128), f"ploop {args}: killed or leaked status {r.rc}")
    return r


def have(*programs):
    for p in programs:
        if not shutil.which(p):
            raise Skip(f"{p} is not installed")


def debian(*args, rc=0, limit=120, large=False, quiet=False):
    """Debian's own ploop, with the padded environment it needs; large: with version 2 allowed (see its large_disk_support)."""
    if not os.path.exists(DEBIAN_PLOOP):
        raise Skip(f"{DEBIAN_PLOOP} (package ploop) is not installed")
    env = dict(os.environ, PADDING="x" * 8192)
    env.pop("LD_LIBRARY_PATH", None)
    env.pop("LD_PRELOAD", None)
    cmd = [DEBIAN_PLOOP, *args]
    if large:
        # Works where / is no mount point too, as in a chroot; /sys is made private first, so that nobody else sees it.
        script = ("mount --make-rprivate /sys && mount -t tmpfs none /sys/module && mkdir -p /sys/module/ploop/parameters && "
                  "echo 1 > /sys/module/ploop/parameters/large_disk_support && exec \"$@\"")
        cmd = ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", script, "sh", *cmd]
    return run(*cmd, rc=rc, limit=limit, env=env, quiet=quiet)


_debian_seen = []


def debian_is_debians():
    """The program used as the judge is the classic one, not ours by way of a library path."""
    if _debian_seen:
        return
    if not os.path.exists(DEBIAN_PLOOP):
        raise Skip(f"{DEBIAN_PLOOP} (package ploop) is not installed")
    if shutil.which("dpkg"):
        r = run("dpkg", "-S", DEBIAN_PLOOP, quiet=True)
        check(r.out.startswith("ploop:"), f"{DEBIAN_PLOOP} is not of the package ploop: {r.out}")
        r = run("dpkg-query", "-W", "-f", "${Version}", "ploop", quiet=True)
        check(r.out.startswith("1.15"), f"package ploop has version {r.out}, 1.15 wanted")
    env = dict(os.environ)
    env.pop("LD_LIBRARY_PATH", None)
    r = run("ldd", DEBIAN_PLOOP, quiet=True, env=env)
    lib = re.search(r"libploop\S* => (\S+)", r.out)
    check(lib and not os.path.realpath(lib.group(1)).startswith(os.path.realpath(ROOT)),
          f"{DEBIAN_PLOOP} would load {lib and lib.group(1)}")
    _debian_seen.append(lib.group(1))
    log(f"judge: {DEBIAN_PLOOP} with {lib.group(1)}")


# --- records and processes -------------------------------------------------------------------------------------------

def start_time(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError):
        return None


def alive(who):
    """A process of a record: it runs, and is the one meant."""
    if start_time(who["pid"]) != who["start_time"]:
        return False
    try:
        with open(f"/proc/{who['pid']}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def record(name):
    name = os.path.basename(str(name))
    with open(f"{RUN}/{name}/state") as f:
        return json.load(f)


def identity_of_device(name):
    """What tells a device from a later one of the same name."""
    r = record(name)
    return r["rdev"], r["diskseq"], r["ids"]


def wait_for(what, condition, limit=10.0, step=0.02):
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failure(f"after {limit} s still not: {what}")
        time.sleep(step)


def running_worker(name, old=None, limit=10.0):
    """The record once it names a living worker other than `old`."""
    def look():
        try:
            r = record(name)
        except (OSError, ValueError):
            return None
        return r if r["worker"]["pid"] != old and alive(r["worker"]) else None
    return wait_for(f"{name} has a living worker" + (f" other than {old}" if old else ""), look, limit)


def kill(pid, sig=signal.SIGKILL):
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass


# --- block devices ---------------------------------------------------------------------------------------------------


class Direct:
    """Direct I/O on a file or device; offsets and lengths are multiples of 512."""

    def __init__(self, path, write=True, size=1 << 20):
        self.fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT)
        self.buf = mmap.mmap(-1, size)
        self.size = size

    def read(self, off, n):
        out = bytearray()
        while n:
            view = memoryview(self.buf)[:min(n, self.size)]
            got = os.preadv(self.fd, [view], off)
            if got <= 0:
                raise Failure(f"end of the device at {off}")
            out += view[:got]
            off, n = off + got, n - got
        return bytes(out)

    def write(self, off, data):
        at = 0
        while at < len(data):
            n = min(len(data) - at, self.size)
            self.buf[:n] = data[at:at + n]
            done = os.pwritev(self.fd, [memoryview(self.buf)[:n]], off + at)
            if done <= 0:
                raise Failure(f"nothing written at {off + at}")
            at += done

    def sync(self):
        os.fsync(self.fd)

    def discard(self, off, n, zeroout=False):
        fcntl.ioctl(self.fd, 0x127F if zeroout else 0x1277, struct.pack("QQ", off, n))

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def device_size(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return struct.unpack("Q", fcntl.ioctl(fd, 0x80081272, bytes(8)))[0]
    finally:
        os.close(fd)


def flush_buffers(path):
    run("blockdev", "--flushbufs", path, quiet=True, limit=30)


class Model:
    """What a disk must contain: a sparse raw file that gets every write too."""

    def __init__(self, path, size, chain=None):
        self.path, self.size = path, size
        if chain:
            chain.export(path)
        else:
            with open(path, "wb") as f:
                f.truncate(size)
        self.f = open(path, "r+b", buffering=0)

    def write(self, off, data):
        os.pwrite(self.f.fileno(), data, off)

    def zero(self, off, n):
        libc_fallocate(self.f.fileno(), 3, off, n)

    def compare(self, path, limit=600):
        """Compares with a device or file, byte for byte, outside of this process (reading may hang)."""
        r = run(sys.executable, os.path.join(TOOLS, "same.py"), self.path, path, rc=None, limit=limit)
        check(r.rc == 0, f"{path} is not what was written: {r.text.strip()}")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def libc_fallocate(fd, mode, off, n):
    if _libc.fallocate(fd, mode, off, n):
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))


def scribble(dev, model, seed, count, longest=256 * 1024, spots=None, zeroes=True):
    """Random writes, some discards and zeroouts, to a device and its model; ends with a flush. A good part of the
    requests cross cluster borders or hit the same few places."""
    rng = random.Random(seed)
    d = Direct(dev)
    sectors = model.size // 512
    try:
        for i in range(count):
            n = rng.choice((1, 1, 2, 7, 8, 8, 8, 64, rng.randrange(1, longest // 512 + 1)))
            n = min(n, sectors)
            if spots and rng.random() < 0.7:
                at = rng.choice(spots) // 512 + rng.randrange(-n, n + 1)
            else:
                at = rng.randrange(0, sectors)
            at = max(0, min(at, sectors - n))
            what = rng.random()
            if zeroes and what < 0.05:
                d.discard(at * 512, n * 512)
                model.zero(at * 512, n * 512)
            elif zeroes and what < 0.10:
                d.discard(at * 512, n * 512, zeroout=True)
                model.zero(at * 512, n * 512)
            else:
                data = rng.randbytes(n * 512)
                d.write(at * 512, data)
                model.write(at * 512, data)
            if i % 97 == 96:
                d.sync()
        d.sync()
    finally:
        d.close()


def sha(path):
    h = hashlib.sha256()
    with open(ploopimg.open_read(path), "rb") as f:
        while piece := f.read(1 << 20):
            h.update(piece)
    return h.hexdigest()


def identity(path):
    """Bytes and times of a file, so that a change of either shows."""
    digest = sha(path)
    # Older than any change: so that even relatime would move the access time at the next read.
    st = os.stat(path)
    os.utime(path, ns=(st.st_mtime_ns - 10 ** 9, st.st_mtime_ns))
    st = os.stat(path)
    return digest, st.st_size, st.st_mtime_ns, st.st_atime_ns, st.st_ctime_ns, st.st_blocks


def unchanged(path, before, atime=True):
    st = os.stat(path)
    now = (st.st_size, st.st_mtime_ns, st.st_atime_ns, st.st_ctime_ns, st.st_blocks)
    names = ("size", "mtime", "atime", "ctime", "blocks")
    for name, was, is_ in zip(names, before[1:], now):
        check(was == is_ or name == "atime" and not atime, f"{path}: {name} changed from {was} to {is_}")
    check(sha(path) == before[0], f"{path}: its bytes changed")


def fill_tree(folder, seed, total, sizes=(1000, 70000, 300000, 4000000)):
    """Many files of random bytes; returns {name: sha}."""
    rng = random.Random(seed)
    sums, done, n = {}, 0, 0
    while done < total:
        name = f"d{n % 7}/f{n}"
        os.makedirs(os.path.join(folder, os.path.dirname(name)), exist_ok=True)
        data = rng.randbytes(min(rng.choice(sizes), total - done))
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)
        sums[name] = hashlib.sha256(data).hexdigest()
        done, n = done + len(data), n + 1
    return sums


def compare_tree(folder, sums):
    for name, want in sums.items():
        path = os.path.join(folder, name)
        check(os.path.exists(path), f"{path} is missing")
        check(sha(path) == want, f"{path}: wrong bytes")


def is_mounted(folder):
    folder = os.path.realpath(folder)
    with open("/proc/self/mountinfo") as f:
        return any(line.split()[4].encode().decode("unicode_escape") == folder for line in f)


def mount_source(folder):
    folder = os.path.realpath(folder)
    found = None
    with open("/proc/mounts") as f:
        for line in f:
            if line.split()[1] == folder:
                found = line.split()[0]
    return found


def compile_c(t, *names, libs=()):
    """A C program of capi-tests/devices (or a path), without our library."""
    src = [n if n.startswith("/") else os.path.join(DEVICES, n) for n in names]
    out = os.path.join(t.dir, os.path.basename(src[0])[:-2])
    run("cc", "-O2", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-o", out, *src, "-lpthread", *libs, limit=120)
    return out


# --- a case ----------------------------------------------------------------------------------------------------------

class Case:
    def __init__(self, name):
        base = os.environ.get("PLOOP_TEST_SCRATCH") or tempfile.mkdtemp(prefix="ploop-test.", dir="/var/tmp")
        os.chmod(base, 0o755)
        self.dir = os.path.join(base, name)
        os.makedirs(self.dir)
        self.undo = []

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def mkdir(self, *parts):
        p = self.path(*parts)
        os.makedirs(p, exist_ok=True)
        return p

    def later(self, f, *args):
        """To be done at the end of the case, last first, whatever happened."""
        self.undo.append((f, args))

    def device_of(self, target, component=""):
        """The node that `ploop list` names for an image, descriptor or mount point."""
        want = os.path.realpath(target)
        if want.endswith(".xml"):
            bs, names = ploopimg.read_descriptor(want)
            want = os.path.realpath(names[0][1])
        for line in ploop("list", quiet=True, limit=30).out.splitlines():
            name, rest = line[:12].strip(), line[13:]
            if rest.split(" ")[0] == want or rest.startswith(want + " "):
                if record(name)["component"] == component:
                    return "/dev/" + name
        return None

    def mount(self, *args, rc=0, **kw):
        """Our `ploop mount`; returns the node named in its output. The device is taken away at the end of the case."""
        r = ploop("mount", *args, rc=rc, **kw)
        if r.rc:
            return r
        m = re.search(r"dev=(/dev/\S+)", r.out)
        check(m, f"no `dev=/dev/ploopN` in the output of mount: {r.out}")
        dev = m.group(1).rstrip(",;:.)")
        self.drop_later(dev)
        return dev

    def drop_later(self, dev):
        """Takes the device away at the end, if it still runs then and its name is not another disk's by now."""
        try:
            was = identity_of_device(dev)
        except (OSError, ValueError):
            was = None

        def drop():
            try:
                now = identity_of_device(dev)
            except (OSError, ValueError):
                return
            if was in (None, now):
                ploop("umount", "--discard-deleted", "-d", dev, rc=None)
        self.later(drop)

    def bare(self, size="64m"):
        """A new disk without a file system, mounted: its device and descriptor."""
        folder = self.mkdir("img")
        ploop("init", "-s", size, "-t", "none", os.path.join(folder, "root.hdd"))
        dd = os.path.join(folder, "DiskDescriptor.xml")
        return self.mount(dd), dd

    def umount(self, *args, rc=0, **kw):
        return ploop("umount", *args, rc=rc, **kw)

    def mkfs_mount(self, kind, size, name="host", options=()):
        """A host file system of a kind, on a loop file (or tmpfs); returns its mount point."""
        point = self.mkdir(name)
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point)
        else:
            have(f"mkfs.{kind}")
            img = self.path(name + ".img")
            with open(img, "wb") as f:
                f.truncate(size)
            run(f"mkfs.{kind}", *({"ext4": ["-q", "-F"], "xfs": ["-q", "-f"], "btrfs": ["-q", "-f"]}[kind]), *options, img)
            if run("mount", "-o", "loop", img, point, rc=None).rc:
                raise Skip(f"this kernel cannot mount {kind}")
        self.later(self._umount_host, point)
        return point

    @staticmethod
    def _umount_host(point):
        for _ in range(20):
            if run("umount", point, rc=None, quiet=True).rc == 0:
                break
            time.sleep(0.25)
        else:
            run("umount", "-l", point, rc=None)
        # The loop device that mount(8) made goes by itself, on btrfs a moment later.
        for _ in range(40):
            if not run("losetup", "-j", point + ".img", rc=None, quiet=True, limit=20).out.strip():
                return
            time.sleep(0.25)

    def user_mount(self, dev, point, fstype=None, options=None):
        cmd = ["mount"]
        if fstype:
            cmd += ["-t", fstype]
        if options:
            cmd += ["-o", options]
        run(*cmd, dev, point)
        self.later(lambda: is_mounted(point) and run("umount", point, rc=None))

    def user_umount(self, point):
        for _ in range(10):
            if run("umount", point, rc=None).rc == 0:
                return
            time.sleep(0.3)
        raise Failure(f"{point} cannot be unmounted")

    def judges(self, path, version=2, raw_bs=None, sparse_ok=False):
        """What others say of a closed image: Debian's check, qemu's check, and the strict reader."""
        debian_is_debians()
        if raw_bs:
            debian("check", "-f", "-r", "-R", "-b", raw_bs, path)
            return
        bad = ploopimg.validate(path, leaks_allowed=True)
        check(not bad, f"{path}: " + "; ".join(bad[:6]))
        before = sha(path) if os.path.getsize(path) < 1 << 30 else None
        debian("check", "-f", "-r", path)
        have("qemu-img")
        r = run("qemu-img", "check", "-f", "parallels", path, limit=300)
        check("No errors were found" in r.out, f"qemu-img check: {r.out}")
        if before:
            check(sha(path) == before, f"{path}: a read-only check changed it")

    def finish(self):
        problems = []
        for f, args in reversed(self.undo):
            try:
                f(*args)
            except Exception as e:  # noqa: BLE001 - every undo gets its turn
                problems.append(f"{getattr(f, '__name__', f)}: {e}")
        self.undo = []
        return problems


def limit(seconds):
    """Time limit of a case (the default is 180 s)."""
    def mark(f):
        f.limit = seconds
        return f
    return mark


def main():
    module = sys.modules["__main__"]
    cases = {n[5:]: f for n, f in vars(module).items() if n.startswith("case_")}
    only = sys.argv[1:]
    if only == ["--list"]:
        for name, f in cases.items():
            print(name, getattr(f, "limit", 180))
        return
    stem = os.path.basename(module.__file__)[:-3]
    for name in only or cases:
        t = Case(f"{stem}.{name}")
        code, said = 0, ""
        try:
            if os.geteuid():
                raise Skip("not root")
            cases[name](t)
        except Skip as e:
            code, said = 77, f"skip: {e}"
        except Failure as e:
            code, said = 1, f"FAILED: {e}"
            frames = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)]
            said += "\n  at " + " > ".join(frames[1:])
        except Exception:  # noqa: BLE001
            code, said = 1, "FAILED: " + traceback.format_exc()
        problems = t.finish()
        if problems and not code:
            code, said = 1, "FAILED while clearing up: " + "; ".join(problems)
        if not only:
            log(f"== {name}: {said or 'ok'}")
        elif said:
            log(said)
        if code and only:
            sys.exit(code)
