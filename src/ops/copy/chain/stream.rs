//! The stream between `ploop send` and `ploop receive`; numbers are little-endian. It begins with [`MAGIC`] and the version, 32
//! bits. Then records follow, each a head of 64 bytes and its payload:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | kind, see [`Kind`] |
//! | 4 | 4 | number of the file, which counts the records of kind 1 from 0 |
//! | 8 | 8 | offset in the file |
//! | 16 | 8 | bytes of the file that it is about |
//! | 24 | 4 | bytes of payload |
//! | 28 | 4 | 0 |
//! | 32 | 32 | BLAKE3 of the record's number, counted from 0 (8 bytes), of the 32 bytes before, and of the payload |
//!
//! | kind | payload | meaning |
//! |---|---|---|
//! | 1 file | its name | a file begins; one of that name that has begun before begins anew |
//! | 2 data | the bytes | of at most one block of the file ([`BLOCK`]), at its offset |
//! | 3 packed | the bytes as a zstd frame | the same |
//! | 4 zero | none | bytes that are zero, at most [`MAX_ZERO`] |
//! | 5 same | BLAKE3 of the bytes | a whole block that the receiver has from an earlier try; it looks whether that is so |
//! | 6 sync | none | what has come is to be written to the disk |
//! | 7 close | none | the file is whole, with the length "bytes of the file"; all that no record was about is a hole |
//! | 8 end | DiskDescriptor.xml | the disk is whole; offset: records before this one, bytes: sum of those in kinds 2 to 5 |
//!
//! Later records about the same bytes count. What is lost, repeated, changed or reordered on the way is noticed by the record's
//! sum, a stream that is cut by its missing end.
#![forbid(unsafe_code)]

use crate::bail;
use crate::error::{Error, Kind as Code, Result};

/// Its first bytes are those of no packet of `ploop copy`.
pub const MAGIC: &[u8; 12] = b"ploop-chain\0";
pub const VERSION: u32 = 1;
pub const START: usize = MAGIC.len() + 4;
pub const HEAD: usize = 64;
const SUMMED: usize = 32;
/// A file is compared and resumed in blocks of this size.
pub const BLOCK: u64 = 1 << 20;
pub const MAX_ZERO: u64 = 64 << 20;
/// As of a descriptor that is read from a file.
pub const MAX_DESCRIPTOR: u32 = 16 << 20;
/// Of a file; its name in a folder can have no more.
pub const MAX_NAME: u32 = 255;
/// Of a file: more than twice the largest disk of the format, so that its tables are in it, too.
pub const MAX_LEN: u64 = 1 << 59;
/// A disk's tree is smaller.
pub const MAX_FILES: u32 = 1 << 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    File = 1,
    Data = 2,
    Packed = 3,
    Zero = 4,
    Same = 5,
    Sync = 6,
    Close = 7,
    End = 8,
}

/// A head without its sum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    pub kind: Kind,
    pub file: u32,
    pub offset: u64,
    pub bytes: u64,
    pub payload: u32,
}

pub type Sum = [u8; 32];

/// What the stream begins with.
pub fn start() -> [u8; START] {
    let mut start = [0; START];
    start[..MAGIC.len()].copy_from_slice(MAGIC);
    start[MAGIC.len()..].copy_from_slice(&VERSION.to_le_bytes());
    start
}

/// `Protocol`: another stream, or a later version of this one.
pub fn check_start(start: &[u8; START]) -> Result<()> {
    let (magic, version) = start.split_at(MAGIC.len());
    if magic.starts_with(&super::super::wire::MARKER.to_ne_bytes()) {
        bail!(Protocol, "this is the stream of ploop copy -s, one image: receive it with ploop copy -d FILE");
    }
    if magic != MAGIC {
        bail!(Protocol, "the stream begins with {:?}, that of ploop send with {:?}", shown(magic), shown(MAGIC));
    }
    if version != VERSION.to_le_bytes() {
        bail!(Protocol, "the stream has version {version:?}, this program takes {VERSION}: install a newer one here");
    }
    Ok(())
}

fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

impl Record {
    fn encode(&self) -> [u8; SUMMED] {
        let mut head = [0; SUMMED];
        head[..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        head[4..8].copy_from_slice(&self.file.to_le_bytes());
        head[8..16].copy_from_slice(&self.offset.to_le_bytes());
        head[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        head[24..28].copy_from_slice(&self.payload.to_le_bytes());
        head
    }

    /// The head, as the record of this number with this payload.
    pub fn head(&self, number: u64, payload: &[u8]) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let summed = self.encode();
        head[..SUMMED].copy_from_slice(&summed);
        head[SUMMED..].copy_from_slice(&sum_of(number, &summed, payload));
        head
    }

    /// What a head says, before its payload has come. `Protocol`: it asks for what no sender sends.
    pub fn parse(head: &[u8; HEAD]) -> Result<Record> {
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let kind = match word(0) {
            1 => Kind::File,
            2 => Kind::Data,
            3 => Kind::Packed,
            4 => Kind::Zero,
            5 => Kind::Same,
            6 => Kind::Sync,
            7 => Kind::Close,
            8 => Kind::End,
            other => bail!(Protocol, "the stream has a record of kind {other}, 1 to 8 are known: it is damaged"),
        };
        let record = Record { kind, file: word(4), offset: long(8), bytes: long(16), payload: word(24) };
        match record.is_sound() && word(28) == 0 {
            true => Ok(record),
            false => Err(Error::new(
                Code::Protocol,
                format!("the stream has {record:?}, which no ploop send makes: it is damaged"),
            )),
        }
    }

    fn is_sound(&self) -> bool {
        let Record { kind, file, offset, bytes, payload } = *self;
        let in_a_file = offset.checked_add(bytes).is_some_and(|end| end <= MAX_LEN);
        let in_a_block = bytes > 0 && offset % BLOCK + bytes <= BLOCK;
        match kind {
            Kind::File => file < MAX_FILES && payload > 0 && payload <= MAX_NAME,
            Kind::Data => in_a_file && in_a_block && u64::from(payload) == bytes,
            Kind::Packed => in_a_file && in_a_block && payload > 0 && u64::from(payload) < bytes,
            Kind::Zero => in_a_file && bytes > 0 && bytes <= MAX_ZERO && payload == 0,
            Kind::Same => in_a_file && in_a_block && offset % BLOCK == 0 && payload as usize == size_of::<Sum>(),
            Kind::Sync => payload == 0,
            Kind::Close => offset == 0 && in_a_file && payload == 0,
            Kind::End => payload > 0 && payload <= MAX_DESCRIPTOR,
        }
    }

    /// `Protocol`: head or payload are not what was sent.
    pub fn check(&self, number: u64, head: &[u8; HEAD], payload: &[u8]) -> Result<()> {
        let wanted = sum_of(number, &self.encode(), payload);
        if wanted[..] != head[SUMMED..] {
            bail!(
                Protocol,
                "record {number} of the stream ({:?}, offset {}) has another BLAKE3 sum than its bytes: the stream was \
                 damaged on the way; send again",
                self.kind,
                self.offset
            );
        }
        Ok(())
    }
}

fn sum_of(number: u64, head: &[u8; SUMMED], payload: &[u8]) -> Sum {
    let mut sum = blake3::Hasher::new();
    sum.update(&number.to_le_bytes());
    sum.update(head);
    sum.update(payload);
    *sum.finalize().as_bytes()
}

/// The sum of a block's bytes, by which the two ends compare what they have.
pub fn block_sum(bytes: &[u8]) -> Sum {
    *blake3::hash(bytes).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: Record = Record { kind: Kind::Data, file: 3, offset: BLOCK, bytes: 5, payload: 5 };

    #[test]
    fn heads_are_read_as_they_are_written() {
        let head = DATA.head(7, b"bytes");
        assert_eq!(Record::parse(&head).unwrap(), DATA);
        DATA.check(7, &head, b"bytes").unwrap();
        for (number, payload) in [(8, b"bytes"), (7, b"bytez")] {
            let e = DATA.check(number, &head, payload).unwrap_err();
            assert!(e.kind() == Code::Protocol && e.to_string().contains("BLAKE3"), "{e}");
        }
        // Each bit of the head counts.
        for bit in 0..HEAD * 8 {
            let mut bad = head;
            bad[bit / 8] ^= 1 << (bit % 8);
            let noticed = Record::parse(&bad).and_then(|r| r.check(7, &bad, b"bytes"));
            assert!(noticed.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_no_sender_sends_is_refused() {
        let same = Record { kind: Kind::Same, bytes: BLOCK, payload: 32, ..DATA };
        let zero = Record { kind: Kind::Zero, bytes: MAX_ZERO, payload: 0, ..DATA };
        let good = [
            same,
            zero,
            Record { bytes: BLOCK, payload: BLOCK as u32, ..DATA },
            Record { kind: Kind::Packed, bytes: 100, payload: 99, ..DATA },
            Record { kind: Kind::File, payload: MAX_NAME, ..DATA },
            Record { kind: Kind::Close, offset: 0, bytes: MAX_LEN, payload: 0, ..DATA },
            Record { kind: Kind::End, payload: MAX_DESCRIPTOR, ..DATA },
        ];
        let bad = [
            Record { bytes: 4, ..DATA },
            Record { bytes: 0, payload: 0, ..DATA },
            Record { offset: BLOCK - 1, ..DATA },
            Record { bytes: BLOCK + 1, payload: BLOCK as u32 + 1, ..DATA },
            Record { offset: i64::MAX as u64 - 3, ..DATA },
            Record { offset: MAX_LEN - 4, ..DATA },
            Record { offset: u64::MAX, ..DATA },
            Record { kind: Kind::Packed, bytes: 100, payload: 100, ..DATA },
            Record { bytes: MAX_ZERO + 1, ..zero },
            Record { payload: 1, ..zero },
            Record { offset: 1, bytes: BLOCK - 1, ..same },
            Record { payload: 31, ..same },
            Record { kind: Kind::File, payload: 0, ..DATA },
            Record { kind: Kind::File, payload: MAX_NAME + 1, ..DATA },
            Record { kind: Kind::File, file: MAX_FILES, payload: 4, ..DATA },
            Record { kind: Kind::Close, offset: 0, bytes: u64::MAX, payload: 0, ..DATA },
            Record { kind: Kind::Close, offset: 0, bytes: MAX_LEN + 1, payload: 0, ..DATA },
            Record { kind: Kind::End, payload: MAX_DESCRIPTOR + 1, ..DATA },
        ];
        for record in good {
            assert_eq!(Record::parse(&record.head(0, b"")).unwrap(), record);
        }
        for record in bad {
            assert_eq!(Record::parse(&record.head(0, b"")).unwrap_err().kind(), Code::Protocol, "{record:?}");
        }
    }

    #[test]
    fn other_streams_are_named() {
        check_start(&start()).unwrap();
        let mut copy = [0; START];
        copy[..4].copy_from_slice(&0x4cc0_ac3du32.to_ne_bytes());
        assert!(check_start(&copy).unwrap_err().to_string().contains("ploop copy -d"));
        assert!(check_start(b"GET / HTTP/1.1\r\n").unwrap_err().to_string().contains("GET / HTTP/1"));
        let mut later = start();
        later[MAGIC.len()] = 2;
        assert!(check_start(&later).unwrap_err().to_string().contains("newer"));
        // The receiver of ploop copy knows this stream for another one, too.
        let begin = u32::from_ne_bytes([MAGIC[0], MAGIC[1], MAGIC[2], MAGIC[3]]);
        assert_ne!(begin, crate::ops::copy::wire::MARKER);
        assert_ne!(begin, 0x4cc0_ac3e);
    }
}
