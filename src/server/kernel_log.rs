//! The supervisor's messages for the host's administrator.
#![forbid(unsafe_code)]

/// One line for the host's administrator, into the kernel's log: no file of ours could be on a device of ours.
pub fn log(name: &str, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    #[cfg(test)]
    if crate::sys::host::is_simulated() {
        return crate::sys::host::simulated::with(|host| host.log(format!("{name}: {text}")));
    }
    let kmsg = std::fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    if let Ok(mut kmsg) = kmsg {
        let line: String = format!("ploop-server: {name}: {text}\n").chars().take(900).collect();
        let _ = kmsg.write_all(line.as_bytes());
    }
}
