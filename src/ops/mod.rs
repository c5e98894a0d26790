//! One file per operation that a user knows: each orders its durable steps and undoes what it did when one fails.

#![forbid(unsafe_code)]

pub mod check;
pub mod compact;
pub mod convert;
mod convert_recovery;
pub mod create;
mod delete_leaf;
pub mod deleted;
pub mod device_chain;
mod disk_lock;
pub mod doctor;
pub mod find;
pub mod fstab;
pub mod grow;
mod image_copy;
mod image_set;
pub mod info;
pub mod list;
pub mod merge;
pub mod merge_temporary;
pub mod mount;
mod mount_images;
pub mod online;
mod orphans;
mod partition;
mod private_folder;
mod recovery;
pub mod reload;
pub mod replace;
pub mod resize;
pub mod restore;
pub mod restore_folder;
mod scratch;
pub mod snapshot;
pub mod snapshot_list;
pub mod switch;
mod temporary_snapshot;
pub mod tour;
pub mod umount;
pub mod umount_all;

#[cfg(test)]
mod convert_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
pub(crate) mod testkit;
#[cfg(test)]
mod tree_tests;
