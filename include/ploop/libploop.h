/*
 * libploop: OpenVZ ploop disk images. C interface of libploop.so.1, link with -lploop.
 *
 * Generated from src/capi; the functions' rules in short: 0 is success where nothing else is said, other values are
 * SYSEXIT codes (below); structs for parameters are zeroed first, then filled; strings are borrowed for the call.
 */

#ifndef _LIBPLOOP_H_
#define _LIBPLOOP_H_

#include <sys/types.h>
#include <linux/types.h>

/* Marks old functions; may be defined before, for example to nothing. */
#ifndef PLOOP_DEPRECATED
#if defined(__GNUC__) || defined(__clang__)
#define PLOOP_DEPRECATED __attribute__((deprecated))
#else
#define PLOOP_DEPRECATED
#endif
#endif

/* Usual name of a descriptor. */
#define DISKDESCRIPTOR_XML "DiskDescriptor.xml"

/* ploop_switch_snapshot_ex(): keep the old top delta. */
#define PLOOP_SNAP_SKIP_TOPDELTA_DESTROY 1

/* ploop_switch_snapshot_ex(): make the snapshot itself the top. */
#define PLOOP_SNAP_SKIP_TOPDELTA_CREATE 2

/* ploop_set_verbose_level(): print nothing (initially so). */
#define PLOOP_LOG_NOCONSOLE (-2)

/* ploop_set_verbose_level(): errors only, to standard error. */
#define PLOOP_LOG_NOSTDOUT (-1)

/* ploop_set_verbose_level(): everything, with the time. */
#define PLOOP_LOG_TIMESTAMPS 4

/* Error codes of functions that return 0 on success; also the exit codes of the ploop program. */
enum {
    /* Cannot create a file. */
    SYSEXIT_CREAT = 1,
    /* Cannot allocate or open a device. */
    SYSEXIT_DEVICE = 2,
    /* A request to a device or file failed. */
    SYSEXIT_DEVIOC = 3,
    /* Cannot open a file, or its header is unusable. */
    SYSEXIT_OPEN = 4,
    /* Out of memory. */
    SYSEXIT_MALLOC = 5,
    /* Read failed or came short. */
    SYSEXIT_READ = 6,
    /* Write failed or came short. */
    SYSEXIT_WRITE = 7,
    SYSEXIT_RESERVED_8 = 8,
    /* State of a device is missing or unreadable. */
    SYSEXIT_SYSFS = 9,
    SYSEXIT_RESERVED_10 = 10,
    /* Bad image format, unrepaired image, images that differ. */
    SYSEXIT_PLOOPFMT = 11,
    /* Other system error, failed helper program. */
    SYSEXIT_SYS = 12,
    /* Corrupt copy stream, wrong answer of the sender or receiver of a copy. */
    SYSEXIT_PROTOCOL = 13,
    /* Too many passes while copying. */
    SYSEXIT_LOOP = 14,
    /* stat or statfs failed. */
    SYSEXIT_FSTAT = 15,
    /* Sync failed. */
    SYSEXIT_FSYNC = 16,
    /* Another operation is in progress. */
    SYSEXIT_EBUSY = 17,
    /* Lock of the balloon failed. */
    SYSEXIT_FLOCK = 18,
    /* Truncation failed. */
    SYSEXIT_FTRUNCATE = 19,
    /* Allocation of space failed. */
    SYSEXIT_FALLOCATE = 20,
    /* Mount failed, or the image is attached already. */
    SYSEXIT_MOUNT = 21,
    /* Unmount failed. */
    SYSEXIT_UMOUNT = 22,
    /* Descriptor not locked, or not readable after locking. */
    SYSEXIT_LOCK = 23,
    /* Making the file system failed. */
    SYSEXIT_MKFS = 24,
    SYSEXIT_RESERVED_25 = 25,
    /* Resizing the file system failed. */
    SYSEXIT_RESIZE_FS = 26,
    /* mkdir failed. */
    SYSEXIT_MKDIR = 27,
    /* rename failed. */
    SYSEXIT_RENAME = 28,
    /* Internal inconsistency. */
    SYSEXIT_ABORT = 29,
    /* Relocation of clusters failed. */
    SYSEXIT_RELOC = 30,
    SYSEXIT_RESERVED_31 = 31,
    SYSEXIT_RESERVED_32 = 32,
    /* Change of the partition table failed. */
    SYSEXIT_CHANGE_GPT = 33,
    SYSEXIT_RESERVED_34 = 34,
    /* unlink failed. */
    SYSEXIT_UNLINK = 35,
    /* mknod failed. */
    SYSEXIT_MKNOD = 36,
    /* Image is marked as in use, or used by a device. */
    SYSEXIT_PLOOPINUSE = 37,
    /* Invalid argument, unsupported request. */
    SYSEXIT_PARAM = 38,
    /* Descriptor missing, not storable, inconsistent. */
    SYSEXIT_DISKDESCR = 39,
    /* The image has no device. */
    SYSEXIT_DEV_NOT_MOUNTED = 40,
    /* fsck failed. */
    SYSEXIT_FSCK = 41,
    SYSEXIT_RESERVED_42 = 42,
    /* No such snapshot. */
    SYSEXIT_NOSNAP = 43
};

/* How an image keeps its data (ploop_create_param.mode, ploop_disk_images_data.mode). */
enum ploop_image_mode {
    /* Grows as it is written. */
    PLOOP_EXPANDED_MODE = 0,
    /* The same format with all space allocated at creation. */
    PLOOP_EXPANDED_PREALLOCATED_MODE = 1,
    /* Plain bytes of the disk. */
    PLOOP_RAW_MODE = 2
};

/* Flags of ploop_create_param. */
enum ploop_create_flags {
    /* Initialise the file system's inode tables at once, not later in the background. */
    PLOOP_CREATE_NOLAZY = 1
};

/* Flags of ploop_replace_param. */
enum ploop_replace_flags {
    /* The new file takes the old file's name. */
    PLOOP_REPLACE_KEEP_NAME = 1
};

/* State of the library behind a ploop_disk_images_data; opaque. */
struct ploop_disk_images_runtime_data;

/* One image of a disk. Owned by the library, read-only. */
struct ploop_image_data {
    char *guid;
    /* Path. */
    char *file;
};

/* One snapshot of a disk. Owned by the library, read-only. */
struct ploop_snapshot_data {
    char *guid;
    /* The null GUID for the base. */
    char *parent_guid;
    /* Non-zero: temporary; removed by a merge when no process uses it. */
    int temporary;
};

/*
 * A disk, made by ploop_open_dd() and freed by ploop_close_dd(). Read-only for callers; empty until a function that
 * locks the descriptor has read it, and read again by each such function: pointers from here are valid until the next
 * call.
 */
struct ploop_disk_images_data {
    /* Size of the disk in sectors. */
    unsigned long long size;
    unsigned int heads;
    unsigned int cylinders;
    unsigned int sectors;
    /* enum ploop_image_mode. */
    int mode;
    int nimages;
    /* nimages pointers, in the descriptor's order. */
    struct ploop_image_data **images;
    char *top_guid;
    int nsnapshots;
    /* nsnapshots pointers. */
    struct ploop_snapshot_data **snapshots;
    struct ploop_disk_images_runtime_data *runtime;
    /* Cluster size in sectors. */
    unsigned int blocksize;
    /* Limit of the top delta in sectors; 0: none. */
    unsigned long long max_delta_size;
    /* Reserved. */
    char dummy[32];
};

/* What statfs(2) says about the file system inside, in blocks of fs_bsize bytes. */
struct ploop_info {
    unsigned long long fs_bsize;
    unsigned long long fs_blocks;
    unsigned long long fs_bfree;
    unsigned long long fs_inodes;
    unsigned long long fs_ifree;
};

/* Format of a disk. */
struct ploop_spec {
    /* Size of the disk in sectors. */
    off_t size;
    /* Cluster size in sectors. */
    __u32 blocksize;
    /* 1 or 2; 0 for raw. */
    int fmt_version;
    /* Reserved, left alone. */
    char dummy[32];
};

/* How to create an image. */
struct ploop_create_param {
    /* Size of the disk in sectors, rounded up to the cluster. */
    unsigned long long size;
    /* enum ploop_image_mode. */
    int mode;
    /* Path of the image; must not exist. DiskDescriptor.xml is made in the same folder. */
    char *image;
    /* File system to make (ext4, ext3); NULL: neither partition nor file system. */
    char *fstype;
    /* Non-zero: file system on the whole disk; 0: GPT with one partition. */
    int without_partition;
    /* Cluster size in sectors, a power of two from 64 to 131072; 0: 2048 (1 MiB). */
    unsigned int blocksize;
    /* Block of the file system in bytes; 0: 4096. */
    unsigned int fsblocksize;
    /* Format version 1 or 2; 0: the best. */
    int fmt_version;
    /* enum ploop_create_flags. */
    unsigned int flags;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to mount an image. */
struct ploop_mount_param {
    /* Device to use, /dev/ploopN; empty: one is chosen and its path stored here. */
    char device[64];
    /* Non-zero: attach and mount read-only. */
    int ro;
    /* Flags of mount(2); MS_NOATIME is honoured, other flags are ignored. */
    int flags;
    /* Keep 0. */
    int unused1;
    /* File system; NULL: ext4. */
    char *fstype;
    /* Existing folder to mount on; NULL: attach the device only. */
    char *target;
    /* Snapshot to mount; NULL: the top delta. */
    char *guid;
    /* Non-zero: journalled user and group quota. */
    int quota;
    /* More mount options, or NULL. */
    char *mount_data;
    /* Cluster size in sectors, for raw images mounted by file name only; 0: from the descriptor. */
    unsigned int blocksize;
    /* Non-zero: run fsck -p before mounting. */
    int fsck;
    /* Out: exit code of fsck, if it ran. */
    int fsck_rc;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to make a snapshot. */
struct ploop_snapshot_param {
    /* GUID of the new snapshot; NULL: generated. */
    char *guid;
    /* Folder of the new delta; NULL: beside the base image. */
    char *snap_dir;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to make and mount a temporary snapshot. */
struct ploop_tsnapshot_param {
    /* GUID of the new snapshot, required. */
    char *guid;
    /* Component that its device gets, required. */
    char *component_name;
    /* Folder to mount on, or NULL. */
    char *target;
    /* Out: its device. */
    char device[64];
    /* Folder of the new delta; NULL: beside the base image. */
    char *snap_dir;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* Which snapshots to merge. */
struct ploop_merge_param {
    /* Keep 0. */
    int unused1;
    /* Non-zero, without guid: everything down to the base. */
    int merge_all;
    /* Snapshot that is merged into its parent; NULL: the top. */
    const char *guid;
    /* Ancestor where the range ends, or NULL. */
    const char *guid2;
    /* New file to merge into, or NULL. */
    const char *new_delta;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* Which snapshot to switch to. */
struct ploop_snapshot_switch_param {
    /* Snapshot that becomes the parent of the new top, required. */
    const char *guid;
    /* New GUID of the old top, when it is kept. */
    const char *guid_old;
    /* PLOOP_SNAP_SKIP_TOPDELTA_DESTROY, PLOOP_SNAP_SKIP_TOPDELTA_CREATE. */
    int flags;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* Which image of a chain to replace, by guid, else by cur_file, else by level. */
struct ploop_replace_param {
    /* The replacement, an identical copy. */
    char *file;
    /* Image to replace, by GUID. */
    char *guid;
    /* The same by level in the running device, 0 is the base. */
    int level;
    /* The same by file name. */
    char *cur_file;
    /* enum ploop_replace_flags. */
    int flags;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to resize a disk. */
struct ploop_resize_param {
    /* New size in sectors; 0: inflate the balloon to the maximum. */
    unsigned long long size;
    /* Non-zero: allow the offline way when the image is not mounted. */
    int offline_resize;
    /* Process in whose mount namespace the image may be mounted; 0: none. */
    pid_t mntns_pid;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to send a copy of a running disk. */
struct ploop_copy_send_param {
    const char *device;
    /* Regular file, pipe or socket. */
    int ofd;
    /* Command run before the last pass, or NULL. */
    const char *flush_cmd;
    /* Descriptor of the receiver's answers; negative: none (0 is a descriptor). */
    int feedback_fd;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to receive a copy. */
struct ploop_copy_receive_param {
    /* File to make; must not exist. */
    const char *file;
    /* Pipe or socket. */
    int ifd;
    /* Descriptor for answers to the sender; negative: none (0 is a descriptor). */
    int feedback_fd;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* How to compact an image. */
struct ploop_discard_param {
    /* Smallest extent worth freeing, bytes; 0: the cluster. */
    __u64 minlen_b;
    /* Bytes to free; 0: all that is free. */
    __u64 to_free;
    /* Non-zero: mount the image for it when it is not mounted. */
    int automount;
    /* Polled; non-zero stops. May be NULL. */
    const int *stop;
    /* Non-zero: defragment first. */
    int defrag;
    /* Reserved, keep 0. */
    char dummy[32];
};

/* Space of an image, in bytes. */
struct ploop_discard_stat {
    /* Used by the file system. */
    off_t data_size;
    /* Size of the disk without the balloon. */
    off_t ploop_size;
    /* Size of the top delta's file. */
    off_t image_size;
    /* Size of the balloon. */
    off_t balloon_size;
};

/* Not used by any function. */
struct ploop_copy_param {
    int ofd;
    char dummy[32];
};

/* Not used by any function. */
struct ploop_copy_stat {
    __u64 xferred_total;
    __u64 xferred;
};

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/*
 * Makes an object for the disk with descriptor fname, to be freed by ploop_close_dd(). The descriptor is not read yet.
 * Missing descriptor: SYSEXIT_DISKDESCR, and *di is left alone.
 */
int ploop_open_dd(struct ploop_disk_images_data **di, const char *fname);

/* Frees an object of ploop_open_dd() and everything in it. NULL is allowed. */
void ploop_close_dd(struct ploop_disk_images_data *di);

/* Old name of ploop_close_dd(). */
void ploop_free_diskdescriptor(struct ploop_disk_images_data *di);

/*
 * ploop_open_dd(), and the descriptor is read at once, without its lock. If that fails -1 is returned with *di set, to be
 * freed all the same.
 */
int ploop_read_disk_descr(struct ploop_disk_images_data **di, const char *file);

/* GUID of the parent of snapshot guid inside di, which must have been read; NULL for the base and an unknown one. */
char *ploop_find_parent_by_guid(struct ploop_disk_images_data *di, const char *guid);

/* Not supported: logs an error, returns NULL. */
PLOOP_DEPRECATED char *ploop_get_base_delta_uuid(struct ploop_disk_images_data *di);

/*
 * Sets the component (at most 63 bytes) by which devices of this object are made and looked for: one image can be attached
 * once for each. NULL or "": none.
 */
int ploop_set_component_name(struct ploop_disk_images_data *di, const char *component_name);

/* Stores the path of the top delta in out, a buffer of len bytes. Too short: SYSEXIT_PARAM. */
int ploop_get_top_delta_fname(struct ploop_disk_images_data *di, char *out, int len);

/* Stores the path of the base delta in out, a buffer of len bytes. Too short: SYSEXIT_PARAM. */
int ploop_get_base_delta_fname(struct ploop_disk_images_data *di, char *out, int len);

/* Stores a new random GUID in uuid, a buffer of len bytes (at least 39). */
int ploop_uuid_generate(char *uuid, int len);

/*
 * Stores the device of this disk for its component in out, a buffer of len bytes. Returns 0; 1 when the disk is not
 * attached; -1 or SYSEXIT_LOCK on error.
 */
int ploop_get_dev(struct ploop_disk_images_data *di, char *out, int len);

/*
 * Stores all devices of this disk, whatever their component, in *out: an array that ends in NULL, for
 * ploop_free_array(). Returns 0; 1 when there is none and -1 on error, both with *out NULL.
 */
int ploop_get_devs(struct ploop_disk_images_data *di, char ***out);

/* Is the disk attached, by a running device without component? 1 yes, 0 no, -1 error. No mount is needed for a yes. */
int ploop_is_mounted(struct ploop_disk_images_data *di);

/* Frees an array of strings made by this library, and the strings. NULL is allowed. */
void ploop_free_array(char **array);

/*
 * Stores the device whose base delta is the file delta, and whose component is component_name (NULL or "": none), in
 * buf; longer than size bytes it is cut. Returns 0; 1 not found; -1 error.
 */
int ploop_find_dev(const char *component_name, const char *delta, char *buf, int size);

/*
 * Stores the device (/dev/ploopN) that is mounted on path in buf. Returns 0; 1 if no ploop device is mounted there; -1
 * on error, a short buffer included.
 */
int ploop_get_dev_by_mnt(const char *path, char *buf, int size);

/* As ploop_get_dev_by_mnt(), but stores the node that is mounted, which may be a partition (/dev/ploopNp1). */
int ploop_get_partition_by_mnt(const char *path, char *buf, int size);

/*
 * Stores the first mount point of device dev or its first partition in buf. Returns 0; 1 not mounted; -1 error, an
 * unknown device included.
 */
int ploop_get_mnt_by_dev(const char *dev, char *buf, int size);

/*
 * Stores the path of a running device's top delta in image and its format, raw or ploop1, in format, cut to the sizes of
 * the buffers. Either may be NULL.
 */
int ploop_find_top_delta_name_and_format(const char *device, char *image, size_t image_size, char *format, size_t format_size);

/* Can disks use format version 2 here? Always 1. */
int ploop_is_large_disk_supported(void);

/* Nothing to do any more; 0. */
PLOOP_DEPRECATED int ploop_complete_running_operation(const char *device);

/*
 * Stores size and use of the file system of the disk with descriptor descr in *info: as stored at the last unmount,
 * else from the mounted file system, else by mounting it for a moment.
 */
int ploop_get_info_by_descr(const char *descr, struct ploop_info *info);

/* Stores size, cluster and format version of the disk in *spec, from its device when it is attached. */
int ploop_get_spec(struct ploop_disk_images_data *di, struct ploop_spec *spec);

/* Stores the largest size of a disk with clusters of blocksize sectors (0: 2048) in *max, in sectors. */
int ploop_get_max_size(unsigned int blocksize, unsigned long long *max);

/*
 * Creates an image and DiskDescriptor.xml beside it, and in it, when param->fstype says so, a GPT with one partition, a
 * file system and the balloon file. Neither file may exist. After an error the files that this call made are removed.
 */
int ploop_create_image(struct ploop_create_param *param);

/*
 * Attaches the disk, from param->guid (NULL: the top) down to the base, to a device, stores its path in param->device,
 * and mounts it on param->target if given. Already attached with this component: SYSEXIT_MOUNT.
 */
int ploop_mount_image(struct ploop_disk_images_data *di, struct ploop_mount_param *param);

/* ploop_mount_image() for a snapshot: param->guid must be set. */
int ploop_mount_snapshot(struct ploop_disk_images_data *di, struct ploop_mount_param *param);

/* Unmounts the disk's file system and detaches its device. Not attached: SYSEXIT_DEV_NOT_MOUNTED. */
int ploop_umount_image(struct ploop_disk_images_data *di);

/* Unmounts and detaches a device by its path. di may be NULL. */
int ploop_umount(const char *device, struct ploop_disk_images_data *di);

/*
 * Takes a snapshot: the disk's content is kept as param->guid, and a new top delta takes all further writes.
 * The file system of a running disk is brought to rest first. A GUID that is malformed or there already: SYSEXIT_PARAM.
 */
int ploop_create_snapshot(struct ploop_disk_images_data *di, struct ploop_snapshot_param *param);

/*
 * Takes a temporary snapshot, which a later operation removes when no process uses it, and mounts it read-only as a
 * device of its own with component param->component_name; the device's path is stored in param->device. With holder_fd
 * the device is opened and the descriptor stored there: the snapshot stays until the caller closes it. Without
 * holder_fd the component gets a leading ~, and the snapshot stays until it is unmounted.
 */
int ploop_create_temporary_snapshot(struct ploop_disk_images_data *di, struct ploop_tsnapshot_param *param, int *holder_fd);

/*
 * Deletes snapshot guid. Deltas that stand on it keep their content: a single one is merged into it; for several it
 * stays, marked temporary, until one is left. The base and the top of a running disk: SYSEXIT_PARAM; unknown:
 * SYSEXIT_NOSNAP.
 */
int ploop_delete_snapshot(struct ploop_disk_images_data *di, const char *guid);

/* Deletes the top delta of a disk that does not run; its parent becomes the top. di must have been read before. */
int ploop_delete_top_delta(struct ploop_disk_images_data *di);

/*
 * Merges snapshot param->guid (NULL: the top) into its parent, or with all that it stands on down to param->guid2, or with
 * param->merge_all the top down to the base. The result keeps the upper one's GUID in the lower one's file, or in the new
 * file param->new_delta. The disk may run. A merge that has begun is not undone: the same call finishes it.
 * Unknown snapshot: SYSEXIT_NOSNAP.
 */
int ploop_merge_snapshot(struct ploop_disk_images_data *di, struct ploop_merge_param *param);

/*
 * Makes snapshot param->guid the parent of a new, empty top; the old top is removed. The disk must not run.
 * PLOOP_SNAP_SKIP_TOPDELTA_DESTROY: the old top is kept as snapshot param->guid_old (NULL: a random GUID).
 * PLOOP_SNAP_SKIP_TOPDELTA_CREATE: the snapshot itself becomes the top. Unknown snapshot: SYSEXIT_NOSNAP.
 */
int ploop_switch_snapshot_ex(struct ploop_disk_images_data *di, struct ploop_snapshot_switch_param *param);

/* ploop_switch_snapshot_ex() without a GUID for the old top. */
int ploop_switch_snapshot(struct ploop_disk_images_data *di, const char *uuid, int flags);

/*
 * Replaces an image of the disk by the file param->file, an identical copy of it. Of a running disk any image but the
 * top can be replaced. PLOOP_REPLACE_KEEP_NAME: the copy gets the image's name.
 */
int ploop_replace_image(struct ploop_disk_images_data *di, struct ploop_replace_param *param);

/*
 * Text of this thread's last error, for users; "" before the first. Never NULL; not to be freed; the next error of the
 * thread overwrites it.
 */
const char *ploop_get_last_error(void);

/*
 * Opens fname (appending) as the log file and closes the old one, which stays in use when that fails. NULL: no log file.
 * Returns 0 or -1.
 */
int ploop_set_log_file(const char *fname);

/* Level up to which messages go to the log file: -1 errors, 0 progress, 1 details, 3 debug (initially 3). */
void ploop_set_log_level(int level);

/*
 * Level up to which messages go to standard output, and errors to standard error: PLOOP_LOG_NOCONSOLE (initially),
 * PLOOP_LOG_NOSTDOUT, 0 progress, 1 details, 3 debug, PLOOP_LOG_TIMESTAMPS.
 */
void ploop_set_verbose_level(int level);

/* Asks the operation that runs in the calling thread to stop. For signal handlers, which run in that thread. */
void ploop_cancel_operation(void);

/*
 * Gives a disk param->size sectors, rounded up to whole clusters; needs root. Larger than it is: with its last partition and
 * the file system (ext, xfs, btrfs) on it, mounted or not. Smaller: with param->offline_resize the file system (ext,
 * btrfs) of a disk that is not mounted gets that size, and the image file shrinks; else, and of a mounted disk, the balloon
 * of an ext4 or xfs takes the difference. 0: the largest balloon. SYSEXIT_PARAM: smaller than the files need.
 */
int ploop_resize_image(struct ploop_disk_images_data *di, struct ploop_resize_param *param);

/*
 * Converts a disk that is not mounted to another enum ploop_image_mode: its base image, whatever deltas stand on it. From
 * raw, or mounted: SYSEXIT_PARAM. An interrupted conversion is finished or undone by the next operation. flags: keep 0.
 */
int ploop_convert_image(struct ploop_disk_images_data *di, int mode, int flags);

/*
 * Sends the top delta of the running device arg->device to arg->ofd: a pipe or socket for ploop_copy_receive() of this library
 * or of versions 1.12 to 1.15, or a regular file, which is written in place and synced. arg->flush_cmd, for the shell, ends what
 * writes; then the file systems of the device are frozen for a moment. Nothing need be mounted. Something else than a pipe,
 * socket or file, or arg->feedback_fd no pipe or socket: SYSEXIT_PARAM; no device: SYSEXIT_DEVICE; levels of it are merged, it is
 * compacted or copied already: SYSEXIT_EBUSY; the command fails: SYSEXIT_SYS; the receiver cannot sync: SYSEXIT_FSYNC, does not
 * answer: SYSEXIT_PROTOCOL. With ofd 1 messages below errors are not printed from then on, with 2 none are. A receiver that ends
 * sends the caller SIGPIPE.
 */
int ploop_copy_send(struct ploop_copy_send_param *arg);

/* Old form of ploop_copy_send(), without answers; is_pipe is ignored. */
PLOOP_DEPRECATED int ploop_send(const char *device, int ofd, const char *flush_cmd, int is_pipe);

/*
 * Receives into the new file arg->file what ploop_copy_send() of this library or of versions 1.12 to 1.15 sends to
 * arg->ifd. The file appears when all of it has come and is durable. It exists: SYSEXIT_CREAT; a descriptor that is no pipe
 * or socket: SYSEXIT_PARAM; the stream ends too early: SYSEXIT_READ; it is none: SYSEXIT_PROTOCOL. With feedback_fd 1 messages
 * below errors are not printed from then on, with 2 none are.
 */
int ploop_copy_receive(struct ploop_copy_receive_param *arg);

/* Old form of ploop_copy_receive(), from standard input and without answers. */
PLOOP_DEPRECATED int ploop_receive(const char *dst);

/*
 * Gives space that the file system inside does not use back to the host, while the disk is in use. Not mounted:
 * SYSEXIT_PARAM, unless param->automount. The work failed: -1.
 */
int ploop_discard(struct ploop_disk_images_data *di, struct ploop_discard_param *param);

/* Stores the sizes that tell what ploop_discard() could free in *pd_stat. The disk has to be mounted: SYSEXIT_PARAM. */
int ploop_discard_get_stat(struct ploop_disk_images_data *di, struct ploop_discard_stat *pd_stat);

/*
 * Stores di, as it was read last, in the descriptor fname: atomically, over the file that is there. No lock is taken, and
 * what other programs have stored since is lost. An old-style GUID of the top becomes the fixed one; the paths of images in
 * the folder of fname are stored relative to it. di stays bound to its own descriptor. Not read yet, no whole tree, no such
 * folder: SYSEXIT_DISKDESCR.
 */
int ploop_store_diskdescriptor(const char *fname, struct ploop_disk_images_data *di);

/*
 * Stores a new descriptor ddxml for the image param->image, which need not exist and is not looked at; a relative path of it
 * counts from the folder of ddxml. param->size (sectors, rounded up to whole clusters), mode and blocksize are stored, too.
 * ddxml exists: SYSEXIT_PARAM, and it stays.
 */
int ploop_create_dd(const char *ddxml, struct ploop_create_param *param);

/*
 * Limits the file of the top delta to size sectors, 0: no limit. Kept in the descriptor; a running disk has it from now on,
 * and another one from its next mount on: a write that needs more space in that file fails with EIO. What the file has
 * already stays. A disk whose only image is raw keeps the number, and has no such limit.
 */
int ploop_set_max_delta_size(struct ploop_disk_images_data *di, unsigned long long size);

#ifdef __cplusplus
} /* extern "C" */
#endif /* __cplusplus */

#endif  /* _LIBPLOOP_H_ */
