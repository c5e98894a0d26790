//! Wall-clock time as people write it.

use std::mem::MaybeUninit;

/// The current local time as `YYYY-MM-DDTHH:MM:SS+ZZZZ`, the form of the classic log file.
pub fn local_timestamp() -> String {
    // SAFETY: time() with a null pointer only returns the clock.
    let now = unsafe { libc::time(std::ptr::null_mut()) };
    format_local(now)
}

/// Seconds since 1970 in the same form.
pub fn format_local(seconds: libc::time_t) -> String {
    let mut tm = MaybeUninit::<libc::tm>::uninit();
    // SAFETY: both pointers are to live locals of the right type; localtime_r() fills `tm` whenever it returns
    // non-null, and `tm` is read only then.
    let tm = unsafe {
        if libc::localtime_r(&seconds, tm.as_mut_ptr()).is_null() {
            return format!("@{seconds}");
        }
        tm.assume_init()
    };
    let (sign, offset) = if tm.tm_gmtoff < 0 { ('-', -tm.tm_gmtoff) } else { ('+', tm.tm_gmtoff) };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{sign}{:02}{:02}",
        i64::from(tm.tm_year) + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        offset / 3600,
        offset / 60 % 60,
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_form_is_the_classic_one() {
        let text = super::local_timestamp();
        let pattern = "dddd-dd-ddTdd:dd:ddsdddd";
        assert_eq!(text.len(), pattern.len(), "{text}");
        for (c, p) in text.chars().zip(pattern.chars()) {
            match p {
                'd' => assert!(c.is_ascii_digit(), "{text}"),
                's' => assert!(c == '+' || c == '-', "{text}"),
                p => assert_eq!(c, p, "{text}"),
            }
        }
    }
}
