//! What is inside a disk: file systems made and checked by helper programs, mounts, the balloon
//! file.

#![forbid(unsafe_code)]

pub mod balloon;
pub mod elsewhere;
pub mod helper;
pub mod holders;
pub mod mkfs;
pub mod mount;
pub mod mounts;
pub mod probe;
pub mod resize;
pub mod stat;
mod twins;
pub mod utab;
