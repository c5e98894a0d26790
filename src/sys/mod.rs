//! System calls, ioctls, aligned buffers, file locks: where `unsafe` lives.

pub mod scm;
