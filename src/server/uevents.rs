//! The kernel's announcements of block devices, so that nodes follow partitions at once.
#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt, socket, sockopt,
};

use crate::sys::host;

/// Multicast group of the kernel's own messages.
const KERNEL_GROUP: u32 = 1;

/// What happened to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct News {
    /// Anything about the disk or a partition of it.
    pub any: bool,
    /// The disk itself changed: its partition table may have been read again.
    pub changed: bool,
}

/// Opens the socket; `None` where it cannot be had: a slower way works too.
pub fn open() -> Option<OwnedFd> {
    if host::is_simulated() {
        return None;
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let sock = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent).ok()?;
    let _ = setsockopt(&sock, sockopt::RcvBuf, &(1 << 18));
    bind(sock.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP)).ok()?;
    Some(sock)
}

/// Takes all messages that have come and reports what they contain about `backing`.
pub fn drain(sock: &OwnedFd, backing: &str) -> News {
    let mut news = News::default();
    let mut buf = [0u8; 8192];
    loop {
        match recvfrom::<NetlinkAddr>(sock.as_raw_fd(), &mut buf) {
            Ok((len, Some(from))) if from.pid() == 0 => {
                let message = interpret(&buf[..len], backing);
                news.any |= message.any;
                news.changed |= message.changed;
            }
            // Not from the kernel.
            Ok(_) | Err(nix::Error::EINTR) => {}
            // Messages were lost: ours may have been among them.
            Err(nix::Error::ENOBUFS) => news = News { any: true, changed: true },
            Err(_) => return news,
        }
    }
}

/// One message: `ACTION@/devices/virtual/block/loop5/loop5p1`, then variables.
fn interpret(message: &[u8], backing: &str) -> News {
    let head = message.split(|b| *b == 0).next().unwrap_or_default();
    let Some((action, path)) = std::str::from_utf8(head).ok().and_then(|h| h.split_once('@')) else {
        return News::default();
    };
    let mut parts = path.rsplit('/');
    let last = parts.next() == Some(backing);
    let parent = parts.next() == Some(backing);
    News { any: last || parent, changed: last && action == "change" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let say = |m: &str| interpret(m.as_bytes(), "loop10000");
        let both = News { any: true, changed: true };
        assert_eq!(say("change@/devices/virtual/block/loop10000\0ACTION=change\0"), both);
        assert_eq!(say("add@/devices/virtual/block/loop10000/loop10000p1\0"), News { any: true, changed: false });
        for other in ["change@/devices/virtual/block/loop1000\0", "libudev\0", "", "add@/x/loop10001/loop10001p1"] {
            assert_eq!(say(other), News::default(), "{other}");
        }
    }
}
