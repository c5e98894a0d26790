//! System calls, ioctls, aligned buffers, file locks: where `unsafe` lives.

pub mod aligned;
pub mod arena;
pub mod calendar;
pub mod calm;
pub mod fiemap;
pub mod pidfd;
pub mod ring;
pub mod scm;
pub mod statx;
pub mod stdio;
pub mod words;
