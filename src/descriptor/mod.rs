//! DiskDescriptor.xml: which images make up a disk, and the tree of its snapshots.

#![forbid(unsafe_code)]

mod commit;
pub mod commit_by_fd;
mod lock;
mod model;
mod parse;
mod tree;
mod write;
mod xml;

pub use commit::{rename_new, sync_folder};
pub use lock::{LockedDescriptor, lock_path};
pub use model::{Descriptor, Image, ImageMode, Layout, ReverseMerge, Snapshot};

/// Name of the descriptor in an image's folder.
pub const FILE_NAME: &str = "DiskDescriptor.xml";

#[cfg(test)]
mod tests;
