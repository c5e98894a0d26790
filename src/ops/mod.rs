//! One file per operation that a user knows: each orders its durable steps and undoes what it did when one fails.

#![forbid(unsafe_code)]

pub mod balloon;
pub mod check;
pub mod compact;
pub mod compact_running;
pub mod convert;
mod convert_recovery;
pub mod copy;
pub mod create;
mod delete_leaf;
pub mod deleted;
pub mod descriptor_file;
pub mod device_chain;
pub mod discard;
mod disk_lock;
pub mod doctor;
pub mod find;
pub mod fstab;
pub mod give_back;
pub mod grow;
mod image_copy;
mod image_set;
pub mod info;
mod inside;
pub mod list;
pub mod maintenance;
pub mod map;
pub mod map_page;
pub mod max_delta;
pub mod merge;
pub mod merge_temporary;
pub mod mount;
mod mount_images;
mod mount_levels;
pub mod online;
mod orphans;
mod partition;
mod partition_table;
mod private_folder;
mod recovery;
pub mod reload;
pub mod replace;
pub mod resize;
pub mod resize_balloon;
pub mod restore;
pub mod restore_folder;
mod scratch;
pub mod shrink;
pub mod snapshot;
pub mod snapshot_list;
pub mod stat;
pub mod stopped;
pub mod switch;
mod temporary_snapshot;
pub mod tour;
mod trim;
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
