//! Changes of the tree of snapshots, in memory. The caller stores the result. A refused change leaves the descriptor as
//! it was.

use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::format::guid::{self, Guid};
use crate::units::MAX_CHAIN;

use super::model::{Descriptor, Image, Snapshot};

impl Descriptor {
    /// Snapshots that stand directly on this one.
    pub fn children(&self, guid: &Guid) -> Vec<Guid> {
        self.snapshots.iter().filter(|s| s.parent == *guid).map(|s| s.guid).collect()
    }

    /// The snapshot below; none for the base. `NoSnap` if `guid` is unknown.
    pub fn parent(&self, guid: &Guid) -> Result<Option<Guid>> {
        Ok(Some(self.known(guid)?.parent).filter(|p| !p.is_none()))
    }

    /// A GUID that must be there. `NoSnap`.
    pub fn known(&self, guid: &Guid) -> Result<&Snapshot> {
        self.snapshot(guid).ok_or_else(|| {
            let known: Vec<String> = self.snapshots.iter().map(|s| s.guid.to_string()).collect();
            Error::new(
                Kind::NoSnap,
                format!("no snapshot {guid} in the disk in {}; there are {}", self.dir.display(), known.join(", ")),
            )
        })
    }

    /// The whole tree is sound, and this program may store it: see [`check_tree`](Self::check_tree).
    pub fn check_changeable(&self) -> Result<()> {
        self.check_storable()?;
        self.check_tree()
    }

    /// Refuses deltas that a program of the newer line has half merged: that program must finish the merge.
    /// `DiskDescr`.
    pub fn check_storable(&self) -> Result<()> {
        match self.snapshots.iter().find(|s| s.reverse_merge.is_some()) {
            Some(snapshot) => bail!(
                DiskDescr,
                "snapshot {} is marked TemporaryZero, half merged by another program: that program must finish it \
                 before this disk is changed",
                snapshot.guid
            ),
            None => Ok(()),
        }
    }

    /// Operations on snapshots need the top under its constant GUID; a resize or a merge stores it so.
    fn check_form(&self) -> Result<()> {
        if self.top != guid::TOP {
            bail!(
                Param,
                "descriptor of the old form: its top is {}, must be {}; any merge or resize stores the new form",
                self.top,
                guid::TOP
            );
        }
        Ok(())
    }

    /// Checks a GUID for a new snapshot: no other snapshot may have it. `Param`.
    fn check_new(&self, guid: &Guid) -> Result<()> {
        if guid.is_none() {
            bail!(Param, "snapshot {guid}: the all-zero GUID stands for \"no parent\"; give another one");
        }
        if *guid == guid::TOP {
            bail!(Param, "snapshot {guid}: this GUID belongs to the writable top; give another one");
        }
        if self.snapshot(guid).is_some() || self.image(guid).is_some() {
            bail!(Param, "snapshot {guid} exists already; give another GUID");
        }
        Ok(())
    }

    fn check_new_file(&self, file: &Path) -> Result<()> {
        if let Some(image) = self.images.iter().find(|i| i.file == file) {
            bail!(Param, "{} is the image of snapshot {} already", file.display(), image.guid);
        }
        Ok(())
    }

    /// Checks that one more delta above `guid` is allowed. `Param`.
    fn check_depth(&self, guid: &Guid) -> Result<()> {
        let images = self.chain(guid)?.len();
        if images >= MAX_CHAIN {
            bail!(
                Param,
                "the chain has {images} images, at most {MAX_CHAIN} are allowed: merge or delete a snapshot first"
            );
        }
        Ok(())
    }

    /// The top becomes snapshot `guid`, and the image `file` the new top.
    pub fn add_snapshot(&mut self, file: PathBuf, guid: Guid, temporary: bool) -> Result<()> {
        self.check_form()?;
        self.check_new(&guid)?;
        self.check_new_file(&file)?;
        self.check_depth(&guid::TOP)?;
        self.rename(&guid::TOP, guid);
        self.mark_temporary(&[guid], temporary);
        self.push_top(file, guid);
        Ok(())
    }

    /// Switches the disk to snapshot `to`. With `file` a new top of that image stands on it, without one `to` itself
    /// becomes the top. The old top is kept as snapshot `keep`, or removed: then its file is returned.
    pub fn switch(&mut self, to: &Guid, file: Option<PathBuf>, keep: Option<Guid>) -> Result<Option<PathBuf>> {
        self.check_form()?;
        let Some(snapshot) = self.snapshot(to) else {
            bail!(
                NoSnap,
                "no snapshot {to} to switch to in the disk in {}; ploop snapshot-list shows them",
                self.dir.display()
            );
        };
        let to = snapshot.guid;
        if to == guid::TOP {
            bail!(Param, "the disk is on {to} already, the writable top");
        }
        self.check_whole(&to)?;
        if snapshot.temporary {
            bail!(Param, "snapshot {to} is temporary and will be removed: the disk cannot be switched to it");
        }
        let mut next = self.clone();
        let gone = match keep {
            Some(keep) => {
                next.check_new(&keep)?;
                next.rename(&guid::TOP, keep);
                None
            }
            None => {
                if next.has_children(&guid::TOP) {
                    bail!(
                        Param,
                        "the top has snapshots standing on it and cannot be dropped; keep it under another GUID"
                    );
                }
                if next.parent(&guid::TOP)?.is_none() {
                    bail!(Param, "the top is the base of the disk and cannot be dropped");
                }
                next.remove(&guid::TOP)
            }
        };
        match file {
            Some(file) => {
                next.check_new_file(&file)?;
                next.check_depth(&to)?;
                next.push_top(file, to);
            }
            None => {
                if next.has_children(&to) {
                    bail!(
                        Param,
                        "snapshot {to} cannot become the top: other deltas stand on it and would change with it; switch \
                         with a new top instead"
                    );
                }
                next.rename(&to, guid::TOP);
            }
        }
        *self = next;
        Ok(gone)
    }

    /// Removes a snapshot on which no delta stands; returns its file. Removing the top makes its parent the top.
    pub fn delete_leaf(&mut self, guid: &Guid) -> Result<PathBuf> {
        self.check_form()?;
        let snapshot = self.known(guid)?;
        let (guid, parent) = (snapshot.guid, snapshot.parent);
        if self.has_children(&guid) {
            bail!(Param, "snapshot {guid} has children: it can only be merged");
        }
        let Some(below) = self.snapshot(&parent) else {
            bail!(Param, "snapshot {guid} is the base, the last image of the disk: it cannot be deleted");
        };
        if guid == guid::TOP {
            if below.temporary {
                bail!(
                    Param,
                    "the top cannot be deleted: snapshot {parent} below it is temporary and would become the top; switch \
                     to another snapshot"
                );
            }
            if self.children(&parent).len() > 1 {
                bail!(
                    Param,
                    "the top cannot be deleted: snapshot {parent} below it has other children and could not be written \
                     to; use snapshot-switch to {parent}"
                );
            }
        }
        let mut next = self.clone();
        let Some(file) = next.remove(&guid) else {
            bail!(DiskDescr, "descriptor in {}: snapshot {guid} has no image", self.dir.display());
        };
        if guid == guid::TOP {
            next.rename(&parent, guid::TOP);
        }
        *self = next;
        Ok(file)
    }

    /// The snapshots that disappear when `descendant` is merged down into `ancestor`: from the ancestor up to the one below
    /// the descendant, in this order. `Param` if it is no ancestor, or if anything else stands on one of them.
    pub fn removed_by_merge(&self, descendant: &Guid, ancestor: &Guid) -> Result<Vec<Guid>> {
        self.known(ancestor)?;
        let chain: Vec<Guid> = self.chain(descendant)?.iter().map(|i| i.guid).collect();
        if descendant == ancestor {
            bail!(Param, "snapshot {descendant} cannot be merged into itself");
        }
        let Some(at) = chain.iter().position(|g| g == ancestor) else {
            bail!(
                Param,
                "snapshot {ancestor} is not below {descendant}: only deltas that stand on each other are merged"
            );
        };
        let gone: Vec<Guid> = chain.get(at..chain.len() - 1).unwrap_or_default().to_vec();
        for guid in &gone {
            let children = self.children(guid);
            if children.len() > 1 {
                bail!(
                    Param,
                    "snapshot {guid} has {} children and must stay for the other children: delete or merge those first",
                    children.len()
                );
            }
        }
        Ok(gone)
    }

    /// The descriptor after a merge of `descendant` and all between into the image of `ancestor` (or into `file`, which
    /// replaces it): one entry stays, with the ancestor's place and the descendant's GUID and mark. Returns the files
    /// that are no longer named.
    pub fn collapse(&mut self, descendant: &Guid, ancestor: &Guid, file: Option<PathBuf>) -> Result<Vec<PathBuf>> {
        let gone = self.removed_by_merge(descendant, ancestor)?;
        let descendant = self.known(descendant)?.clone();
        let mut next = self.clone();
        let mut files = Vec::new();
        for guid in gone.iter().skip(1).chain([&descendant.guid]) {
            files.extend(next.remove(guid));
        }
        if let Some(file) = file {
            self.check_new_file(&file)?;
            if let Some(image) = next.images.iter_mut().find(|i| i.guid == *ancestor) {
                files.push(std::mem::replace(&mut image.file, file));
            }
        }
        // Children of the descendant keep it as their parent.
        for image in next.images.iter_mut().filter(|i| i.guid == *ancestor) {
            image.guid = descendant.guid;
        }
        for snapshot in next.snapshots.iter_mut().filter(|s| s.guid == *ancestor) {
            snapshot.guid = descendant.guid;
            snapshot.temporary = descendant.temporary;
            snapshot.spoiled = descendant.spoiled;
        }
        *self = next;
        Ok(files)
    }

    /// Sets or clears the mark "temporary" of snapshots.
    pub fn mark_temporary(&mut self, guids: &[Guid], temporary: bool) {
        for snapshot in self.snapshots.iter_mut().filter(|s| guids.contains(&s.guid)) {
            snapshot.temporary = temporary;
            snapshot.spoiled &= temporary;
        }
    }

    /// Marks snapshots that a merge is going to remove, before it writes into their images.
    pub fn mark_spoiled(&mut self, guids: &[Guid]) {
        for snapshot in self.snapshots.iter_mut().filter(|s| guids.contains(&s.guid)) {
            (snapshot.temporary, snapshot.spoiled) = (true, true);
        }
    }

    /// Refuses a snapshot whose content an interrupted merge has changed, and says how to finish that merge. `Param`.
    pub fn check_whole(&self, guid: &Guid) -> Result<()> {
        match self.half_merged(guid) {
            Some(why) => bail!(Param, "{why}"),
            None => Ok(()),
        }
    }

    /// The merge, from the first to the second, that has to be finished for a snapshot to be whole; none: it is whole.
    pub fn unfinished_merge(&self, guid: &Guid) -> Option<(Guid, Guid)> {
        let spoiled = |guid: &Guid| self.snapshot(guid).filter(|s| s.spoiled);
        let mut lowest = spoiled(guid)?;
        let mut highest = lowest.guid;
        // Bounded, since a tree that is not sound can have a circle.
        for _ in 0..self.snapshots.len() {
            lowest = spoiled(&lowest.parent).unwrap_or(lowest);
            if let (Some(_), [above, ..]) = (spoiled(&highest), self.children(&highest).as_slice()) {
                highest = *above;
            }
        }
        Some((highest, lowest.guid))
    }

    /// Why a snapshot is not whole, and the command that ends that; none: it is whole.
    pub fn half_merged(&self, guid: &Guid) -> Option<String> {
        let (highest, lowest) = self.unfinished_merge(guid)?;
        Some(format!(
            "snapshot {guid} is half merged: an interrupted merge of {highest} has changed its content; finish that: ploop \
             snapshot-merge -u {highest} -U {lowest} {}",
            self.dir.join(super::FILE_NAME).display()
        ))
    }

    /// Gives the image of a snapshot another file; returns the old one.
    pub fn set_file(&mut self, guid: &Guid, file: PathBuf) -> Result<PathBuf> {
        self.known(guid)?;
        self.check_new_file(&file)?;
        match self.images.iter_mut().find(|i| i.guid == *guid) {
            Some(image) => Ok(std::mem::replace(&mut image.file, file)),
            None => bail!(DiskDescr, "descriptor in {}: snapshot {guid} has no image", self.dir.display()),
        }
    }

    /// Another GUID for image, snapshot and its children.
    fn rename(&mut self, from: &Guid, to: Guid) {
        for image in self.images.iter_mut().filter(|i| i.guid == *from) {
            image.guid = to;
        }
        for snapshot in &mut self.snapshots {
            if snapshot.guid == *from {
                snapshot.guid = to;
            }
            if snapshot.parent == *from {
                snapshot.parent = to;
            }
        }
    }

    fn remove(&mut self, guid: &Guid) -> Option<PathBuf> {
        self.snapshots.retain(|s| s.guid != *guid);
        let at = self.images.iter().position(|i| i.guid == *guid)?;
        Some(self.images.remove(at).file)
    }

    fn push_top(&mut self, file: PathBuf, parent: Guid) {
        self.images.push(Image { guid: guid::TOP, file });
        self.snapshots.push(Snapshot {
            guid: guid::TOP,
            parent,
            temporary: false,
            spoiled: false,
            reverse_merge: None,
        });
        self.top = guid::TOP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ImageMode;
    use crate::units::ClusterSize;

    fn g(n: u32) -> Guid {
        Guid::parse(&format!("{{{n:08x}-2222-4333-8444-555555555555}}")).unwrap()
    }

    fn file(name: &str) -> PathBuf {
        Path::new("/d").join(name)
    }

    /// base 1 <- 2 <- top, all in files of their own.
    fn disk() -> Descriptor {
        let mut d = Descriptor::new_base(&file("b"), 1 << 20, ClusterSize::DEFAULT, ImageMode::Expanded).unwrap();
        d.add_snapshot(file("x"), g(1), false).unwrap();
        d.add_snapshot(file("y"), g(2), false).unwrap();
        d
    }

    fn chain(d: &Descriptor, of: &Guid) -> Vec<(Guid, PathBuf)> {
        d.check_tree().unwrap();
        d.chain(of).unwrap().iter().map(|i| (i.guid, i.file.clone())).collect()
    }

    #[test]
    fn snapshots_stack() {
        let d = disk();
        assert_eq!(chain(&d, &guid::TOP), [(g(1), file("b")), (g(2), file("x")), (guid::TOP, file("y"))]);
        assert_eq!(d.first_image().unwrap().guid, g(1));
    }

    #[test]
    fn bad_snapshots_change_nothing() {
        let d = disk();
        for (guid, name) in [(guid::NONE, "z"), (guid::TOP, "z"), (g(1), "z"), (g(3), "x")] {
            let mut changed = d.clone();
            assert_eq!(changed.add_snapshot(file(name), guid, false).unwrap_err().kind(), Kind::Param);
            assert_eq!(changed, d);
        }
        let mut deep = d;
        for n in 3..127 {
            deep.add_snapshot(file(&n.to_string()), g(n), false).unwrap();
        }
        assert_eq!(deep.images.len(), 127);
        assert_eq!(deep.add_snapshot(file("z"), g(500), false).unwrap_err().kind(), Kind::Param);
    }

    #[test]
    fn old_forms_are_refused() {
        let mut d = disk();
        d.rename(&guid::TOP, g(9));
        d.top = g(9);
        assert_eq!(d.add_snapshot(file("z"), g(3), false).unwrap_err().kind(), Kind::Param);
        assert_eq!(d.switch(&g(1), None, None).unwrap_err().kind(), Kind::Param);
        assert_eq!(d.delete_leaf(&g(9)).unwrap_err().kind(), Kind::Param);
    }

    #[test]
    fn switching() {
        let mut d = disk();
        assert_eq!(d.switch(&g(1), Some(file("z")), None).unwrap(), Some(file("y")));
        assert_eq!(chain(&d, &guid::TOP), [(g(1), file("b")), (guid::TOP, file("z"))]);
        assert_eq!(chain(&d, &g(2)), [(g(1), file("b")), (g(2), file("x"))]);
        // The old top stays as a branch.
        assert_eq!(d.switch(&g(2), Some(file("w")), Some(g(3))).unwrap(), None);
        assert_eq!(chain(&d, &g(3)), [(g(1), file("b")), (g(3), file("z"))]);
        assert_eq!(d.children(&g(1)).len(), 2);
        // Without a new top only a snapshot without children can become the top.
        assert_eq!(d.switch(&g(1), None, None).unwrap_err().kind(), Kind::Param);
        assert_eq!(d.switch(&g(2), None, None).unwrap(), Some(file("w")));
        assert_eq!(chain(&d, &guid::TOP), [(g(1), file("b")), (guid::TOP, file("x"))]);
        for bad in [guid::TOP, g(77), guid::NONE] {
            let kind = if bad == guid::TOP { Kind::Param } else { Kind::NoSnap };
            assert_eq!(d.switch(&bad, Some(file("q")), None).unwrap_err().kind(), kind);
        }
        d.mark_temporary(&[g(3)], true);
        assert_eq!(d.switch(&g(3), Some(file("q")), None).unwrap_err().kind(), Kind::Param);
    }

    #[test]
    fn leaves_are_deleted_and_parents_become_the_top() {
        let mut d = disk();
        assert_eq!(d.delete_leaf(&g(77)).unwrap_err().kind(), Kind::NoSnap);
        assert_eq!(d.delete_leaf(&g(1)).unwrap_err().kind(), Kind::Param);
        assert_eq!(d.delete_leaf(&guid::TOP).unwrap(), file("y"));
        assert_eq!(chain(&d, &guid::TOP), [(g(1), file("b")), (guid::TOP, file("x"))]);
        d.mark_temporary(&[g(1)], true);
        assert_eq!(d.delete_leaf(&guid::TOP).unwrap_err().kind(), Kind::Param);
        d.mark_temporary(&[g(1)], false);
        d.switch(&g(1), Some(file("z")), Some(g(5))).unwrap();
        // A top on a branch would leave a parent that cannot be written to.
        assert_eq!(d.delete_leaf(&guid::TOP).unwrap_err().kind(), Kind::Param);
        assert_eq!(d.delete_leaf(&g(5)).unwrap(), file("x"));
        d.delete_leaf(&guid::TOP).unwrap();
        assert_eq!(d.delete_leaf(&guid::TOP).unwrap_err().kind(), Kind::Param);
    }

    #[test]
    fn ranges_collapse_into_the_lowest_file() {
        let mut d = disk();
        d.add_snapshot(file("z"), g(3), false).unwrap();
        assert_eq!(d.removed_by_merge(&g(3), &g(1)).unwrap(), [g(1), g(2)]);
        assert_eq!(d.collapse(&g(3), &g(1), None).unwrap(), [file("x"), file("y")]);
        assert_eq!(chain(&d, &guid::TOP), [(g(3), file("b")), (guid::TOP, file("z"))]);
        assert_eq!(d.collapse(&guid::TOP, &g(3), Some(file("new"))).unwrap(), [file("z"), file("b")]);
        assert_eq!(chain(&d, &guid::TOP), [(guid::TOP, file("new"))]);
    }

    #[test]
    fn branches_are_not_merged() {
        let mut d = disk();
        d.switch(&g(1), Some(file("z")), None).unwrap();
        for (descendant, ancestor, kind) in [
            (guid::TOP, g(1), Kind::Param),
            (g(2), g(1), Kind::Param),
            (g(1), g(2), Kind::Param),
            (g(1), g(1), Kind::Param),
            (g(9), g(1), Kind::NoSnap),
            (g(2), g(9), Kind::NoSnap),
        ] {
            assert_eq!(d.removed_by_merge(&descendant, &ancestor).unwrap_err().kind(), kind);
        }
        // Several children of the descendant are no obstacle.
        let mut d = disk();
        d.switch(&g(2), Some(file("z")), Some(g(4))).unwrap();
        d.mark_temporary(&[g(2)], true);
        assert_eq!(d.collapse(&g(2), &g(1), None).unwrap(), [file("x")]);
        assert_eq!(chain(&d, &g(4)), [(g(2), file("b")), (g(4), file("y"))]);
        assert!(d.snapshot(&g(2)).unwrap().temporary);
    }
}
