//! The process that serves one device on a stock kernel: supervisor, worker, control protocol, transports.

pub mod frame;
pub mod fuse;
pub mod proto;
pub mod shm;
