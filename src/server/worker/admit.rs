//! What a request comes to: an answer at once, or something for the engine.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use crate::engine::api::{Errno, RequestKind};
use crate::server::fuse::{Head, MAX_IO, Op, Reply};
use crate::server::shm::RequestKey;
use crate::units::SECTOR;

use super::core::{Answer, Core};

/// FALLOCATE modes that mean "reads as zero": punch a hole, zero the range; both keep the size.
const PUNCH: u32 = 0x03;
const ZERO: u32 = 0x11;

/// What the engine is to be asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    pub kind: RequestKind,
    pub answer: Answer,
    pub offset: u64,
    pub len: u64,
    /// An earlier worker had it and did not answer it.
    pub again: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    Ask(Asked),
    Say(Reply),
    /// No answer may be sent.
    Nothing,
}

/// Looks at a request, which nothing has been done for. An error is its answer.
pub fn admit(core: &Core, head: &Head, again: bool) -> Result<Verdict, Errno> {
    let unique = head.unique;
    let say = |reply| Ok(Verdict::Say(reply));
    let (kind, answer, offset, len) = match head.op {
        Op::Read { offset, len } => {
            let len = u64::from(len).min(core.device_bytes.saturating_sub(offset));
            if len == 0 {
                return say(Reply::status(unique, 0));
            }
            (RequestKind::Read, Answer::Read, offset, len)
        }
        Op::Write { offset, len } => {
            let len = u64::from(len);
            within(core, offset, len)?;
            if len == 0 {
                return say(Reply::written(unique, 0));
            }
            (RequestKind::Write, Answer::Write, offset, len)
        }
        Op::Fallocate { mode, .. } if mode != PUNCH && mode != ZERO => return Err(libc::EOPNOTSUPP),
        Op::Fallocate { offset, len, .. } => {
            if !core.writable {
                return Err(libc::EROFS);
            }
            let len = len.min(core.device_bytes.saturating_sub(offset));
            if len == 0 {
                return say(Reply::status(unique, 0));
            }
            (RequestKind::Zero, Answer::Status, offset, len)
        }
        Op::Fsync if !core.writable => return say(Reply::status(unique, 0)),
        Op::Fsync => (RequestKind::Flush, Answer::Status, 0, 0),
        Op::GetAttr => return say(Reply::attr(unique, core.device_bytes)),
        Op::Open => return say(Reply::open(unique)),
        Op::StatFs => return say(Reply::statfs(unique, core.device_bytes, core.block_bytes)),
        Op::Nothing => return say(Reply::status(unique, 0)),
        Op::NoReply => return Ok(Verdict::Nothing),
        Op::Unknown => return Err(libc::ENOSYS),
    };
    if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        return Err(libc::EINVAL);
    }
    if core.closing.load(Ordering::Acquire) {
        return Err(libc::EIO);
    }
    let key = RequestKey::new(unique, head.opcode, offset, len);
    if again && core.shm.struck_out(key, &core.strikes) {
        core.log.say(format!("request {unique} {:?} has killed several workers: it fails", head.op));
        core.shm.forgive(key);
        return Err(libc::EIO);
    }
    if matches!(kind, RequestKind::Read | RequestKind::Write) && len > MAX_IO as u64 {
        return Err(libc::EIO);
    }
    Ok(Verdict::Ask(Asked { kind, answer, offset, len, again }))
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
