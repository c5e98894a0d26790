//! The worker's threads in the simulation of lives: one that does what all of them do, one thing at a time, in any order.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::engine::api::{Action, BAT_PAGE, Errno, ReqId, Request, RequestKind};
use crate::error::{IoContext, Kind, Result};
use crate::lives::world::world;
use crate::server::transport::{HEAD, KernelRequest, Queue};
use crate::sys::aligned::AlignedBuf;
use crate::sys::arena::Span;
use crate::sys::{host, store};

use super::core::{AuxJob, Core, IoSubmitter, Notice, Pending, THREADS};
use super::dispatch::{Verdict, dispatch};
use super::memory::{BufId, SMALL};
use super::pool::Stash;
use super::replay;
use super::request::EngineRequest;
use super::supervisor_link::SupervisorLink;

/// What [`start_threads`](super::start_threads) does.
pub fn start(link: &SupervisorLink, core: &Arc<Core>, token: u64, resend: bool) -> Result<()> {
    if let Some(journal) = &core.journal {
        if !host::breach("the journal is not given to the supervisor") {
            link.send_journal(journal)?;
        }
        core.shm.set_reading(token);
        replay::replay(core, journal);
    } else if resend && !host::breach("requests are not sent again") {
        core.queue.resend().ctx(Kind::Device, || "the kernel refuses to give out unanswered requests again")?;
    }
    let core = core.clone();
    host::simulated::with(|host| {
        host.thread("io", Box::new(move || Threads::new(&core).run(&core)));
    });
    Ok(())
}

/// Work that was begun.
enum Work {
    File(Action),
    Sync(crate::engine::api::OpId),
    Aux(AuxJob),
}

struct Threads {
    stash: Stash,
    begun: Vec<Work>,
    pending: Vec<Pending>,
    actions: Vec<Action>,
    page: Span,
    quiet: bool,
}

impl Threads {
    fn new(core: &Core) -> Threads {
        let page = core.memory.pages(0)[0];
        Threads {
            stash: core.pool.share(),
            begun: Vec::new(),
            pending: Vec::new(),
            actions: Vec::new(),
            page,
            quiet: false,
        }
    }

    fn run(&mut self, core: &Arc<Core>) {
        loop {
            self.collect(core);
            let retiring = core.retiring.load(Ordering::Acquire);
            let Queue::Simulated(queue) = &core.queue else { panic!("another transport") };
            let may_read = !retiring && queue.has_requests();
            let chosen = world().choose(self.begun.len() + usize::from(may_read));
            if chosen < self.begun.len() {
                let work = self.begun.swap_remove(chosen);
                self.finish(core, work);
            } else if may_read {
                if host::step("read a request").is_err() || !self.read(core) {
                    self.wait(core);
                }
            } else if retiring && !self.quiet {
                self.quiet = true;
                (0..THREADS).for_each(|_| core.notices.push(Notice::Quiet));
            } else {
                self.wait(core);
            }
            self.step(core);
        }
    }

    /// What other threads have left for the I/O threads.
    fn collect(&mut self, core: &Core) {
        let mut actions = Vec::new();
        core.inboxes.iter().for_each(|inbox| inbox.take(&mut actions));
        core.execute(&mut actions, self);
        while let Some(op) = core.syncs.try_pop() {
            self.begun.push(Work::Sync(op));
        }
        for jobs in [&core.aux, &core.background] {
            while let Some(job) = jobs.try_pop() {
                match job {
                    AuxJob::AddBuffers => core.add_buffers(),
                    job => self.begun.push(Work::Aux(job)),
                }
            }
        }
    }

    fn wait(&self, core: &Arc<Core>) {
        let (core, quiet) = (core.clone(), self.quiet);
        let ready = move || {
            let Queue::Simulated(queue) = &core.queue else { return true };
            let retiring = core.retiring.load(Ordering::Acquire);
            core.inboxes.iter().any(|i| i.has_rung())
                || !core.syncs.is_empty()
                || !core.aux.is_empty()
                || !core.background.is_empty()
                || if retiring { !quiet } else { queue.has_requests() }
        };
        host::simulated::with(|host| host.block(Box::new(ready)));
    }

    fn step(&mut self, core: &Core) {
        if self.pending.is_empty() {
            return;
        }
        let (mut pending, mut actions) = (std::mem::take(&mut self.pending), std::mem::take(&mut self.actions));
        core.step(0, &mut pending, &mut actions);
        core.execute(&mut actions, self);
        self.pending.append(&mut pending);
        self.actions = actions;
    }

    /// Does what was begun.
    fn finish(&mut self, core: &Core, work: Work) {
        let done = match work {
            Work::Sync(op) => Pending::Done { op, result: errno(store::sync_data(&core.top().file)) },
            Work::Aux(job) => aux(core, job),
            Work::File(Action::Read { op, level, file_off, len, to }) => {
                let mut bytes = AlignedBuf::new(len as usize);
                let got = read(core, level, &mut bytes, file_off);
                let result = if got < bytes.len() { Err(libc::EIO) } else { Ok(()) };
                core.memory.arena.put(core.span(to, len), &bytes);
                Pending::Done { op, result }
            }
            Work::File(Action::Write { op, level, file_off, len, from }) => {
                let mut bytes = AlignedBuf::new(len as usize);
                core.memory.arena.get(core.span(from, len), &mut bytes);
                Pending::Done { op, result: write(core, level, &bytes, file_off) }
            }
            Work::File(Action::ReadBat { op, level, page, len }) => {
                let mut bytes = AlignedBuf::new(BAT_PAGE);
                let got = read(core, level, &mut bytes, u64::from(page) * BAT_PAGE as u64);
                core.memory.arena.put(self.page, &bytes);
                let enough = got >= len as usize;
                let result = if enough { Ok(self.page.part(0, len as usize)) } else { Err(libc::EIO) };
                self.pending.push(Pending::Bat { op, result });
                // The buffer is used once at a time.
                return self.step(core);
            }
            Work::File(Action::WriteBat { op, level, page, data }) => {
                let mut bytes = AlignedBuf::new(BAT_PAGE);
                bytes.copy_from_slice(&data[..]);
                Pending::Done { op, result: write(core, level, &bytes, u64::from(page) * BAT_PAGE as u64) }
            }
            Work::File(other) => panic!("no work on files: {other:?}"),
        };
        self.pending.push(done);
    }

    /// Reads one request; false: there is none, or no room for one.
    fn read(&mut self, core: &Core) -> bool {
        if self.stash.next().is_none() {
            core.pool.refill(&mut self.stash);
        }
        let Some((big, id)) = self.stash.next() else {
            core.want_buffers();
            return false;
        };
        let span = core.memory.buffer(big);
        let mut head = [0; HEAD];
        let read = match &core.journal {
            None => core.queue.read(&core.memory.arena, &mut head, span),
            Some(journal) => journal.read(&core.queue, id, big, span, &mut head),
        };
        let Ok(len) = read else { return false };
        let request = core.queue.parse(&head, len).expect("a whole request");
        self.accept(core, &request, big, id);
        true
    }

    fn accept(&mut self, core: &Core, from: &KernelRequest, big: BufId, id: u32) {
        match dispatch(core, from, from.resent) {
            Ok(Verdict::Submit(request)) => {
                let buf = self.buffer(core, request.kind, big, request.len as usize);
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

    fn buffer(&mut self, core: &Core, kind: RequestKind, big: BufId, len: usize) -> BufId {
        if matches!(kind, RequestKind::Zero | RequestKind::Flush) {
            self.stash.take_none();
            return BufId::NONE;
        }
        if len <= SMALL
            && let Some(small) = self.stash.take_small()
        {
            let memory = &core.memory;
            memory.arena.copy(memory.buffer(big).part(0, len), memory.buffer(small));
            return small;
        }
        self.stash.take_big();
        big
    }
}

impl IoSubmitter for Threads {
    fn start(&mut self, _core: &Core, action: Action) {
        self.begun.push(Work::File(action));
    }

    fn free(&mut self, _core: &Core, buf: BufId, request: u32) {
        self.stash.give(buf, request);
    }
}

fn errno(result: std::io::Result<()>) -> std::result::Result<(), Errno> {
    result.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
}

fn read(core: &Core, level: u8, bytes: &mut [u8], offset: u64) -> usize {
    if host::step("read a file").is_err() {
        return 0;
    }
    let file = &core.levels[usize::from(level)].file;
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], offset + got as u64) {
            Ok(0) | Err(_) => break,
            Ok(n) => got += n,
        }
    }
    got
}

fn write(core: &Core, level: u8, bytes: &[u8], offset: u64) -> std::result::Result<(), Errno> {
    errno(store::write_all(&core.levels[usize::from(level)].file, bytes, offset))
}

fn aux(core: &Core, job: AuxJob) -> Pending {
    let file = |level: u8| &core.levels[usize::from(level)].file;
    let (op, result) = match job {
        AuxJob::AddBuffers => panic!("no work on files: {job:?}"),
        AuxJob::Fallocate { op, level, file_off, len } => (op, store::fallocate(file(level), file_off, len)),
        AuxJob::Truncate { op, level, len } => (op, store::set_len(file(level), len)),
        AuxJob::ZeroRange { op, level, file_off, len } => {
            (op, store::write_all(file(level), &AlignedBuf::new(len as usize), file_off))
        }
        AuxJob::Sync { op, level } => (op, store::sync_data(file(level))),
        AuxJob::Clone { op, from, from_off, level, file_off, len } => {
            (op, store::clone_range(file(from), from_off, file(level), file_off, len))
        }
    };
    Pending::Done { op, result: errno(result) }
}
