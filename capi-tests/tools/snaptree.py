"""A disk with snapshots as it has to be: the tree, and the bytes of every snapshot; and what writes to an image that nobody
has mounted. Like ploopimg.py made from the format's description alone; nothing here asks the library under test.

`Disk` is the model of one folder. Its methods (`snapshot`, `delete`, `switch`, `merge`, ...) change the model, and tell the
exit status that the command must have; `verify` reads the folder and compares.
"""

import os
import struct
import xml.etree.ElementTree as ET

import ploopimg
from devlib import FMT, NOSNAP, PARAM, Failure, check

TOP, NONE = ploopimg.TOP, ploopimg.NONE
MAX_CHAIN = 127


class Tree:
    """A descriptor as it is on disk."""

    def __init__(self, path):
        root = ET.parse(path).getroot()
        folder = os.path.dirname(os.path.abspath(path))
        storage = root.find("StorageData/Storage")
        self.bs = int(storage.findtext("Blocksize"))
        self.size = int(root.findtext("Disk_Parameters/Disk_size"))
        self.order, self.files, self.raw = [], {}, False
        for im in storage.findall("Image"):
            g, name = im.findtext("GUID").lower(), im.findtext("File")
            check(g not in self.files, f"{path}: image {g} is there twice")
            self.order.append(g)
            self.files[g] = os.path.normpath(os.path.join(folder, name))
            self.raw |= im.findtext("Type") == "Plain"
        self.parents, self.temporary = {}, set()
        for s in root.findall("Snapshots/Shot"):
            g = s.findtext("GUID").lower()
            check(g not in self.parents, f"{path}: snapshot {g} is there twice")
            self.parents[g] = s.findtext("ParentGUID").lower()
            if s.find("Temporary") is not None:
                self.temporary.add(g)
        check(set(self.files) == set(self.parents), f"{path}: images {sorted(self.files)}, snapshots {sorted(self.parents)}")

    def chain(self, guid):
        """Files from the base to guid."""
        out = []
        while guid != NONE:
            out.append(self.files[guid])
            guid = self.parents[guid]
            check(len(out) <= len(self.parents), "the chain runs in a circle")
        return out[::-1]


class Snap:
    def __init__(self, parent, content, sectors, temporary=False):
        self.parent, self.content, self.sectors, self.temporary = parent, content, sectors, temporary


class Disk:
    """content: {cluster: bytes}, what is not there is zero. The bytes of a snapshot never change."""

    def __init__(self, folder, bs, version, sectors, raw=False, content=None, base_name="root.hdd"):
        self.folder, self.bs, self.version, self.raw = folder, bs, version, raw
        self.cluster = bs * 512
        self.dd = os.path.join(folder, "DiskDescriptor.xml")
        base = os.path.join(folder, base_name)
        content = dict(content or {})
        if raw:
            with open(base, "xb") as f:
                for c, data in content.items():
                    f.seek(c * self.cluster)
                    f.write(data)
                f.truncate(sectors * 512)
        else:
            ploopimg.write_image(base, version, bs, sectors, content, order="scattered", seed=len(content))
        ploopimg.descriptor(self.dd, sectors, bs, [(TOP, base_name)], raw=raw)
        self.snaps = {TOP: Snap(NONE, content, sectors)}
        # Files beside the disk's own that must not be there, but may.
        self.may_remain = set()
        # Merges of 1.15 leave m_Flags as they were or set them wrongly.
        self.flags_matter = True

    # --- the tree -----------------------------------------------------------------------------------------------------

    def children(self, guid):
        return [g for g, s in self.snaps.items() if s.parent == guid]

    def depth(self, guid=TOP):
        n = 0
        while guid != NONE:
            n, guid = n + 1, self.snaps[guid].parent
        return n

    def ancestors(self, guid):
        """The snapshots that guid stands on."""
        out = set()
        while self.snaps[guid].parent != NONE:
            guid = self.snaps[guid].parent
            out.add(guid)
        return out

    def is_raw(self, guid):
        return self.raw and self.snaps[guid].parent == NONE

    def rename(self, old, new):
        self.snaps[new] = self.snaps.pop(old)
        for s in self.snaps.values():
            if s.parent == old:
                s.parent = new

    def swallow(self, guid):
        """The parent of guid goes; what it stood on is guid's parent now."""
        parent = self.snaps[guid].parent
        self.snaps[guid].parent = self.snaps.pop(parent).parent

    def sweep(self, mounted=False):
        """Temporary snapshots that have no need to be there any more; what a mount merges is in the chain of the top."""
        while True:
            chain = self.ancestors(TOP) if mounted else ()
            for g, s in self.snaps.items():
                below = self.children(g)
                if s.temporary and len(below) < 2 and (not mounted or not below or g in chain):
                    if below:
                        self.swallow(below[0])
                    else:
                        del self.snaps[g]
                    break
            else:
                return

    # --- what commands do ---------------------------------------------------------------------------------------------

    def snapshot(self, guid):
        if guid in self.snaps or guid in (TOP, NONE) or self.depth() >= MAX_CHAIN:
            return PARAM
        self.sweep()
        top = self.snaps[TOP]
        self.rename(TOP, guid)
        self.snaps[TOP] = Snap(guid, dict(top.content), top.sectors)
        return 0

    def delete(self, guid):
        if guid not in self.snaps:
            return NOSNAP
        s, below = self.snaps[guid], self.children(guid)
        if len(below) > 1:
            if s.temporary:
                return PARAM
            s.temporary = True
        elif below:
            self.swallow(below[0])
        elif s.parent == NONE:
            return PARAM
        elif guid == TOP:
            parent = s.parent
            if self.snaps[parent].temporary or len(self.children(parent)) > 1:
                return PARAM
            del self.snaps[TOP]
            self.rename(parent, TOP)
        else:
            del self.snaps[guid]
        self.sweep()
        return 0

    def switch(self, guid):
        if guid not in self.snaps or guid == TOP or self.snaps[guid].temporary:
            return PARAM
        s = self.snaps[guid]
        del self.snaps[TOP]
        self.snaps[TOP] = Snap(guid, dict(s.content), s.sectors)
        return 0

    def merge(self, guid=None, guid2=None, everything=False):
        if everything:
            guid, guid2 = TOP, TOP
            while self.snaps[guid2].parent != NONE:
                guid2 = self.snaps[guid2].parent
            if guid2 == TOP:
                return PARAM
        guid = guid or TOP
        if guid not in self.snaps or self.snaps[guid].parent == NONE:
            return PARAM
        guid2 = guid2 or self.snaps[guid].parent
        swallowed, at = [], guid
        while at != guid2:
            at = self.snaps[at].parent
            if at == NONE:
                return PARAM
            swallowed.append(at)
        if not swallowed or any(len(self.children(g)) > 1 for g in swallowed):
            return PARAM
        for _ in swallowed:
            self.swallow(guid)
        return 0

    def replace(self, guid):
        return FMT if self.is_raw(guid) else 0

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, pieces, rng):
        """Writes to the top: pieces is [(byte offset, bytes)]. Clusters that the top lacks come up whole."""
        top = self.snaps[TOP]
        content, touched = dict(top.content), set()
        for off, data in pieces:
            touched |= overlay(content, self.cluster, off, data)
        top.content = content
        changed = {c: content[c] for c in sorted(touched)}
        path = Tree(self.dd).files[TOP]
        if self.is_raw(TOP):
            with open(path, "r+b") as f:
                for c, data in changed.items():
                    f.seek(c * self.cluster)
                    f.write(data)
        else:
            put_clusters(path, changed, rng)

    def grow_top(self, sectors, rng):
        """The top alone becomes larger, as growing does; the descriptor is not told."""
        path = Tree(self.dd).files[TOP]
        self.snaps[TOP].sectors = sectors
        if self.is_raw(TOP):
            os.truncate(path, sectors * 512)
            return
        im = ploopimg.Image(path)
        own = {c: im.read(im.locate(c), self.cluster) for c in range(len(im.bat)) if im.bat[c]}
        im.close()
        os.unlink(path)
        ploopimg.write_image(path, self.version, self.bs, sectors, own, order="scattered", seed=rng.random())

    # --- judging ------------------------------------------------------------------------------------------------------

    def verify(self, contents=True, classic_order=None):
        """The descriptor, the files and the bytes of every snapshot are as the model has them."""
        t = Tree(self.dd)
        want = {g: s.parent for g, s in self.snaps.items()}
        check(t.parents == want, f"the tree is {t.parents}, it should be {want}")
        temporary = {g for g, s in self.snaps.items() if s.temporary}
        check(t.temporary == temporary, f"temporary: {t.temporary}, should be {temporary}")
        there = {os.path.join(self.folder, n) for n in os.listdir(self.folder)}
        wanted = set(t.files.values()) | {self.dd}
        there -= self.may_remain | {self.dd + ".lck"}
        check(there == wanted, f"left over: {sorted(there - wanted)}; missing: {sorted(wanted - there)}")
        for g, path in t.files.items():
            if not self.is_raw(g):
                bad = [b for b in ploopimg.validate(path) if self.flags_matter or "m_Flags" not in b]
                check(not bad, f"{path} ({g}): {bad[:4]}")
                check(ploopimg.Image(path).header.version == self.version, f"{path}: another version")
        if contents:
            for g in self.snaps:
                self.verify_content(g, t)
        return t

    def verify_content(self, guid, t):
        s = self.snaps[guid]
        files = t.chain(guid)
        chain = ploopimg.Chain(files, self.bs if self.raw else None)
        check(chain.sectors == s.sectors, f"snapshot {guid} has {chain.sectors} sectors, it should have {s.sectors}")
        zero = bytes(self.cluster)
        for c in range(-(-s.sectors // self.bs)):
            got, want = chain.read_cluster(c), s.content.get(c)
            if (got or zero) != (want or zero):
                at = chain.find(c)
                where = f"{files[at[0]]} at {at[1]}" if at else "nowhere"
                raise Failure(f"snapshot {guid}: cluster {c} is wrong (found {where})")
        chain.close()


def overlay(content, cluster, off, data):
    """Lays bytes over {cluster: bytes}; the clusters touched."""
    touched = set()
    while data:
        c, within = divmod(off, cluster)
        n = min(len(data), cluster - within)
        old = content.get(c) or bytes(cluster)
        content[c] = old[:within] + data[:n] + old[within + n:]
        touched.add(c)
        off, data = off + n, data[n:]
    return touched


def put_clusters(path, changed, rng):
    """Whole clusters into a ploop1 image: in place, else at the end of the file in any order."""
    im = ploopimg.Image(path)
    h, n, bat, length = im.header, im.header.cluster, im.bat, im.bytes
    im.close()
    new = [c for c in changed if not bat[c]]
    rng.shuffle(new)
    with open(path, "r+b") as f:
        end = max(h.l1, -(-length // n))
        if new:
            ploopimg.punch(f.fileno(), end * n, len(new) * n)
        for c in new:
            bat[c] = h.entry(end)
            f.seek(end * n)
            f.write(changed[c])
            end += 1
        for c in changed:
            if c not in new:
                f.seek(h.place(bat[c]) * n)
                f.write(changed[c])
        f.flush()
        for c in new:
            f.seek(64 + 4 * c)
            f.write(struct.pack("<I", bat[c]))
        if new and h.flags & ploopimg.CIF_EMPTY:
            h.flags &= ~ploopimg.CIF_EMPTY
            f.seek(0)
            f.write(h.encode())
