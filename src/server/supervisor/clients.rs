//! The clients of a supervisor: connections on which no command has come yet, and those that wait for an answer.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::error::{IoContext, Kind, Result};
use crate::server::control::{self, Client, ClientEvent};
use crate::server::proto::{Answer, Command};
use crate::sys::host;

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Awaited {
    /// The clean end of the device.
    Stop,
    /// The end of a device that is given up.
    Abort,
    /// That the former top is complete.
    FormerTop,
    /// The end of a merge.
    Merge,
    /// That space is given back, for the client with this token.
    GiveBack(u64),
    Flush,
}

/// A command with the connection on which it is answered.
pub struct Asked {
    pub command: Command,
    pub fds: Vec<OwnedFd>,
    pub client: OwnedFd,
}

/// The other end of the connection is closed.
fn is_gone(client: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::empty())];
    let found = host::poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) > 0;
    found && fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLHUP))
}

/// See the module.
pub struct Clients {
    listener: UnixListener,
    connected: Vec<Client>,
    waiting: BTreeMap<Awaited, Vec<OwnedFd>>,
}

impl Clients {
    pub fn new(listener: &OwnedFd) -> Result<Clients> {
        let listener = listener.try_clone().ctx(Kind::Sys, || "cannot duplicate the control socket")?;
        fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .ctx(Kind::Sys, || "cannot prepare the control socket")?;
        let listener = UnixListener::from(listener);
        Ok(Clients { listener, connected: Vec::new(), waiting: BTreeMap::new() })
    }

    /// Listens on another socket, too late for connections that wait on the old one.
    pub fn listen_on(&mut self, listener: &OwnedFd) -> Result<()> {
        let Clients { listener, .. } = Clients::new(listener)?;
        self.listener = listener;
        Ok(())
    }

    /// The listening socket, as long as there is room for another client.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        (self.connected.len() < control::MAX_CLIENTS).then(|| self.listener.as_fd())
    }

    /// Connections on which a command may come.
    pub fn connections(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.connected.iter().map(|c| c.sock.as_fd())
    }

    pub fn accept(&mut self) {
        self.connected.extend(Client::accept(&self.listener));
    }

    /// Takes the command of connection `i`. One that is closed, or has got its answer, is forgotten: numbers of
    /// connections above `i` change by it.
    pub fn receive(&mut self, i: usize) -> Option<Asked> {
        match self.connected.get(i)?.receive() {
            ClientEvent::Nothing => None,
            ClientEvent::Closed => {
                self.connected.swap_remove(i);
                None
            }
            ClientEvent::Command(command, fds) => {
                Some(Asked { command, fds, client: self.connected.swap_remove(i).sock })
            }
        }
    }

    /// Forgets connections on which no command has come for too long.
    pub fn expire(&mut self) {
        self.connected.retain(|c| !c.silent_too_long());
    }

    /// The client gets its answer later.
    pub fn wait(&mut self, awaited: Awaited, client: impl IntoIterator<Item = OwnedFd>) {
        self.waiting.entry(awaited).or_default().extend(client);
    }

    pub fn is_awaited(&self, awaited: Awaited) -> bool {
        self.waiting.get(&awaited).is_some_and(|w| !w.is_empty())
    }

    /// All that waited for this have closed their connections.
    pub fn is_abandoned(&self, awaited: Awaited) -> bool {
        self.waiting.get(&awaited).is_some_and(|w| !w.is_empty() && w.iter().all(is_gone))
    }

    /// A client that is still connected waits for this.
    pub fn is_awaited_by_client(&self, awaited: Awaited) -> bool {
        self.waiting.get(&awaited).is_some_and(|w| !w.iter().all(is_gone))
    }

    /// Answers all that wait for this.
    pub fn answer(&mut self, awaited: Awaited, answer: &Answer) {
        self.answer_with(awaited, std::slice::from_ref(answer));
    }

    /// The same with several messages.
    pub fn answer_with(&mut self, awaited: Awaited, answers: &[Answer]) {
        for client in self.take(awaited) {
            answers.iter().for_each(|a| control::answer(&client, a));
        }
    }

    /// Those that wait for this; they are the caller's to answer.
    pub fn take(&mut self, awaited: Awaited) -> Vec<OwnedFd> {
        self.waiting.remove(&awaited).unwrap_or_default()
    }
}
