"""4 KiB blocks that say where they belong and which write made them: written, read under load, and judged.

    blocks.py fill  PATH STATE VERSION START STEP COUNT LENGTH   writes COUNT runs of LENGTH bytes, flushes, notes them in STATE
    blocks.py spare STATE START STEP COUNT                        notes blocks that nothing was written to yet
    blocks.py check PATH STATE                                    every block of STATE has a version that it may have
    blocks.py churn PATH STATE THREADS RATE                       reads and writes the blocks of STATE until SIGTERM

STATE is JSON: {offset: version or [versions]}; version 0 is zeroes. Of the blocks two in three are written by `churn`, the
third is only read. RATE is in requests a second, 0 for as many as go. Direct I/O. Errors and wrong bytes are lines that
begin with `error` or `wrong`, `ops N` lines tell that it goes on; the status is 1 after one of the former.
"""

import errno
import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time

BLOCK = 4096
HANGS = 60


def block(off, version):
    """The bytes of a block: each sector repeats its own place and the version."""
    if not version:
        return bytes(BLOCK)
    return b"".join(struct.pack("<QQ", off + s, version) * 32 for s in range(0, BLOCK, 512))


def may_be(data, off, versions):
    return any(data == block(off, v) for v in (versions if isinstance(versions, list) else [versions]))


def load(path):
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return {int(k): v for k, v in json.load(f).items()}


def store(path, state):
    with open(path + ".tmp", "w") as f:
        json.dump(state, f)
    os.rename(path + ".tmp", path)


def say(*words):
    print(*words, flush=True)


def fill(path, state_path, version, start, step, count, length):
    state = load(state_path)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    buf = mmap.mmap(-1, 1 << 20)
    for i in range(count):
        at, end = start + i * step, start + i * step + length
        while at < end:
            n = min(len(buf), end - at)
            buf[:n] = b"".join(block(at + k, version) for k in range(0, n, BLOCK))
            if os.pwritev(fd, [memoryview(buf)[:n]], at) != n:
                raise OSError(errno.EIO, f"short write at {at}")
            state.update((at + k, version) for k in range(0, n, BLOCK))
            at += n
    os.fsync(fd)
    os.close(fd)
    store(state_path, state)


def check(path, state):
    """Neighbouring blocks are read together."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buf = mmap.mmap(-1, 1 << 20)
    offs, i, bad = sorted(state), 0, 0
    while i < len(offs):
        n = 1
        while i + n < len(offs) and n < len(buf) // BLOCK and offs[i + n] == offs[i] + n * BLOCK:
            n += 1
        try:
            if os.preadv(fd, [memoryview(buf)[:n * BLOCK]], offs[i]) != n * BLOCK:
                raise OSError(errno.EIO, "short read")
            for k in range(n):
                data = buf[k * BLOCK:(k + 1) * BLOCK]
                if not may_be(data, offs[i + k], state[offs[i + k]]):
                    bad += 1
                    say(f"wrong {offs[i + k]}: {struct.unpack('<QQ', data[:16])}, wanted version {state[offs[i + k]]}")
        except OSError as e:
            bad += 1
            say(f"error read {offs[i]} +{n * BLOCK}: {e.strerror}")
        i += n
    say(f"checked {len(offs)} blocks, {bad} bad")
    return 1 if bad else 0


class Churn:
    def __init__(self, path, state_path, threads, rate):
        self.path, self.state_path, self.state, self.count = path, state_path, load(state_path), threads
        self.pause = threads / rate if rate else 0
        self.halt = threading.Event()
        self.reads, self.writes, self.bad, self.longest = [0] * threads, [0] * threads, 0, [0.0] * threads
        self.began = [0.0] * threads

    def one(self, me, fd, buf, off, version):
        self.began[me] = time.monotonic()
        try:
            os.preadv(fd, [buf], off)
            self.reads[me] += 1
            if not may_be(buf[:], off, self.state[off]):
                self.bad += 1
                say(f"wrong {off}: {struct.unpack('<QQ', buf[:16])}, wanted version {self.state[off]}")
        except OSError as e:
            self.bad += 1
            say(f"error read {off}: {e.strerror}")
        if (off // BLOCK) % 3:
            buf[:] = block(off, version)
            try:
                os.pwritev(fd, [buf], off)
                self.writes[me] += 1
                self.state[off] = version
            except OSError as e:
                self.bad += 1
                say(f"error write {off}: {e.strerror}")
                old = self.state[off]
                self.state[off] = (old if isinstance(old, list) else [old])[-20:] + [version]
        self.longest[me] = max(self.longest[me], time.monotonic() - self.began[me])
        self.began[me] = 0.0

    def thread(self, me):
        # A block has one owner, so that what it must contain is known at each moment.
        mine = [off for i, off in enumerate(sorted(self.state)) if i % self.count == me]
        rng, version = random.Random(me), int(time.time()) << 20
        fd, buf = os.open(self.path, os.O_RDWR | os.O_DIRECT), mmap.mmap(-1, BLOCK)
        while mine and not self.halt.is_set():
            rng.shuffle(mine)
            for off in mine:
                if self.halt.is_set():
                    break
                version += 1
                self.one(me, fd, buf, off, version)
                if self.pause:
                    time.sleep(self.pause)
        os.close(fd)

    def run(self):
        signal.signal(signal.SIGTERM, lambda *_: self.halt.set())
        threads = [threading.Thread(target=self.thread, args=(i,), daemon=True) for i in range(self.count)]
        for t in threads:
            t.start()
        while not self.halt.wait(0.1):
            say(f"ops {sum(self.reads) + sum(self.writes)}")
        end = time.monotonic() + HANGS
        for t in threads:
            t.join(max(0.0, end - time.monotonic()))
        hung = [i for i, t in enumerate(threads) if t.is_alive()]
        if hung:
            say(f"error {len(hung)} requests hang for {time.monotonic() - min(self.began[i] or end for i in hung):.0f} s")
        store(self.state_path, dict(self.state))
        say(f"done: {sum(self.reads)} reads, {sum(self.writes)} writes, {self.bad} bad, longest {max(self.longest):.2f} s")
        sys.stdout.flush()
        # A thread that the kernel holds must not keep the process from reporting it.
        os._exit(1 if hung or self.bad else 0)


def main():
    what, *args = sys.argv[1:]
    if what == "fill":
        fill(args[0], args[1], *map(int, args[2:]))
    elif what == "spare":
        state = load(args[0])
        start, step, count = map(int, args[1:])
        state.update((start + i * step, 0) for i in range(count))
        store(args[0], state)
    elif what == "check":
        sys.exit(check(args[0], load(args[1])))
    elif what == "churn":
        Churn(args[0], args[1], int(args[2]), int(args[3])).run()


if __name__ == "__main__":
    main()
