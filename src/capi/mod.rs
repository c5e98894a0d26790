//! The C ABI of the classic `libploop.so.1`: thin functions that check pointers, convert, call [`ops`](crate::ops) and
//! return classic codes. No panic crosses the boundary; memory that callers free comes from malloc.
//!
//! What is exported, by file:
//! - [`descriptor`]: ploop_open_dd, ploop_read_disk_descr, ploop_close_dd, ploop_free_diskdescriptor,
//!   ploop_set_component_name, ploop_get_top_delta_fname, ploop_get_base_delta_fname, ploop_find_parent_by_guid,
//!   ploop_get_base_delta_uuid, ploop_uuid_generate
//! - [`descriptor_files`]: ploop_store_diskdescriptor, ploop_create_dd, ploop_set_max_delta_size
//! - [`devices`]: ploop_get_dev, ploop_get_devs, ploop_is_mounted, ploop_find_dev, ploop_get_dev_by_mnt,
//!   ploop_get_partition_by_mnt, ploop_get_mnt_by_dev, ploop_free_array, ploop_get_info_by_descr, ploop_get_spec,
//!   ploop_get_max_size, ploop_find_top_delta_name_and_format, ploop_is_large_disk_supported,
//!   ploop_complete_running_operation
//! - [`mount`]: ploop_create_image, ploop_mount_image, ploop_mount_snapshot, ploop_umount_image, ploop_umount, and ploop_mount, which the classic
//!   exports without declaring it
//! - [`snapshots`]: ploop_create_snapshot, ploop_create_temporary_snapshot, ploop_delete_snapshot, ploop_delete_top_delta,
//!   ploop_merge_snapshot, ploop_switch_snapshot, ploop_switch_snapshot_ex, ploop_replace_image
//! - [`tools`]: what the classic's own programs use, undeclared: find_image_by_guid, find_snapshot_by_guid,
//!   make_images_list, guidcmp, is_valid_guid, read_line, check_deltas_same, find_level_by_delta, get_delta_info,
//!   create_snapshot, merge_image, replace_delta, ploop_check, check_dd, mntn2str
//! - [`sizes`], [`size_tools`]: ploop_resize_image; undeclared: ploop_grow_image, ploop_grow_delta_offline,
//!   ploop_grow_raw_delta_offline, ploop_restore_descriptor
//! - [`balloon`]: undeclared: get_balloon, ploop_balloon_change_size, ploop_balloon_get_state, ploop_balloon_clear_state,
//!   ploop_balloon_complete, ploop_balloon_check_and_repair
//! - [`discard`], [`discard_tools`]: ploop_discard, ploop_discard_get_stat; undeclared: ploop_discard_by_dev,
//!   ploop_discard_get_stat_by_dev
//! - [`conversions`]: ploop_convert_image; in [`size_tools`], undeclared: ploop_change_fmt_version
//! - [`log`]: ploop_get_last_error, ploop_set_log_file, ploop_set_log_level, ploop_set_verbose_level,
//!   ploop_cancel_operation
//! - [`dynload`]: ploop_resolve_functions, and the table that it fills
//! - [`device_state`], undeclared: ploop_get_attr, ploop_getdevice
//! - `vz`, with the Cargo feature of that name: what the newer line has and the classic has not
//!
//! [`types`] and [`consts`] are the source of the C header, together with these functions and their comments.

// The header has the rules for callers, in C's terms: pointers are NULL or valid, one thread at a time uses an object.
#![allow(clippy::missing_safety_doc)]

pub mod balloon;
mod boundary;
pub mod consts;
pub mod conversions;
mod convert;
pub mod copies;
pub mod descriptor;
pub mod descriptor_files;
pub mod device_state;
pub mod devices;
pub mod discard;
pub mod discard_tools;
pub mod dynload;
mod handle;
pub mod kernel_consts;
pub mod log;
pub mod mount;
pub mod size_tools;
pub mod sizes;
pub mod snapshots;
mod state;
pub mod tools;
pub mod types;
#[cfg(any(feature = "vz", test))]
pub mod vz;
