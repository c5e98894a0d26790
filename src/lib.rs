//! libploop: OpenVZ's virtual-disk library on any Linux kernel.
//!
//! A chain of images (a base and its deltas) becomes a block device. The layers below, in the order in which they may
//! call each other (never upwards): `capi` and the commands, [`ops`], [`fs`], [`device`], [`server`], [`engine`],
//! [`chain`], [`image`], [`descriptor`], [`format`], [`sys`]; [`error`], [`units`] and [`report`] serve all.

pub mod capi;
pub mod chain;
pub mod descriptor;
pub mod device;
pub mod engine;
pub mod error;
pub mod format;
pub mod fs;
pub mod image;
#[cfg(test)]
mod lives;
pub mod ops;
pub mod report;
pub mod server;
pub mod sys;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod testing;
pub mod units;

pub use error::{Error, Kind, Result};
