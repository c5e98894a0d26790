//! Frames on the sockets between library, supervisor and worker.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use ploop::error::{Kind, Result};
use ploop::server::frame;
use ploop::server::proto::{Answer, AttachRequest, Command, DeviceRecord, FromWorker, ToWorker};
use ploop::server::remote_error::RemoteError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Target;
use crate::mutate::Rng;

pub struct Messages {
    pair: (OwnedFd, OwnedFd),
}

impl Messages {
    pub fn new() -> Messages {
        Messages { pair: frame::pair().expect("sockets") }
    }

    /// Receives what was sent as this kind of message.
    fn receive<T: DeserializeOwned + Serialize>(
        &mut self,
        input: &[u8],
        fds: &[i32],
    ) -> std::result::Result<bool, Kind> {
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &control[..] };
        let sent =
            sendmsg::<()>(self.pair.0.as_raw_fd(), &[IoSlice::new(input)], control, MsgFlags::MSG_DONTWAIT, None);
        if sent.is_err() {
            // Longer than the kernel takes: nobody has to bear it.
            return Ok(false);
        }
        let got: Result<Option<(T, Vec<OwnedFd>)>> = frame::recv_within(&self.pair.1, Duration::from_secs(5));
        match got {
            Ok(Some((value, _fds))) => {
                // What was understood can be said again.
                let said = serde_json::to_vec(&value).expect("encodes");
                let again: T = serde_json::from_slice(&said).expect("decodes");
                assert_eq!(serde_json::to_vec(&again).expect("encodes"), said);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(e) => Err(e.kind()),
        }
    }
}

impl Target for Messages {
    const NAME: &'static str = "message";
    const WORDS: usize = 9;

    fn seeds(&self) -> Vec<Vec<u8>> {
        let record = DeviceRecord { name: "ploop0".into(), ids: vec![(1, 2).into()], ..DeviceRecord::default() };
        let record = String::from_utf8(encode(&record)).expect("text");
        let info = format!("{{\"Info\":{{\"record\":{record},\"no_space\":true,\"failed\":false}}}}");
        let mut seeds: Vec<Vec<u8>> =
            [Command::Info, Command::Stop, Command::HoldForSpace(true)].iter().map(encode).collect();
        seeds.extend([info.into_bytes(), encode(&Answer::Error { code: 3, message: "busy".into() })]);
        seeds.extend([
            encode(&ToWorker::Close),
            encode(&FromWorker::Flushed { error: Some(RemoteError { code: 5, message: "x".into() }) }),
        ]);
        seeds
    }

    fn words(&self) -> &'static [&'static [u8]] {
        &[
            b"\"Info\"",
            b"\"Stop\"",
            b"\"Abort\"",
            b"null",
            b"true",
            b"[",
            b"]",
            b"{",
            b"}",
            b"\"",
            b"\\u0000",
            b"\\ud800",
            b"1e999",
            b"-0",
            b"18446744073709551616",
            b":",
            b",",
            b"[[[[[[[[[[[[[[[[",
            b"\"levels\":",
            b"\"path\":",
        ]
    }

    fn run(&mut self, input: &[u8], rng: &mut Rng) -> String {
        // An empty message is the end of a connection.
        if input.is_empty() {
            return String::new();
        }
        let fds = vec![self.pair.0.as_raw_fd(); rng.mostly(50, 3, 300)];
        let fds = &fds[..fds.len().min(253)];
        let all = [
            self.receive::<Command>(input, fds),
            self.receive::<Answer>(input, &[]),
            self.receive::<AttachRequest>(input, fds),
            self.receive::<ToWorker>(input, &[]),
            self.receive::<FromWorker>(input, &[]),
            self.receive::<DeviceRecord>(input, &[]),
        ];
        for got in &all {
            if let Err(kind) = got {
                assert_eq!(*kind, Kind::Protocol, "a message that is not understood");
            }
        }
        // What it is taken for, and how the decoder judged it.
        let why = |e: serde_json::Error| e.to_string().split(" at line").next().unwrap_or_default().to_owned();
        let judged = serde_json::from_slice::<Command>(input).map_or_else(why, |_| "command".into());
        let answer = serde_json::from_slice::<Answer>(input).map_or_else(why, |_| "answer".into());
        let as_what: Vec<&str> = all.iter().map(|a| if *a == Ok(true) { "yes" } else { "no" }).collect();
        format!("{} {judged} / {answer}", as_what.join(" "))
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("encodes")
}
