//! A request for the engine, and how it is answered.
#![forbid(unsafe_code)]

use crate::engine::api::RequestKind;

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

/// How the answer to a request looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum ReplyKind {
    /// The data.
    Read = 0,
    /// The number of bytes.
    Write = 1,
    /// Nothing.
    Status = 2,
}
