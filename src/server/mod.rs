//! The process that serves one device on a stock kernel: supervisor, worker, control protocol, transports.

pub mod birth;
mod commands;
pub mod control;
pub mod daemon;
pub mod end;
pub mod frame;
pub mod freeze;
pub mod fuse;
pub mod helper;
pub mod loopdev;
mod merge;
pub mod merge_job;
mod merge_levels;
pub mod mounts;
pub mod nodes;
pub mod partitions;
mod plan;
pub mod proto;
pub mod runtime;
pub mod shm;
pub mod spawn;
pub mod supervisor;
pub mod swap;
pub mod uevents;
pub mod worker;
pub mod workers;
