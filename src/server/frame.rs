//! Frames of the protocol: one JSON value in one SEQPACKET message, descriptors beside it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::greeting::{self, Incoming};
use crate::server::proto::MAX_FRAME;
use crate::sys::host;
use crate::sys::scm;
use crate::sys::wait::{wait, wait_forever};

/// Longest wait of [`send`] for a receiver that does not read.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// A connected pair of sockets for frames, both close-on-exec.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .ctx(Kind::Sys, || "cannot make a pair of local sockets")?;
    prepare(&pair.0);
    prepare(&pair.1);
    Ok(pair)
}

/// Makes room for a frame of the largest size in a socket that was not made by [`pair`].
pub fn prepare(sock: impl AsFd) {
    // The kernel's default is too small for a frame of MAX_FRAME bytes; refused, only such frames fail.
    let _ = setsockopt(&sock, sockopt::SndBuf, &(2 * MAX_FRAME));
}

/// Sends one frame. Waits for room 10 s at most, whether the socket blocks or not.
pub fn send<T: Serialize>(sock: impl AsFd, value: &T, fds: &[BorrowedFd]) -> Result<()> {
    send_within(sock, value, fds, SEND_LIMIT)
}

/// Like [`send`] with another limit; zero: only if there is room now.
pub fn send_within<T: Serialize>(sock: impl AsFd, value: &T, fds: &[BorrowedFd], limit: Duration) -> Result<()> {
    let sock = sock.as_fd();
    let data = serde_json::to_vec(value).map_err(|e| Error::with(Kind::Protocol, "cannot encode a message", e))?;
    if data.len() > MAX_FRAME {
        bail!(Protocol, "a message of {} bytes: at most {MAX_FRAME} can be sent; use shorter file names", data.len());
    }
    let end = host::now() + limit;
    host::step("send a message").ctx(Kind::Protocol, || "cannot send a message")?;
    loop {
        match scm::send(sock, &data, fds, libc::MSG_DONTWAIT) {
            Ok(n) if n == data.len() => return Ok(()),
            Ok(n) => bail!(Protocol, "{n} of {} bytes of a message were sent", data.len()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if !wait(sock, PollFlags::POLLOUT, end)? {
                    bail!(Protocol, "the other side did not take a message within {} s", limit.as_secs());
                }
            }
            Err(e) => return Err(Error::with(Kind::Protocol, "cannot send a message", e)),
        }
    }
}

/// Receives one frame, waiting as long as it takes. `None`: the other side has closed.
pub fn recv<T: DeserializeOwned>(sock: impl AsFd) -> Result<Option<(T, Vec<OwnedFd>)>> {
    receive(sock)?.map(known).transpose()
}

/// Like [`recv`] for a receiver that goes on after a message that it does not understand.
pub fn receive<T: DeserializeOwned>(sock: impl AsFd) -> Result<Option<(Incoming<T>, Vec<OwnedFd>)>> {
    let mut buf = vec![0; MAX_FRAME];
    let sock = sock.as_fd();
    loop {
        let flags = if host::is_simulated() { libc::MSG_DONTWAIT } else { 0 };
        match scm::recv(sock, &mut buf, flags) {
            // A socket that does not block.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                wait_forever(sock, PollFlags::POLLIN)?;
            }
            other => return decode(other, &buf),
        }
    }
}

/// Receives one frame, waiting no longer than `limit`. `None`: the other side has closed.
pub fn recv_within<T: DeserializeOwned>(sock: impl AsFd, limit: Duration) -> Result<Option<(T, Vec<OwnedFd>)>> {
    receive_within(sock, limit)?.map(known).transpose()
}

/// Like [`recv_within`] for a receiver that goes on after a message that it does not understand. An error: what came is
/// no JSON.
pub fn receive_within<T: DeserializeOwned>(
    sock: impl AsFd,
    limit: Duration,
) -> Result<Option<(Incoming<T>, Vec<OwnedFd>)>> {
    let sock = sock.as_fd();
    let end = host::now() + limit;
    let mut buf = vec![0; MAX_FRAME];
    loop {
        match scm::recv(sock, &mut buf, libc::MSG_DONTWAIT) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if !wait(sock, PollFlags::POLLIN, end)? {
                    let error = io::Error::from_raw_os_error(libc::ETIMEDOUT);
                    return Err(Error::with(
                        Kind::Protocol,
                        format!("no answer in {:.1} s", limit.as_secs_f32()),
                        error,
                    ));
                }
            }
            other => return decode(other, &buf),
        }
    }
}

fn known<T>((message, fds): (Incoming<T>, Vec<OwnedFd>)) -> Result<(T, Vec<OwnedFd>)> {
    match message {
        Incoming::Known(message) => Ok((message, fds)),
        Incoming::Unknown(unknown) => {
            bail!(Protocol, "a message that is not understood was received: {:?}", unknown.name)
        }
    }
}

fn decode<T: DeserializeOwned>(
    got: io::Result<scm::Received>,
    buf: &[u8],
) -> Result<Option<(Incoming<T>, Vec<OwnedFd>)>> {
    let got = match got {
        Ok(got) => got,
        // The peer exited with unread data: the connection is closed.
        Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => return Ok(None),
        Err(e) => return Err(Error::with(Kind::Protocol, "cannot receive a message", e)),
    };
    if got.truncated {
        bail!(Protocol, "a message of more than {MAX_FRAME} bytes or with too many descriptors was received");
    }
    if got.len == 0 {
        return Ok(None);
    }
    let value = greeting::decode(&buf[..got.len])
        .map_err(|e| Error::with(Kind::Protocol, "a message that is no JSON was received", e))?;
    Ok(Some((value, got.fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn values_and_descriptors_arrive() {
        let (a, b) = pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let fds = vec![null.as_fd(); 130];
        send(&a, &("hello".to_string(), 7u32), &fds).unwrap();
        let ((text, n), got): ((String, u32), _) = recv(&b).unwrap().unwrap();
        assert_eq!((text.as_str(), n, got.len()), ("hello", 7, 130));
        let rdev = File::from(got.into_iter().next().unwrap()).metadata().unwrap().rdev();
        assert_eq!(rdev, null.metadata().unwrap().rdev());
        drop(a);
        assert!(recv::<u32>(&b).unwrap().is_none());
    }

    #[test]
    fn bounds_are_kept() {
        let (a, b) = pair().unwrap();
        send(&a, &"x".repeat(MAX_FRAME - 2), &[]).unwrap();
        let (text, _) = recv::<String>(&b).unwrap().unwrap();
        assert_eq!(text.len(), MAX_FRAME - 2);
        assert_eq!(send(&a, &"x".repeat(MAX_FRAME), &[]).unwrap_err().kind(), Kind::Protocol);
        let e = recv_within::<u32>(&b, Duration::from_millis(20)).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ETIMEDOUT));
        scm::send(a.as_fd(), b"{not json", &[], 0).unwrap();
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), Kind::Protocol);
        // JSON of another kind is an error to some receivers and not to others.
        send(&a, &"Grow", &[]).unwrap();
        let e = recv::<u32>(&b).unwrap_err();
        assert!(e.kind() == Kind::Protocol && e.to_string().contains("\"Grow\""), "{e}");
        send(&a, &"Grow", &[a.as_fd()]).unwrap();
        match receive_within::<u32>(&b, Duration::ZERO).unwrap() {
            Some((Incoming::Unknown(unknown), fds)) => assert_eq!((&unknown.name[..], fds.len()), ("Grow", 1)),
            other => panic!("{other:?}"),
        }
    }
}
