//! The table for programs that load the library by dlopen(): its header, dynload.h, is made from this file.

#![allow(non_camel_case_types)]

use super::types::{
    ploop_copy_receive_param, ploop_copy_send_param, ploop_create_param, ploop_discard_param, ploop_discard_stat,
    ploop_disk_images_data, ploop_info, ploop_merge_param, ploop_mount_param, ploop_replace_param, ploop_resize_param,
    ploop_snapshot_param, ploop_snapshot_switch_param, ploop_spec, ploop_tsnapshot_param,
};
use super::{conversions, copies, descriptor, descriptor_files, devices, discard, log, mount, sizes, snapshots};
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

/// The functions of libploop.h by their names without ploop_. A new function takes the first element of padding; order
/// and size never change.
#[repr(C)]
pub struct ploop_functions {
    pub read_disk_descr:
        Option<unsafe extern "C" fn(di: *mut *mut ploop_disk_images_data, file: *const c_char) -> c_int>,
    pub set_component_name:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, component_name: *const c_char) -> c_int>,
    pub free_diskdescriptor: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data)>,
    pub get_base_delta_uuid: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data) -> *mut c_char>,
    pub get_top_delta_fname:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, out: *mut c_char, len: c_int) -> c_int>,
    pub store_diskdescriptor:
        Option<unsafe extern "C" fn(fname: *const c_char, di: *mut ploop_disk_images_data) -> c_int>,
    pub find_dev: Option<
        unsafe extern "C" fn(
            component_name: *const c_char,
            delta: *const c_char,
            buf: *mut c_char,
            size: c_int,
        ) -> c_int,
    >,
    pub get_dev_by_mnt: Option<unsafe extern "C" fn(path: *const c_char, buf: *mut c_char, size: c_int) -> c_int>,
    pub get_mnt_by_dev: Option<unsafe extern "C" fn(dev: *const c_char, buf: *mut c_char, size: c_int) -> c_int>,
    pub get_dev: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, out: *mut c_char, len: c_int) -> c_int>,
    pub get_partition_by_mnt: Option<unsafe extern "C" fn(path: *const c_char, buf: *mut c_char, size: c_int) -> c_int>,
    pub create_image: Option<unsafe extern "C" fn(param: *mut ploop_create_param) -> c_int>,
    pub mount_image:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_mount_param) -> c_int>,
    pub mount_snapshot:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_mount_param) -> c_int>,
    pub umount: Option<unsafe extern "C" fn(device: *const c_char, di: *mut ploop_disk_images_data) -> c_int>,
    pub umount_image: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data) -> c_int>,
    pub resize_image:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_resize_param) -> c_int>,
    pub convert_image:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, mode: c_int, flags: c_int) -> c_int>,
    pub get_info_by_descr: Option<unsafe extern "C" fn(descr: *const c_char, info: *mut ploop_info) -> c_int>,
    pub create_snapshot:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_snapshot_param) -> c_int>,
    pub merge_snapshot:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_merge_param) -> c_int>,
    pub switch_snapshot:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, uuid: *const c_char, flags: c_int) -> c_int>,
    pub delete_snapshot: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, guid: *const c_char) -> c_int>,
    pub delete_top_delta: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data) -> c_int>,
    pub find_top_delta_name_and_format: Option<
        unsafe extern "C" fn(
            device: *const c_char,
            image: *mut c_char,
            image_size: usize,
            format: *mut c_char,
            format_size: usize,
        ) -> c_int,
    >,
    pub find_parent_by_guid:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, guid: *const c_char) -> *mut c_char>,
    pub uuid_generate: Option<unsafe extern "C" fn(uuid: *mut c_char, len: c_int) -> c_int>,
    pub get_last_error: Option<unsafe extern "C" fn() -> *const c_char>,
    pub set_log_file: Option<unsafe extern "C" fn(fname: *const c_char) -> c_int>,
    pub set_log_level: Option<unsafe extern "C" fn(level: c_int)>,
    pub set_verbose_level: Option<unsafe extern "C" fn(level: c_int)>,
    pub cancel_operation: Option<unsafe extern "C" fn()>,
    pub send: Option<
        unsafe extern "C" fn(device: *const c_char, ofd: c_int, flush_cmd: *const c_char, is_pipe: c_int) -> c_int,
    >,
    pub receive: Option<unsafe extern "C" fn(dst: *const c_char) -> c_int>,
    pub discard_get_stat:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, pd_stat: *mut ploop_discard_stat) -> c_int>,
    pub discard:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_discard_param) -> c_int>,
    pub switch_snapshot_ex:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_snapshot_switch_param) -> c_int>,
    pub complete_running_operation: Option<unsafe extern "C" fn(device: *const c_char) -> c_int>,
    pub is_large_disk_supported: Option<unsafe extern "C" fn() -> c_int>,
    pub get_spec: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, spec: *mut ploop_spec) -> c_int>,
    pub get_devs: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, out: *mut *mut *mut c_char) -> c_int>,
    pub free_array: Option<unsafe extern "C" fn(array: *mut *mut c_char)>,
    pub replace_image:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, param: *mut ploop_replace_param) -> c_int>,
    pub open_dd: Option<unsafe extern "C" fn(di: *mut *mut ploop_disk_images_data, fname: *const c_char) -> c_int>,
    pub close_dd: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data)>,
    pub create_temporary_snapshot: Option<
        unsafe extern "C" fn(
            di: *mut ploop_disk_images_data,
            param: *mut ploop_tsnapshot_param,
            holder_fd: *mut c_int,
        ) -> c_int,
    >,
    pub is_mounted: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data) -> c_int>,
    pub copy_send: Option<unsafe extern "C" fn(arg: *mut ploop_copy_send_param) -> c_int>,
    pub copy_receive: Option<unsafe extern "C" fn(arg: *mut ploop_copy_receive_param) -> c_int>,
    pub get_max_size: Option<unsafe extern "C" fn(blocksize: c_uint, max: *mut c_ulonglong) -> c_int>,
    pub create_dd: Option<unsafe extern "C" fn(ddxml: *const c_char, param: *mut ploop_create_param) -> c_int>,
    pub set_max_delta_size: Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, size: c_ulonglong) -> c_int>,
    pub get_base_delta_fname:
        Option<unsafe extern "C" fn(di: *mut ploop_disk_images_data, out: *mut c_char, len: c_int) -> c_int>,
    /// Left alone by ploop_resolve_functions().
    pub padding: [*mut c_void; 11],
}

/// Stores the address of each function in *f; padding is left alone. NULL is ignored.
#[unsafe(no_mangle)]
#[allow(deprecated)]
pub unsafe extern "C" fn ploop_resolve_functions(f: *mut ploop_functions) {
    // SAFETY: the caller's struct of 64 pointers, NULL or valid and used by this thread alone.
    let Some(f) = (unsafe { f.as_mut() }) else { return };
    f.read_disk_descr = Some(descriptor::ploop_read_disk_descr);
    f.set_component_name = Some(descriptor::ploop_set_component_name);
    f.free_diskdescriptor = Some(descriptor::ploop_free_diskdescriptor);
    f.get_base_delta_uuid = Some(descriptor::ploop_get_base_delta_uuid);
    f.get_top_delta_fname = Some(descriptor::ploop_get_top_delta_fname);
    f.store_diskdescriptor = Some(descriptor_files::ploop_store_diskdescriptor);
    f.find_dev = Some(devices::ploop_find_dev);
    f.get_dev_by_mnt = Some(devices::ploop_get_dev_by_mnt);
    f.get_mnt_by_dev = Some(devices::ploop_get_mnt_by_dev);
    f.get_dev = Some(devices::ploop_get_dev);
    f.get_partition_by_mnt = Some(devices::ploop_get_partition_by_mnt);
    f.create_image = Some(mount::ploop_create_image);
    f.mount_image = Some(mount::ploop_mount_image);
    f.mount_snapshot = Some(mount::ploop_mount_snapshot);
    f.umount = Some(mount::ploop_umount);
    f.umount_image = Some(mount::ploop_umount_image);
    f.resize_image = Some(sizes::ploop_resize_image);
    f.convert_image = Some(conversions::ploop_convert_image);
    f.get_info_by_descr = Some(devices::ploop_get_info_by_descr);
    f.create_snapshot = Some(snapshots::ploop_create_snapshot);
    f.merge_snapshot = Some(snapshots::ploop_merge_snapshot);
    f.switch_snapshot = Some(snapshots::ploop_switch_snapshot);
    f.delete_snapshot = Some(snapshots::ploop_delete_snapshot);
    f.delete_top_delta = Some(snapshots::ploop_delete_top_delta);
    f.find_top_delta_name_and_format = Some(devices::ploop_find_top_delta_name_and_format);
    f.find_parent_by_guid = Some(descriptor::ploop_find_parent_by_guid);
    f.uuid_generate = Some(descriptor::ploop_uuid_generate);
    f.get_last_error = Some(log::ploop_get_last_error);
    f.set_log_file = Some(log::ploop_set_log_file);
    f.set_log_level = Some(log::ploop_set_log_level);
    f.set_verbose_level = Some(log::ploop_set_verbose_level);
    f.cancel_operation = Some(log::ploop_cancel_operation);
    f.send = Some(copies::ploop_send);
    f.receive = Some(copies::ploop_receive);
    f.discard_get_stat = Some(discard::ploop_discard_get_stat);
    f.discard = Some(discard::ploop_discard);
    f.switch_snapshot_ex = Some(snapshots::ploop_switch_snapshot_ex);
    f.complete_running_operation = Some(devices::ploop_complete_running_operation);
    f.is_large_disk_supported = Some(devices::ploop_is_large_disk_supported);
    f.get_spec = Some(devices::ploop_get_spec);
    f.get_devs = Some(devices::ploop_get_devs);
    f.free_array = Some(devices::ploop_free_array);
    f.replace_image = Some(snapshots::ploop_replace_image);
    f.open_dd = Some(descriptor::ploop_open_dd);
    f.close_dd = Some(descriptor::ploop_close_dd);
    f.create_temporary_snapshot = Some(snapshots::ploop_create_temporary_snapshot);
    f.is_mounted = Some(devices::ploop_is_mounted);
    f.copy_send = Some(copies::ploop_copy_send);
    f.copy_receive = Some(copies::ploop_copy_receive);
    f.get_max_size = Some(devices::ploop_get_max_size);
    f.create_dd = Some(descriptor_files::ploop_create_dd);
    f.set_max_delta_size = Some(descriptor_files::ploop_set_max_delta_size);
    f.get_base_delta_fname = Some(descriptor::ploop_get_base_delta_fname);
}
