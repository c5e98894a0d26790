//! Copying the top image of a running disk to another file or machine: the stream of `ploop copy`, as libploop 1.12 to 1.15
//! speak it; and moving a whole disk ([`chain`]), in a stream of its own.

pub mod chain;
mod output;
mod reader;
pub mod receive;
pub mod send;
#[cfg(test)]
mod send_tests;
pub mod sink;
#[cfg(test)]
mod tests;
pub mod wire;

pub use receive::{Received, receive, receive_by_number};
pub use send::{Sent, send_by_number, send_to_file};
