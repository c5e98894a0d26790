//! The process that serves one device on a stock kernel: supervisor, worker, control protocol, transports.

pub mod attach;
mod chain_plan;
pub mod chain_switch;
mod commands;
pub mod control;
pub mod daemon;
pub mod detach;
pub mod frame;
pub mod freeze;
pub mod greeting;
pub mod helper;
mod kernel_log;
mod merge;
pub mod mounts;
pub mod nodes;
pub mod partitions;
pub mod proto;
pub mod remote_error;
pub mod runtime;
pub mod shm;
pub mod spawn;
pub mod supervisor;
pub mod sysfs;
pub mod transport;
pub mod uevents;
pub mod worker;
pub mod worker_process;
