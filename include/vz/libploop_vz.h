/*
 * Functions of the newer line of the library (Virtuozzo) beside those of the classic: of a library built with the Cargo
 * feature vz. Generated from src/capi.
 */

#ifndef _LIBPLOOP_VZ_H_
#define _LIBPLOOP_VZ_H_

#include <ploop/libploop.h>

/* Size and use of a disk's file system, and its nodes. */
struct ploop_fs_info {
    struct ploop_info fs;
    /* Node of the disk; "": not attached. */
    char dev[64];
    /* Node of its file system. */
    char part[64];
};

#ifdef __cplusplus
extern "C" {
#endif

/* Reads the descriptor of di again, without its lock. di is empty after an error, which is -1. */
int ploop_read_dd(struct ploop_disk_images_data *di);

/*
 * Stores the node with the file system of device dev, its partition if it has one, in partname, a buffer of len bytes. di may
 * be NULL. Too short: SYSEXIT_PARAM; no such device: SYSEXIT_DEVICE.
 */
int ploop_get_part(struct ploop_disk_images_data *di, const char *dev, char *partname, int len);

/*
 * Stores the node of device dev in devname, a buffer of dlen bytes, and that of ploop_get_part() in partname, one of plen.
 * di may be NULL.
 */
int ploop_get_devname(struct ploop_disk_images_data *di, const char *dev, char *devname, int dlen, char *partname, int plen);

/*
 * Stores size and use of the file system of the disk with descriptor descr, and its nodes, in the first size bytes of *info;
 * what is not known is 0. Attached and not mounted: SYSEXIT_FSTAT, with the nodes.
 */
int ploop_get_fs_info(const char *descr, struct ploop_fs_info *info, int size);

/*
 * Stores the paths of the image files of device devname, base first, in *names: an array that ends in NULL, for
 * ploop_free_array(). No such device: SYSEXIT_DEVICE, and *names is NULL.
 */
int ploop_get_names(const char *devname, char ***names);

/*
 * Remembers size and use of the file system that is mounted at mnt beside image, for ploop_get_info_by_descr(). Returns 0
 * or -1.
 */
int ploop_store_statfs_info(const char *mnt, char *image);

/* ploop_create_snapshot() of a disk that is not attached. Attached: SYSEXIT_PARAM. */
int ploop_create_snapshot_offline(struct ploop_disk_images_data *di, struct ploop_snapshot_param *param);

#ifdef __cplusplus
}
#endif

#endif /* _LIBPLOOP_VZ_H_ */
