//! The file operations of one I/O thread: started in its ring, continued where they fell short, ended for the engine.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use crate::engine::api::{Action, BAT_PAGE, Errno, OpId};
use crate::sys::arena::Span;
use crate::sys::ring::Ring;

use super::core::{Core, IoSubmitter, Pending};
use super::memory::BufId;
use super::pool::Stash;

/// Operations handed over in one system call.
const RING: u32 = 256;

/// What a file operation is for.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    Data(OpId),
    /// Reading a page of a BAT into this buffer; so many bytes are wanted.
    ReadBat(OpId, Span, u32),
    /// Writing a page of the BAT from this buffer.
    WriteBat(OpId, Span),
}

/// A file operation in the ring.
#[derive(Clone, Copy, Debug)]
struct InflightIo {
    purpose: Purpose,
    level: u8,
    write: bool,
    /// What is left to be transferred.
    span: Span,
    file_off: u64,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug)]
pub enum IoResult {
    /// It goes on.
    Continued,
    Done(Pending),
}

pub struct Files {
    pub ring: Ring,
    pub stash: Stash,
    /// A buffer was freed since this was looked at.
    pub freed: bool,
    inflight: Vec<InflightIo>,
    /// Numbers of inflight that have landed.
    idle: Vec<u32>,
    pages: Vec<Span>,
    /// Pages whose content the engine sees with the next step.
    shown: Vec<Span>,
    /// What waits for a page buffer.
    waiting: VecDeque<Action>,
    /// The ring refused an operation: nothing can go on.
    broken: Option<io::Error>,
}

impl Files {
    pub fn new(core: &Core, thread: usize) -> io::Result<Files> {
        Ok(Files {
            ring: Ring::new(RING, core.memory.arena.clone())?,
            stash: core.pool.share(),
            freed: false,
            inflight: Vec::with_capacity(1024),
            idle: Vec::with_capacity(1024),
            pages: core.memory.pages(thread),
            shown: Vec::with_capacity(64),
            waiting: VecDeque::with_capacity(64),
            broken: None,
        })
    }

    /// The engine has seen the pages that were read.
    pub fn seen(&mut self) {
        self.pages.append(&mut self.shown);
    }

    /// At the end of a turn: starts what waited for page buffers, gives away what exceeds this thread's share.
    pub fn end_round(&mut self, core: &Core) -> io::Result<()> {
        while !self.pages.is_empty()
            && let Some(action) = self.waiting.pop_front()
        {
            self.start(core, action);
        }
        core.pool.level(&mut self.stash);
        self.broken.take().map_or(Ok(()), Err)
    }

    fn start_io(&mut self, core: &Core, io: InflightIo) {
        let tag = match self.idle.pop() {
            Some(tag) => {
                self.inflight[tag as usize] = io;
                tag
            }
            None => {
                self.inflight.push(io);
                self.inflight.len() as u32 - 1
            }
        };
        self.submit(core, tag);
    }

    fn submit(&mut self, core: &Core, tag: u32) {
        let f = self.inflight[tag as usize];
        let file = core.levels[usize::from(f.level)].file.as_fd();
        let pushed = if f.write {
            self.ring.write(file, f.span, f.file_off, u64::from(tag))
        } else {
            self.ring.read(file, f.span, f.file_off, u64::from(tag))
        };
        if let Err(e) = pushed {
            self.broken.get_or_insert(e);
        }
    }

    /// The operation `tag` has come back from the ring.
    pub fn on_completion(&mut self, core: &Core, tag: u64, result: i32) -> io::Result<IoResult> {
        let Some(f) = self.inflight.get_mut(tag as usize) else {
            return Err(io::Error::other(format!("the ring completed operation {tag}, which was never started")));
        };
        let left = f.span.len;
        let moved = match result {
            n if n >= 0 && n as usize >= left => left,
            n if n > 0 && !core.levels[usize::from(f.level)].direct => n as usize,
            // Direct I/O goes on at a sector.
            n if n >= 512 => n as usize & !511,
            n if -n == libc::EAGAIN || -n == libc::EINTR => 0,
            n => {
                // The end of the file, in the middle of what was wanted or behind it.
                let enough = match f.purpose {
                    Purpose::ReadBat(_, _, len) => n >= 0 && BAT_PAGE - left + n as usize >= len as usize,
                    _ => false,
                };
                let error = if n < 0 { -n } else { libc::EIO };
                return Ok(self.end(tag as u32, if enough { Ok(()) } else { Err(error) }));
            }
        };
        if moved == left {
            return Ok(self.end(tag as u32, Ok(())));
        }
        f.span = f.span.part(moved, left - moved);
        f.file_off += moved as u64;
        self.submit(core, tag as u32);
        Ok(IoResult::Continued)
    }

    fn end(&mut self, tag: u32, result: Result<(), Errno>) -> IoResult {
        self.idle.push(tag);
        IoResult::Done(match self.inflight[tag as usize].purpose {
            Purpose::Data(op) => Pending::Done { op, result },
            Purpose::WriteBat(op, page) => {
                self.pages.push(page);
                Pending::Done { op, result }
            }
            Purpose::ReadBat(op, page, len) => {
                self.shown.push(page);
                Pending::Bat { op, result: result.map(|()| page.part(0, len as usize)) }
            }
        })
    }
}

impl IoSubmitter for Files {
    fn start(&mut self, core: &Core, action: Action) {
        let io = match action {
            Action::Read { op, level, file_off, len, to } => {
                InflightIo { purpose: Purpose::Data(op), level, write: false, span: core.span(to, len), file_off }
            }
            Action::Write { op, level, file_off, len, from } => {
                InflightIo { purpose: Purpose::Data(op), level, write: true, span: core.span(from, len), file_off }
            }
            other => match (other, self.pages.pop()) {
                (Action::ReadBat { op, level, page, len }, Some(span)) => InflightIo {
                    purpose: Purpose::ReadBat(op, span, len),
                    level,
                    write: false,
                    span,
                    file_off: u64::from(page) * BAT_PAGE as u64,
                },
                (Action::WriteBat { op, level, page, data }, Some(span)) => {
                    core.memory.arena.put(span, &data[..]);
                    InflightIo {
                        purpose: Purpose::WriteBat(op, span),
                        level,
                        write: true,
                        span,
                        file_off: u64::from(page) * BAT_PAGE as u64,
                    }
                }
                (other, page) => {
                    self.pages.extend(page);
                    self.waiting.push_back(other);
                    return;
                }
            },
        };
        self.start_io(core, io);
    }

    fn free(&mut self, _core: &Core, buf: BufId, request: u32) {
        self.stash.give(buf, request);
        self.freed = true;
    }
}
