//! One file per operation that a user knows: each orders its durable steps and undoes what it did when one fails.

#![forbid(unsafe_code)]

pub mod check;
pub mod create;
mod delete_leaf;
pub mod device_chain;
pub mod doctor;
pub mod find;
pub mod fstab;
mod image_copy;
mod image_set;
pub mod info;
pub mod list;
pub mod merge;
mod merge_temporary;
pub mod mount;
mod mount_images;
pub mod online;
mod orphans;
mod partition;
mod recovery;
pub mod reload;
pub mod replace;
mod scratch;
pub mod snapshot;
pub mod snapshot_list;
pub mod switch;
mod temporary_snapshot;
pub mod tour;
pub mod umount;
pub mod umount_all;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
pub(crate) mod testkit;
#[cfg(test)]
mod tree_tests;
