#!/usr/bin/env python3
"""Images made by others mount and are written right, and their makers accept them after our clean close."""
import os
import random
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import devlib  # noqa: E402
import ploopimg  # noqa: E402
from devlib import Failure, check, debian, log, ploop, run  # noqa: E402

MIB = 1 << 20


def with_descriptor(path, sectors, bs):
    dd = os.path.join(os.path.dirname(path), "DiskDescriptor.xml")
    ploopimg.descriptor(dd, sectors, bs, [(ploopimg.TOP, os.path.basename(path))])
    return dd


def write_and_close(t, mount_args, size, initial, seed, count, spots=None):
    """Mounts, compares with the initial content, scribbles, compares, unmounts, mounts read-only, compares again.
    Returns the model of the final content."""
    dev = t.mount(*mount_args)
    check(devlib.device_size(dev) == size, f"{dev}: {devlib.device_size(dev)} bytes, the image has {size}")
    model = devlib.Model(t.path("model"), size, initial)
    model.compare(dev)
    devlib.scribble(dev, model, seed, count, spots=spots)
    devlib.flush_buffers(dev)
    model.compare(dev)
    t.umount("-d", dev)
    check(not os.path.exists(dev), f"{dev} is still there after umount")
    dev = t.mount("-r", *mount_args)
    model.compare(dev)
    t.umount("-d", dev)
    return model


def chain_equals(paths, model):
    chain = ploopimg.Chain(paths)
    at = chain.compare(model.path)
    chain.close()
    check(at is None, f"{paths}: read independently it differs at byte {at} from what was written")


def qemu_check(path, leaks_ok=False):
    r = run("qemu-img", "check", "-f", "parallels", path, rc=(0, 3) if leaks_ok else 0, limit=120)
    check("No errors were found" in r.out or leaks_ok, f"qemu-img check: {r.text}")


def qemu_same(path, model):
    r = run("qemu-img", "compare", "-f", "parallels", "-F", "raw", path, model.path, rc=None, limit=300)
    check(r.rc == 0, f"qemu-img reads other bytes: {r.text}")


def case_qemu_create(t):
    """qemu-img create; by descriptor and by path; then written by qemu again."""
    devlib.have("qemu-img", "qemu-io")
    img = t.path("q.hds")
    size = devlib.pick(768, 2048) * MIB
    run("qemu-img", "create", "-f", "parallels", img, size)
    dd = with_descriptor(img, size // 512, 2048)
    spots = [k * MIB for k in (0, 1, 2, 500, 767)]
    model = write_and_close(t, [dd], size, None, 11, 400, spots)
    bad = ploopimg.validate(img, leaks_allowed=True)
    check(not bad, "; ".join(bad))
    qemu_check(img, True)
    qemu_same(img, model)
    chain_equals([img], model)
    # The maker goes on with it, and we after the maker.
    pat = bytes([0xA5]) * (3 * MIB)
    run("qemu-io", "-f", "parallels", "-c", f"write -P 0xa5 {700 * MIB + 4096} {3 * MIB}", "-c", "flush", img)
    model.write(700 * MIB + 4096, pat)
    dev = t.mount(dd)
    model.compare(dev)
    devlib.scribble(dev, model, 12, 200, spots=[700 * MIB, 702 * MIB])
    t.umount(dd)
    qemu_check(img)
    qemu_same(img, model)
    chain_equals([img], model)
    bad = ploopimg.validate(img, leaks_allowed=True)
    check(not bad, f"after qemu's and our writing: {bad}")


def case_qemu_path(t):
    """The same image without a descriptor, by its path alone."""
    devlib.have("qemu-img")
    img = t.path("q.hds")
    run("qemu-img", "create", "-f", "parallels", img, "512M")
    model = write_and_close(t, [img], 512 * MIB, None, 13, 300, [0, 5 * MIB, 511 * MIB])
    qemu_check(img)
    qemu_same(img, model)
    chain_equals([img], model)


def case_qemu_odd_size(t):
    """A size that is not a multiple of the cluster: the device has the full sector count."""
    devlib.have("qemu-img")
    img = t.path("odd.hds")
    run("qemu-img", "create", "-f", "parallels", img, "10752K")
    size = 10752 * 1024
    check(ploopimg.Image(img).sectors == 21504, "qemu-img made another size than expected")
    model = write_and_close(t, [img], size, None, 14, 200, [10 * MIB, size - 4096, 0])
    qemu_check(img)
    qemu_same(img, model)
    chain_equals([img], model)


def case_qemu_convert(t):
    """qemu-img convert -O parallels of random data with gaps, to and fro."""
    devlib.have("qemu-img")
    raw, img = t.path("source.raw"), t.path("c.hds")
    rng = random.Random(5)
    with open(raw, "wb") as f:
        f.truncate(1 << 30)
        for _ in range(60):
            f.seek(rng.randrange(0, (1 << 30) - 3 * MIB, 4096))
            f.write(rng.randbytes(rng.randrange(1, 2 * MIB)))
    run("qemu-img", "convert", "-O", "parallels", raw, img)
    dd = with_descriptor(img, (1 << 30) // 512, 2048)
    chain = ploopimg.Chain([img])
    check(chain.compare(raw) is None, "the independent reader and qemu-img differ")
    model = write_and_close(t, [dd], 1 << 30, chain, 15, 400, [k * MIB for k in (0, 3, 77, 512, 1023)])
    bad = ploopimg.validate(img, leaks_allowed=True)
    check(not bad, "; ".join(bad))
    qemu_check(img)
    qemu_same(img, model)
    devlib.debian_is_debians()
    debian("check", "-f", "-r", img)
    debian("check", dd)
    run("qemu-img", "convert", "-f", "parallels", "-O", "raw", img, t.path("back.raw"))
    model.compare(t.path("back.raw"))


def debian_init(t, version, bs, fmt):
    devlib.debian_is_debians()
    folder = t.mkdir(f"v{version}-{bs}-{fmt}")
    img = os.path.join(folder, "root.hdd")
    debian("init", "-s", "256m", "-f", fmt, "-v", version, "-b", bs, "-t", "none", img, large=True)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    size = 256 * MIB
    spots = [k * bs * 512 for k in (0, 1, 2, 3)] + [size - 65536]
    model = write_and_close(t, [dd], size, None, 16, 250, spots)
    if fmt == "raw":
        debian("check", "-f", "-r", "-R", "-b", bs, img)
        model.compare(img)
        return
    t.judges(img)
    debian("check", dd)
    qemu_same(img, model)
    chain_equals([img], model)


def case_debian_v1(t):
    debian_init(t, 1, 2048, "ploop1")


def case_debian_v2(t):
    debian_init(t, 2, 2048, "ploop1")


def case_debian_small_clusters(t):
    debian_init(t, 2, 64, "ploop1")
    debian_init(t, 1, 64, "ploop1")


def case_debian_preallocated(t):
    debian_init(t, 2, 2048, "preallocated")
    debian_init(t, 1, 128, "preallocated")


def case_debian_raw(t):
    debian_init(t, 2, 2048, "raw")


def chain_of(t, depth, version, bs, sectors, count, **how):
    folder = t.mkdir(f"chain{depth}")
    dd, paths = ploopimg.write_chain(folder, depth, version, bs, sectors, seed=depth * 10 + version, **how)
    lower = {p: devlib.identity(p)[:3] for p in paths[:-1]}
    before = ploopimg.Chain(dd)
    n = bs * 512
    rng = random.Random(depth)
    mapped = [c * n for c in range(sectors // bs) if before.find(c)]
    spots = rng.sample(mapped, min(len(mapped), 40)) + [rng.randrange(sectors // bs) * n for _ in range(10)]
    model = write_and_close(t, [dd], sectors * 512, before, depth, count, spots)
    before.close()
    chain_equals(dd, model)
    raw_base = how.get("raw_base")
    for p in paths[1 if raw_base else 0:]:
        bad = ploopimg.validate(p, leaks_allowed=bool(how.get("leaks")) or p == paths[-1])
        check(not bad, f"{p}: " + "; ".join(bad))
    for p, was in lower.items():
        st = os.stat(p)
        check((devlib.sha(p), st.st_size, st.st_mtime_ns) == was, f"{p}: a lower delta changed")
    devlib.debian_is_debians()
    if not raw_base and not how.get("leaks"):
        for p in (paths[-1], paths[0]):
            debian("check", "-f", "-r", p)
    debian("check", dd)
    if depth <= 20:
        # The same chain as a list of files.
        args = (["-f", "raw", "-b", bs] if raw_base else []) + paths
        dev = t.mount("-r", *args)
        model.compare(dev)
        t.umount("-d", dev)
    return dd, paths, model


def case_chain3(t):
    chain_of(t, 3, 2, 2048, 512 * 2048, 300)


def case_chain3_v1_small_lower(t):
    """Version 1, 64 KiB clusters, lower deltas smaller than the upper ones, clusters of the files leaked and reversed."""
    chain_of(t, 3, 1, 128, 2048 * 128, 400, grow=True, order="reversed", leaks=9)


def case_chain3_raw(t):
    chain_of(t, 3, 2, 256, 1024 * 256, 300, raw_base=True, grow=True)


def case_chain20(t):
    chain_of(t, 20, 2, 256, 4096 * 256, 400, grow=True)


@devlib.limit(400)
def case_chain127(t):
    dd, paths, model = chain_of(t, 127, 2, 64, 8192 * 2 * 64, devlib.pick(400, 2000), fill=0.02, grow=True)
    # One more is one too many, for the descriptor as for the list.
    extra = t.path("chain127", "root.hdd.extra")
    ploopimg.write_image(extra, 2, 64, 8192 * 2 * 64, {})
    r = ploop("mount", "-r", *paths, extra, rc=None)
    check(r.rc != 0, "a chain of 128 was mounted")


def case_chain_mixed_refused(t):
    """Cluster sizes or versions that differ, or an upper delta smaller than a lower one: refused by name, nothing written."""
    kinds = {"cluster": ((2, 2048, 64 * 2048), (2, 1024, 64 * 2048)), "version": ((1, 2048, 64 * 2048), (2, 2048, 64 * 2048)),
             "size": ((2, 2048, 64 * 2048), (2, 2048, 32 * 2048))}
    for kind, levels in kinds.items():
        folder, paths = t.mkdir(kind), []
        for i, (version, bs, sectors) in enumerate(levels):
            p = os.path.join(folder, f"l{i}")
            ploopimg.write_image(p, version, bs, sectors, ploopimg.random_content(bs, sectors, 0.1, 3, i))
            paths.append(p)
        was = [devlib.identity(p) for p in paths]
        r = ploop("mount", *paths, rc=None)
        check(r.rc in (devlib.FMT, devlib.PARAM), f"{kind}: exit {r.rc}, 11 or 38 wanted: {r.err}")
        check("l0" in r.err or "l1" in r.err, f"{kind}: no file is named: {r.err}")
        for p, w in zip(paths, was):
            devlib.unchanged(p, w, atime=False)


def case_damaged_refused(t):
    """Every kind of damage is refused with a message that names the file; nothing is written or left running."""
    wrong = []
    for version in (1, 2):
        for kind, make in sorted(ploopimg.DAMAGE.items()):
            if kind in ("tail", "tail-clusters", "in-use", "in-use-other") or (kind == "entry-misaligned" and version == 2):
                continue
            folder = t.mkdir(f"v{version}-{kind}")
            p = os.path.join(folder, "root.hdd")
            sectors = 20000 * 64  # a BAT of three clusters
            ploopimg.write_image(p, version, 64, sectors, ploopimg.random_content(64, sectors, 0.01, 7))
            make(p)
            dd = with_descriptor(p, sectors, 64)
            was = devlib.identity(p)
            what = f"version {version}, {kind}: "
            # Classic readers never look at m_Size, nor at slots of no cluster: only a check has to tell of those.
            mounts = () if kind in ("clusters-huge", "slot-past-size") else (["-r", p], ["-r", dd], [p], [dd])
            for args in mounts:
                r = ploop("mount", *args, rc=None)
                if r.rc == 0:
                    t.umount(args[-1], rc=None)
                    wrong.append(what + f"`ploop mount {' '.join(args)}` took it")
                    continue
                if "root.hdd" not in r.err:
                    wrong.append(what + f"no file is named: {r.err}")
                try:
                    devlib.unchanged(p, was, atime="-r" in args)
                except Failure as e:
                    wrong.append(what + str(e))
            r = ploop("check", "-r", "-f", "-c", p, rc=None)
            if r.rc == 0 and kind != "clusters-huge":
                wrong.append(what + "`ploop check -r -f -c` finds nothing")
    check(not wrong, "\n".join(wrong))


def case_tail_and_v21(t):
    """A garbage tail is no damage; "v2.1" with its extension is a clean state. After our close both are plain images."""
    for version in (1, 2):
        sectors = 100 * 2048
        for kind in ("tail", "tail-clusters", "v21", "in-use"):
            folder = t.mkdir(f"v{version}-{kind}")
            p = os.path.join(folder, "root.hdd")
            ploopimg.write_image(p, version, 2048, sectors, ploopimg.random_content(2048, sectors, 0.1, 8))
            chain = ploopimg.Chain([p])
            if kind == "v21":
                ploopimg.add_v21(p)
            else:
                ploopimg.DAMAGE[kind](p)
            dd = with_descriptor(p, sectors, 2048)
            was = devlib.identity(p)
            if kind in ("tail", "tail-clusters", "v21"):
                dev = t.mount("-r", dd)
                t.umount("-d", dev)
                devlib.unchanged(p, was)
            model = write_and_close(t, [dd], sectors * 512, chain, 17, 60, [0, MIB, 99 * MIB])
            t.judges(p)
            chain_equals([p], model)
            os.unlink(model.path)


if __name__ == "__main__":
    devlib.main()
