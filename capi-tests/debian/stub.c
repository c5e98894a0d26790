/*
 * Uses every function and every struct of the headers, so that abidiff sees them all when this file is built against two sets
 * of headers. Only the debugging information counts: nothing of it runs.
 */
#include <string.h>
#include <sys/types.h>
#include <linux/types.h>

#define PLOOP_DEPRECATED
#include <ploop/libploop.h>
#include <ploop/dynload.h>
#include <ploop/ploop_if.h>
#include <ploop/ploop1_image.h>

#define USE(function) __typeof__(function) *const use_##function = function

USE(ploop_open_dd);
USE(ploop_close_dd);
USE(ploop_free_diskdescriptor);
USE(ploop_read_disk_descr);
USE(ploop_find_parent_by_guid);
USE(ploop_get_base_delta_uuid);
USE(ploop_set_component_name);
USE(ploop_get_top_delta_fname);
USE(ploop_get_base_delta_fname);
USE(ploop_uuid_generate);
USE(ploop_get_dev);
USE(ploop_get_devs);
USE(ploop_is_mounted);
USE(ploop_free_array);
USE(ploop_find_dev);
USE(ploop_get_dev_by_mnt);
USE(ploop_get_partition_by_mnt);
USE(ploop_get_mnt_by_dev);
USE(ploop_find_top_delta_name_and_format);
USE(ploop_is_large_disk_supported);
USE(ploop_complete_running_operation);
USE(ploop_get_info_by_descr);
USE(ploop_get_spec);
USE(ploop_get_max_size);
USE(ploop_create_image);
USE(ploop_mount_image);
USE(ploop_mount_snapshot);
USE(ploop_umount_image);
USE(ploop_umount);
USE(ploop_create_snapshot);
USE(ploop_create_temporary_snapshot);
USE(ploop_delete_snapshot);
USE(ploop_delete_top_delta);
USE(ploop_merge_snapshot);
USE(ploop_switch_snapshot_ex);
USE(ploop_switch_snapshot);
USE(ploop_replace_image);
USE(ploop_get_last_error);
USE(ploop_set_log_file);
USE(ploop_set_log_level);
USE(ploop_set_verbose_level);
USE(ploop_cancel_operation);
USE(ploop_resize_image);
USE(ploop_convert_image);
USE(ploop_copy_send);
USE(ploop_send);
USE(ploop_copy_receive);
USE(ploop_receive);
USE(ploop_discard);
USE(ploop_discard_get_stat);
USE(ploop_store_diskdescriptor);
USE(ploop_create_dd);
USE(ploop_set_max_delta_size);
USE(ploop_resolve_functions);

USE(CalcSectors);
USE(CalcHeads);
USE(ConvertToCHSLow);
USE(ConvertToPureLBA);
USE(ConvertToCHS);
USE(GetHeaderSize);
USE(ploop1_signature);
USE(ploop1_version);
USE(put_SizeInSectors);
USE(get_SizeInSectors);
USE(generate_pvd_header);

struct ploop_image_data a_ploop_image_data;
struct ploop_snapshot_data a_ploop_snapshot_data;
struct ploop_disk_images_data a_ploop_disk_images_data;
struct ploop_info a_ploop_info;
struct ploop_spec a_ploop_spec;
struct ploop_create_param a_ploop_create_param;
struct ploop_mount_param a_ploop_mount_param;
struct ploop_snapshot_param a_ploop_snapshot_param;
struct ploop_tsnapshot_param a_ploop_tsnapshot_param;
struct ploop_merge_param a_ploop_merge_param;
struct ploop_snapshot_switch_param a_ploop_snapshot_switch_param;
struct ploop_replace_param a_ploop_replace_param;
struct ploop_resize_param a_ploop_resize_param;
struct ploop_copy_send_param a_ploop_copy_send_param;
struct ploop_copy_receive_param a_ploop_copy_receive_param;
struct ploop_discard_param a_ploop_discard_param;
struct ploop_discard_stat a_ploop_discard_stat;
struct ploop_copy_param a_ploop_copy_param;
struct ploop_copy_stat a_ploop_copy_stat;
struct ploop_functions a_ploop_functions;
struct ploop_ctl_chunk a_ploop_ctl_chunk;
struct ploop_ctl a_ploop_ctl;
struct ploop_ctl_delta a_ploop_ctl_delta;
struct ploop_truncate_ctl a_ploop_truncate_ctl;
struct reloc_map a_reloc_map;
struct ploop_index_update_ctl a_ploop_index_update_ctl;
struct ploop_freeblks_ctl_extent a_ploop_freeblks_ctl_extent;
struct ploop_freeblks_ctl a_ploop_freeblks_ctl;
struct ploop_relocblks_ctl_extent a_ploop_relocblks_ctl_extent;
struct ploop_relocblks_ctl a_ploop_relocblks_ctl;
struct ploop_balloon_ctl a_ploop_balloon_ctl;
struct ploop_getdevice_ctl a_ploop_getdevice_ctl;
struct ploop_track_extent a_ploop_track_extent;
struct ploop_pvd_header a_ploop_pvd_header;
struct CHSData a_CHSData;
enum ploop_image_mode an_ploop_image_mode;
enum ploop_create_flags an_ploop_create_flags;
enum ploop_replace_flags an_ploop_replace_flags;
