//! The control socket, /run/ploop/NAME/control: for root alone, one command and one answer a connection. The supervisor
//! waits for no client.
#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::TimeVal;
use serde::Serialize;

use crate::error::{Error, IoContext, Kind, Result};
use crate::server::frame;
use crate::server::greeting::{self, Incoming};
use crate::server::proto::{Answer, Command};
use crate::sys::host;

/// Most clients at a time; more wait in the kernel's queue.
pub const MAX_CLIENTS: usize = 32;
/// The connection of a client that sends nothing for so long is closed.
const SILENCE: Duration = Duration::from_secs(5);

fn new_socket() -> Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .ctx(Kind::Sys, || "cannot make a local socket")
}

/// Addresses hold about 100 bytes, folders of other namespaces more: through the folder's descriptor any length will
/// do.
fn address(dir: &Path, file: &str) -> Result<(OwnedFd, UnixAddr)> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = open(dir, flags, Mode::empty()).ctx(Kind::Open, || format!("cannot open {}", dir.display()))?;
    let direct = dir.join(file);
    // A path that fits needs no /proc.
    let path = match direct.to_str() {
        Some(path) if path.len() < SUN_PATH => path.to_owned(),
        _ => format!("/proc/self/fd/{}/{file}", folder.as_raw_fd()),
    };
    let address = UnixAddr::new(path.as_str()).ctx(Kind::Sys, || format!("{path} is too long for a socket"))?;
    Ok((folder, address))
}

/// Room for a path in the address of a local socket.
const SUN_PATH: usize = 107;

/// Makes the listening socket `file` in `dir`, for root alone.
pub fn listen_at(dir: &Path, file: &str) -> Result<OwnedFd> {
    let sock = new_socket()?;
    let (_dir, address) = address(dir, file)?;
    let mask = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(sock.as_raw_fd(), &address);
    umask(mask);
    bound.ctx(Kind::Sys, || format!("cannot make {}/{file}", dir.display()))?;
    listen(&sock, Backlog::new(64).unwrap_or(Backlog::MAXCONN)).ctx(Kind::Sys, || "cannot listen")?;
    Ok(sock)
}

/// Asks a supervisor and waits for its answer no longer than `limit`. Returns the connection too, which stays open as
/// long as the supervisor runs.
pub fn ask(dir: &Path, command: &Command, limit: Duration) -> Result<(Answer, OwnedFd)> {
    ask_with(dir, command, &[], limit)
}

/// The same with descriptors beside the command. Further answers come on the connection.
pub fn ask_with(dir: &Path, command: &Command, fds: &[BorrowedFd], limit: Duration) -> Result<(Answer, OwnedFd)> {
    let sock = send_command(dir, command, fds, limit)?;
    next_answer(&sock, dir, limit).map(|answer| (answer, sock))
}

/// The next answer on a connection. Unsupported is an error that names the command.
pub fn next_answer(sock: &OwnedFd, dir: &Path, limit: Duration) -> Result<Answer> {
    match frame::recv_within::<Answer>(sock, limit)? {
        Some((answer @ Answer::Unsupported { .. }, _)) => answer.into_result(),
        Some((answer, _)) => Ok(answer),
        None => Err(ended(dir)),
    }
}

/// A supervisor that has closed the connection.
pub fn ended(dir: &Path) -> Error {
    Error::new(Kind::Device, format!("the supervisor in {} ended without an answer", dir.display()))
}

/// Sends a command, waiting no longer than `limit` for a supervisor that takes it. Answers the connection, on which the
/// answers come.
pub fn send_command(dir: &Path, command: &impl Serialize, fds: &[BorrowedFd], limit: Duration) -> Result<OwnedFd> {
    let sock = new_socket()?;
    let (_dir, address) = address(dir, super::runtime::CONTROL)?;
    // A supervisor that does not accept must not hang us once its queue is full.
    let seconds = TimeVal::new(limit.as_secs().clamp(1, 10) as _, 0);
    setsockopt(&sock, sockopt::SendTimeout, &seconds).ctx(Kind::Sys, || "cannot set a time limit")?;
    if host::is_simulated() {
        // The real kernel must not wait there.
        let _ = nix::fcntl::fcntl(&sock, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK));
    }
    connect(sock.as_raw_fd(), &address).ctx(Kind::Device, || format!("no supervisor answers in {}", dir.display()))?;
    let peer = getsockopt(&sock, sockopt::PeerCredentials).ctx(Kind::Sys, || "cannot see who answers")?;
    if peer.uid() != 0 {
        crate::bail!(Protocol, "a process of user {} answers in {}: root wanted", peer.uid(), dir.display());
    }
    frame::prepare(&sock);
    frame::send_within(&sock, command, fds, limit.min(Duration::from_secs(10)))?;
    Ok(sock)
}

/// The supervisor or the worker holds the listening socket: the device is served. Valid in any PID namespace.
pub fn has_listener(dir: &Path) -> bool {
    let (Ok(sock), Ok((_dir, address))) = (new_socket(), address(dir, super::runtime::CONTROL)) else { return false };
    // Not waiting: a full queue has a listener too.
    let _ = nix::fcntl::fcntl(&sock, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK));
    matches!(connect(sock.as_raw_fd(), &address), Ok(()) | Err(nix::Error::EAGAIN))
}

/// A connection on which no command has come yet.
pub struct Client {
    pub sock: OwnedFd,
    since: Instant,
}

/// What a look at a client showed.
pub enum ClientEvent {
    Nothing,
    Command(Command, Vec<OwnedFd>),
    /// The client has gone, has sent no JSON, or has got its answer: the command is not supported.
    Closed,
}

impl Client {
    /// Takes one new connection if there is one and it is root's.
    pub fn accept(listener: &UnixListener) -> Option<Client> {
        let (stream, _) = listener.accept().ok()?;
        let sock = OwnedFd::from(stream);
        let peer = getsockopt(&sock, sockopt::PeerCredentials).ok()?;
        if peer.uid() != 0 {
            return None;
        }
        frame::prepare(&sock);
        Some(Client { sock, since: host::now() })
    }

    pub fn receive(&self) -> ClientEvent {
        match frame::receive_within::<Command>(&self.sock, Duration::ZERO) {
            Ok(Some((Incoming::Known(command), fds))) => ClientEvent::Command(command, fds),
            Ok(Some((Incoming::Unknown(unknown), _))) => {
                answer(&self.sock, &Answer::Unsupported { what: unknown.name, version: greeting::VERSION });
                ClientEvent::Closed
            }
            Err(e) if e.errno() == Some(libc::ETIMEDOUT) => ClientEvent::Nothing,
            _ => ClientEvent::Closed,
        }
    }

    pub fn silent_too_long(&self) -> bool {
        host::since(self.since) >= SILENCE
    }
}

/// Answers; a client that does not take it gets nothing.
pub fn answer(sock: &OwnedFd, answer: &Answer) {
    let _ = frame::send_within(sock, answer, &[], Duration::ZERO);
}

/// An error as an answer.
pub fn refusal(e: &Error) -> Answer {
    Answer::Error { code: e.code(), message: e.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn one_question_one_answer() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let listener = UnixListener::from(listen_at(&deep, "control").unwrap());
        let mode = std::fs::metadata(deep.join("control")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        if !nix::unistd::geteuid().is_root() {
            crate::testing::skip::skip("only root is answered");
            return;
        }
        let e = ask(&deep, &Command::Info, Duration::from_millis(50)).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ETIMEDOUT));
        // The one that gave up.
        assert!(Client::accept(&listener).is_some());
        assert!(has_listener(&deep));
        assert!(Client::accept(&listener).is_some_and(|c| matches!(c.receive(), ClientEvent::Closed)));
        let initiator = std::thread::spawn(move || ask(&deep, &Command::Stop, Duration::from_secs(10)).map(|a| a.0));
        let client = Client::accept(&listener).unwrap();
        loop {
            match client.receive() {
                ClientEvent::Command(Command::Stop, _) => break,
                ClientEvent::Nothing => std::thread::yield_now(),
                _ => panic!("unexpected"),
            }
        }
        answer(&client.sock, &Answer::Done);
        assert!(matches!(initiator.join().unwrap(), Ok(Answer::Done)));
        assert!(matches!(client.receive(), ClientEvent::Closed));
        // An unknown command is answered at once, and once.
        let (sock, theirs) = frame::pair().unwrap();
        let client = Client { sock: theirs, since: Instant::now() };
        frame::send(&sock, &"Grow", &[]).unwrap();
        assert!(matches!(client.receive(), ClientEvent::Closed));
        let e = next_answer(&sock, dir.path(), Duration::ZERO).unwrap_err();
        assert!(e.kind() == Kind::Param && e.to_string().contains("Grow"), "{e}");
        // An answer of a later version is no end of the supervisor.
        frame::send(&client.sock, &"Later", &[]).unwrap();
        assert_eq!(next_answer(&sock, dir.path(), Duration::ZERO).unwrap_err().kind(), Kind::Protocol);
        drop(listener);
        assert!(!has_listener(dir.path()));
    }
}
