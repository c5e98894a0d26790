//! An I/O thread: reads requests from the queue, feeds the engine, does the file I/O by its ring, answers.
//!
//! One turn takes whatever is there: completions, requests, work from other threads; locks the engine once; and hands
//! all new operations to the kernel in one system call, which also waits. No request lies unread while a thread with
//! buffers sleeps: its reader of the queue is armed after a read found nothing and completes at once if something has
//! come since; a thread that stops for want of buffers wakes the other one, and the thread that frees a buffer then
//! looks again.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use crate::engine::api::{Action, ReqId, Request, RequestKind};
use crate::server::transport::{HEAD, KernelRequest, ReadError, Reader, TAGS};
use crate::sys::ring::Completion;

use super::core::{Core, Notice, Pending, THREADS};
use super::dispatch::{Verdict, dispatch};
use super::files::{Files, IoResult};
use super::memory::{BufId, SMALL};
use super::request::EngineRequest;

/// Requests read in one turn; the answers of the first must not wait for ever.
const BATCH: usize = 32;

const TAG_INBOX: u64 = u64::MAX;

/// Why reading requests ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Drained {
    /// Nothing more is there.
    Empty,
    /// Enough for this turn.
    Batch,
    /// No buffers.
    Starved,
    /// The connection has ended.
    Over,
}

pub struct IoThread<'a> {
    core: &'a Core,
    number: usize,
    files: Files,
    pending: Vec<Pending>,
    reader: Reader<'a>,
    /// Requests may be there.
    may_read: bool,
    /// The main thread knows that no more requests are read.
    quiet: bool,
}

impl<'a> IoThread<'a> {
    /// For the calling thread, which must go on to [`run`](Self::run).
    pub fn new(core: &'a Core, number: usize) -> io::Result<IoThread<'a>> {
        let files = Files::new(core, number)?;
        Ok(IoThread {
            core,
            number,
            files,
            pending: Vec::with_capacity(512),
            reader: core.queue.reader(),
            may_read: true,
            quiet: false,
        })
    }

    /// Serves until the process ends. An error is one of the ring itself, with which nothing can go on.
    pub fn run(&mut self) -> io::Result<()> {
        let mut done: Vec<Completion> = Vec::with_capacity(1024);
        let mut actions: Vec<Action> = Vec::with_capacity(1024);
        self.files.ring.poll_in(self.core.inboxes[self.number].as_fd(), false, TAG_INBOX)?;
        loop {
            if self.core.retiring.load(Ordering::Acquire) {
                self.stop_reading()?;
            } else if self.may_read {
                self.read_requests()?;
            }
            if !self.pending.is_empty() {
                self.core.step(self.number, &mut self.pending, &mut actions);
                self.files.seen();
            }
            self.core.shm.note_alive();
            self.core.execute(&mut actions, &mut self.files);
            self.files.end_round(self.core)?;
            if self.files.freed && self.core.starving.load(Ordering::Acquire) {
                self.may_read = true;
            }
            self.files.freed = false;
            self.files.ring.submit(usize::from(!self.may_read))?;
            self.files.ring.completions(&mut done);
            for c in done.drain(..) {
                match c.tag {
                    tag if TAGS.contains(&tag) => self.may_read |= self.reader.on_completion(tag),
                    TAG_INBOX => {
                        let inbox = &self.core.inboxes[self.number];
                        inbox.take(&mut actions);
                        self.may_read = true;
                        self.files.ring.poll_in(inbox.as_fd(), false, TAG_INBOX)?;
                    }
                    tag => match self.files.on_completion(self.core, tag, c.result)? {
                        IoResult::Continued => {}
                        IoResult::Done(p) => self.pending.push(p),
                    },
                }
            }
        }
    }

    /// Reads requests, and makes sure that a thread notices the next ones.
    fn read_requests(&mut self) -> io::Result<()> {
        match self.drain() {
            Drained::Batch => {}
            Drained::Empty => {
                self.may_read = false;
                self.reader.arm(&mut self.files.ring)?;
            }
            Drained::Starved => {
                if self.core.status().no_space {
                    self.grow();
                } else {
                    self.core.want_buffers();
                }
                if !self.core.starving.swap(true, Ordering::AcqRel) {
                    self.core.inboxes[(self.number + 1) % THREADS].ring();
                }
                // Something may have been given back between the last look and the flag.
                self.core.pool.refill(&mut self.files.stash);
                self.may_read = self.files.stash.next().is_some();
            }
            Drained::Over => self.may_read = false,
        }
        Ok(())
    }

    /// Reads no more requests, and leaves nothing behind that would take one from the successor.
    fn stop_reading(&mut self) -> io::Result<()> {
        self.may_read = false;
        if !self.quiet && self.reader.quiesce(&mut self.files.ring)? {
            self.quiet = true;
            self.core.notices.push(Notice::Quiet);
        }
        Ok(())
    }

    /// What waits for space must not keep other requests from being read.
    fn grow(&mut self) {
        match self.core.pool.add_for_waiting(&self.core.memory) {
            Ok(_) => {}
            Err(e) => self.core.log.line(format!("no memory for more requests while writes wait for space: {e}")),
        }
    }

    fn drain(&mut self) -> Drained {
        let core = self.core;
        let mut head = [0; HEAD];
        for _ in 0..BATCH {
            if self.files.stash.next().is_none() {
                core.pool.refill(&mut self.files.stash);
            }
            let Some((big, id)) = self.files.stash.next() else {
                return Drained::Starved;
            };
            let span = core.memory.buffer(big);
            let read = match &core.journal {
                None => core.queue.read(&core.memory.arena, &mut head, span),
                Some(journal) => journal.read(&core.queue, id, big, span, &mut head),
            };
            let len = match read {
                Ok(len) => {
                    if !core.active.load(Ordering::Relaxed) {
                        core.active.store(true, Ordering::Relaxed);
                    }
                    len
                }
                Err(ReadError::Empty) => {
                    core.starving.store(false, Ordering::Release);
                    return Drained::Empty;
                }
                Err(ReadError::Over) => return Drained::Over,
                Err(ReadError::Again) => continue,
                Err(ReadError::Failed(e)) => {
                    core.log.line(format!("cannot read a request from the kernel: {e}"));
                    continue;
                }
            };
            match core.queue.parse(&head, len) {
                Some(request) => self.accept(&request, big, id),
                None => {
                    core.log.line(format!("a request of {len} bytes from the kernel is not understood: {head:?}"));
                    core.forget(id);
                }
            }
        }
        Drained::Batch
    }

    /// Answers a request or makes it known to the engine. `big` holds the data of a write; it and the number `id` are
    /// the next ones of the stash, which are taken here if they are needed.
    fn accept(&mut self, from: &KernelRequest, big: BufId, id: u32) {
        let core = self.core;
        if core.log.trace {
            core.log.line(format!("request {} {:?}", from.unique, from.op));
        }
        match dispatch(core, from, from.resent) {
            Ok(Verdict::Submit(request)) => {
                let buf = self.choose_buffer(request.kind, big, request.len as usize);
                core.register(id, from, &request, buf);
                let EngineRequest { kind, offset, len, .. } = request;
                self.pending.push(Pending::Request(Request { id: ReqId(id), kind, offset, len }));
                return;
            }
            Ok(Verdict::Reply(reply)) => core.send(from.unique, reply),
            Ok(Verdict::Own) => core.answer_own(from),
            Ok(Verdict::NoReply) => {}
            Err(errno) => core.refuse(id, from.unique, errno),
        }
        core.forget(id);
    }

    /// A buffer for a request: a small one if that is enough, so that the big one is free for the next request.
    fn choose_buffer(&mut self, kind: RequestKind, big: BufId, len: usize) -> BufId {
        if matches!(kind, RequestKind::Zero | RequestKind::Flush) {
            self.files.stash.take_none();
            return BufId::NONE;
        }
        if len <= SMALL
            && let Some(small) = self.files.stash.take_small()
        {
            if kind == RequestKind::Write {
                let memory = &self.core.memory;
                memory.arena.copy(memory.buffer(big).part(0, len), memory.buffer(small));
            }
            return small;
        }
        self.files.stash.take_big();
        big
    }
}
