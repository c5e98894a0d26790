//! What a daemon asks of the kernel about itself and other processes.

use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Privileges were raised at exec (setuid, file capabilities): the environment belongs to another user.
pub fn privileges_raised() -> bool {
    // SAFETY: getauxval only reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// The file that this code was loaded from: the shared library, or the executable.
pub fn own_object() -> Option<PathBuf> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr fills `info` if it returns non-zero; `dli_fname` then is a string of the loader's that lives as
    // long as the object, that is as long as this code.
    unsafe {
        if libc::dladdr(own_object as *const libc::c_void, info.as_mut_ptr()) == 0 {
            return None;
        }
        let name = info.assume_init().dli_fname;
        (!name.is_null()).then(|| OsStr::from_bytes(CStr::from_ptr(name).to_bytes()).into())
    }
}

/// Takes over what descriptor `fd` refers to, close-on-exec, and leaves `/dev/null` (or, without one, nothing) there.
/// For the first lines of a program, when nothing else knows the standard descriptors.
pub fn take_standard(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor, owned by the caller from here on; dup2 and close act on a
    // standard descriptor that, by contract, has no owner yet.
    unsafe {
        let taken = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10);
        if taken < 0 {
            return Err(io::Error::last_os_error());
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 && null != fd {
            libc::dup2(null, fd);
            libc::close(null);
        } else if null < 0 {
            libc::close(fd);
        }
        Ok(OwnedFd::from_raw_fd(taken))
    }
}

/// An argument that programs which name themselves later are started with: its place in memory takes the name.
pub const ROOM_FOR_NAME: &str = "                                                                ";

/// The short name of this process (15 bytes). That of a program that was started by the number of a descriptor is this number.
pub fn show_short(short: &str) {
    let short: String = short.chars().take(15).collect();
    if let Ok(short) = std::ffi::CString::new(short) {
        // SAFETY: `short` is a string that ends with a zero byte; the kernel copies it.
        unsafe { libc::prctl(libc::PR_SET_NAME, short.as_ptr() as libc::c_ulong, 0, 0, 0) };
    }
}

/// What ps, top and the kernel's messages show of this process: its short name (15 bytes), and, if it was started with
/// [`ROOM_FOR_NAME`] as its last argument, `name` in place of that.
pub fn show_as(short: &str, name: &str) {
    show_short(short);
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    // Fields 48 and 49, of which the first two come before.
    let mut ends = after_name.split(' ').skip(45).map(|n| n.parse::<usize>().unwrap_or(0));
    let (Some(start), Some(end)) = (ends.next(), ends.next()) else { return };
    if start == 0 || end.saturating_sub(start) <= ROOM_FOR_NAME.len() + 1 || name.len() > ROOM_FOR_NAME.len() {
        return;
    }
    let room = (end - 1 - ROOM_FOR_NAME.len()) as *mut u8;
    // SAFETY: the kernel put the arguments there when the program was started, `start` to `end`, in memory of this process
    // that can be written; the standard library reads them only while it makes copies, which this program does not ask for
    // from another thread. What is not the expected argument is left alone.
    unsafe {
        let place = std::slice::from_raw_parts_mut(room, ROOM_FOR_NAME.len());
        if place.iter().all(|b| *b == b' ') {
            place[..name.len()].copy_from_slice(name.as_bytes());
            place[name.len()..].fill(0);
        }
    }
}

/// Makes `fd` known under the number `to`, close-on-exec; what was there is closed. For the first lines of a program.
pub fn move_to(fd: OwnedFd, to: RawFd) -> io::Result<()> {
    // SAFETY: `fd` is ours; `to` has, by contract, no owner.
    match unsafe { libc::dup3(fd.as_raw_fd(), to, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Ends this process as soon as the thread that started it has ended; false: not any more.
pub fn exit_with_parent(enable: bool) -> io::Result<()> {
    let signal = if enable { libc::SIGKILL } else { 0 };
    // SAFETY: this prctl takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets go of what `file` refers to: locks on its description fall, if no other descriptor has it. The descriptor
/// refers to /dev/null from here on, so that its number is not reused as long as `file` lives.
pub fn replace_with_null(file: &std::fs::File) -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: both descriptors are open and owned by the two files, which stay their owners.
    match unsafe { libc::dup3(null.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Closes all descriptors from `first` on. For the first lines of a program, before anything was opened.
pub fn close_from(first: RawFd) {
    // SAFETY: by contract no object of this program owns one of these descriptors.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) != 0 {
            for fd in first..4096 {
                libc::close(fd);
            }
        }
    }
}

/// Default dispositions (those of ignored signals are inherited) and nothing blocked.
pub fn reset_signals() {
    // SAFETY: SIG_DFL is valid for all signals but SIGKILL and SIGSTOP, for which the call fails without effect; the
    // set is initialised by sigemptyset.
    unsafe {
        for signal in 1..=64 {
            if signal != libc::SIGPIPE {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut());
    }
}

/// The usual policy and priority for CPUs and disks, on all CPUs. For single-threaded programs. What is not permitted
/// stays as it is.
pub fn reset_scheduling() {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: the two structures are plain numbers, all values of which are valid; the calls only read them, and the
    // rest takes numbers only.
    unsafe {
        let param = MaybeUninit::<libc::sched_param>::zeroed().assume_init();
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &param);
        libc::setpriority(libc::PRIO_PROCESS as _, 0, 0);
        // Class none: it follows from the other priority.
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0);
        let mut all = MaybeUninit::<libc::cpu_set_t>::zeroed().assume_init();
        for cpu in 0..8 * size_of::<libc::cpu_set_t>() {
            libc::CPU_SET(cpu, &mut all);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &all);
    }
}

/// Memory reclaim caused by this thread does no I/O, which might be ours (Linux 5.6, CAP_SYS_RESOURCE).
pub fn set_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: this prctl takes numbers only.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
