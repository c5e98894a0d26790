//! The I/O engine: read, write, zero, flush, allocation, copy-on-write.
//!
//! A machine without threads, clocks or files: [`api`] says what goes in and what comes out.

pub mod api;
