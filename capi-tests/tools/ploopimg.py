#!/usr/bin/env python3
"""Writes, reads, damages and judges ploop images and chains, independently of the library under test.

Made from the format's description alone and sharing no code with the library, so that a misreading on one side shows
up as a difference. Standard library only. All sizes are sectors of 512 bytes unless a name says otherwise.

As a program:
    ploopimg.py create FILE --size N[KMGT] [--version 1|2] [--cluster SECTORS] [--raw] [--fill FRACTION] [--seed N]
                       [--order linear|reversed|scattered] [--prealloc] [--leak N] [--state 0|inuse|v21] [--descriptor]
    ploopimg.py chain DIR --depth N --size N ... [--raw-base] [--grow]      base, deltas and DiskDescriptor.xml
    ploopimg.py info FILE | sha FILE... | cat FILE... | compare RAW FILE... (base first, or one DiskDescriptor.xml)
    ploopimg.py validate FILE...       strict check of cleanly closed images; prints every breach, exit 1
    ploopimg.py damage FILE KIND       one of DAMAGE below
"""

import argparse
import array
import fcntl
import hashlib
import os
import random
import struct
import sys
import xml.etree.ElementTree as ET

SECTOR = 512
SIGNATURES = {1: b"WithoutFreeSpace", 2: b"WithouFreSpacExt"}
IN_USE = 0x746F6E59
V21 = 0x312E3276
CIF_EMPTY = 1
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
NONE = "{00000000-0000-0000-0000-000000000000}"
HEADER = struct.Struct("<16sIIIIIQIIIQ")  # 64 bytes
EXT_MAGIC = 0xAB234CEF23DCEA87
BITMAP_MAGIC = 0x20385FAE252CB34A
assert HEADER.size == 64


class FormatError(Exception):
    pass


def geometry(n):
    """Heads and cylinders for a disk of n sectors."""
    if 1032192 < n < 16777216:
        return 16, n // 1008
    for spt in (63, 32, 16, 8):
        if n % spt == 0:
            t = n // spt
            for heads in (16, 8, 4, 2):
                if t % heads == 0:
                    return heads, t // heads
            break
    return 1, n & 0xFFFFFFFF


def header_clusters(clusters, bs):
    """File clusters taken by header and BAT."""
    bytes_ = (64 + 4 * clusters + 511) // 512 * 512
    return -(-bytes_ // (bs * SECTOR))


class Header:
    def __init__(self, version, bs, sectors):
        heads, cylinders = geometry(sectors)
        self.version, self.bs, self.sectors = version, bs, sectors
        self.type, self.heads, self.cylinders = 2, heads, cylinders & 0xFFFFFFFF
        self.size = -(-sectors // bs)
        self.in_use, self.flags, self.ext = 0, CIF_EMPTY, 0
        self.first = header_clusters(self.size, bs) * bs

    @classmethod
    def parse(cls, raw):
        if len(raw) < 64:
            raise FormatError(f"header of {len(raw)} bytes, 64 needed")
        (sig, typ, heads, cyl, bs, size, sectors, in_use, first, flags, ext) = HEADER.unpack(raw[:64])
        for version, want in SIGNATURES.items():
            if sig == want:
                break
        else:
            raise FormatError(f"signature {sig!r}")
        self = cls.__new__(cls)
        self.version = version
        self.sectors = sectors & 0xFFFFFFFF if version == 1 else sectors
        self.type, self.heads, self.cylinders, self.bs, self.size = typ, heads, cyl, bs, size
        self.in_use, self.first, self.flags, self.ext = in_use, first, flags, ext
        return self

    def encode(self):
        return HEADER.pack(SIGNATURES[self.version], self.type, self.heads, self.cylinders, self.bs, self.size,
                           self.sectors, self.in_use, self.first, self.flags, self.ext)

    @property
    def l1(self):
        return self.first // self.bs

    @property
    def cluster(self):
        return self.bs * SECTOR

    def entry(self, place):
        """BAT entry that names file cluster `place`."""
        return place * self.bs if self.version == 1 else place

    def place(self, entry):
        if self.version == 1:
            if entry % self.bs:
                raise FormatError(f"entry {entry} is not a multiple of the cluster ({self.bs} sectors)")
            return entry // self.bs
        return entry


def pattern(seed, level, cluster, nbytes):
    """Content of a cluster: reproducible, different for every (seed, level, cluster), different in every sector."""
    return random.Random(f"{seed}/{level}/{cluster}").randbytes(nbytes)


def punch(fd, off, length):
    """Space reserved for a range, read as zero (unwritten extents where the file system has them)."""
    os.posix_fallocate(fd, off, length)


def write_image(path, version, bs, sectors, content, order="linear", seed=0, prealloc=False, leaks=0, in_use=0,
                first_place=None, dense=True, flags=None):
    """Makes an image file. `content`: {cluster: bytes}. Returns the header.

    order: where in the file the clusters go. leaks: clusters in the file that no entry names (random bytes in them).
    first_place: the first data cluster used in the file, to leave a gap (leaked, reserved but not written)."""
    h = Header(version, bs, sectors)
    if flags is not None:
        h.flags = flags
    elif content or prealloc:
        h.flags = 0
    h.in_use = in_use
    n = h.cluster
    rng = random.Random(f"order/{seed}")
    start = max(h.l1, first_place or 0)
    used = sorted(content)
    if prealloc:
        places = {c: h.l1 + c for c in range(h.size)}
        end = h.l1 + h.size
        leaked = []
    else:
        slots = list(range(start, start + len(used) + leaks))
        leaked = rng.sample(slots[:-1] or slots, min(leaks, max(0, len(slots) - 1))) if leaks else []
        slots = [s for s in slots if s not in set(leaked)]
        if order == "reversed":
            slots.reverse()
        elif order == "scattered":
            rng.shuffle(slots)
        elif order != "linear":
            raise ValueError(order)
        places = dict(zip(used, slots))
        end = max(list(places.values()) + leaked + [h.l1 - 1]) + 1
    bat = array.array("I", bytes(4 * h.size))
    for c, p in places.items():
        e = h.entry(p)
        if e > 0xFFFFFFFF:
            raise FormatError(f"cluster {c}: entry {e} does not fit")
        bat[c] = e
    if sys.byteorder == "big":
        bat.byteswap()
    with open(path, "xb") as f:
        os.fchmod(f.fileno(), 0o600)
        head = h.encode() + bat.tobytes()
        f.write(head + bytes(h.first * SECTOR - len(head)))
        f.flush()
        if dense and end > h.l1:
            punch(f.fileno(), h.l1 * n, (end - h.l1) * n)
        else:
            f.truncate(end * n)
        for c in sorted(content, key=places.get):
            data = content[c]
            if len(data) != n:
                raise ValueError(f"cluster {c}: {len(data)} bytes")
            f.seek(places[c] * n)
            f.write(data)
        for p in leaked:
            f.seek(p * n)
            f.write(rng.randbytes(n))
        f.flush()
        os.fsync(f.fileno())
    return h


def random_content(bs, sectors, fill, seed, level=0, device_sectors=None):
    """{cluster: bytes} for about `fill` of the clusters (at least one), the last one among them."""
    size = -(-sectors // bs)
    rng = random.Random(f"{seed}/which/{level}")
    chosen = {c for c in range(size) if rng.random() < fill} or {rng.randrange(size)}
    if fill > 0:
        chosen.add(size - 1)
    else:
        chosen = set()
    return {c: pattern(seed, level, c, bs * SECTOR) for c in chosen}


def guid(rng):
    h = "%032x" % rng.getrandbits(128)
    return "{%s-%s-4%s-a%s-%s}" % (h[:8], h[8:12], h[13:16], h[17:20], h[20:])


def descriptor(path, sectors, bs, images, raw=False, prealloc=False, shots=None, top=TOP):
    """Writes a DiskDescriptor.xml. images: [(guid, file name)], base first; each the child of the one before."""
    heads, cylinders = geometry(sectors)
    spt = sectors // (heads * cylinders) if heads * cylinders else 0
    out = ['<?xml version="1.0"?>', "<Parallels_disk_image>", "  <Disk_Parameters>", f"    <Disk_size>{sectors}</Disk_size>",
           f"    <Cylinders>{cylinders}</Cylinders>", f"    <Heads>{heads}</Heads>", f"    <Sectors>{spt}</Sectors>",
           "    <Padding>0</Padding>", "  </Disk_Parameters>", "  <StorageData>", "    <Storage>", "      <Start>0</Start>",
           f"      <End>{sectors}</End>", f"      <Blocksize>{bs}</Blocksize>"]
    if prealloc:
        out.append("      <Preallocated>1</Preallocated>")
    for g, name in images:
        out += ["      <Image>", f"        <GUID>{g}</GUID>", f"        <Type>{'Plain' if raw else 'Compressed'}</Type>",
                f"        <File>{name}</File>", "      </Image>"]
    out += ["    </Storage>", "  </StorageData>", "  <Snapshots>", f"    <TopGUID>{top}</TopGUID>"]
    if shots is None:
        shots, parent = [], NONE
        for g, _ in images:
            shots.append((g, parent))
            parent = g
    for g, parent in shots:
        out += ["    <Shot>", f"      <GUID>{g}</GUID>", f"      <ParentGUID>{parent}</ParentGUID>", "    </Shot>"]
    out += ["  </Snapshots>", "</Parallels_disk_image>", ""]
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(out))
        f.flush()
        os.fsync(f.fileno())


def write_chain(folder, depth, version=2, bs=2048, sectors=2097152, fill=0.05, seed=1, order="scattered", raw_base=False,
                grow=False, base_fill=0.3, leaks=0):
    """Base and depth-1 deltas with DiskDescriptor.xml in `folder`. grow: lower levels are smaller. Returns the path of
    the descriptor and the images, base first."""
    rng = random.Random(f"guids/{seed}")
    sizes = [sectors] * depth
    if grow:
        least = max(1, sectors // bs // 2)
        sizes = sorted(rng.randrange(least, sectors // bs + 1) * bs for _ in range(depth))
        sizes[-1] = sectors
    images, paths = [], []
    for level in range(depth):
        name = "root.hdd" if level == 0 else f"root.hdd.{guid(rng)}"
        path = os.path.join(folder, name)
        content = random_content(bs, sizes[level], base_fill if level == 0 else fill, seed, level)
        if level == 0 and raw_base:
            with open(path, "xb") as f:
                os.fchmod(f.fileno(), 0o600)
                for c in range(sizes[0] // bs):
                    f.write(content.get(c, bytes(bs * SECTOR)))
                f.flush()
                os.fsync(f.fileno())
        else:
            write_image(path, version, bs, sizes[level], content, order=order, seed=seed * 1000 + level, leaks=leaks)
        images.append((TOP if level == depth - 1 else guid(rng), name))
        paths.append(path)
    dd = os.path.join(folder, "DiskDescriptor.xml")
    descriptor(dd, sectors, bs, images, raw=raw_base)
    return dd, paths


def open_read(path):
    """For reading, without moving the access time where that is allowed."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


class File:
    """An open file that is closed with the object at the latest (an open one keeps its file system busy)."""

    fd = -1

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __del__(self):
        self.close()


class Raw(File):
    """A raw base."""

    def __init__(self, path, bs):
        self.path, self.fd, self.bs = path, open_read(path), bs
        self.bytes = os.fstat(self.fd).st_size
        self.header = None
        self.sectors = self.bytes // SECTOR

    def locate(self, c):
        off = c * self.bs * SECTOR
        return off if off < self.bytes else None

    def read(self, off, n):
        data = os.pread(self.fd, min(n, max(0, self.bytes - off)), off)
        return data + bytes(n - len(data))


class Image(File):
    """One ploop1 file, opened for reading."""

    def __init__(self, path):
        self.path, self.fd = path, open_read(path)
        self.header = h = Header.parse(os.pread(self.fd, 64, 0))
        self.bs, self.sectors = h.bs, h.sectors
        if h.bs & (h.bs - 1) or not 64 <= h.bs <= 131072:
            raise FormatError(f"{path}: cluster of {h.bs} sectors")
        self.bytes = os.fstat(self.fd).st_size
        count = -(-h.sectors // h.bs)
        raw = os.pread(self.fd, 4 * count, 64)
        self.bat = array.array("I", raw[:len(raw) // 4 * 4])
        if sys.byteorder == "big":
            self.bat.byteswap()

    def locate(self, c):
        """Byte offset in the file of virtual cluster c, or None."""
        if c >= len(self.bat) or not self.bat[c]:
            return None
        return self.header.place(self.bat[c]) * self.header.cluster

    def read(self, off, n):
        data = os.pread(self.fd, n, off)
        if len(data) != n:
            raise FormatError(f"{self.path}: {n} bytes at {off}: only {len(data)}, the file has {self.bytes}")
        return data


def read_descriptor(path):
    """(cluster in sectors, [(guid, path, raw)] from base to top)."""
    root = ET.parse(path).getroot()
    storage = root.find("StorageData/Storage")
    bs = int(storage.findtext("Blocksize"))
    files = {}
    plain = False
    for n, im in enumerate(storage.findall("Image")):
        name = im.findtext("File")
        plain |= im.findtext("Type") == "Plain"
        files[im.findtext("GUID").lower()] = (n, name if name.startswith("/") else os.path.join(os.path.dirname(os.path.abspath(path)), name))
    shots = {s.findtext("GUID").lower(): s.findtext("ParentGUID").lower() for s in root.findall("Snapshots/Shot")}
    g = (root.findtext("Snapshots/TopGUID") or TOP).lower()
    chain = []
    while g != NONE:
        n, file = files[g]
        chain.append((g, file, plain and n == 0))
        g = shots[g]
        if len(chain) > len(shots):
            raise FormatError(f"{path}: parents go round in a circle")
    return bs, chain[::-1]


class Chain:
    """The virtual disk of a chain of files, base first, or of one descriptor."""

    def __init__(self, paths, raw_bs=None):
        if isinstance(paths, str):
            paths = [paths]
        if len(paths) == 1 and paths[0].endswith(".xml"):
            bs, names = read_descriptor(paths[0])
            self.levels = [Raw(p, bs) if raw else Image(p) for _, p, raw in names]
        else:
            self.levels = [Raw(p, raw_bs) if raw_bs and n == 0 else Image(p) for n, p in enumerate(paths)]
        top = self.levels[-1]
        self.bs, self.sectors = top.bs, top.sectors
        self.cluster = self.bs * SECTOR
        self.bytes = self.sectors * SECTOR

    def find(self, c):
        """(level number, byte offset) of the cluster, or None."""
        for n in range(len(self.levels) - 1, -1, -1):
            off = self.levels[n].locate(c)
            if off is not None:
                return n, off
        return None

    def read_cluster(self, c):
        at = self.find(c)
        if at is None:
            return None
        return self.levels[at[0]].read(at[1], self.cluster)

    def pieces(self):
        """(byte offset, length, bytes or None for zeroes), in order over the whole disk."""
        for c in range(-(-self.sectors // self.bs)):
            off = c * self.cluster
            n = min(self.cluster, self.bytes - off)
            data = self.read_cluster(c)
            yield off, n, data if data is None or n == self.cluster else data[:n]

    def sha(self):
        h, zero = hashlib.sha256(), bytes(self.cluster)
        for _, n, data in self.pieces():
            h.update(zero[:n] if data is None else data)
        return h.hexdigest()

    def export(self, path):
        """A sparse raw file with the disk's bytes."""
        with open(path, "wb") as f:
            for off, _, data in self.pieces():
                if data is not None:
                    f.seek(off)
                    f.write(data)
            f.truncate(self.bytes)

    def compare(self, path):
        """First differing byte offset against a raw file or device, or None. A length that differs is a difference."""
        zero = bytes(self.cluster)
        fd = os.open(path, os.O_RDONLY)
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            for off, n, data in self.pieces():
                want = zero[:n] if data is None else data
                got = os.pread(fd, n, off)
                while 0 < len(got) < n:
                    more = os.pread(fd, n - len(got), off + len(got))
                    if not more:
                        break
                    got += more
                if got != want:
                    return off + next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            return None if end == self.bytes else min(end, self.bytes)
        finally:
            os.close(fd)

    def close(self):
        for level in self.levels:
            level.close()


def extents(path):
    """[(logical, length, flags)] by FIEMAP after a sync, or None where there is no FIEMAP."""
    out, start = [], 0
    with open(open_read(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        while start < size:
            count = 256
            buf = bytearray(struct.pack("<QQIIII", start, size - start, 1, 0, count, 0) + bytes(56 * count))
            try:
                fcntl.ioctl(f.fileno(), 0xC020660B, buf)
            except OSError:
                return None
            got = struct.unpack_from("<I", buf, 20)[0]
            if not got:
                break
            for i in range(got):
                logical, _, length, _, _, flags = struct.unpack_from("<QQQQQI", buf, 32 + 56 * i)
                out.append((logical, length, flags))
            start = out[-1][0] + out[-1][1]
            if out[-1][2] & 1:
                break
    return out


def host_fs(path):
    """Name of the file system that holds the file, from the longest matching mount."""
    path, best, kind = os.path.realpath(path), "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, right = line.split(" - ", 1)
            point = left.split()[4].replace("\\040", " ")
            if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                best, kind = point, right.split()[0]
    return kind


def holes(path, cluster):
    """What the classic check calls sparse: holes, and unwritten extents that do not stand on cluster borders."""
    found = extents(path)
    if found is None:
        return []
    size = os.stat(path).st_size
    out, at = [], 0
    for logical, length, flags in found:
        if logical > at:
            out.append(f"hole of {logical - at} bytes at {at}")
        if flags & 0x800 and (logical % cluster or length % cluster):
            out.append(f"unwritten extent of {length} bytes at {logical}, not on cluster borders")
        at = logical + length
    if at < size:
        out.append(f"hole of {size - at} bytes at {at}, up to the end")
    return out


def validate(path, in_use=0, leaks_allowed=False, check_holes=None):
    """Every breach of the rules for a cleanly closed image, as text."""
    bad = []
    try:
        im = Image(path)
    except (FormatError, OSError) as e:
        return [str(e)]
    h = im.header
    try:
        if h.type != 2:
            bad.append(f"m_Type {h.type}, 2 wanted")
        clusters = -(-h.sectors // h.bs)
        if h.size != clusters:
            bad.append(f"m_Size {h.size}, but m_SizeInSectors {h.sectors} makes {clusters} clusters")
        l1 = header_clusters(clusters, h.bs)
        if h.first != l1 * h.bs:
            bad.append(f"m_FirstBlockOffset {h.first}, {l1 * h.bs} wanted")
            return bad
        if h.in_use != in_use:
            bad.append(f"m_DiskInUse {h.in_use:#x}, {in_use:#x} wanted")
        if h.version == 1 and os.pread(im.fd, 4, 40) != bytes(4):
            bad.append("bytes 40-43 of a version 1 header are not zero")
        if h.ext:
            bad.append(f"m_FormatExtensionOffset {h.ext}, but the image is not closed as v2.1")
        n = h.cluster
        raw = os.pread(im.fd, l1 * n, 0)
        if len(raw) != l1 * n:
            bad.append(f"the file has {im.bytes} bytes, header and BAT need {l1 * n}")
            return bad
        slack = raw[64 + 4 * clusters:]
        if slack.count(0) != len(slack):
            bad.append("slots beyond the last cluster are not zero")
        owner, high = {}, l1
        for c, e in enumerate(im.bat):
            if not e:
                continue
            if h.version == 1 and e % h.bs:
                bad.append(f"entry {c}: {e} is not a multiple of {h.bs}")
                continue
            p = h.place(e)
            if p < l1:
                bad.append(f"entry {c}: cluster {p} is inside header and BAT ({l1} clusters)")
            if (p + 1) * n > im.bytes:
                bad.append(f"entry {c}: cluster {p} ends at {(p + 1) * n}, the file at {im.bytes}")
            if p in owner:
                bad.append(f"entries {owner[p]} and {c} both name cluster {p}")
            owner[p] = c
            high = max(high, p + 1)
        if im.bytes != high * n:
            bad.append(f"the file has {im.bytes} bytes, the last used cluster ends at {high * n}: a tail of {im.bytes - high * n}")
        leaked = high - l1 - len(owner)
        if leaked > 0 and not leaks_allowed:
            bad.append(f"{leaked} clusters of the file belong to nothing")
        if bool(h.flags & CIF_EMPTY) != (not owner):
            bad.append(f"m_Flags {h.flags:#x} with {len(owner)} clusters in use")
        if h.flags & ~CIF_EMPTY:
            bad.append(f"m_Flags {h.flags:#x}")
        if check_holes is None:
            check_holes = host_fs(path) == "ext4"
        if check_holes:
            bad += holes(path, n)[:5]
    finally:
        im.close()
    return bad


def patch(path, off, data):
    with open(path, "r+b") as f:
        f.seek(off)
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _entry_at(path, n):
    """(slot, value) of the n-th used BAT entry."""
    im = Image(path)
    used = [c for c, e in enumerate(im.bat) if e]
    im.close()
    return used[n], im.bat[used[n]]


def _set(path, slot, value):
    patch(path, 64 + 4 * slot, struct.pack("<I", value))


def _d_entry_past_end(path):
    im = Image(path)
    h = im.header
    im.close()
    _set(path, _entry_at(path, 0)[0], h.entry(im.bytes // h.cluster + 7))


def _d_entry_all_ones(path):
    _set(path, _entry_at(path, 0)[0], 0xFFFFFFFF)


def _d_entry_low(path):
    h = Image(path).header
    if h.l1 < 2 and h.version == 2:
        raise FormatError("needs a BAT of two clusters")
    _set(path, _entry_at(path, 0)[0], h.entry(1))


def _d_duplicate(path):
    _set(path, _entry_at(path, 1)[0], _entry_at(path, 0)[1])


def _d_misaligned(path):
    slot, e = _entry_at(path, 0)
    _set(path, slot, e + 1)


def _d_slot_past_size(path):
    im = Image(path)
    _set(path, im.header.size + 3, _entry_at(path, 0)[1])


def _d_tail(path):
    with open(path, "ab") as f:
        f.write(b"T" * 70000)


def _d_tail_clusters(path):
    with open(path, "ab") as f:
        f.write(b"T" * (Image(path).header.cluster * 3))


def _d_truncated(path):
    os.truncate(path, Image(path).bytes - Image(path).header.cluster // 2)


def _d_short_bat(path):
    os.truncate(path, 70)


def _d_converting(path):
    patch(path, 44, struct.pack("<III", IN_USE, Image(path).header.first, 2))


# Kinds of damage by name.
DAMAGE = {
    "signature": lambda p: patch(p, 0, b"X"),
    "type": lambda p: patch(p, 16, struct.pack("<I", 3)),
    "cluster-zero": lambda p: patch(p, 28, struct.pack("<I", 0)),
    "cluster-odd": lambda p: patch(p, 28, struct.pack("<I", 100)),
    "cluster-huge": lambda p: patch(p, 28, struct.pack("<I", 1 << 31)),
    "size-huge": lambda p: patch(p, 36, struct.pack("<I" if Image(p).header.version == 1 else "<Q", 0xFFFFF800)),
    "clusters-huge": lambda p: patch(p, 32, struct.pack("<I", 0xFFFFFFFF)),
    "first-zero": lambda p: patch(p, 48, struct.pack("<I", 0)),
    "first-large": lambda p: patch(p, 48, struct.pack("<I", Image(p).header.first + Image(p).header.bs)),
    "entry-past-end": _d_entry_past_end,
    "entry-all-ones": _d_entry_all_ones,
    "entry-in-bat": _d_entry_low,
    "entry-misaligned": _d_misaligned,
    "duplicate": _d_duplicate,
    "slot-past-size": _d_slot_past_size,
    "tail": _d_tail,
    "tail-clusters": _d_tail_clusters,
    "truncated": _d_truncated,
    "short-bat": _d_short_bat,
    "empty-file": lambda p: os.truncate(p, 0),
    "in-use": lambda p: patch(p, 44, struct.pack("<I", IN_USE)),
    "in-use-other": lambda p: patch(p, 44, struct.pack("<I", 0xDEADBEEF)),
    "converting": _d_converting,
}


def add_v21(path, granularity=128, extra_bits=(0, 5, 1000)):
    """Closes an image as "v2.1": a dirty bitmap and a format extension after the data."""
    im = Image(path)
    h, n = im.header, im.header.cluster
    im.close()
    bits = -(-h.sectors // granularity)
    nbytes = -(-bits // 8)
    l1 = -(-nbytes // n)
    end = -(-im.bytes // n)
    with open(path, "r+b") as f:
        parts = []
        for i in range(l1):
            part = bytearray(n)
            for b in extra_bits:
                if b < bits and b // 8 // n == i:
                    part[b // 8 % n] |= 1 << (b % 8)
            f.seek((end + i) * n)
            f.write(part)
            parts.append((end + i) * h.bs)
        data = struct.pack("<Q16sII", h.sectors, bytes(range(16)), granularity, l1) + struct.pack(f"<{l1}Q", *parts)
        body = struct.pack("<QQII", BITMAP_MAGIC, 0, len(data), 0) + data
        body += bytes(-len(body) % 8)
        body += bytes(n - 24 - len(body))
        f.seek((end + l1) * n)
        f.write(struct.pack("<Q", EXT_MAGIC) + hashlib.md5(body).digest() + body)
        f.flush()
        os.fsync(f.fileno())
        h.in_use, h.ext = V21, (end + l1) * h.bs
        f.seek(0)
        f.write(h.encode())
        f.flush()
        os.fsync(f.fileno())


def parse_size(text):
    unit = {"K": 2, "M": 2048, "G": 2097152, "T": 2147483648}.get(text[-1:].upper())
    return int(text[:-1], 0) * unit if unit else int(text, 0)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="cmd", required=True)
    for name in ("create", "chain"):
        p = sub.add_parser(name)
        p.add_argument("path")
        p.add_argument("--size", type=parse_size, required=True)
        p.add_argument("--version", type=int, default=2, choices=(1, 2))
        p.add_argument("--cluster", type=int, default=2048)
        p.add_argument("--fill", type=float, default=0.1)
        p.add_argument("--seed", type=int, default=1)
        p.add_argument("--order", default="scattered", choices=("linear", "reversed", "scattered"))
        p.add_argument("--leak", type=int, default=0)
        if name == "create":
            p.add_argument("--prealloc", action="store_true")
            p.add_argument("--raw", action="store_true")
            p.add_argument("--state", default="0", choices=("0", "inuse", "v21"))
            p.add_argument("--descriptor", action="store_true")
        else:
            p.add_argument("--depth", type=int, required=True)
            p.add_argument("--raw-base", action="store_true")
            p.add_argument("--grow", action="store_true")
    for name in ("info", "sha", "cat", "compare", "validate", "damage"):
        p = sub.add_parser(name)
        p.add_argument("args", nargs="+")
    a = ap.parse_args()
    if a.cmd == "create":
        content = random_content(a.cluster, a.size, a.fill, a.seed)
        if a.raw:
            with open(a.path, "xb") as f:
                for c in range(-(-a.size // a.cluster)):
                    f.write(content.get(c, bytes(a.cluster * SECTOR)))
        else:
            write_image(a.path, a.version, a.cluster, a.size, content, order=a.order, seed=a.seed, prealloc=a.prealloc,
                        leaks=a.leak, in_use=IN_USE if a.state == "inuse" else 0)
            if a.state == "v21":
                add_v21(a.path)
        if a.descriptor:
            descriptor(os.path.join(os.path.dirname(os.path.abspath(a.path)), "DiskDescriptor.xml"), a.size, a.cluster,
                       [(TOP, os.path.basename(a.path))], raw=a.raw, prealloc=a.prealloc)
    elif a.cmd == "chain":
        os.makedirs(a.path, exist_ok=True)
        dd, _ = write_chain(a.path, a.depth, a.version, a.cluster, a.size, a.fill, a.seed, a.order, a.raw_base, a.grow,
                            leaks=a.leak)
        print(dd)
    elif a.cmd == "info":
        im = Image(a.args[0])
        print(vars(im.header), "file bytes", im.bytes, "entries", sum(1 for e in im.bat if e))
    elif a.cmd == "sha":
        print(Chain(a.args).sha())
    elif a.cmd == "cat":
        chain = Chain(a.args)
        for _, n, data in chain.pieces():
            sys.stdout.buffer.write(bytes(n) if data is None else data)
    elif a.cmd == "compare":
        at = Chain(a.args[1:]).compare(a.args[0])
        if at is not None:
            sys.exit(f"differs at byte {at}")
    elif a.cmd == "validate":
        bad = [f"{p}: {b}" for p in a.args for b in validate(p)]
        print("\n".join(bad))
        sys.exit(bool(bad))
    elif a.cmd == "damage":
        DAMAGE[a.args[1]](a.args[0])


if __name__ == "__main__":
    main()
