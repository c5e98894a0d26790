//! Functions of the newer line of the library (Virtuozzo) that take no struct of which the classic has another form, for
//! programs that are written for both. Exported with the Cargo feature `vz` alone; compiled with the tests, too. Their header is
//! include/vz/libploop_vz.h.

#![allow(non_camel_case_types)]

use super::boundary;
use super::convert::{self, Long};
use super::devices::fs_answer;
use super::handle::{self, Disk};
use super::snapshots::{change, snapshot_params};
use super::types::{ploop_disk_images_data, ploop_info, ploop_snapshot_param};
use crate::bail;
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::fs::stat::FsInfo;
use crate::ops;
use crate::sys::folder::Folder;
use std::ffi::{c_char, c_int};
use std::path::Path;

/// Size and use of a disk's file system, and its nodes.
#[repr(C)]
pub struct ploop_fs_info {
    pub fs: ploop_info,
    /// Node of the disk; "": not attached.
    pub dev: [c_char; 64],
    /// Node of its file system.
    pub part: [c_char; 64],
}

/// Reads the descriptor of di again, without its lock. di is empty after an error, which is -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_read_dd(di: *mut ploop_disk_images_data) -> c_int {
    boundary::minus_one("ploop_read_dd", || {
        // SAFETY: the caller's object, used by this thread alone.
        unsafe { Disk::borrow(di) }?.read()
    })
}

/// Stores the node with the file system of device dev, its partition if it has one, in partname, a buffer of len bytes. di may
/// be NULL. Too short: SYSEXIT_PARAM; no such device: SYSEXIT_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_part(
    di: *mut ploop_disk_images_data,
    dev: *const c_char,
    partname: *mut c_char,
    len: c_int,
) -> c_int {
    let _ = di;
    boundary::call("ploop_get_part", || {
        convert::buffer(partname, len)?;
        // SAFETY: the caller's string, and its buffer of `len` bytes.
        unsafe { convert::copy_out(partname, len, device::mount_source(&named(dev)?)?.as_ref(), Long::Refuse) }
    })
}

/// Stores the node of device dev in devname, a buffer of dlen bytes, and that of ploop_get_part() in partname, one of plen.
/// di may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_devname(
    di: *mut ploop_disk_images_data,
    dev: *const c_char,
    devname: *mut c_char,
    dlen: c_int,
    partname: *mut c_char,
    plen: c_int,
) -> c_int {
    let _ = di;
    boundary::call("ploop_get_devname", || {
        convert::buffer(devname, dlen)?;
        convert::buffer(partname, plen)?;
        // SAFETY: the caller's string, and its buffers of `dlen` and `plen` bytes.
        unsafe {
            let device = named(dev)?;
            convert::copy_out(partname, plen, device::mount_source(&device)?.as_ref(), Long::Refuse)?;
            convert::copy_out(devname, dlen, device.node().as_ref(), Long::Refuse)
        }
    })
}

/// Stores size and use of the file system of the disk with descriptor descr, and its nodes, in the first size bytes of *info;
/// what is not known is 0. Attached and not mounted: SYSEXIT_FSTAT, with the nodes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_fs_info(descr: *const c_char, info: *mut ploop_fs_info, size: c_int) -> c_int {
    boundary::call("ploop_get_fs_info", || {
        let room = usize::try_from(size).unwrap_or(0).min(size_of::<ploop_fs_info>());
        if info.is_null() || room == 0 {
            bail!(
                Param,
                "ploop_get_fs_info: place of {size} bytes for the result; sizeof(struct ploop_fs_info) is wanted"
            );
        }
        // SAFETY: the caller's string.
        let descriptor = unsafe { convert::path(descr, "descriptor") }?;
        let (answer, result) = fs_info(&descriptor)?;
        // SAFETY: the caller's place has `room` bytes, and the answer at least as many.
        unsafe { std::ptr::copy_nonoverlapping((&raw const answer).cast::<u8>(), info.cast::<u8>(), room) };
        result
    })
}

/// Stores the paths of the image files of device devname, base first, in *names: an array that ends in NULL, for
/// ploop_free_array(). No such device: SYSEXIT_DEVICE, and *names is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_names(devname: *const c_char, names: *mut *mut *mut c_char) -> c_int {
    boundary::call("ploop_get_names", || {
        if names.is_null() {
            bail!(Param, "ploop_get_names: place for the result is NULL");
        }
        // SAFETY: not NULL, and the caller's place for a pointer; its string.
        let device = unsafe {
            *names = std::ptr::null_mut();
            named(devname)?
        };
        let paths: Vec<&Path> = device.images.iter().map(|image| image.path.as_path()).collect();
        // SAFETY: as above.
        unsafe { *names = handle::string_array(&paths)? };
        Ok(())
    })
}

/// Remembers size and use of the file system that is mounted at mnt beside image, for ploop_get_info_by_descr(). Returns 0
/// or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_store_statfs_info(mnt: *const c_char, image: *mut c_char) -> c_int {
    boundary::minus_one("ploop_store_statfs_info", || {
        // SAFETY: the caller's strings.
        let (mnt, image) = unsafe { (convert::path(mnt, "mount point")?, convert::path(image, "image")?) };
        let folder = image.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = Folder::resolve(folder).ctx(Kind::Open, || format!("cannot open folder {}", folder.display()))?;
        FsInfo::of(&mnt)?.store(&folder).ctx(Kind::Write, || format!("{} cannot be stored", folder.display()))
    })
}

/// ploop_create_snapshot() of a disk that is not attached. Attached: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_create_snapshot_offline(
    di: *mut ploop_disk_images_data,
    param: *mut ploop_snapshot_param,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone, and its struct, NULL or valid, unchanged during the call.
    unsafe {
        change("ploop_create_snapshot_offline", di, |descriptor, component| {
            let params = snapshot_params(param)?;
            if let Some(device) = ops::find::devices(descriptor, None)?.iter().find(|d| !d.read_only) {
                bail!(Param, "{} is attached as {}", descriptor.display(), device.node().display());
            }
            ops::snapshot::create(descriptor, component, &params)
        })
    }
}

/// # Safety
/// `dev` is NULL or a C string.
unsafe fn named(dev: *const c_char) -> Result<Device> {
    // SAFETY: this function's contract.
    let Some(dev) = unsafe { convert::optional_string(dev, "device") }? else {
        bail!(Param, "device is NULL or empty; give its path, /dev/ploopN");
    };
    match device::by_node(&dev)? {
        Some(device) => Ok(device),
        None => bail!(Device, "{dev} is no ploop device; see ploop list"),
    }
}

fn fs_info(descriptor: &Path) -> Result<(ploop_fs_info, Result<()>)> {
    let mut answer = ploop_fs_info { fs: ploop_info::default(), dev: [0; 64], part: [0; 64] };
    let attached = ops::find::devices(descriptor, Some(""))?.into_iter().find(|d| d.state.runs());
    if let Some(device) = &attached {
        convert::store_fixed(&mut answer.dev, &device.node().to_string_lossy(), "device")?;
        convert::store_fixed(&mut answer.part, &device::mount_source(device)?.to_string_lossy(), "partition")?;
    }
    match ops::info::fs_info(descriptor) {
        Ok(fs) => {
            answer.fs = fs_answer(fs);
            Ok((answer, Ok(())))
        }
        Err(e) if attached.is_some() && e.kind() == Kind::DevNotMounted => Ok((answer, Err(e.as_kind(Kind::Fstat)))),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ImageMode;
    use crate::format::header::Version;
    use crate::ops::testkit::{make_disk, small};
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    fn c(path: &Path) -> CString {
        CString::new(path.as_os_str().as_bytes()).expect("no NUL")
    }

    #[test]
    fn the_symbol_list_is_that_of_the_sources() {
        let classic = include_str!("../../tests/abi/libploop.so.1.symbols");
        let with_vz = include_str!("../../tests/abi/libploop.so.1.vz.symbols");
        let added: Vec<&str> = with_vz.lines().filter(|name| classic.lines().all(|c| c != *name)).collect();
        assert_eq!(
            classic.lines().filter(|name| with_vz.lines().all(|v| v != *name)).count(),
            0,
            "all of the classic's"
        );
        let mut ours: Vec<&str> = include_str!("vz.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("pub unsafe extern \"C\" fn "))
            .filter_map(|l| l.split('(').next())
            .collect();
        ours.sort_unstable();
        assert_eq!(ours, added);
    }

    #[test]
    fn the_struct_has_the_newer_lines_layout() {
        use std::mem::offset_of;
        assert_eq!(
            (size_of::<ploop_fs_info>(), offset_of!(ploop_fs_info, dev), offset_of!(ploop_fs_info, part)),
            (168, 40, 104)
        );
    }

    #[test]
    fn a_disk_that_does_not_run() {
        let dir = tempfile::tempdir().expect("folder");
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 32);
        let di = Disk::create(dd.clone()).expect("object");
        let mut names = std::ptr::dangling_mut();
        let mut buf = [0; 64];
        let (room, device) = (buf.len() as c_int, c"/dev/null".as_ptr());
        let mut param =
            ploop_snapshot_param { guid: std::ptr::null_mut(), snap_dir: std::ptr::null_mut(), dummy: [0; 32] };
        let mut info = ploop_fs_info { fs: ploop_info::default(), dev: [1; 64], part: [1; 64] };
        // SAFETY: an open object, strings, and buffers of the sizes given.
        unsafe {
            assert_eq!(((*di).nimages, ploop_read_dd(di), (*di).nimages), (0, 0, 1));
            assert_eq!(ploop_read_dd(std::ptr::null_mut()), -1);
            assert_eq!((ploop_create_snapshot_offline(di, &mut param), (*di).nimages), (0, 2));
            assert_eq!(ploop_create_snapshot_offline(di, std::ptr::null_mut()), 38);
            assert_eq!(ploop_get_part(di, device, buf.as_mut_ptr(), room), 2);
            assert_eq!(ploop_get_part(di, std::ptr::null(), buf.as_mut_ptr(), room), 38);
            assert_eq!(ploop_get_devname(di, device, buf.as_mut_ptr(), 0, buf.as_mut_ptr(), room), 38);
            assert_eq!(ploop_get_names(device, &mut names), 2);
            assert!(names.is_null());
            assert_eq!(ploop_store_statfs_info(c"/".as_ptr(), c(&dir.path().join("root.hdd")).as_ptr().cast_mut()), 0);
            assert_eq!(ploop_get_fs_info(c(&dd).as_ptr(), &mut info, 168), 0);
            assert!(info.fs.fs_bsize > 0 && info.dev == [0; 64]);
            assert_eq!(ploop_get_fs_info(c(&dd).as_ptr(), &mut info, 0), 38);
            handle::close(di).expect("close");
        }
        assert!(FsInfo::cached(dir.path()).is_some());
    }
}
