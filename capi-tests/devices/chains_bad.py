#!/usr/bin/env python3
"""Where ours and Debian's ploop 1.15 answer differently on purpose, one by one; and bad input: the right code, a message that
names the thing, nothing changed."""
import fcntl
import os
import random
import shutil
import struct
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import DISKDESCR, FMT, IN_USE, LOCK, NOSNAP, OPEN, PARAM, check, log, ploop, run  # noqa: E402
from snaptree import NONE, TOP, Disk, Tree  # noqa: E402

BUSY, FALLOCATE, WRITE = 17, 20, 7
CRASH = -11
A, B, C, D, UNKNOWN = ("{aaaaaaaa-0000-4000-8000-00000000000%d}" % n for n in range(5))


def classic(*args, rc=0):
    return devlib.debian(*args, rc=rc, large=True, quiet=True)


def disk(folder, guids=(), bs=64, version=2, clusters=20, raw=False, seed=1):
    """A disk with these snapshots in a row and data in each."""
    os.makedirs(folder)
    rng = random.Random(seed)
    n = bs * 512
    d = Disk(folder, bs, version, clusters * bs, raw, {c: rng.randbytes(n) for c in range(0, clusters, 3)})
    for g in guids:
        ploop("snapshot", "-u", g, d.dd, quiet=True)
        d.snapshot(g)
        d.write([(rng.randrange(clusters) * n, rng.randbytes(n)) for _ in range(4)], rng)
    return d


def mark(path, value=ploopimg.IN_USE):
    ploopimg.patch(path, 44, struct.pack("<I", value))


# --- differences from 1.15 -------------------------------------------------------------------------------------------

def temporary_in_the_middle(d, tool):
    """A deleted snapshot with two others on it: the next snapshot is taken all the same."""
    tool("snapshot-switch", "-u", A, d.dd)
    tool("snapshot", "-u", C, d.dd)
    tool("snapshot-delete", "-u", A, d.dd)
    return ["snapshot", d.dd]


def deleted_twice(d, tool):
    """1.15 leaks a plain 1."""
    temporary_in_the_middle(d, tool)
    return ["snapshot-delete", "-u", A, d.dd]


def top_with_brothers(d, tool):
    """Deleting the top would leave a top on which others stand, and which cannot be mounted."""
    tool("snapshot-switch", "-u", A, d.dd)
    return ["snapshot-delete", "-u", TOP, d.dd]


def kept_top(d, tool):
    """1.15 writes a descriptor with two tops."""
    return ["snapshot-switch", "-D", "-u", A, d.dd]


def null_guid(d, tool):
    """The top would have no parent: its data would be hidden."""
    return ["snapshot", "-u", NONE, d.dd]


def one_into_a_new_file(d, tool):
    """1.15 crashes after the copy."""
    return ["snapshot-merge", "-u", B, "-n", os.path.join(d.folder, "new"), d.dd]


def raw_into_a_new_file(d, tool):
    """1.15 takes the raw base for a ploop1 image."""
    return ["snapshot-merge", "-A", "-n", os.path.join(d.folder, "new"), d.dd]


def lower_marked(d, tool):
    """A mark that a crash left on a lower delta is cleared; 1.15 wants a check by hand."""
    mark(Tree(d.dd).files[B])
    return ["snapshot-merge", d.dd]


def switch_to_marked(d, tool):
    mark(Tree(d.dd).files[A])
    return ["snapshot-switch", "-u", A, d.dd]


def other_version_below(d, tool):
    """1.15 fills the lower image with entries of the other version."""
    base = Tree(d.dd).files[A]
    content = d.snaps[A].content
    os.unlink(base)
    ploopimg.write_image(base, 1, d.bs, d.snaps[A].sectors, content)
    return ["merge", Tree(d.dd).files[B], base]


def larger_below(d, tool):
    """1.15 cuts the lower image to the upper one's size."""
    base = Tree(d.dd).files[A]
    os.unlink(base)
    ploopimg.write_image(base, 2, d.bs, d.snaps[A].sectors + 5 * d.bs, d.snaps[A].content)
    return ["merge", Tree(d.dd).files[B], base]


def not_raw(d, tool):
    """A ploop1 image called raw: 1.15 writes over its header."""
    t = Tree(d.dd)
    return ["merge", "-f", "raw", t.files[B], t.files[A]]


def relative_current(d, tool):
    """1.15 looks for the current file beside the descriptor and opens it in the working folder."""
    shutil.copy(Tree(d.dd).files[A], os.path.join(d.folder, "copy"))
    return ["replace", "-o", "root.hdd", "-i", os.path.join(d.folder, "copy"), d.dd]


# What is done to a disk with snapshots A and B; our status, and that of 1.15.
DIFFERENCES = (
    (temporary_in_the_middle, 0, 1),
    (deleted_twice, PARAM, 1),
    (top_with_brothers, PARAM, 0),
    (kept_top, 0, 0),
    (null_guid, PARAM, 0),
    (one_into_a_new_file, 0, CRASH),
    (raw_into_a_new_file, 0, OPEN),
    (lower_marked, 0, OPEN),
    (switch_to_marked, 0, OPEN),
    (other_version_below, FMT, 0),
    (larger_below, PARAM, 0),
    (not_raw, PARAM, 0),
    (relative_current, 0, OPEN),
)


def case_differences(t):
    devlib.debian_is_debians()
    for scene, ours, theirs in DIFFERENCES:
        answers = []
        for name, tool in (("ours", ploop), ("theirs", classic)):
            d = disk(t.path(f"{scene.__name__}.{name}"), (A, B), raw=scene is raw_into_a_new_file)

            def quietly(*args, tool=tool):
                return tool(*args, rc=0)
            words = scene(d, quietly)
            r = tool(*words, rc=None)
            answers.append(r.rc if r.rc not in (139, -11) else CRASH)
            if tool is ploop:
                tops = Tree(d.dd)  # refuses doubles
                check(TOP in tops.parents and not any(p == TOP for p in tops.parents.values()), f"{scene.__name__}: {tops.parents}")
                check(r.rc or not r.err.strip(), f"{scene.__name__}: {r.err}")
        check(tuple(answers) == (ours, theirs), f"{scene.__name__}: ours and 1.15 answer {answers}, wanted {(ours, theirs)}\n{r.text}")
        log(f"{scene.__name__}: {ours}, 1.15 {theirs}: {(scene.__doc__ or '').strip()}")
    log(f"RESULT: {len(DIFFERENCES)} differences")


def case_left_by_a_switch(t):
    """Of two deleted snapshots one has to stay for several others, and the last sibling at the other goes by a switch: the
    next deletion swallows that one; 1.15 looks at the first one only."""
    for name, tool, swallowed in (("ours", ploop, True), ("theirs", classic, False)):
        d = disk(t.path(name), (A, B))
        for words in (["snapshot", "-u", C], ["snapshot-switch", "-u", A], ["snapshot", "-u", D], ["snapshot-delete", "-u", A],
                      ["snapshot-switch", "-u", B], ["snapshot-delete", "-u", B], ["snapshot-switch", "-u", C],
                      ["snapshot-delete", "-u", TOP]):
            tool(*words, d.dd, rc=0)
        want = {A: NONE, D: A, TOP: A} if swallowed else {A: NONE, B: A, D: A, TOP: B}
        found = dict(Tree(d.dd).parents)
        check(found == want, f"{name}: {found}, wanted {want}")


# --- bad input -------------------------------------------------------------------------------------------------------

class Bad:
    """A disk in a folder of its own, and what must not change."""

    def __init__(self, t, name, guids=(A, B), **how):
        self.name, self.d = name, disk(t.path(name), guids, **how)
        self.tree = Tree(self.d.dd)

    def keep(self):
        self.before = {n: devlib.identity(os.path.join(self.d.folder, n)) for n in sorted(os.listdir(self.d.folder))
                       if not n.endswith(".lck") and not os.path.islink(os.path.join(self.d.folder, n))}

    def refused(self, rc, named, *words, limit=90):
        """The command ends with this status and names this, and nothing changes."""
        self.keep()
        r = ploop(*words, rc=rc, limit=limit)
        check(named in r.err, f"{self.name}: the message does not name {named!r}: {r.err}")
        now = sorted(n for n in os.listdir(self.d.folder) if not n.endswith(".lck") and not os.path.islink(os.path.join(self.d.folder, n)))
        check(now == sorted(self.before), f"{self.name}: `{words[0]}` left {set(now) ^ set(self.before)}")
        for n, was in self.before.items():
            devlib.unchanged(os.path.join(self.d.folder, n), was, atime=False)
        return r

    def file(self, guid):
        return self.tree.files[guid]


def case_wrong_names(t):
    """GUIDs, files and levels that are not there."""
    b = Bad(t, "names")
    dd, base = b.d.dd, b.file(A)
    copy = os.path.join(b.d.folder, "copy")
    shutil.copy(base, copy)
    rows = [
        (PARAM, "123", ["snapshot", "-u", "123"]), (PARAM, A, ["snapshot", "-u", A]), (PARAM, TOP, ["snapshot", "-u", TOP]),
        (PARAM, A.upper(), ["snapshot", "-u", A.upper()]), (PARAM, NONE, ["snapshot", "-u", NONE]),
        (NOSNAP, UNKNOWN, ["snapshot-delete", "-u", UNKNOWN]), (PARAM, "xyz", ["snapshot-delete", "-u", "xyz"]),
        (NOSNAP, UNKNOWN, ["snapshot-switch", "-u", UNKNOWN]), (PARAM, "", ["snapshot-switch", "-u", TOP]),
        (NOSNAP, UNKNOWN, ["snapshot-merge", "-u", UNKNOWN]), (NOSNAP, UNKNOWN, ["snapshot-merge", "-u", B, "-U", UNKNOWN]),
        (PARAM, A, ["snapshot-merge", "-u", A]), (PARAM, "", ["snapshot-merge", "-u", A, "-U", B]),
        (PARAM, "", ["snapshot-merge", "-U", A]), (PARAM, "", ["snapshot-merge", "-u", B, "-U", B]),
        (PARAM, copy, ["snapshot-merge", "-n", copy]), (1, "nowhere", ["snapshot-merge", "-n", "/nowhere/at/all"]),
        (NOSNAP, UNKNOWN, ["replace", "-u", UNKNOWN, "-i", copy]), (PARAM, "missing", ["replace", "-u", A, "-i", "/missing"]),
        (PARAM, "nothere", ["replace", "-o", "nothere", "-i", copy]), (PARAM, "", ["replace", "-l", "0", "-i", copy]),
        (PARAM, B, ["replace", "-u", A, "-i", b.file(B)]),
    ]
    for rc, named, words in rows:
        b.refused(rc, named, *words, dd)
    b.refused(DISKDESCR, "nowhere.xml", "snapshot", os.path.join(b.d.folder, "nowhere.xml"))
    b.refused(OPEN, "/missing", "merge", "/missing", base)
    b.refused(PARAM, "DiskDescriptor.xml", "merge", b.file(B), dd)
    log(f"RESULT: {len(rows) + 3} rows")


def case_branches(t):
    """Snapshots on which several stand are not swallowed."""
    b = Bad(t, "branches")
    ploop("snapshot-switch", "-u", A, b.d.dd)
    b.refused(PARAM, A, "snapshot-merge", b.d.dd)
    b.refused(PARAM, A, "snapshot-merge", "-u", B, b.d.dd)
    b.refused(PARAM, A, "snapshot-merge", "-A", b.d.dd)
    b.refused(PARAM, "", "snapshot-delete", "-u", TOP, b.d.dd)
    ploop("snapshot-delete", "-u", A, b.d.dd)
    check(A in Tree(b.d.dd).temporary, "A is not marked temporary")
    b.refused(PARAM, A, "snapshot-switch", "-u", A, b.d.dd)
    b.refused(PARAM, A, "snapshot-delete", "-u", A, b.d.dd)
    b.refused(PARAM, A, "snapshot-merge", b.d.dd)
    b.refused(PARAM, "", "snapshot-delete", "-u", TOP, b.d.dd)


def case_in_use(t):
    """Somebody holds an image: as our server does, and as qemu does."""
    for how in ("flock", "bytes"):
        b = Bad(t, how)
        for guid, rows in ((TOP, (["snapshot"], ["snapshot-switch", "-u", A], ["snapshot-delete", "-u", TOP], ["snapshot-merge"])),
                           (B, (["snapshot-delete", "-u", A], ["snapshot-merge"], ["snapshot-merge", "-A"]))):
            with open(b.file(guid), "r+b") as f:
                if how == "flock":
                    fcntl.flock(f, fcntl.LOCK_EX)
                else:
                    for byte in (101, 201):
                        fcntl.fcntl(f, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))  # F_OFD_SETLK
                for words in rows:
                    b.refused((BUSY, PARAM, IN_USE), os.path.basename(b.file(guid)), *words, b.d.dd)
                other = b.file(A)
                # Another delta of the disk may stand on the lower one, which is refused first, with its name.
                b.refused((BUSY, OPEN, IN_USE, PARAM), "", "merge", b.file(guid), other)
    b = Bad(t, "marked")
    mark(b.file(B))
    b.refused(OPEN, b.file(B), "merge", b.file(B), b.file(A))
    # By descriptor the mark of a crash is cleared.
    ploop("snapshot-merge", b.d.dd)


def case_deleted_behind_our_back(t):
    for gone, words in ((A, ["snapshot"]), (A, ["snapshot-merge", "-A"]), (B, ["snapshot-merge"]), (B, ["snapshot-delete", "-u", A]),
                        (A, ["snapshot-switch", "-u", A]), (TOP, ["snapshot"]), (B, ["replace", "-u", B, "-i", "/etc/hostname"])):
        b = Bad(t, f"{words[0]}.{gone[-2]}.{len(words)}")
        os.unlink(b.file(gone))
        b.refused((OPEN, PARAM, FMT), "" if words[0] == "replace" else os.path.basename(b.file(gone)), *words, b.d.dd)
    # What does not need it works: its own deletion among them.
    b = Bad(t, "leaf")
    ploop("snapshot-switch", "-u", A, b.d.dd)
    os.unlink(b.file(B))
    ploop("snapshot", "-u", C, b.d.dd)
    ploop("snapshot-delete", "-u", B, b.d.dd)
    check(B not in Tree(b.d.dd).parents, "B is still there")


def case_damaged(t):
    """Images that are not what the descriptor says."""
    for kind in ("signature", "first-large", "entry-past-end", "duplicate", "truncated", "empty-file", "converting"):
        b = Bad(t, kind)
        ploopimg.DAMAGE[kind](b.file(B))
        b.refused((OPEN, FMT, BUSY, PARAM), os.path.basename(b.file(B)), "snapshot-merge", "-A", b.d.dd)
    b = Bad(t, "cluster")
    os.unlink(b.file(B))
    ploopimg.write_image(b.file(B), 2, 128, 20 * 64, {})
    b.refused((FMT, PARAM), os.path.basename(b.file(B)), "snapshot-merge", "-A", b.d.dd)


def case_full_disk(t):
    """No space in the middle: what was there is whole, and with space the same command goes on."""
    host = t.mkfs_mount("ext4", 40 << 20)
    d = disk(os.path.join(host, "disk"), (A,), clusters=400)
    rng = random.Random(5)
    d.write([(c * 32768, rng.randbytes(32768)) for c in range(1, 400, 2)], rng)
    filler = os.path.join(host, "filler")

    def fill(leave):
        with open(filler, "wb", buffering=0) as f:
            for piece in (1 << 20, 4096):
                try:
                    while True:
                        f.write(bytes(piece))
                except OSError:
                    pass
            os.fsync(f.fileno())
            f.truncate(max(0, f.tell() - leave))
            os.fsync(f.fileno())
    for words, leave in ((["snapshot", "-u", B], 8192), (["snapshot-merge"], 1 << 20),
                         (["snapshot-merge", "-n", os.path.join(host, "disk", "new")], 1 << 20)):
        fill(leave)
        r = ploop(*words, d.dd, rc=None)
        check(r.rc in (FALLOCATE, WRITE, 1, DISKDESCR), f"{words}: exit {r.rc}: {r.text}")
        check("space" in r.err, f"the message does not say that space is missing: {r.err}")
        tree = Tree(d.dd)
        check(set(tree.parents) == set(d.snaps), f"{words}: the tree is {tree.parents}")
        d.verify_content(TOP, tree)
        os.unlink(filler)
        if words[0] == "snapshot":
            d.verify()
    ploop("snapshot-merge", d.dd)
    check(d.merge() == 0, "the model refuses")
    d.verify()


def case_read_only_host(t):
    host = t.mkfs_mount("ext4", 32 << 20)
    b = Bad(t, "host/disk")
    run("mount", "-o", "remount,ro", host)
    t.later(lambda: run("mount", "-o", "remount,rw", host, rc=None))
    for words in (["snapshot"], ["snapshot-delete", "-u", A], ["snapshot-switch", "-u", A], ["snapshot-merge"]):
        r = ploop(*words, b.d.dd, rc=None)
        check(r.rc in (LOCK, 1, OPEN, DISKDESCR) and "Read-only" in r.err, f"{words}: exit {r.rc}: {r.err}")
    r = ploop("merge", b.file(B), b.file(A), rc=None)
    check(r.rc == OPEN and "Read-only" in r.err, f"merge: exit {r.rc}: {r.err}")
    check("UUID" in ploop("snapshot-list", b.d.dd).out, "snapshot-list needs no lock")
    run("mount", "-o", "remount,rw", host)
    b.d.verify()


@devlib.limit(300)
def case_locked(t):
    """The descriptor's lock held by another process: 60 s, then 23. In CI, which has no minute for it: released in time, and the command
    goes on."""
    b = Bad(t, "locked")
    with open(b.d.dd + ".lck", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if devlib.FULL:
            r = b.refused(LOCK, ".lck", "snapshot-merge", b.d.dd, limit=90)
            check(58 <= r.seconds <= 75, f"it waited {r.seconds:.1f} s")
        else:
            timer = threading.Timer(3, lambda: fcntl.flock(f, fcntl.LOCK_UN))
            timer.start()
            r = ploop("snapshot", b.d.dd)
            timer.join()
            check(2.5 <= r.seconds <= 20, f"it waited {r.seconds:.1f} s for a lock held for 3 s")
            fcntl.flock(f, fcntl.LOCK_EX)
        check("UUID" in ploop("snapshot-list", b.d.dd).out, "snapshot-list needs no lock")
    ploop("snapshot", b.d.dd)


if __name__ == "__main__":
    devlib.main()
