//! The packets of a copy. A stream has no header of its own; each packet is a head of 16 bytes and its payload, numbers in
//! the order of the host:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | [`MARKER`] |
//! | 4 | 4 | length of the payload |
//! | 8 | 8 | where it belongs in the image file, in bytes |
//!
//! Two lengths are commands: 0 ends the stream, 4 asks for a sync (its payload has no meaning, and old receivers write it
//! where it came from). Packets may overlap; the later one counts.
#![forbid(unsafe_code)]

use crate::bail;
use crate::error::Result;

pub const MARKER: u32 = 0x4cc0_ac3d;
pub const HEAD: usize = 16;
/// Length of the payload of a command to sync.
pub const SYNC: u32 = 4;
/// The largest cluster is the largest payload.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// The answers to a command to sync, on the feedback channel.
pub const SUCCESS: &[u8; 8] = b"SUCCESS\n";
pub const FAILURE: &[u8; 8] = b"FAILURE\n";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet {
    End,
    Sync,
    Data { offset: u64, len: u32 },
}

/// What a head says. `Protocol`: it is none, or asks for what no image has.
pub fn parse(head: &[u8; HEAD]) -> Result<Packet> {
    let [marker, len] = [0, 4].map(|at| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
    let [.., a, b, c, d, e, f, g, h] = *head;
    let offset = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    if marker != MARKER {
        bail!(Protocol, "the copy stream has {marker:#010x} where a packet begins, {MARKER:#010x} wanted");
    }
    Ok(match len {
        0 => Packet::End,
        SYNC => Packet::Sync,
        _ if len > MAX_PAYLOAD => {
            bail!(Protocol, "a packet of the copy stream has {len} bytes, at most {MAX_PAYLOAD} (the largest cluster)")
        }
        // Offsets of files are signed.
        _ if offset.checked_add(len.into()).is_none_or(|end| i64::try_from(end).is_err()) => {
            bail!(Protocol, "a packet of the copy stream is for offset {offset}, where no file has bytes")
        }
        _ => Packet::Data { offset, len },
    })
}

/// The head of a packet.
pub fn head(packet: Packet) -> [u8; HEAD] {
    let (offset, len) = match packet {
        Packet::End => (0, 0),
        Packet::Sync => (0, SYNC),
        Packet::Data { offset, len } => (offset, len),
    };
    let mut head = [0; HEAD];
    head[..4].copy_from_slice(&MARKER.to_ne_bytes());
    head[4..8].copy_from_slice(&len.to_ne_bytes());
    head[8..].copy_from_slice(&offset.to_ne_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn heads_are_read_as_they_are_written() {
        for packet in [Packet::End, Packet::Sync, Packet::Data { offset: 1 << 40, len: MAX_PAYLOAD }] {
            assert_eq!(parse(&head(packet)).unwrap(), packet);
        }
        let known = [0x3d, 0xac, 0xc0, 0x4c, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];
        assert_eq!(head(Packet::Data { offset: 65536, len: 512 }), known);
    }

    #[test]
    fn what_no_image_has_is_refused() {
        let end = i64::MAX as u64;
        for (offset, len, wanted) in
            [(end - 512, 512, true), (end - 511, 512, false), (u64::MAX - 8, 512, false), (0, MAX_PAYLOAD + 1, false)]
        {
            let got = parse(&head(Packet::Data { offset, len }));
            assert_eq!(got.is_ok(), wanted, "{offset} {len}");
            assert!(got.err().is_none_or(|e| e.kind() == Kind::Protocol));
        }
        assert!(parse(&[0; HEAD]).unwrap_err().to_string().contains("0x00000000"));
    }
}
