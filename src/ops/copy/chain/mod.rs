//! Moving a disk with all its snapshots: `ploop send` and `ploop receive`.
//!
//! The stream ([`stream`]) is this program's own and cannot be taken for the one of `ploop copy`: it begins with other bytes,
//! and each end speaks of the two only the one whose command it was given.

#[cfg(test)]
mod change_tests;
mod half;
mod incoming;
pub mod kept;
mod local;
mod names;
mod on_disk;
mod outgoing;
pub mod receive;
#[cfg(test)]
mod resume_tests;
pub mod send;
mod stamp;
pub mod stream;
#[cfg(test)]
mod tests;

pub use local::copy_here;
pub use receive::{Arrived, list_kept, receive_by_number};
pub use send::{Options, send_by_number};
