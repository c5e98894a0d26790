//! The disk object of C callers: a malloc'ed mirror with the classic's visible fields. Its `runtime` points to the
//! library's own state: the path of the descriptor and the component's name.

use super::state::State;
use super::types::{ploop_disk_images_data, ploop_disk_images_runtime_data, ploop_image_data, ploop_snapshot_data};
use crate::bail;
use crate::descriptor::{Descriptor, ImageMode};
use crate::error::{Error, Kind, Result};
use crate::format::guid;
use crate::sys::folder::Folder;
use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::{PoisonError, RwLock};
use std::thread;

/// Addresses of the objects that are open: others that a caller passes are not looked at.
static OPEN: RwLock<BTreeSet<usize>> = RwLock::new(BTreeSet::new());

fn is_open(di: *const ploop_disk_images_data) -> bool {
    OPEN.read().unwrap_or_else(PoisonError::into_inner).contains(&(di as usize))
}

/// The caller's object during one call.
pub struct Disk {
    di: NonNull<ploop_disk_images_data>,
    /// The thread was unwinding already when the call began.
    unwinding: bool,
}

impl Disk {
    /// A new, empty object of the descriptor at the absolute path `descriptor`, to be freed by [`close`].
    pub fn create(descriptor: PathBuf) -> Result<*mut ploop_disk_images_data> {
        let di: *mut ploop_disk_images_data = allocate(1)?;
        let state = State { descriptor, component: None, read: None, broken: false };
        let runtime = Box::into_raw(Box::new(ploop_disk_images_runtime_data { state }));
        // SAFETY: `allocate` returned zeroed memory for one object, which is a valid (empty) value of it.
        unsafe { (*di).runtime = runtime };
        OPEN.write().unwrap_or_else(PoisonError::into_inner).insert(di as usize);
        Ok(di)
    }

    /// The object that C calls `di`. NULL is what the classic reports as a descriptor that could not be locked.
    ///
    /// # Safety
    /// No other thread uses `di` until the result is dropped. NULL, and what did not come from [`create`](Self::create) or was
    /// closed, is refused without a look at it.
    pub unsafe fn borrow(di: *mut ploop_disk_images_data) -> Result<Disk> {
        let Some(di) = NonNull::new(di) else { bail!(Lock, "disk object is NULL; get one from ploop_open_dd()") };
        if !is_open(di.as_ptr()) {
            bail!(Lock, "disk object {di:p} was not made by ploop_open_dd(), or was closed");
        }
        let disk = Disk { di, unwinding: thread::panicking() };
        if disk.state().broken {
            bail!(
                Abort,
                "disk object of {} is unusable since an internal error; close it and open it again",
                disk.descriptor().display()
            );
        }
        Ok(disk)
    }

    /// Path of the descriptor.
    pub fn descriptor(&self) -> &Path {
        &self.state().descriptor
    }

    /// Component of the devices that this object looks for.
    pub fn component(&self) -> Option<&str> {
        self.state().component.as_deref()
    }

    pub fn set_component(&mut self, component: Option<String>) {
        self.state_mut().component = component;
    }

    /// Cluster size in sectors as last read, 0 before.
    pub fn blocksize(&self) -> u32 {
        self.mirror().blocksize
    }

    /// Has a descriptor been read into the visible fields?
    pub fn is_empty(&self) -> bool {
        self.mirror().nimages == 0
    }

    /// File of the first image as last read: what devices of this disk are looked up by.
    pub fn base(&self) -> Option<PathBuf> {
        if self.is_empty() {
            return None;
        }
        // SAFETY: `nimages` is positive, so `images` has a first element, and it was filled by `fill`.
        let file = unsafe { CStr::from_ptr((*(*self.mirror().images)).file) };
        Some(PathBuf::from(OsStr::from_bytes(file.to_bytes())))
    }

    /// The snapshot with this GUID (either case) in the visible fields: its index in `snapshots`, its parent, its
    /// image. The strings belong to the object and are valid until it is read again.
    pub fn shown(&self, guid: &CStr) -> Option<Shown> {
        let m = self.mirror();
        let is = |text: *const c_char| {
            // SAFETY: GUIDs of a filled mirror are NUL-terminated strings.
            unsafe { CStr::from_ptr(text) }.to_bytes().eq_ignore_ascii_case(guid.to_bytes())
        };
        // SAFETY: `fill_mirror` filled both arrays up to their numbers with pointers to live structs.
        unsafe {
            let index = (0..m.nsnapshots as usize).find(|i| is((**m.snapshots.add(*i)).guid))?;
            let image = (0..m.nimages as usize).find(|i| is((**m.images.add(*i)).guid));
            Some(Shown {
                index,
                parent: (**m.snapshots.add(index)).parent_guid,
                file: image.map_or(ptr::null_mut(), |i| (**m.images.add(i)).file),
            })
        }
    }

    /// Files of the chain that ends with this snapshot, base first, as they are shown. `NoSnap`, `DiskDescr`.
    pub fn shown_chain(&self, guid: &CStr) -> Result<Vec<PathBuf>> {
        let mut chain = Vec::new();
        let mut at = guid.to_owned();
        while !at.to_bytes().eq_ignore_ascii_case(guid::NONE.as_str().as_bytes()) {
            let Some(shown) = self.shown(&at) else {
                bail!(NoSnap, "{} has no snapshot {}", self.descriptor().display(), at.to_string_lossy());
            };
            if shown.file.is_null() || chain.len() >= self.mirror().nsnapshots as usize {
                bail!(
                    DiskDescr,
                    "{}: the chain of {} has no image or runs in a circle at {}",
                    self.descriptor().display(),
                    guid.to_string_lossy(),
                    at.to_string_lossy()
                );
            }
            // SAFETY: strings of a filled mirror, alive while `self` is.
            unsafe {
                chain.push(PathBuf::from(OsStr::from_bytes(CStr::from_ptr(shown.file).to_bytes())));
                at = CStr::from_ptr(shown.parent).to_owned();
            }
        }
        chain.reverse();
        Ok(chain)
    }

    /// Reads the descriptor again, without its lock, into the visible fields; they are empty when that fails.
    pub fn read(&mut self) -> Result<()> {
        match Descriptor::read(self.descriptor()) {
            Ok(descriptor) => self.fill(&descriptor),
            Err(error) => {
                self.clear();
                Err(error)
            }
        }
    }

    /// Shows `descriptor` in the visible fields. Pointers that callers got from them before are invalid afterwards.
    pub fn fill(&mut self, descriptor: &Descriptor) -> Result<()> {
        let mut fresh = empty_mirror();
        let filled = fill_mirror(&mut fresh, descriptor);
        self.clear();
        if let Err(error) = filled {
            free_contents(&mut fresh);
            return Err(error);
        }
        fresh.runtime = self.mirror().runtime;
        *self.mirror_mut() = fresh;
        // An object that is open keeps no file open.
        let dir = Folder::new(descriptor.dir.path());
        self.state_mut().read = Some(Descriptor { dir, ..descriptor.clone() });
        Ok(())
    }

    /// Empties the visible fields.
    pub fn clear(&mut self) {
        free_contents(self.mirror_mut());
        self.state_mut().read = None;
    }

    /// What was read last, with what the visible fields do not show.
    pub fn last_read(&self) -> Option<&Descriptor> {
        self.state().read.as_ref()
    }

    /// The visible fields.
    pub fn mirror(&self) -> &ploop_disk_images_data {
        // SAFETY: `borrow`'s contract: open, and used by this thread alone until `self` is dropped.
        unsafe { self.di.as_ref() }
    }

    fn mirror_mut(&mut self) -> &mut ploop_disk_images_data {
        // SAFETY: as in `mirror`; `self` is borrowed mutably.
        unsafe { self.di.as_mut() }
    }

    fn state(&self) -> &State {
        // SAFETY: `borrow` checked that the object is open; `runtime` comes from `create` and lives as long as the object.
        unsafe { &(*self.mirror().runtime).state }
    }

    fn state_mut(&mut self) -> &mut State {
        // SAFETY: as in `state`; `self` is borrowed mutably.
        unsafe { &mut (*self.mirror_mut().runtime).state }
    }
}

/// A snapshot in the visible fields.
pub struct Shown {
    pub index: usize,
    /// The null GUID for the base.
    pub parent: *mut c_char,
    /// NULL if it has no image.
    pub file: *mut c_char,
}

impl Drop for Disk {
    fn drop(&mut self) {
        if thread::panicking() && !self.unwinding {
            self.state_mut().broken = true;
        }
    }
}

/// Frees an object and all that is visible in it. NULL is allowed; what is no open object is left alone.
///
/// # Safety
/// No other thread uses `di` any more.
pub unsafe fn close(di: *mut ploop_disk_images_data) -> Result<()> {
    let Some(mut object) = NonNull::new(di) else { return Ok(()) };
    if !OPEN.write().unwrap_or_else(PoisonError::into_inner).remove(&(di as usize)) {
        bail!(Param, "disk object {di:p} was not made by ploop_open_dd(), or was closed: it is left alone");
    }
    // SAFETY: it was open until now, and no other thread uses it, by this function's contract.
    let mirror = unsafe { object.as_mut() };
    free_contents(mirror);
    if !mirror.runtime.is_null() {
        // SAFETY: made by Box::into_raw in `create` and freed only here.
        drop(unsafe { Box::from_raw(mirror.runtime) });
    }
    // SAFETY: malloc'ed by `create`.
    unsafe { libc::free(di.cast()) };
    Ok(())
}

/// A NULL-terminated, malloc'ed array of malloc'ed strings, for ploop_free_array().
pub fn string_array<S: AsRef<OsStr>>(strings: &[S]) -> Result<*mut *mut c_char> {
    let array: *mut *mut c_char = allocate(strings.len() + 1)?;
    for (i, string) in strings.iter().enumerate() {
        match duplicate(string.as_ref()) {
            // SAFETY: `i` is below the number of elements allocated.
            Ok(copy) => unsafe { *array.add(i) = copy },
            Err(error) => {
                // SAFETY: made here, zeroed, and so NULL-terminated wherever the filling stopped.
                unsafe { free_string_array(array) };
                return Err(error);
            }
        }
    }
    Ok(array)
}

/// Frees what [`string_array`] made. NULL is allowed.
///
/// # Safety
/// `array` is NULL or a NULL-terminated malloc'ed array of malloc'ed strings that no thread uses any more.
pub unsafe fn free_string_array(array: *mut *mut c_char) {
    if array.is_null() {
        return;
    }
    // SAFETY: every element up to the NULL is readable and malloc'ed, by this function's contract.
    unsafe {
        let mut element = array;
        while !(*element).is_null() {
            libc::free((*element).cast());
            element = element.add(1);
        }
        libc::free(array.cast());
    }
}

fn empty_mirror() -> ploop_disk_images_data {
    ploop_disk_images_data {
        size: 0,
        heads: 0,
        cylinders: 0,
        sectors: 0,
        mode: 0,
        nimages: 0,
        images: ptr::null_mut(),
        top_guid: ptr::null_mut(),
        nsnapshots: 0,
        snapshots: ptr::null_mut(),
        runtime: ptr::null_mut(),
        blocksize: 0,
        max_delta_size: 0,
        dummy: [0; 32],
    }
}

/// Frees all that the visible fields own and empties them; `runtime` stays.
fn free_contents(mirror: &mut ploop_disk_images_data) {
    let old = std::mem::replace(mirror, empty_mirror());
    mirror.runtime = old.runtime;
    // SAFETY: the fields were filled by `fill_mirror` alone (callers only read them): arrays of `nimages` and `nsnapshots`
    // pointers to malloc'ed structs with malloc'ed strings, NULL where the filling stopped.
    unsafe {
        for i in 0..old.nimages as usize {
            let image = *old.images.add(i);
            if !image.is_null() {
                libc::free((*image).guid.cast());
                libc::free((*image).file.cast());
                libc::free(image.cast());
            }
        }
        for i in 0..old.nsnapshots as usize {
            let snapshot = *old.snapshots.add(i);
            if !snapshot.is_null() {
                libc::free((*snapshot).guid.cast());
                libc::free((*snapshot).parent_guid.cast());
                libc::free(snapshot.cast());
            }
        }
        libc::free(old.images.cast());
        libc::free(old.snapshots.cast());
        libc::free(old.top_guid.cast());
    }
}

/// Fills an empty mirror. After an error the caller frees the part that was filled with `free_contents`.
fn fill_mirror(mirror: &mut ploop_disk_images_data, descriptor: &Descriptor) -> Result<()> {
    mirror.size = descriptor.size_sectors;
    mirror.heads = descriptor.heads;
    mirror.cylinders = descriptor.cylinders;
    // Per track, as descriptors state it; the model leaves it out because it follows.
    let tracks = u64::from(descriptor.heads) * u64::from(descriptor.cylinders);
    mirror.sectors = descriptor.size_sectors.checked_div(tracks).unwrap_or(0) as u32;
    mirror.mode = match descriptor.mode {
        ImageMode::Expanded => 0,
        ImageMode::Preallocated => 1,
        ImageMode::Raw => 2,
    };
    mirror.blocksize = descriptor.blocksize.sectors();
    mirror.max_delta_size = descriptor.max_delta_size;
    mirror.top_guid = duplicate(OsStr::new(descriptor.top.as_str()))?;

    mirror.images = allocate(descriptor.images.len())?;
    mirror.nimages = descriptor.images.len() as c_int;
    for (i, from) in descriptor.images.iter().enumerate() {
        let to: *mut ploop_image_data = allocate(1)?;
        // SAFETY: `i` is below the number of pointers allocated; `to` is a live zeroed struct.
        unsafe {
            *mirror.images.add(i) = to;
            (*to).guid = duplicate(OsStr::new(from.guid.as_str()))?;
            (*to).file = duplicate(from.file.as_os_str())?;
        }
    }

    mirror.snapshots = allocate(descriptor.snapshots.len())?;
    mirror.nsnapshots = descriptor.snapshots.len() as c_int;
    for (i, from) in descriptor.snapshots.iter().enumerate() {
        let to: *mut ploop_snapshot_data = allocate(1)?;
        // SAFETY: as above.
        unsafe {
            *mirror.snapshots.add(i) = to;
            (*to).guid = duplicate(OsStr::new(from.guid.as_str()))?;
            (*to).parent_guid = duplicate(OsStr::new(from.parent.as_str()))?;
            (*to).temporary = from.temporary.into();
        }
    }
    Ok(())
}

/// Zeroed memory from malloc for `count` values (at least one), all of whose types here are valid when zero.
fn allocate<T>(count: usize) -> Result<*mut T> {
    // SAFETY: calloc() checks the product itself and returns NULL or zeroed memory aligned for any of these types.
    let memory = unsafe { libc::calloc(count.max(1), size_of::<T>()) };
    if memory.is_null() {
        return Err(Error::new(Kind::Malloc, format!("out of memory: {count} times {} bytes", size_of::<T>())));
    }
    Ok(memory.cast())
}

/// A malloc'ed copy with a NUL.
fn duplicate(text: &OsStr) -> Result<*mut c_char> {
    let bytes = text.as_bytes();
    let copy: *mut c_char = allocate(bytes.len() + 1)?;
    // SAFETY: `copy` has room for the text and, being zeroed, ends in a NUL.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr().cast(), copy, bytes.len()) };
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{Image, Snapshot};
    use crate::format::guid::{self, Guid};
    use crate::units::ClusterSize;
    use std::ffi::CStr;

    fn two_levels(dir: &Path) -> Descriptor {
        let base = dir.join("root.hds");
        let mut d = Descriptor::new_base(&base, 1 << 21, ClusterSize::DEFAULT, ImageMode::Preallocated).expect("base");
        let snapshot = Guid::parse("{11111111-2222-3333-4444-555555555555}").expect("GUID");
        d.images[0].guid = snapshot;
        d.snapshots[0].guid = snapshot;
        d.snapshots[0].temporary = true;
        d.images.push(Image { guid: guid::TOP, file: dir.join("delta") });
        d.snapshots.push(Snapshot {
            guid: guid::TOP,
            parent: snapshot,
            temporary: false,
            spoiled: false,
            reverse_merge: None,
        });
        d.max_delta_size = 77;
        d
    }

    unsafe fn string(text: *const c_char) -> String {
        // SAFETY: the callers below pass strings of a filled mirror.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    #[test]
    fn the_visible_fields_show_the_descriptor_and_are_freed() {
        let descriptor = two_levels(Path::new("/disk"));
        let di = Disk::create(PathBuf::from("/disk/DiskDescriptor.xml")).expect("object");
        // SAFETY: `di` was just made and is used by this thread alone; arrays and strings are read only while they live.
        unsafe {
            {
                let mut disk = Disk::borrow(di).expect("borrow");
                assert!(disk.is_empty() && disk.base().is_none());
                disk.set_component(Some("c".into()));
                disk.fill(&descriptor).expect("fill");
                disk.fill(&descriptor).expect("fill again");
                assert_eq!(disk.base(), Some(PathBuf::from("/disk/root.hds")));
                assert_eq!((disk.component(), disk.blocksize()), (Some("c"), 2048));
            }
            let m = &*di;
            assert_eq!((m.size, m.mode, m.nimages, m.nsnapshots, m.max_delta_size), (1 << 21, 1, 2, 2, 77));
            assert_eq!(u64::from(m.heads) * u64::from(m.cylinders) * u64::from(m.sectors), m.size - m.size % 1008);
            assert_eq!(string(m.top_guid), guid::TOP.as_str());
            assert_eq!(string((**m.images.add(1)).file), "/disk/delta");
            assert_eq!(string((**m.images.add(0)).guid), string((**m.snapshots.add(1)).parent_guid));
            assert_eq!(string((**m.snapshots.add(0)).parent_guid), guid::NONE.as_str());
            assert_eq!(((**m.snapshots.add(0)).temporary, (**m.snapshots.add(1)).temporary), (1, 0));
            Disk::borrow(di).expect("borrow").clear();
            assert_eq!(((*di).nimages, (*di).images.is_null(), (*di).runtime.is_null()), (0, true, false));
            close(di).expect("close");
            close(ptr::null_mut()).expect("NULL");
        }
    }

    #[test]
    fn bad_objects_are_refused() {
        // SAFETY: NULL, a zeroed object, and an object of this library.
        unsafe {
            assert_eq!(Disk::borrow(ptr::null_mut()).err().map(|e| e.kind()), Some(Kind::Lock));
            let mut zeroed = empty_mirror();
            assert_eq!(Disk::borrow(&mut zeroed).err().map(|e| e.kind()), Some(Kind::Lock));

            let di = Disk::create(PathBuf::from("/nowhere/DiskDescriptor.xml")).expect("object");
            assert!(Disk::borrow(di).expect("borrow").read().is_err());
            let panicked = std::panic::catch_unwind(|| {
                let _disk = Disk::borrow(di).expect("borrow");
                panic!("in a call");
            });
            assert!(panicked.is_err());
            assert_eq!(Disk::borrow(di).err().map(|e| e.kind()), Some(Kind::Abort), "unusable after a panic");
            close(di).expect("close");
            assert_eq!(Disk::borrow(di).err().map(|e| e.kind()), Some(Kind::Lock), "closed");
            assert_eq!(close(di).err().map(|e| e.kind()), Some(Kind::Param), "closed twice");
        }
    }

    #[test]
    fn arrays_end_in_null() {
        let array = string_array(&["/dev/ploop0", "/dev/ploop1"]).expect("array");
        // SAFETY: made above.
        unsafe {
            assert_eq!(string(*array.add(1)), "/dev/ploop1");
            assert!((*array.add(2)).is_null());
            free_string_array(array);
            free_string_array(ptr::null_mut());
        }
    }
}
