//! A part of a balloon file, as a message.

use serde::{Deserialize, Serialize};

/// A part of a balloon file. The initiator sends the open file with its first piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Bytes of the file that are looked at.
    pub start: u64,
    pub end: u64,
    /// Where the file system begins on the disk, in bytes.
    pub partition: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Bytes of the disk that may be discarded, whole clusters: start and length.
    pub ranges: Vec<(u64, u64)>,
}
