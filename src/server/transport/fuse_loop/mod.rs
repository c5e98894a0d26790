//! A loop device over a FUSE file: the transport of kernels that offer nothing better.
//!
//! The file is the whole disk. It is mounted over a regular file in the device's folder until the loop device is bound
//! to it; from then on the loop device alone holds it.
#![forbid(unsafe_code)]

pub mod binding;
pub mod connection;
pub mod loop_device;
pub mod protocol;
pub mod queue;

use std::path::Path;

/// The file in a device's folder that is mounted over.
pub const DISK: &str = "disk";

/// How the names of the block devices begin.
pub const BLOCK_DEVICES: &str = "loop";

/// This kernel, and this /dev, offer it.
pub fn is_offered() -> bool {
    Path::new("/dev/fuse").exists()
}
