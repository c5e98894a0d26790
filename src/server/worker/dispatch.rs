//! What a request comes to: an answer at once, or something for the engine.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use crate::engine::api::{Errno, RequestKind};
use crate::server::fuse::{Head, MAX_IO, Op, Reply};
use crate::server::shm::RequestKey;
use crate::units::SECTOR;

use super::core::{Core, ReplyKind};

/// FALLOCATE modes that mean "reads as zero": punch a hole, zero the range; both keep the size.
const PUNCH: u32 = 0x03;
const ZERO: u32 = 0x11;

/// A request for the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineRequest {
    pub kind: RequestKind,
    pub answer: ReplyKind,
    pub offset: u64,
    pub len: u64,
    /// An earlier worker had it and did not answer it.
    pub resent: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    Submit(EngineRequest),
    Reply(Reply),
    /// No answer may be sent.
    NoReply,
}

/// Looks at a request, which nothing has been done for. An error is its answer.
pub fn dispatch(core: &Core, head: &Head, resent: bool) -> Result<Verdict, Errno> {
    let unique = head.unique;
    let reply = |reply| Ok(Verdict::Reply(reply));
    let (kind, answer, offset, len) = match head.op {
        Op::Read { offset, len } => {
            let len = u64::from(len).min(core.device_bytes.saturating_sub(offset));
            if len == 0 {
                return reply(Reply::status(unique, 0));
            }
            (RequestKind::Read, ReplyKind::Read, offset, len)
        }
        Op::Write { offset, len } => {
            let len = u64::from(len);
            within(core, offset, len)?;
            if len == 0 {
                return reply(Reply::written(unique, 0));
            }
            (RequestKind::Write, ReplyKind::Write, offset, len)
        }
        Op::Fallocate { mode, .. } if mode != PUNCH && mode != ZERO => return Err(libc::EOPNOTSUPP),
        Op::Fallocate { offset, len, .. } => {
            if !core.writable {
                return Err(libc::EROFS);
            }
            let len = len.min(core.device_bytes.saturating_sub(offset));
            if len == 0 {
                return reply(Reply::status(unique, 0));
            }
            (RequestKind::Zero, ReplyKind::Status, offset, len)
        }
        Op::Fsync if !core.writable => return reply(Reply::status(unique, 0)),
        Op::Fsync => (RequestKind::Flush, ReplyKind::Status, 0, 0),
        Op::GetAttr => return reply(Reply::attr(unique, core.device_bytes)),
        Op::Open => return reply(Reply::open(unique)),
        Op::StatFs => return reply(Reply::statfs(unique, core.device_bytes, core.block_bytes)),
        Op::Nothing => return reply(Reply::status(unique, 0)),
        Op::NoReply => return Ok(Verdict::NoReply),
        Op::Unknown => return Err(libc::ENOSYS),
    };
    if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        return Err(libc::EINVAL);
    }
    if core.closing.load(Ordering::Acquire) {
        return Err(libc::EIO);
    }
    let key = RequestKey::new(unique, head.opcode, offset, len);
    if resent && core.shm.is_poisoned(key, &core.poison_counts) {
        core.log.line(format!("request {unique} {:?} has caused several worker exits: it fails with EIO", head.op));
        core.shm.clear_poison(key);
        return Err(libc::EIO);
    }
    if matches!(kind, RequestKind::Read | RequestKind::Write) && len > MAX_IO as u64 {
        return Err(libc::EIO);
    }
    Ok(Verdict::Submit(EngineRequest { kind, answer, offset, len, resent }))
}

fn within(core: &Core, offset: u64, len: u64) -> Result<(), Errno> {
    if !core.writable {
        return Err(libc::EROFS);
    }
    match offset.checked_add(len) {
        Some(end) if end <= core.device_bytes => Ok(()),
        _ => Err(libc::ENOSPC),
    }
}
