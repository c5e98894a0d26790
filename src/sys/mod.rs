//! System calls, ioctls, aligned buffers, file locks: where `unsafe` lives.

pub mod calendar;
pub mod pidfd;
pub mod scm;
pub mod stdio;

pub mod aligned;
pub mod fiemap;
pub mod statx;
