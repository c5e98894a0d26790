//! What a request comes to: an answer at once, or something for the engine.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use crate::engine::api::{Errno, RequestKind};
use crate::server::transport::{KernelRequest, Op, Reply};
use crate::units::SECTOR;

use super::core::Core;
use super::request::{EngineRequest, ReplyKind};

#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    Submit(EngineRequest),
    Reply(Reply),
    /// The queue answers it.
    Own,
    /// No answer may be sent.
    NoReply,
}

/// Looks at a request, which nothing has been done for. An error is its answer.
pub fn dispatch(core: &Core, request: &KernelRequest, resent: bool) -> Result<Verdict, Errno> {
    let reply = |reply| Ok(Verdict::Reply(reply));
    let device_bytes = core.geometry.bytes;
    let (kind, answer, offset, len) = match request.op {
        Op::Read { offset, len } => {
            let len = u64::from(len).min(device_bytes.saturating_sub(offset));
            if len == 0 {
                return reply(Reply::Done);
            }
            (RequestKind::Read, ReplyKind::Read, offset, len)
        }
        Op::Write { offset, len } => {
            let len = u64::from(len);
            within(core, offset, len)?;
            if len == 0 {
                return reply(Reply::Written(0));
            }
            (RequestKind::Write, ReplyKind::Write, offset, len)
        }
        Op::Zero { offset, len } => {
            if !core.writable {
                return Err(libc::EROFS);
            }
            let len = len.min(device_bytes.saturating_sub(offset));
            if len == 0 {
                return reply(Reply::Done);
            }
            (RequestKind::Zero, ReplyKind::Status, offset, len)
        }
        Op::Flush if !core.writable => return reply(Reply::Done),
        Op::Flush => (RequestKind::Flush, ReplyKind::Status, 0, 0),
        Op::Own => return Ok(Verdict::Own),
        Op::NoReply => return Ok(Verdict::NoReply),
        Op::Unsupported(errno) => return Err(errno),
    };
    if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        return Err(libc::EINVAL);
    }
    if core.closing.load(Ordering::Acquire) {
        return Err(libc::EIO);
    }
    let key = core.request_key(request.unique, request.code, offset, len);
    if resent && core.shm.is_poisoned(key) {
        core.log.line(format!(
            "request {} {:?} has caused several worker exits: it fails with EIO",
            request.unique, request.op
        ));
        core.shm.clear_poison(key);
        return Err(libc::EIO);
    }
    if matches!(kind, RequestKind::Read | RequestKind::Write) && len > core.memory.limits.max_io as u64 {
        return Err(libc::EIO);
    }
    Ok(Verdict::Submit(EngineRequest { kind, answer, offset, len, resent }))
}

fn within(core: &Core, offset: u64, len: u64) -> Result<(), Errno> {
    if !core.writable {
        return Err(libc::EROFS);
    }
    match offset.checked_add(len) {
        Some(end) if end <= core.geometry.bytes => Ok(()),
        _ => Err(libc::ENOSPC),
    }
}
