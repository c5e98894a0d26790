//! How the kernel's block device and the worker exchange requests: one folder for each transport, which implements
//! [`RequestQueue`] for the worker and [`BlockBinding`] for supervisor and helpers.
//!
//! All that chooses a transport or dispatches on it is here: the enums of what each one has, and the choice ([`probe`]). The enums dispatch
//! without indirect calls, because queue and reader are on the path of every request.
#![forbid(unsafe_code)]

mod binding;
pub mod fuse_loop;
mod queue;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};

use crate::error::Result;
#[cfg(test)]
use crate::lives::transport::{SimBinding, SimQueue, SimReader, SimSession};
use crate::sys::arena::{Arena, Span};
use crate::sys::ring::Ring;

pub use self::binding::{Binding, BlockBinding, Patience, Wanted};
use self::fuse_loop::binding::LoopBinding;
use self::fuse_loop::connection::FuseSession;
use self::fuse_loop::queue::{FuseQueue, FuseReader};
pub use self::queue::{
    Connection, Geometry, HEAD, KernelRequest, Limits, Op, QueueReader, ReadError, Recovery, Reply, RequestQueue, TAGS,
};

/// The transports, in the order in which they are preferred.
#[cfg(not(test))]
const ALL: [Transport; 1] = [Transport::FuseLoop];
#[cfg(test)]
const ALL: [Transport; 2] = [Transport::Simulated, Transport::FuseLoop];

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// A loop device over a FUSE file. Servers that knew no other did not name it.
    #[default]
    FuseLoop,
    /// Of the simulation of whole lives.
    #[cfg(test)]
    Simulated,
}

/// The transport for a new device: the first that this kernel offers. If it seems to offer none, attaching by the last
/// one says what is missing.
pub fn probe() -> Transport {
    let [.., last] = ALL;
    ALL.into_iter().find(|t| t.is_offered()).unwrap_or(last)
}

/// Removes from a device's folder what an exited server has left there of any transport.
pub fn clean(dir: &Path) -> Result<()> {
    ALL.into_iter().try_for_each(|t| match t {
        Transport::FuseLoop => FuseQueue::clean(dir),
        #[cfg(test)]
        Transport::Simulated => SimQueue::clean(dir),
    })
}

/// The names that transports give to files in a device's folder.
pub const FILES: [&str; 1] = [fuse_loop::DISK];

impl Transport {
    fn is_offered(self) -> bool {
        match self {
            Transport::FuseLoop => fuse_loop::is_offered(),
            #[cfg(test)]
            Transport::Simulated => crate::sys::host::is_simulated(),
        }
    }

    /// The one whose block device has this name in /sys/block.
    pub fn of(backing: &str) -> Transport {
        match backing {
            _ if backing.starts_with(fuse_loop::BLOCK_DEVICES) => Transport::FuseLoop,
            #[cfg(test)]
            _ if backing.starts_with(crate::lives::BLOCK_DEVICES) => Transport::Simulated,
            _ => Transport::default(),
        }
    }

    pub fn binding(self) -> &'static dyn BlockBinding {
        match self {
            Transport::FuseLoop => &LoopBinding,
            #[cfg(test)]
            Transport::Simulated => &SimBinding,
        }
    }

    /// See [`RequestQueue::create`].
    pub fn create(self, dir: &Path, image: &str, journal: bool) -> Result<Connection<Session>> {
        match self {
            Transport::FuseLoop => FuseQueue::create(dir, image, journal).map(|c| c.map(Session::FuseLoop)),
            #[cfg(test)]
            Transport::Simulated => SimQueue::create(dir, image, journal).map(|c| c.map(Session::Simulated)),
        }
    }

    /// See [`RequestQueue::hide`].
    pub fn hide(self, dir: &Path) -> Result<()> {
        match self {
            Transport::FuseLoop => FuseQueue::hide(dir),
            #[cfg(test)]
            Transport::Simulated => SimQueue::hide(dir),
        }
    }

    /// See [`RequestQueue::discard`].
    pub fn discard(self, dir: &Path) {
        match self {
            Transport::FuseLoop => FuseQueue::discard(dir),
            #[cfg(test)]
            Transport::Simulated => SimQueue::discard(dir),
        }
    }
}

/// What a worker has to know of the connection it serves. Untagged in messages: a new variant must have a required
/// field that no other variant has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Session {
    FuseLoop(FuseSession),
    #[cfg(test)]
    Simulated(SimSession),
}

impl Session {
    pub fn transport(&self) -> Transport {
        match self {
            Session::FuseLoop(_) => Transport::FuseLoop,
            #[cfg(test)]
            Session::Simulated(_) => Transport::Simulated,
        }
    }

    pub fn limits(&self) -> Limits {
        match self {
            Session::FuseLoop(_) => FuseQueue::LIMITS,
            #[cfg(test)]
            Session::Simulated(_) => SimQueue::LIMITS,
        }
    }

    pub fn recovery(&self) -> Recovery {
        match self {
            Session::FuseLoop(s) => FuseQueue::recovery(s),
            #[cfg(test)]
            Session::Simulated(s) => SimQueue::recovery(s),
        }
    }
}

/// The queue of a device; the methods are those of [`RequestQueue`].
#[derive(Debug)]
pub enum Queue {
    FuseLoop(FuseQueue),
    #[cfg(test)]
    Simulated(SimQueue),
}

impl Queue {
    pub fn open(queue: OwnedFd, session: Session) -> Queue {
        match session {
            Session::FuseLoop(s) => Queue::FuseLoop(FuseQueue::open(queue, s)),
            #[cfg(test)]
            Session::Simulated(s) => Queue::Simulated(SimQueue::open(queue, s)),
        }
    }

    pub fn read(&self, arena: &Arena, head: &mut [u8; HEAD], data: Span) -> std::result::Result<usize, ReadError> {
        match self {
            Queue::FuseLoop(q) => q.read(arena, head, data),
            #[cfg(test)]
            Queue::Simulated(q) => q.read(arena, head, data),
        }
    }

    pub fn read_words(&self, arena: &Arena, head: &[AtomicU64], data: Span) -> std::result::Result<usize, ReadError> {
        match self {
            Queue::FuseLoop(q) => q.read_words(arena, head, data),
            #[cfg(test)]
            Queue::Simulated(q) => q.read_words(arena, head, data),
        }
    }

    pub fn parse(&self, head: &[u8; HEAD], len: usize) -> Option<KernelRequest> {
        match self {
            Queue::FuseLoop(q) => q.parse(head, len),
            #[cfg(test)]
            Queue::Simulated(q) => q.parse(head, len),
        }
    }

    pub fn parse_kept(&self, head: &[u8; HEAD]) -> Option<KernelRequest> {
        match self {
            Queue::FuseLoop(q) => q.parse_kept(head),
            #[cfg(test)]
            Queue::Simulated(q) => q.parse_kept(head),
        }
    }

    pub fn stable_id(&self, unique: u64) -> u64 {
        match self {
            Queue::FuseLoop(q) => q.stable_id(unique),
            #[cfg(test)]
            Queue::Simulated(q) => q.stable_id(unique),
        }
    }

    pub fn reply(&self, arena: &Arena, unique: u64, reply: Reply) -> io::Result<()> {
        match self {
            Queue::FuseLoop(q) => q.reply(arena, unique, reply),
            #[cfg(test)]
            Queue::Simulated(q) => q.reply(arena, unique, reply),
        }
    }

    pub fn answer_own(&self, request: &KernelRequest, geometry: &Geometry) -> io::Result<()> {
        match self {
            Queue::FuseLoop(q) => q.answer_own(request, geometry),
            #[cfg(test)]
            Queue::Simulated(q) => q.answer_own(request, geometry),
        }
    }

    pub fn resend(&self) -> io::Result<()> {
        match self {
            Queue::FuseLoop(q) => q.resend(),
            #[cfg(test)]
            Queue::Simulated(q) => q.resend(),
        }
    }

    /// What one I/O thread keeps of the queue.
    pub fn reader(&self) -> Reader<'_> {
        match self {
            Queue::FuseLoop(q) => Reader::FuseLoop(q, FuseReader::default()),
            #[cfg(test)]
            Queue::Simulated(q) => Reader::Simulated(q, SimReader),
        }
    }
}

/// An I/O thread's part of a queue; the methods are those of [`QueueReader`].
#[derive(Debug)]
pub enum Reader<'a> {
    FuseLoop(&'a FuseQueue, FuseReader),
    #[cfg(test)]
    Simulated(&'a SimQueue, SimReader),
}

impl Reader<'_> {
    pub fn arm(&mut self, ring: &mut Ring) -> io::Result<()> {
        match self {
            Reader::FuseLoop(q, r) => r.arm(q, ring),
            #[cfg(test)]
            Reader::Simulated(q, r) => r.arm(q, ring),
        }
    }

    pub fn on_completion(&mut self, tag: u64) -> bool {
        match self {
            Reader::FuseLoop(_, r) => r.on_completion(tag),
            #[cfg(test)]
            Reader::Simulated(_, r) => r.on_completion(tag),
        }
    }

    pub fn quiesce(&mut self, ring: &mut Ring) -> io::Result<bool> {
        match self {
            Reader::FuseLoop(_, r) => r.quiesce(ring),
            #[cfg(test)]
            Reader::Simulated(_, r) => r.quiesce(ring),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Workers of other versions get and leave it.
    #[test]
    fn a_session_has_the_form_it_always_had() {
        let text = r#"{"minor":45,"max_write":1048576,"flags":549755813888}"#;
        let session: Session = serde_json::from_str(text).unwrap();
        assert_eq!(session, Session::FuseLoop(FuseSession { minor: 45, max_write: 1 << 20, flags: 1 << 39, depth: 0 }));
        assert_eq!(serde_json::to_string(&session).unwrap(), text);
        assert_eq!(session.recovery(), Recovery::Kernel);
    }

    #[test]
    fn a_block_device_tells_its_transport() {
        assert_eq!(Transport::of("loop10000"), Transport::FuseLoop);
        assert!(crate::sys::host::is_simulated() || probe() == Transport::FuseLoop);
    }
}
