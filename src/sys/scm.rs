//! Messages with descriptors over local sockets (SCM_RIGHTS).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors that the kernel passes with one message (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// Control buffer for [`MAX_FDS`] descriptors, aligned for `cmsghdr`.
const CONTROL_WORDS: usize = (MAX_FDS * size_of::<RawFd>()).div_ceil(8) + 8;

/// Sends one message and the descriptors beside it. Never raises SIGPIPE; `flags` is added to MSG_NOSIGNAL.
pub fn send(sock: BorrowedFd, data: &[u8], fds: &[BorrowedFd], flags: i32) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::from_raw_os_error(libc::ETOOMANYREFS));
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: msghdr is plain data; all zeroes means no name, no control data, no buffers.
    let mut msg: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = size_of_val(fds);
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute; CMSG_FIRSTHDR points into `control`, which has room for MAX_FDS
        // descriptors, is aligned, zeroed and outlives the call; the data part takes exactly `bytes` bytes.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(bytes as u32) as _;
            let head = libc::CMSG_FIRSTHDR(&msg);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(bytes as u32) as _;
            let data = libc::CMSG_DATA(head).cast::<RawFd>();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    loop {
        // SAFETY: `msg` describes live buffers (see above), which sendmsg only reads.
        let n = unsafe { libc::sendmsg(sock.as_raw_fd(), &msg, flags | libc::MSG_NOSIGNAL) };
        if n >= 0 {
            return Ok(n as usize);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// What [`recv`] got.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the message now in the buffer; 0: the other side has closed.
    pub len: usize,
    /// The message was larger than the buffer, or descriptors were lost.
    pub truncated: bool,
    /// The descriptors, all close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Receives one message into `buf`; `flags` is added to MSG_CMSG_CLOEXEC.
pub fn recv(sock: BorrowedFd, buf: &mut [u8], flags: i32) -> io::Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: as in `send`.
    let mut msg: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control) as _;
    let n = loop {
        // SAFETY: `msg` describes live, exclusively borrowed buffers of the stated lengths.
        let n = unsafe { libc::recvmsg(sock.as_raw_fd(), &mut msg, flags | libc::MSG_CMSG_CLOEXEC) };
        if n >= 0 {
            break n as usize;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` with whole headers up to `msg_controllen`; the CMSG_ walk stays inside it.
    // Each
    // number in an SCM_RIGHTS message is a descriptor just installed for us that has no other owner.
    unsafe {
        let mut head = libc::CMSG_FIRSTHDR(&msg);
        while !head.is_null() {
            if (*head).cmsg_level == libc::SOL_SOCKET && (*head).cmsg_type == libc::SCM_RIGHTS {
                let bytes = ((*head).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(head).cast::<RawFd>();
                for i in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            head = libc::CMSG_NXTHDR(&msg, head);
        }
    }
    let truncated = msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(Received { len: n, truncated, fds })
}
