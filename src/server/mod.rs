//! The process that serves one device on a stock kernel: supervisor, worker, control protocol, transports.

pub mod control;
pub mod daemon;
pub mod descriptors;
mod exclusion;
pub mod frame;
pub mod freeze;
pub mod give_back;
pub mod greeting;
pub mod helper;
pub mod jobs;
pub mod kernel_log;
pub mod mounts;
pub mod nodes;
pub mod partitions;
pub mod proto;
pub mod remote_error;
pub mod roles;
pub mod runtime;
pub mod shm;
pub mod spawn;
pub mod supervisor;
pub mod sysfs;
pub mod transport;
pub mod uevents;
pub mod unflushed;
pub mod worker;
pub mod worker_process;
