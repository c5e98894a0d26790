//! Functions that the classic exports for its own programs without declaring them; other programs use them all the same.
//! They are not in the header.

#![allow(non_camel_case_types)]

use super::boundary;
use super::convert::{self, Long};
use super::handle::{self, Disk};
use super::kernel_consts::{
    CHECK_DETAILED, CHECK_DROPINUSE, CHECK_FORCE, CHECK_HARDFORCE, CHECK_RAW, CHECK_READONLY, CHECK_REPAIR_SPARSE,
    CHECK_TALKATIVE,
};
use super::types::ploop_disk_images_data;
use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::image::same::same_shape;
use crate::ops;
use crate::ops::check::CheckOptions;
use crate::report;
use std::cmp::Ordering;
use std::ffi::{CStr, OsString, c_char, c_int};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::ptr;

/// Longest first line that [`read_line`] looks at.
const LINE_MAX: u64 = 1 << 20;

/// A merge on a device, for [`get_delta_info`].
#[repr(C)]
pub struct merge_info {
    /// In and out: the level that is merged into.
    pub start_level: c_int,
    /// In and out: the highest level of the range; in: 0 means the top.
    pub end_level: c_int,
    /// Out: the lowest level is raw.
    pub raw: c_int,
    /// Out: the device's highest level.
    pub top_level: c_int,
    /// Out: the range ends with the top, and the device writes to it.
    pub merge_top: c_int,
    /// Out: files, the upper first, then NULL; for ploop_free_array().
    pub names: *mut *mut c_char,
}

/// Compares two GUIDs as strcasecmp() does. NULL is less than any text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guidcmp(p1: *const c_char, p2: *const c_char) -> c_int {
    // SAFETY: the caller's strings, NULL or NUL-terminated.
    let (a, b) = unsafe { (convert::text(p1), convert::text(p2)) };
    let lower = |t: Option<&CStr>| t.map(|t| t.to_bytes().to_ascii_lowercase());
    match lower(a).cmp(&lower(b)) {
        Ordering::Less => -1,
        Ordering::Equal => 0,
        Ordering::Greater => 1,
    }
}

/// 1: a GUID in braces; 0: anything else, NULL included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn is_valid_guid(guid: *const c_char) -> c_int {
    // SAFETY: the caller's string, NULL or NUL-terminated.
    let text = unsafe { convert::text(guid) }.and_then(|t| t.to_str().ok());
    text.is_some_and(|t| t.starts_with('{') && Guid::parse(t).is_ok()).into()
}

/// File of the image with this GUID inside di; NULL if it is unknown.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn find_image_by_guid(di: *mut ploop_disk_images_data, guid: *const c_char) -> *mut c_char {
    boundary::or("find_image_by_guid", ptr::null_mut(), || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, guid) = unsafe { (Disk::borrow(di)?, convert::text(guid)) };
        Ok(guid.and_then(|g| disk.shown(g)).map_or(ptr::null_mut(), |s| s.file))
    })
}

/// Index of the snapshot with this GUID in di->snapshots; -1 if it is unknown.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn find_snapshot_by_guid(di: *mut ploop_disk_images_data, guid: *const c_char) -> c_int {
    boundary::or("find_snapshot_by_guid", -1, || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, guid) = unsafe { (Disk::borrow(di)?, convert::text(guid)) };
        Ok(guid.and_then(|g| disk.shown(g)).map_or(-1, |s| s.index as c_int))
    })
}

/// Files of the chain that ends with guid, as di shows it: base first, or top first if reverse is not 0. An array that
/// ends in NULL, for ploop_free_array(); NULL on error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn make_images_list(
    di: *mut ploop_disk_images_data,
    guid: *const c_char,
    reverse: c_int,
) -> *mut *mut c_char {
    boundary::or("make_images_list", ptr::null_mut(), || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, guid) = unsafe { (Disk::borrow(di)?, convert::text(guid)) };
        let Some(guid) = guid else { bail!(Param, "make_images_list: GUID is NULL") };
        let mut files = disk.shown_chain(guid)?;
        if reverse != 0 {
            files.reverse();
        }
        handle::string_array(&files)
    })
}

/// Stores the first line of a file, without its newline and cut to len - 1 bytes, in nbuf. 0, or -1 on error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read_line(path: *const c_char, nbuf: *mut c_char, len: c_int) -> c_int {
    boundary::minus_one("read_line", || {
        convert::buffer(nbuf, len)?;
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let path = unsafe { convert::path(path, "path") }?;
        let mut line = Vec::new();
        File::open(&path)
            .and_then(|f| BufReader::new(f.take(LINE_MAX)).read_until(b'\n', &mut line))
            .ctx(Kind::Read, || format!("cannot read {}", path.display()))?;
        let text: Vec<u8> = line.into_iter().take_while(|b| !matches!(b, b'\n' | 0)).collect();
        // SAFETY: the caller's buffer of `len` bytes.
        unsafe { convert::copy_out(nbuf, len, &OsString::from_vec(text), Long::Cut) }
    })
}

/// 0 if sizes and headers of two images are the same but for the in-use mark, else SYSEXIT_PLOOPFMT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn check_deltas_same(img1: *const c_char, img2: *const c_char) -> c_int {
    boundary::call("check_deltas_same", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (a, b) = unsafe { (convert::path(img1, "image")?, convert::path(img2, "image")?) };
        same_shape(&a, &b)
    })
}

/// Stores the level of a device whose image is the file delta in *level.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn find_level_by_delta(device: *const c_char, delta: *const c_char, level: *mut c_int) -> c_int {
    boundary::call("find_level_by_delta", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, delta) = unsafe { (device_name(device)?, convert::path(delta, "delta")?) };
        if level.is_null() {
            bail!(Param, "find_level_by_delta: place for the level is NULL");
        }
        let found = ops::device_chain::level_of(&device, &delta)?;
        // SAFETY: not NULL, and the caller's place for the number.
        unsafe { *level = found as c_int };
        Ok(())
    })
}

/// Fills info for the levels info->start_level to info->end_level (0: the top) of a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_delta_info(device: *const c_char, info: *mut merge_info) -> c_int {
    boundary::call("get_delta_info", || {
        // SAFETY: the caller's struct, NULL or valid and used by this thread alone.
        let Some(info) = (unsafe { info.as_mut() }) else { bail!(Param, "get_delta_info: info is NULL") };
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let device = unsafe { device_name(device) }?;
        let Ok(low) = usize::try_from(info.start_level) else {
            bail!(Sysfs, "level {}: levels start with 0", info.start_level);
        };
        // A negative number is no level either.
        let high = match info.end_level {
            0 => None,
            n => Some(usize::try_from(n).unwrap_or_default()),
        };
        let range = ops::device_chain::merge_range(&device, low, high)?;
        info.names = handle::string_array(&range.files)?;
        info.end_level = range.high as c_int;
        info.top_level = range.top as c_int;
        info.raw = range.raw.into();
        info.merge_top = range.writable_top.into();
        Ok(())
    })
}

/// Puts a new empty delta, the file delta, on top of a running device; syncfs: its file systems are brought to rest first.
/// No descriptor is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn create_snapshot(device: *const c_char, delta: *const c_char, syncfs: c_int) -> c_int {
    boundary::call("create_snapshot", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, delta) = unsafe { (device_name(device)?, convert::path(delta, "delta")?) };
        ops::device_chain::put_on_top(&device, &delta, syncfs != 0)
    })
}

/// Replaces the image of a level below the top of a running device by its copy image. No descriptor is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn replace_delta(device: *const c_char, level: c_int, image: *const c_char) -> c_int {
    boundary::call("replace_delta", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, image) = unsafe { (device_name(device)?, convert::path(image, "image")?) };
        let Ok(level) = usize::try_from(level) else {
            bail!(Param, "level {level}: levels start with 0");
        };
        ops::device_chain::replace(&device, level, &image)
    })
}

/// Merges images, the upper first, in an array that ends in NULL, into the last one (raw: it is a raw image) or into the
/// new file new_delta. device NULL: files that no process uses. Else levels start_level to end_level of a running
/// device. The files merged stay, no descriptor is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn merge_image(
    device: *const c_char,
    start_level: c_int,
    end_level: c_int,
    raw: c_int,
    merge_top: c_int,
    images: *mut *mut c_char,
    new_delta: *const c_char,
) -> c_int {
    // The device says whether its top is merged.
    let _ = merge_top;
    boundary::call("merge_image", || {
        // SAFETY: the caller's strings and array of strings, NULL or terminated.
        let (device, new_delta) =
            unsafe { (convert::optional_string(device, "device")?, convert::optional_path(new_delta)) };
        match device {
            None => {
                // SAFETY: as above.
                let files = unsafe { convert::paths(images, "list of images") }?;
                ops::merge::merge_files(&files, raw != 0, new_delta.as_deref())
            }
            Some(device) => {
                let (Ok(low), Ok(high)) = (usize::try_from(start_level), usize::try_from(end_level)) else {
                    bail!(Param, "levels {start_level}..{end_level}: levels start with 0");
                };
                if low >= high {
                    bail!(Param, "levels {low}..{high}: the lower one comes first");
                }
                ops::device_chain::merge(&device, low, Some(high), new_delta.as_deref())
            }
        }
    })
}

/// Checks an image and repairs what the CHECK flags say. blocksize_p: cluster size in sectors; read for raw images, else
/// stored there if it is not NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_check(img: *mut c_char, flags: c_int, blocksize_p: *mut u32) -> c_int {
    boundary::call("ploop_check", || {
        // SAFETY: the caller's string, and NULL or its place for the number.
        let (path, blocksize) = unsafe { (convert::path(img, "image")?, blocksize_p.as_mut()) };
        let has = |flag: i64| i64::from(flags) & flag != 0;
        let options = CheckOptions {
            force: has(CHECK_FORCE),
            hard_force: has(CHECK_HARDFORCE),
            drop_inuse: has(CHECK_DROPINUSE),
            check: has(CHECK_DETAILED),
            repair_sparse: has(CHECK_REPAIR_SPARSE),
            read_only: has(CHECK_READONLY),
            raw: has(CHECK_RAW),
            raw_blocksize: blocksize.as_ref().map(|b| u64::from(**b)),
        };
        let found = ops::check::check_image(&path, &options)?;
        if found.skipped && has(CHECK_TALKATIVE) {
            report::say(0, format_args!("Image {} is clean, check skipped", path.display()));
        }
        if let Some(blocksize) = blocksize
            && !options.raw
        {
            *blocksize = found.cluster.sectors();
        }
        Ok(())
    })
}

/// Checks all deltas of a disk that is not attached, from the base to uuid (NULL: the top), and repairs what a crash left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn check_dd(di: *mut ploop_disk_images_data, uuid: *const c_char) -> c_int {
    boundary::call("check_dd", || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, uuid) = unsafe { (Disk::borrow(di)?, convert::text(uuid)) };
        let guid = uuid.map(|u| Guid::parse(&u.to_string_lossy())).transpose()?;
        ops::check::check_disk(disk.descriptor(), guid.as_ref())
    })
}

/// Name of a maintenance state.
#[unsafe(no_mangle)]
pub extern "C" fn mntn2str(mntn_type: c_int) -> *mut c_char {
    let name = match mntn_type {
        0 => c"OFF",
        1 => c"BALLOON",
        2 => c"FBLOADED",
        4 => c"TRACK",
        5 => c"DISCARD",
        257 => c"MERGE",
        258 => c"GROW",
        259 => c"RELOC",
        _ => c"UNKNOWN",
    };
    name.as_ptr().cast_mut()
}

/// # Safety
/// `device` is NULL or a C string.
unsafe fn device_name(device: *const c_char) -> Result<String> {
    // SAFETY: this function's contract.
    match unsafe { convert::optional_string(device, "device") }? {
        Some(name) => Ok(name),
        None => bail!(Param, "device is NULL or empty; give its path, /dev/ploopN"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn guids() {
        let top = c"{5fbaabe3-6958-40ff-92a7-860e329aab41}";
        let upper = c"{5FBAABE3-6958-40FF-92A7-860E329AAB41}";
        let bare = c"5fbaabe3-6958-40ff-92a7-860e329aab41";
        // SAFETY: literals and NULL.
        unsafe {
            assert_eq!(guidcmp(top.as_ptr(), upper.as_ptr()), 0);
            assert!(guidcmp(bare.as_ptr(), top.as_ptr()) < 0 && guidcmp(top.as_ptr(), ptr::null()) > 0);
            assert_eq!([top, upper, bare, c""].map(|g| is_valid_guid(g.as_ptr())), [1, 1, 0, 0]);
            assert_eq!(is_valid_guid(ptr::null()), 0);
        }
    }

    #[test]
    fn first_lines() {
        let dir = tempfile::tempdir().unwrap();
        let read = |content: &[u8], len: usize| {
            let path = dir.path().join("f");
            std::fs::write(&path, content).unwrap();
            let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
            let mut buf = [b'#' as c_char; 16];
            // SAFETY: the buffer has at least `len` bytes.
            let rc = unsafe { read_line(name.as_ptr(), buf.as_mut_ptr(), len as c_int) };
            (rc, convert::fixed(&buf))
        };
        assert_eq!(read(b"one\ntwo\n", 16), (0, b"one".to_vec()));
        assert_eq!(read(b"", 16), (0, b"".to_vec()));
        assert_eq!(read(b"123456789", 4), (0, b"123".to_vec()));
        assert_eq!(read(b"x", 0).0, -1);
    }

    #[test]
    fn layout_of_merge_info() {
        let offsets = [
            offset_of!(merge_info, start_level),
            offset_of!(merge_info, end_level),
            offset_of!(merge_info, raw),
            offset_of!(merge_info, top_level),
            offset_of!(merge_info, merge_top),
            offset_of!(merge_info, names),
        ];
        assert_eq!((offsets, size_of::<merge_info>()), ([0, 4, 8, 12, 16, 24], 32));
    }
}
