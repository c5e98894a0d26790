//! What a worker does with the requests that the one before has left in its journal.
#![forbid(unsafe_code)]

use crate::bail;
use crate::engine::api::{Errno, ReqId, Request};
use crate::error::Result;
use crate::server::transport::{KernelRequest, Op, Reply};

use super::core::{Core, DeferToIoThread, MAIN_THREAD, Pending};
use super::dispatch::{Verdict, dispatch};
use super::request::EngineRequest;
use super::request_journal::{PriorJournal, RequestJournal};

/// Makes the requests of the worker before our own; nothing is done for them yet.
pub fn import(core: &Core, left: &PriorJournal) -> Result<()> {
    let Some(journal) = &core.journal else {
        bail!(Protocol, "requests of the worker before were sent to one that keeps none")
    };
    left.copy(journal, &core.queue, &core.memory, &core.pool)
}

/// Answers or executes what was imported. No thread reads requests yet, and the supervisor has our journal.
pub fn replay(core: &Core, journal: &RequestJournal) {
    let (mut pending, mut actions) = (Vec::new(), Vec::new());
    for row in journal.filled() {
        let Some(from) = row.request(&core.queue) else { continue };
        let verdict = match row.done {
            Some(result) => Ok(Verdict::Reply(repeated(&from, result))),
            None => dispatch(core, &from, true),
        };
        match verdict {
            Ok(Verdict::Submit(request)) => {
                core.register(row.id, &from, &request, row.buf);
                let EngineRequest { kind, offset, len, .. } = request;
                pending.push(Pending::Request(Request { id: ReqId(row.id), kind, offset, len }));
                continue;
            }
            Ok(Verdict::Reply(reply)) => core.send(from.unique, reply),
            Ok(Verdict::Own) => core.answer_own(&from),
            Ok(Verdict::NoReply) => {}
            Err(errno) => core.refuse(row.id, from.unique, errno),
        }
        core.forget(row.id);
        core.give(row.buf, row.id);
    }
    core.step(MAIN_THREAD, &mut pending, &mut actions);
    core.execute(&mut actions, &mut DeferToIoThread);
}

/// The answer to a request that was executed before.
fn repeated(request: &KernelRequest, result: std::result::Result<(), Errno>) -> Reply {
    match (request.op, result) {
        (Op::Write { len, .. }, Ok(())) => Reply::Written(len),
        (_, Ok(())) => Reply::Done,
        (_, Err(errno)) => Reply::Error(errno),
    }
}
