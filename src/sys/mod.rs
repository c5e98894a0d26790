//! System calls, ioctls, aligned buffers, file locks: where `unsafe` lives.

pub mod aligned;
pub mod arena;
pub mod cache;
pub mod calendar;
pub mod cancel;
pub mod console;
pub mod fiemap;
pub mod file_id;
pub mod file_lock;
pub mod freeze;
pub mod host;
pub mod inode_flags;
pub mod loopdev;
pub mod partition;
pub mod pidfd;
pub mod process;
pub mod process_hardening;
pub mod reopen;
pub mod ring;
pub mod scm;
pub mod shared_words;
pub mod signals;
pub mod statx;
pub mod stdio;
pub mod store;
pub mod wait;
