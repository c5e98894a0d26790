//! Values of options: sizes, numbers, formats, GUIDs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ploop::descriptor::ImageMode;
use ploop::format::guid::Guid;
use ploop::report::progress::Wanted;
use ploop::units::ClusterSize;

use crate::{Fail, mistake};

/// Sizes of so many sectors and more are refused.
const TOO_LARGE: u64 = 0xffff_ffff * 512;

/// C's `strtoul` with base 0: the number and what follows it. None without a digit or when it does not fit.
fn strtoul(text: &str) -> Option<(u64, &str)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let text = text.strip_prefix('+').unwrap_or(text);
    let hex =
        text.strip_prefix("0x").or(text.strip_prefix("0X")).filter(|t| t.starts_with(|c: char| c.is_ascii_hexdigit()));
    let (digits, radix) = match hex {
        Some(t) => (t, 16),
        None if text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    let end = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    let number = u64::from_str_radix(digits.get(..end).filter(|d| !d.is_empty())?, radix).ok()?;
    Some((number, &digits[end..]))
}

/// `NUMBER[K|M|G|T]`, without a suffix sectors; the result is in sectors. Zero is allowed here.
pub fn size(text: &OsStr) -> Result<u64, Fail> {
    let shown = text.to_string_lossy();
    let bad = |why: &str| mistake(format!("Incorrect size '{shown}': {why}"));
    let want = "must be NUMBER[K|M|G|T], without a suffix in sectors of 512 bytes";
    let (number, suffix) = strtoul(&shown).ok_or_else(|| bad(want))?;
    let sectors = match suffix {
        "" => Some(number),
        "K" | "k" => number.checked_mul(2),
        "M" | "m" => number.checked_mul(2 << 10),
        "G" | "g" => number.checked_mul(2 << 20),
        "T" | "t" => number.checked_mul(2 << 30),
        _ => return Err(bad(want)),
    };
    sectors.filter(|s| *s < TOO_LARGE).ok_or_else(|| bad("too large"))
}

/// A number with nothing behind it.
pub fn number(text: &OsStr, what: &str) -> Result<u64, Fail> {
    let shown = text.to_string_lossy();
    match strtoul(&shown) {
        Some((number, "")) => Ok(number),
        _ => Err(mistake(format!("Incorrect {what} '{shown}': must be a number"))),
    }
}

/// A cluster size in sectors.
pub fn cluster(text: &OsStr) -> Result<ClusterSize, Fail> {
    let sectors = number(text, "cluster size")?;
    ClusterSize::from_sectors(sectors).map_err(|e| mistake(e.to_string()))
}

/// `raw`, `ploop1` or `expanded`, `preallocated`.
pub fn format(text: &OsStr) -> Result<ImageMode, Fail> {
    match text.to_str() {
        Some("raw") => Ok(ImageMode::Raw),
        Some("ploop1" | "expanded") => Ok(ImageMode::Expanded),
        Some("preallocated") => Ok(ImageMode::Preallocated),
        _ => Err(mistake(format!(
            "Incorrect format '{}': must be one of raw, ploop1, expanded, preallocated",
            text.to_string_lossy()
        ))),
    }
}

/// `auto`, `json`, `none`.
pub fn progress(text: &OsStr) -> Result<Wanted, Fail> {
    match text.to_str() {
        Some("auto") => Ok(Wanted::Fitting),
        Some("json") => Ok(Wanted::Objects),
        Some("none") => Ok(Wanted::Nothing),
        _ => Err(mistake(format!("Incorrect progress '{}': must be one of auto, json, none", text.to_string_lossy()))),
    }
}

/// A GUID with or without braces.
pub fn guid(text: &OsStr) -> Result<Guid, Fail> {
    Guid::parse(&text.to_string_lossy()).map_err(|e| mistake(e.to_string()))
}

/// A file argument is a descriptor if its name ends in `.xml`; whether it exists does not matter.
pub fn is_descriptor(file: &OsStr) -> bool {
    file.as_bytes().ends_with(b".xml")
}

/// Digits only: the id of a container.
pub fn is_container_id(text: &OsStr) -> bool {
    !text.is_empty() && text.as_bytes().iter().all(u8::is_ascii_digit)
}

/// Text that must be valid UTF-8 (options for the kernel, names).
pub fn text(value: &OsStr, what: &str) -> Result<String, Fail> {
    value
        .to_str()
        .map(str::to_owned)
        .ok_or_else(|| mistake(format!("{what} '{}' is not valid UTF-8", value.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sectors(text: &str) -> Option<u64> {
        size(OsStr::new(text)).ok()
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("2048", 2048),
            ("1k", 2),
            ("10M", 20480),
            ("1g", 2097152),
            ("1T", 1 << 31),
            ("0x10", 16),
            ("010", 8),
            ("  7", 7),
            ("+7", 7),
            ("0", 0),
            ("0K", 0),
        ] {
            assert_eq!(sectors(text), Some(want), "{text}");
        }
        for bad in [
            "",
            "K",
            "10mb",
            "1.5g",
            "-1",
            "1 ",
            "0x",
            "08",
            "12B",
            "12S",
            "99999999999999999999",
            "2199023255040",
            "1024T",
            "é",
        ] {
            assert_eq!(sectors(bad), None, "{bad}");
        }
        assert_eq!(sectors("2199023255039"), Some(2199023255039));
    }

    #[test]
    fn clusters() {
        assert_eq!(cluster(OsStr::new("64")).map(ClusterSize::sectors).ok(), Some(64));
        for bad in ["63", "32", "262144", "1m", "x"] {
            assert!(cluster(OsStr::new(bad)).is_err(), "{bad}");
        }
    }
}
