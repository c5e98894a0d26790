#!/usr/bin/env python3
"""Snapshots, merges, switches, deletions and replacements of disks that do not run: random sequences against a model that
knows the tree and every byte of every snapshot; the same sequences with Debian's ploop 1.15; bad input; the longest chain."""
import os
import random
import shutil
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
import snaptree  # noqa: E402
from devlib import NOSNAP, PARAM, Failure, check, log, pick, ploop, run  # noqa: E402
from snaptree import NONE, TOP, Disk, Tree  # noqa: E402

# Sectors of a cluster, and how many clusters a disk of a sequence has; large ones have few, for the time it takes.
SHAPES = ((64, (20, 150)), (128, (20, 100)), (256, (10, 60)), (1024, (5, 30)), (2048, (4, 20)), (8192, (3, 8)))
UNKNOWN = "{dddddddd-0000-4000-8000-00000000dddd}"


def classic(*args, rc=0, quiet=False):
    return devlib.debian(*args, rc=rc, large=True, quiet=quiet)


def chain_of(disk, guid=TOP):
    """GUIDs from the base to this one."""
    out = []
    while guid != NONE:
        out.append(guid)
        guid = disk.snaps[guid].parent
    return out[::-1]


class Sequence:
    """Random operations on one disk by one or two programs, each with a folder of its own."""

    def __init__(self, parent, seed, tools, deepest, mounts=None):
        self.rng = rng = random.Random(seed)
        self.tools, self.deepest = tools, deepest
        self.counts, self.log = {}, []
        self.mounts, self.patient = mounts, rng.random() < 0.4
        # Every third disk first goes as deep as is wanted.
        self.climbs = seed % 3 == 0
        self.bs, (least, most) = rng.choice(SHAPES)
        self.version = rng.choice((1, 2))
        self.raw = rng.random() < 0.25
        self.clusters = rng.randrange(least, most)
        if self.bs == 64 and rng.random() < 0.3:
            # So that a grown disk needs a table that is one cluster longer.
            self.clusters = rng.randrange(8100, 8176)
        base = {c: rng.randbytes(self.bs * 512) for c in rng.sample(range(self.clusters), min(self.clusters, rng.randrange(30)))}
        if self.raw:
            # What is put on a raw base has the default version.
            self.version = 2
        self.disks = []
        for n in range(len(tools)):
            folder = os.path.join(parent, f"{seed}.{n}")
            os.mkdir(folder)
            disk = Disk(folder, self.bs, self.version, self.clusters * self.bs, self.raw, base)
            if tools[n] is classic:
                # Its failures leave this behind; it disturbs nobody.
                disk.may_remain.add(disk.dd + ".tmp")
                disk.flags_matter = False
            self.disks.append(disk)
        log(f"seed {seed}: clusters of {self.bs} sectors, {self.clusters} of them, "
            f"{'raw base' if self.raw else f'version {self.version}'}")

    @property
    def model(self):
        return self.disks[0]

    def both(self, want, args, after=lambda disk: None):
        """The command by each program; `args` is a function of the disk. All must answer `want`."""
        name = None
        for disk, tool in zip(self.disks, self.tools):
            words = args(disk)
            name = words[0]
            r = tool(*words, rc=None, quiet=True)
            self.log.append(f"{tool.__name__} {' '.join(words)} [{r.rc}]")
            # A snapshot that is missing is one code of ours; the classic has another one for switch and merge.
            wanted = NOSNAP if want == PARAM and UNKNOWN in words and tool is not classic else want
            check(r.rc == wanted, f"{' '.join(words)} by {tool.__name__}: exit {r.rc}, wanted {wanted}: {r.text}; last commands:\n  " + "\n  ".join(self.log[-6:]))
            after(disk)
        self.counts[name] = self.counts.get(name, 0) + 1

    def model_both(self, f):
        """Changes every model; the status they tell."""
        wants = {f(d) for d in self.disks}
        check(len(wants) == 1, f"the models disagree: {wants}")
        return wants.pop()

    def some_snapshot(self):
        return self.rng.choice(list(self.model.snaps) + [TOP, TOP])

    def step(self):
        rng, m = self.rng, self.model
        # Some disks are let grow deep.
        self.climbs = self.climbs and m.depth() < self.deepest
        less = 0.02 if self.climbs else 0.2 if self.patient else 1
        actions = [("write", 5 if self.climbs else 8), ("snapshot", 20 if self.climbs else 6 if m.depth() < self.deepest else 0), ("switch", 2 * less), ("delete", 2 * less),
                   ("merge", 2 * less), ("range", 1 * less), ("all", 0.3 * less * less), ("replace", 1), ("grow", 0.5), ("bad", 0.5),
                   ("mount", 1.5 if self.mounts else 0)]
        names, weights = zip(*actions)
        getattr(self, "do_" + rng.choices(names, weights)[0])()

    def do_write(self):
        rng, n = self.rng, self.bs * 512
        size = self.model.snaps[TOP].sectors * 512
        pieces = []
        for _ in range(rng.randrange(1, 6)):
            off = rng.randrange(0, size // 512) * 512
            kind = rng.random()
            if kind < 0.4:
                off, data = off // n * n, rng.randbytes(n)
            elif kind < 0.55:
                # Zeroes over what is below must stay zeroes.
                off, data = off // n * n, bytes(n)
            else:
                data = rng.randbytes(512 * rng.choice((1, 1, 8, 64, self.bs)))
            pieces.append((off, data[:size - off]))
        seed = rng.random()
        for d in self.disks:
            d.write(pieces, random.Random(seed))
        self.counts["write"] = self.counts.get("write", 0) + 1

    def do_snapshot(self):
        guid = ploopimg.guid(self.rng)
        if classic in self.tools and self.is_defect_of_snapshot():
            return
        self.both(self.model_both(lambda d: d.snapshot(guid)), lambda d: ["snapshot", "-u", guid, d.dd])

    def do_switch(self):
        guid = self.some_snapshot()
        self.both(self.model_both(lambda d: d.switch(guid)), lambda d: ["snapshot-switch", "-u", guid, d.dd])

    def do_delete(self):
        guid = self.some_snapshot()
        if self.is_defect_of_delete(guid):
            return
        self.both(self.model_both(lambda d: d.delete(guid)), lambda d: ["snapshot-delete", "-u", guid, d.dd])

    # What 1.15 does otherwise: not part of the sequences that it takes part in; `DEFECTS` has each of them.

    def is_defect_of_snapshot(self):
        """1.15 takes no snapshot (1) while a deleted one has to stay for several others."""
        return any(s.temporary and len(self.model.children(g)) > 1 for g, s in self.model.snaps.items())

    def is_defect_of_new_file(self, lower):
        """1.15 takes a raw base for a ploop1 image (4)."""
        return classic in self.tools and lower in self.model.snaps and self.model.is_raw(lower)

    def is_defect_of_delete(self, guid):
        """1.15 makes a top with children of the parent; and answers 1 for what is deleted already; and, deleting the top,
        leaves a deleted snapshot whose last sibling went by a switch, if there is another one (`case_left_by_a_switch`)."""
        s = self.model.snaps[guid]
        deleted = {min(2, len(self.model.children(g))) for g, x in self.model.snaps.items() if x.temporary}
        if classic in self.tools and guid == TOP and deleted == {1, 2}:
            return True
        if classic in self.tools and s.temporary and len(self.model.children(guid)) > 1:
            return True
        return classic in self.tools and guid == TOP and s.parent != NONE and len(self.model.children(s.parent)) > 1

    def do_merge(self):
        guid = self.some_snapshot()
        # 1.15 crashes when one snapshot is merged into a new file.
        new = self.rng.random() < 0.3 and classic not in self.tools
        self.merge(["-u", guid] if guid != TOP or self.rng.random() < 0.3 else [], new, lambda d: d.merge(guid))

    def do_range(self):
        guid = self.some_snapshot()
        chain = chain_of(self.model, guid)
        lower = self.rng.choice(chain[:-1] or chain + [UNKNOWN])
        new = self.rng.random() < 0.3 and not self.is_defect_of_new_file(lower)
        self.merge(["-u", guid, "-U", lower], new, lambda d: d.merge(guid, lower))

    def do_all(self):
        new = self.rng.random() < 0.2 and not self.is_defect_of_new_file(chain_of(self.model)[0])
        self.merge(["-A"], new, lambda d: d.merge(everything=True))

    def merge(self, words, new, change):
        name = f"merged.{self.rng.randrange(1 << 30)}"
        self.both(self.model_both(change),
                  lambda d: ["snapshot-merge", *words, *(["-n", os.path.join(d.folder, name)] if new else []), d.dd])

    def do_replace(self):
        guid, keep = self.some_snapshot(), self.rng.random() < 0.5
        name = f"copy.{self.rng.randrange(1 << 30)}"
        want = self.model_both(lambda d: d.replace(guid))
        olds = {}
        for d in self.disks:
            olds[d.folder] = Tree(d.dd).files[guid]
            run("cp", "--sparse=never", olds[d.folder], os.path.join(d.folder, name), quiet=True)

        def after(d):
            # The old file is the user's now, or the new one that nobody wanted; a kept name has only one.
            for path in (olds[d.folder], os.path.join(d.folder, name)):
                if path not in Tree(d.dd).files.values() and os.path.exists(path):
                    os.unlink(path)
        which = self.rng.choice((["-u", guid], ["-o"]))
        self.both(want, lambda d: ["replace", *(which if which[0] == "-u" else ["-o", olds[d.folder]]), *(["-k"] if keep else []),
                                   "-i", os.path.join(d.folder, name), d.dd], after)

    def do_grow(self):
        top = self.model.snaps[TOP]
        sectors = top.sectors + self.bs * self.rng.choice((1, 3, 700 if self.bs == 64 else 2))
        seed = self.rng.random()
        for d in self.disks:
            d.grow_top(sectors, random.Random(seed))
        self.counts["grow"] = self.counts.get("grow", 0) + 1

    def do_mount(self):
        """A device of a snapshot, or of the top, which is written to through it."""
        d, guid = self.model, self.some_snapshot()
        snap = d.snaps[guid]
        if guid == TOP and self.rng.random() < 0.7:
            dev = self.mounts.mount(d.dd, quiet=True)
            direct = devlib.Direct(dev)
            content = dict(snap.content)
            for _ in range(self.rng.randrange(6)):
                at = self.rng.randrange(snap.sectors) * 512
                data = self.rng.randbytes(min(512 * self.rng.choice((1, 8, 100)), snap.sectors * 512 - at))
                direct.write(at, data)
                snaptree.overlay(content, d.cluster, at, data)
            direct.close()
            snap.content = content
            d.sweep(mounted=True)
            # The mount has not waited for that.
            devlib.wait_for("temporary snapshots are gone", lambda: set(Tree(d.dd).parents) == set(d.snaps), 60, 0.05)
        else:
            dev = self.mounts.mount("-r", "-u", guid, "-c", "old", d.dd, quiet=True)
        zero = bytes(d.cluster)
        direct = devlib.Direct(dev, write=False, size=d.cluster)
        for c in range(snap.sectors // d.bs):
            check(direct.read(c * d.cluster, d.cluster) == (snap.content.get(c) or zero), f"{dev}, snapshot {guid}: cluster {c} is wrong")
        check(devlib.device_size(dev) == snap.sectors * 512, f"{dev} has {devlib.device_size(dev)} bytes")
        direct.close()
        self.mounts.umount("-d", dev, quiet=True)
        self.log.append(f"mounted {guid}")
        self.counts["mount"] = self.counts.get("mount", 0) + 1

    def do_bad(self):
        guid = self.rng.choice(list(self.model.snaps))
        for want, words in ((PARAM, ["snapshot", "-u", guid]), (NOSNAP, ["snapshot-delete", "-u", UNKNOWN]),
                            (PARAM, ["snapshot-switch", "-u", UNKNOWN]), (PARAM, ["snapshot-switch", "-u", TOP]),
                            (PARAM, ["snapshot-merge", "-u", UNKNOWN])):
            self.both(want, lambda d: [*words, d.dd])

    def compare_lists(self):
        """snapshot-list of all programs, byte for byte but for the names of files."""
        guid = self.rng.choice(list(self.model.snaps))
        for words in (["-o", "uuid,parent_uuid,current"], ["-s", "-H", "-o", "current,uuid"], ["-u", guid, "-o", "parent_uuid,uuid"],
                      ["-u", UNKNOWN], ["-o", "length"]):
            said = [tool("snapshot-list", *words, d.dd, rc=None, quiet=True) for d, tool in zip(self.disks, self.tools)]
            check(len({(r.rc, r.out) for r in said}) == 1, f"snapshot-list {' '.join(words)}: " + "\n".join(r.text for r in said))

    def verify(self, contents=True):
        if len(self.tools) > 1 and self.rng.random() < 0.15:
            self.compare_lists()
        for d, tool in zip(self.disks, self.tools):
            try:
                d.verify(contents)
            except Exception as e:
                raise Failure(f"{d.folder}: {e}; last commands:\n  " + "\n  ".join(self.log[-6:])) from e


def sequences(t, tools, seeds, steps, deepest, mounts=None):
    """Runs sequences; half of them on tmpfs, where their many syncs cost nothing."""
    memory = t.mkfs_mount("tmpfs", 1 << 30, "memory") if os.geteuid() == 0 else t.dir
    total, depth, snaps = {}, 0, 0
    begin = time.monotonic()
    for seed in seeds:
        folder = memory if seed % 2 else t.mkdir("disks")
        s = Sequence(folder, seed, tools, deepest, mounts)
        try:
            for _ in range(steps):
                s.step()
                s.verify()
                depth = max(depth, s.model.depth())
                snaps += len(s.model.snaps)
        except Exception as e:
            raise Failure(f"seed {seed}: {e}\n{devlib.replay(t, seed)}") from e
        for k, v in s.counts.items():
            total[k] = total.get(k, 0) + v
        for d in s.disks:
            shutil.rmtree(d.folder)
    check(len(seeds) < 3 or depth >= deepest, f"depth {depth} was reached, {deepest} wanted")
    log(f"RESULT: {len(seeds)} disks, {' '.join(f'{k} {v}' for k, v in sorted(total.items()))}; {snaps} snapshots compared, "
        f"depth up to {depth}, {time.monotonic() - begin:.0f} s")


def seeds(default):
    return devlib.seeds(default, "CHAINS_SEED")


@devlib.limit(5400)
def case_random(t):
    """Our command against the model."""
    sequences(t, [ploop], seeds(range(1000, 1000 + pick(4, 100))), pick(50, 120), 20)


@devlib.limit(3600)
def case_random_with_devices(t):
    """The same with devices in between: old snapshots are read through them, the top is written to."""
    sequences(t, [ploop], seeds(range(4000, 4000 + pick(3, 40))), pick(40, 80), 20, t)


@devlib.limit(5400)
def case_same_as_classic(t):
    """Ours and Debian's 1.15: the same answers, the same tree, the same bytes."""
    devlib.debian_is_debians()
    sequences(t, [ploop, classic], seeds(range(2000, 2000 + pick(3, 60))), pick(40, 100), 12)


def timed(*words):
    begin = time.monotonic()
    ploop(*words, limit=600)
    return time.monotonic() - begin


@devlib.limit(600)
def case_longest(t):
    """127 images: no more, all of it reads right, and merging all takes what one delta with the same bytes takes."""
    rng = random.Random(127)
    bs, each = 2048, pick(1, 8)
    clusters, n = 126 * each + 7, bs * 512
    folder = t.mkdir("long")
    d = Disk(folder, bs, 2, clusters * bs)
    order = rng.sample(range(clusters), 126 * each)
    data = [rng.randbytes(n) for _ in range(61)]
    guids = []
    for level in range(126):
        guids.append(ploopimg.guid(rng))
        ploop("snapshot", "-u", guids[-1], d.dd, quiet=True)
        check(d.snapshot(guids[-1]) == 0, "the model refuses")
        d.write([(c * n, data[c % 61]) for c in order[each * level:each * (level + 1)]], rng)
    before = {p: devlib.identity(p) for p in Tree(d.dd).files.values()}
    r = ploop("snapshot", d.dd, rc=PARAM)
    check("127" in r.err, f"the limit is not named: {r.err}")
    for p, was in before.items():
        devlib.unchanged(p, was)
    ploop("check", d.dd, quiet=True)
    t127 = d.verify(contents=False)
    for g in [TOP, guids[0], guids[63], guids[125]]:
        d.verify_content(g, t127)
    # The same bytes in one delta.
    other = Disk(t.mkdir("short"), bs, 2, clusters * bs)
    ploop("snapshot", other.dd, quiet=True)
    one = [g for g in Tree(other.dd).parents if g != TOP][0]
    other.snapshot(one)
    other.write([(c * n, bytes_) for c, bytes_ in d.snaps[TOP].content.items()], rng)
    copies = []
    for k in range(3):
        for disk in (d, other):
            copy = disk.folder + f".{k}"
            shutil.copytree(disk.folder, copy)
            copies.append(os.path.join(copy, "DiskDescriptor.xml"))
    run("sync", limit=120)
    times = [[timed("snapshot-merge", "-A", dd) for dd in copies[i::2]] for i in range(2)]
    middle = [sorted(ts)[1] for ts in times]
    ploop("snapshot-merge", "-A", d.dd)
    check(d.merge(everything=True) == 0, "the model refuses")
    d.verify()
    log(f"RESULT: merge of 126 deltas into the base {middle[0] * 1000:.0f} ms, of one with the same {len(order) * n >> 20} MiB "
        f"{middle[1] * 1000:.0f} ms: {middle[0] / middle[1]:.2f} times")
    # What each file costs by itself weighs with so few bytes as the reduced count has.
    check(middle[0] <= 1.5 * middle[1] + pick(6, 0), f"merging 126 deltas takes {times[0]}, one delta {times[1]}")


@devlib.limit(900)
def case_model_is_the_classic(t):
    """The model itself against 1.15 alone: what it says is not our own opinion."""
    devlib.debian_is_debians()
    sequences(t, [classic], seeds(range(3000, 3000 + pick(2, 30))), 50, 12)


if __name__ == "__main__":
    devlib.main()
