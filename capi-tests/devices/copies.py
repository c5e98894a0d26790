#!/usr/bin/env python3
"""The receiving end of `ploop copy`: the same stream to our program and to that of 1.15, vzmigrate's probe, kills. Needs no device."""
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
from devlib import check, log  # noqa: E402

MARKER = 0x4CC0AC3D


def packet(pos, data):
    return struct.pack("<IIQ", MARKER, len(data), pos) + data


SYNC, END = packet(0, b"With"), packet(0, b"")


def receiver(program, target, *more, pipes=True):
    """Starts a receiver; (process, what its stream is written to, what its answers are read from)."""
    data, answers = (os.pipe(), os.pipe()) if pipes else (None, None)
    if pipes:
        source, sink, told, heard = data[0], data[1], answers[1], answers[0]
    else:
        ours, theirs = socket.socketpair()
        source = told = theirs.detach()
        sink = ours.detach()
        heard = os.dup(sink)
    # 1.15 reads past the end of a short argument.
    env = {k: v for k, v in os.environ.items() if not k.startswith("LD_")} | {"PADDING": "x" * 8192}
    p = subprocess.Popen([program, "copy", "-d", target, "-i", str(source), "-f", str(told), *more], pass_fds=(source, told),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env)
    for fd in {source, told}:
        os.close(fd)
    return p, sink, heard


def feed(sink, stream):
    try:
        while stream:
            stream = stream[os.write(sink, stream[:1 << 16]):]
    except BrokenPipeError:
        pass


def received(program, target, stream, pipes):
    """(status, answers, content or nothing) after this stream."""
    p, sink, heard = receiver(program, target, pipes=pipes)
    feed(sink, stream)
    if pipes:
        os.close(sink)
    else:
        s = socket.socket(fileno=sink)
        try:
            s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
    answers = b""
    while True:
        try:
            got = os.read(heard, 4096)
        except ConnectionResetError:
            break
        if not got:
            break
        answers += got
    os.close(heard)
    p.wait(60)
    texts = p.stdout.read(), p.stderr.read()
    check(p.returncode == 0 or texts[1].strip(), f"{program}: status {p.returncode} without a message")
    content = None
    if os.path.exists(target):
        with open(target, "rb") as f:
            content = f.read()
        os.remove(target)
    return p.returncode, answers, content


def streams(rng):
    """Good ones and bad ones."""
    def random_packets(n):
        out = b""
        for _ in range(n):
            data = rng.randbytes(rng.choice([512, 4096, 65536, 5, 1]))
            out += packet(rng.choice([0, 512, 4096, rng.randrange(1 << 20), 3 << 20]), data)
            out += SYNC if rng.random() < 0.3 else b""
        return out

    yield "nothing", b""
    yield "an end alone", END
    yield "a sync alone", SYNC + END
    yield "no marker", b"\0" * 16
    yield "another protocol", struct.pack("<IIIIQ", MARKER + 1, 1, 4, 0, 1) + b"\0" * 4
    yield "a head cut", packet(0, b"x" * 512)[:9]
    yield "a payload cut", packet(0, b"x" * 512)[:100]
    yield "a sync cut", SYNC[:18]
    yield "no end", packet(0, b"x" * 512) + SYNC
    yield "more after the end", packet(0, b"x" * 512) + END + packet(0, b"y" * 512)
    yield "a marker lost on the way", random_packets(3) + b"x" + random_packets(2) + END
    for i in range(devlib.pick(4, 60)):
        yield f"random {i}", random_packets(rng.randrange(1, 12)) + END


def case_as_the_classic(t):
    """Status, answers and file are those of 1.15, for whole and broken streams, by pipes and by one socket."""
    devlib.debian_is_debians()
    folder = t.mkdir("a")
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    for what, stream in streams(rng):
        for pipes in (True, False):
            ours = received(devlib.PLOOP, os.path.join(folder, "ours"), stream, pipes)
            theirs = received(devlib.DEBIAN_PLOOP, os.path.join(folder, "theirs"), stream, pipes)
            check(ours == theirs, f"{what} (pipes: {pipes}): {ours[0]} {ours[1]} {ours[2] and len(ours[2])}, 1.15: {theirs[0]} {theirs[1]} "
                                  f"{theirs[2] and len(theirs[2])}")
            check(not os.listdir(folder), f"{what}: left behind: {os.listdir(folder)}")
    log("a packet larger than the largest cluster: 1.15 takes what it is told")
    huge = struct.pack("<IIQ", MARKER, (64 << 20) + 512, 0)
    check(received(devlib.PLOOP, os.path.join(folder, "ours"), huge, True)[0] == 13, "more than a cluster is taken")


def case_probe(t):
    """vzmigrate asks whether the program knows feedback: 38 would mean that it does not."""
    for program in (devlib.PLOOP, devlib.DEBIAN_PLOOP):
        (r, w), (r2, w2) = os.pipe(), os.pipe()
        p = subprocess.Popen([program, "copy", "-i0", "-f1", "-d", "/dev/null"], stdin=r, stdout=w2, stderr=subprocess.PIPE,
                             env=dict(os.environ, PADDING="x" * 8192))
        for fd in (r, w, w2):
            os.close(fd)
        check(p.wait(20) == 1, f"{program}: {p.returncode}")
        check(os.read(r2, 100) == b"", "text where answers are expected")
        os.close(r2)
    devlib.run(devlib.PLOOP, "copy", "-d", os.path.join(t.mkdir("b"), "x"), rc=38)
    devlib.run(devlib.PLOOP, "copy", rc=38)


def case_killed(t):
    """A receiver that is killed at any moment leaves nothing under the name; the next one takes its place. SIGTERM: nothing at all."""
    folder = t.mkdir("a")
    target = os.path.join(folder, "root.hds")
    [seed] = devlib.seeds([1])
    log(devlib.replay(t, seed))
    rng = random.Random(seed)
    block = rng.randbytes(1 << 20)
    for i in range(devlib.pick(6, 100)):
        p, sink, heard = receiver(devlib.PLOOP, target)
        gentle = i % 3 == 2
        for n in range(rng.randrange(1, 12)):
            feed(sink, packet(n << 20, block) + (SYNC if n % 4 == 3 else b""))
        time.sleep(rng.random() * 0.02)
        p.send_signal(signal.SIGTERM if gentle else signal.SIGKILL)
        p.wait(20)
        os.close(sink)
        os.close(heard)
        check(p.returncode == (143 if gentle else -9), f"status {p.returncode}: {p.stderr.read()}")
        left = os.listdir(folder)
        check(left in ([], [] if gentle else ["root.hds.receiving"]), f"after a kill: {left}")
    stream = b"".join(packet(n << 20, block) for n in range(8)) + SYNC + END
    got = received(devlib.PLOOP, target, stream, True)
    check(got == (0, b"SUCCESS\n", block * 8), f"after kills: {got[:2]}")
    check(os.listdir(folder) == [], f"left: {os.listdir(folder)}")


if __name__ == "__main__":
    devlib.main()
