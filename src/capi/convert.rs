//! Strings and arrays between C and Rust. Nothing is read beyond a NUL; nothing is written beyond the size that the
//! caller gave.

use crate::bail;
use crate::error::{Error, Kind, Result};
use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A borrowed C string, `None` for NULL.
///
/// # Safety
/// `text` is NULL or points to a NUL-terminated string that no thread changes while the result is used.
pub unsafe fn text<'a>(text: *const c_char) -> Option<&'a CStr> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not NULL, and NUL-terminated by this function's contract.
    Some(unsafe { CStr::from_ptr(text) })
}

/// A path argument that must be there; `what` names it in the error.
///
/// # Safety
/// As [`text`].
pub unsafe fn path(argument: *const c_char, what: &str) -> Result<PathBuf> {
    // SAFETY: the same contract.
    match unsafe { text(argument) } {
        Some(path) if !path.is_empty() => Ok(to_path(path)),
        Some(_) => bail!(Param, "{what} is an empty string; give a path"),
        None => bail!(Param, "{what} is NULL; give a path"),
    }
}

/// A path argument that may be NULL or, as classic callers do, empty.
///
/// # Safety
/// As [`text`].
pub unsafe fn optional_path(argument: *const c_char) -> Option<PathBuf> {
    // SAFETY: the same contract.
    unsafe { text(argument) }.filter(|p| !p.is_empty()).map(to_path)
}

/// A text argument that may be NULL or empty (both `None`) and must be UTF-8; `what` names it in the error.
///
/// # Safety
/// As [`text`].
pub unsafe fn optional_string(argument: *const c_char, what: &str) -> Result<Option<String>> {
    // SAFETY: the same contract.
    match unsafe { text(argument) }.filter(|t| !t.is_empty()) {
        None => Ok(None),
        Some(text) => match text.to_str() {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => bail!(Param, "{what} {text:?} is not UTF-8"),
        },
    }
}

/// A NULL-terminated array of paths.
///
/// # Safety
/// `array` is NULL or points to strings as for [`text`], the last followed by a NULL.
pub unsafe fn paths(array: *const *mut c_char, what: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    if array.is_null() {
        bail!(Param, "{what} is NULL; give a list of paths that ends in NULL");
    }
    loop {
        // SAFETY: every element up to and including the NULL is readable, by this function's contract.
        let element = unsafe { *array.add(paths.len()) };
        if element.is_null() {
            return Ok(paths);
        }
        // SAFETY: an element before the NULL is a string.
        paths.push(unsafe { path(element, what) }?);
    }
}

/// A fixed array of characters, up to its NUL if it has one.
pub fn fixed(array: &[c_char]) -> Vec<u8> {
    array.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect()
}

/// Copies `text` and a NUL into a fixed array, and clears the rest of it.
pub fn store_fixed(array: &mut [c_char], text: &str, what: &str) -> Result<()> {
    if text.len() >= array.len() {
        bail!(Param, "{what} {text} has {} bytes; only {} fit", text.len(), array.len() - 1);
    }
    let bytes = text.bytes().chain(std::iter::repeat(0));
    for (to, from) in array.iter_mut().zip(bytes) {
        *to = from as c_char;
    }
    Ok(())
}

/// What to do with a text that is longer than the caller's buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Long {
    Refuse,
    Cut,
}

/// Copies `text` and a NUL to the caller's buffer of `len` bytes.
///
/// # Safety
/// `out` is NULL or has room for `len` bytes.
pub unsafe fn copy_out(out: *mut c_char, len: c_int, text: &OsStr, long: Long) -> Result<()> {
    let room = buffer(out, len)?;
    let mut bytes = text.as_bytes();
    if bytes.len() >= room {
        if long == Long::Refuse {
            bail!(Param, "buffer of {room} bytes is too short for {text:?}; it needs {}", bytes.len() + 1);
        }
        bytes = &bytes[..room - 1];
    }
    // SAFETY: `out` has `room` bytes by this function's contract, and the text with its NUL is at most that long; the
    // caller's buffer cannot overlap a string of this library.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len());
        *out.add(bytes.len()) = 0;
    }
    Ok(())
}

/// Checks an output buffer before any work is done for it; its size in bytes, at least 1.
pub fn buffer(out: *mut c_char, len: c_int) -> Result<usize> {
    match usize::try_from(len) {
        Ok(len) if len > 0 && !out.is_null() => Ok(len),
        _ => Err(Error::new(Kind::Param, format!("output buffer {out:p} of {len} bytes; give one of at least 1 byte"))),
    }
}

fn to_path(text: &CStr) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(text.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_past_the_buffer() {
        let mut buf = [b'x' as c_char; 8];
        // SAFETY: the buffers given are at least as long as said.
        unsafe {
            assert!(copy_out(buf.as_mut_ptr(), 4, OsStr::new("abcd"), Long::Refuse).is_err());
            assert_eq!(buf, [b'x' as c_char; 8], "refused: untouched");
            assert!(copy_out(buf.as_mut_ptr(), 4, OsStr::new("abc"), Long::Refuse).is_ok());
            assert_eq!(fixed(&buf), b"abc");
            assert_eq!(buf[4], b'x' as c_char);
            assert!(copy_out(buf.as_mut_ptr(), 3, OsStr::new("defg"), Long::Cut).is_ok());
            assert_eq!(fixed(&buf), b"de");
            for len in [0, -1, c_int::MIN] {
                assert!(copy_out(buf.as_mut_ptr(), len, OsStr::new(""), Long::Cut).is_err());
            }
            assert!(copy_out(std::ptr::null_mut(), 8, OsStr::new(""), Long::Cut).is_err());
        }
    }

    #[test]
    fn fixed_arrays() {
        let full = [b'a' as c_char; 4];
        assert_eq!(fixed(&full), b"aaaa", "no NUL needed");
        let mut array = full;
        assert!(store_fixed(&mut array, "abcd", "name").is_err());
        assert!(store_fixed(&mut array, "ab", "name").is_ok());
        assert_eq!(array.map(|c| c as u8), *b"ab\0\0");
    }

    #[test]
    fn arguments() {
        // SAFETY: literals and NULL.
        unsafe {
            assert_eq!(path(std::ptr::null(), "p").map_err(|e| e.code()), Err(38));
            assert_eq!(path(c"".as_ptr(), "p").map_err(|e| e.code()), Err(38));
            assert_eq!(path(c"/a".as_ptr(), "p").ok(), Some(PathBuf::from("/a")));
            assert_eq!(optional_string(c"\xff".as_ptr(), "p").map_err(|e| e.code()), Err(38));
            assert_eq!(optional_string(c"".as_ptr(), "p").ok(), Some(None));
            let list = [c"/a".as_ptr().cast_mut(), c"b".as_ptr().cast_mut(), std::ptr::null_mut()];
            assert_eq!(paths(list.as_ptr(), "p").ok(), Some(vec!["/a".into(), "b".into()]));
            assert_eq!(paths(list[2..].as_ptr(), "p").ok(), Some(vec![]));
            assert_eq!(paths(std::ptr::null(), "p").map_err(|e| e.code()), Err(38));
        }
    }
}
