/*
 * The interface of kernels that have the ploop driver: ioctls on /dev/ploopN, their arguments, and the numbers in them.
 * This library makes no use of such a driver; the header is here for programs that were written for it. Their ioctls fail on
 * the devices of this library.
 *
 * Numbers are in the byte order of the machine. Members whose names begin with __mbz must be zero. A cluster is the unit in
 * which images allocate; level 0 of a chain is its base. Each struct with an array of length 0 at its end is followed in
 * memory by as many elements as its counter says.
 */

#ifndef _PLOOP_IF_H_
#define _PLOOP_IF_H_

#include <linux/ioctl.h>
#include <linux/types.h>

/* Versions of the image format ploop1. */
enum {
    PLOOP_FMT_ERROR = -1,
    PLOOP_FMT_UNDEFINED = 0,
    PLOOP_FMT_V1 = 1, /* sectors count in 32 bits */
    PLOOP_FMT_V2 = 2
};

/* Formats: ploop_ctl.pctl_format. */
#define PLOOP_FMT_RAW 1    /* the bytes of the disk, as the base only */
#define PLOOP_FMT_PLOOP1 2 /* header, table, clusters */

/* Flags: ploop_ctl.pctl_flags. */
#define PLOOP_FMT_RDONLY 1
#define PLOOP_FMT_FLAGS PLOOP_FMT_RDONLY /* those that are kept with a delta */
#define PLOOP_FMT_PREALLOCATED 2
#define PLOOP_FLAG_COOKIE 4              /* PLOOP_COOKIE_SIZE bytes follow the chunk */
#define PLOOP_FLAG_CLUBLKS 8             /* pctl_size counts clusters, not sectors */
#define PLOOP_FLAG_FS_SYNC 0x10000000    /* freeze the file system meanwhile */

/* Bytes of a cookie, the name by which a device is told from others on the same base; a NUL among them. */
#define PLOOP_COOKIE_SIZE 64

/* How the driver does I/O on an image: ploop_ctl_chunk.pctl_type. */
#define PLOOP_IO_AUTO 0
#define PLOOP_IO_DIRECT 1
#define PLOOP_IO_NFS 2
#define PLOOP_IO_RESERVED 3
#define PLOOP_IO_KAIO 4

/* Entries of the table in an image begin after so many 32-bit words: the header. */
#define PLOOP_MAP_OFFSET 16
/* In maps of relocated clusters: this entry becomes zero. */
#define PLOOP_ZERO_INDEX 0xffffffffU

/* What a device is in the middle of. */
enum {
    PLOOP_MNTN_OFF = 0,
    PLOOP_MNTN_BALLOON = 1,
    PLOOP_MNTN_FBLOADED = 2, /* free blocks are known to the driver */
    PLOOP_MNTN_SNAPSHOT = 3,
    PLOOP_MNTN_TRACK = 4,
    PLOOP_MNTN_DISCARD = 5,
    PLOOP_MNTN_NOFAST = 256, /* those above disable the fast path */
    PLOOP_MNTN_MERGE = 257,
    PLOOP_MNTN_GROW = 258,
    PLOOP_MNTN_RELOC = 259
};

#define FAST_PATH_DISABLED(t) ((t) > PLOOP_MNTN_NOFAST)

/* Events that a read of the device's attribute pstate/event tells. */
#define PLOOP_EVENT_ABORTED 1
#define PLOOP_EVENT_STOPPED 2
#define PLOOP_EVENT_ENOSPC 3

/* The file of a delta. */
struct ploop_ctl_chunk {
    __s32 pctl_fd;
    __u32 pctl_type;   /* PLOOP_IO_* */
    __u32 pctl_flags;
    __u32 pctl_offset; /* zero, as are the next two */
    __u64 pctl_start;
    __u64 pctl_len;
};

/* A delta to add or replace, or a size to grow to. */
struct ploop_ctl {
    __u32 pctl_format;      /* PLOOP_FMT_RAW, PLOOP_FMT_PLOOP1 */
    __u32 pctl_flags;       /* PLOOP_FMT_*, PLOOP_FLAG_* */
    __u32 pctl_cluster_log; /* binary logarithm of a cluster's sectors */
    __u32 pctl_size;        /* of the disk, in sectors or (PLOOP_FLAG_CLUBLKS) clusters */
    __u16 pctl_chunks;      /* number of chunks that follow */
    __u8 pctl_level;
    __u8 __mbz1;
    __u32 __mbz2;
    struct ploop_ctl_chunk chunks[0];
};

/* The whole argument of PLOOP_IOC_ADD_DELTA. */
struct ploop_ctl_delta {
    struct ploop_ctl c;
    struct ploop_ctl_chunk f;
    char cookie[PLOOP_COOKIE_SIZE];
};

/* Cuts the file of a frozen level. */
struct ploop_truncate_ctl {
    int fd;
    __u32 alloc_head; /* clusters that stay */
    __u8 level;
    __u8 __mbz1;
    __u16 __mbz2;
} __attribute__((aligned(8)));

/* Where a cluster of the disk is in the file now. */
struct reloc_map {
    __u32 req_cluster; /* cluster of the disk */
    __u32 iblk;        /* cluster of the file */
} __attribute__((aligned(8)));

/* Clusters of a frozen level were moved. */
struct ploop_index_update_ctl {
    __u32 n_maps;
    __u8 level;
    __u8 __mbz1;
    __u16 __mbz2;
    struct reloc_map rmap[0];
};

/* Clusters of the disk that hold no data, and where they are in the file. */
struct ploop_freeblks_ctl_extent {
    __u32 clu;  /* first cluster of the disk */
    __u32 iblk; /* first cluster of the file */
    __u32 len;  /* clusters */
} __attribute__((aligned(8)));

struct ploop_freeblks_ctl {
    __u32 n_extents;
    __u32 alloc_head; /* out: clusters of the file */
    __u8 level;
    __u8 __mbz1;
    __u16 __mbz2;
    struct ploop_freeblks_ctl_extent extents[0];
};

/* Clusters to move into free ones. */
struct ploop_relocblks_ctl_extent {
    __u32 clu;
    __u32 iblk;
    __u32 len;
    __u32 free; /* non-zero: they are free ones, of which the table is to forget the content */
} __attribute__((aligned(8)));

struct ploop_relocblks_ctl {
    __u32 n_extents;
    __u32 n_scanned;
    __u32 alloc_head; /* in: clusters that the file has; out: by how many it was cut */
    __u8 level;
    __u8 __mbz1;
    __u16 __mbz2;
    struct ploop_relocblks_ctl_extent extents[0];
};

/* Begins or ends the work of a balloon, or asks for the maintenance state. */
struct ploop_balloon_ctl {
    __u32 mntn_type;  /* out: PLOOP_MNTN_* */
    __u32 alloc_head; /* out */
    __u8 level;       /* out */
    __u8 inflate;     /* non-zero: begin */
    __u8 keep_intact; /* non-zero: only ask */
    __u8 __mbz;
} __attribute__((aligned(8)));

struct ploop_getdevice_ctl {
    __u32 minor; /* out: a device that is free */
    __u32 __mbz1;
} __attribute__((aligned(8)));

/* Bytes of the top's file that were written. */
struct ploop_track_extent {
    __u64 start;
    __u64 end;
};

#define PLOOPCTLTYPE 'P'

/* Adds a level on top of a stopped device: struct ploop_ctl_delta. */
#define PLOOP_IOC_ADD_DELTA _IOW(PLOOPCTLTYPE, 0, struct ploop_ctl)
/* Takes all levels from a stopped device. */
#define PLOOP_IOC_CLEAR _IO(PLOOPCTLTYPE, 1)
#define PLOOP_IOC_STOP _IO(PLOOPCTLTYPE, 2)
#define PLOOP_IOC_START _IO(PLOOPCTLTYPE, 3)
/* Adds a level on top of a running device: struct ploop_ctl and its chunk. */
#define PLOOP_IOC_SNAPSHOT _IOW(PLOOPCTLTYPE, 4, struct ploop_ctl)
/* Takes the level of that number away. */
#define PLOOP_IOC_DEL_DELTA _IOW(PLOOPCTLTYPE, 5, __u32)
/* Tracks writes to the top's file; out: what is in it so far. */
#define PLOOP_IOC_TRACK_INIT _IOR(PLOOPCTLTYPE, 6, struct ploop_track_extent)
#define PLOOP_IOC_TRACK_STOP _IO(PLOOPCTLTYPE, 7)
#define PLOOP_IOC_TRACK_ABORT _IO(PLOOPCTLTYPE, 8)
/* All below that byte was copied. */
#define PLOOP_IOC_TRACK_SETPOS _IOW(PLOOPCTLTYPE, 9, __u64)
/* Out: what to copy next. */
#define PLOOP_IOC_TRACK_READ _IOR(PLOOPCTLTYPE, 10, struct ploop_track_extent)
#define PLOOP_IOC_SYNC _IO(PLOOPCTLTYPE, 11)
/* Merges the top into the level below. */
#define PLOOP_IOC_MERGE _IO(PLOOPCTLTYPE, 12)
/* Swaps the file of a level for an identical one: struct ploop_ctl and its chunk. */
#define PLOOP_IOC_REPLACE_DELTA _IOW(PLOOPCTLTYPE, 13, struct ploop_ctl)
#define PLOOP_IOC_TRUNCATE _IOW(PLOOPCTLTYPE, 14, struct ploop_truncate_ctl)
/* 15 is the kernel's own. */
#define PLOOP_IOC_UPDATE_INDEX _IOW(PLOOPCTLTYPE, 16, struct ploop_index_update_ctl)
#define PLOOP_IOC_GROW _IOW(PLOOPCTLTYPE, 17, struct ploop_ctl)
/* Out: the free blocks that the driver knows. */
#define PLOOP_IOC_FBGET _IOW(PLOOPCTLTYPE, 18, struct ploop_freeblks_ctl)
#define PLOOP_IOC_BALLOON _IOW(PLOOPCTLTYPE, 19, struct ploop_balloon_ctl)
/* Tells the driver free blocks. */
#define PLOOP_IOC_FREEBLKS _IOW(PLOOPCTLTYPE, 20, struct ploop_freeblks_ctl)
#define PLOOP_IOC_RELOCBLKS _IOW(PLOOPCTLTYPE, 21, struct ploop_relocblks_ctl)
/* Out: a device that is free. */
#define PLOOP_IOC_GETDEVICE _IOW(PLOOPCTLTYPE, 22, struct ploop_getdevice_ctl)
#define PLOOP_IOC_DISCARD_INIT _IO(PLOOPCTLTYPE, 23)
#define PLOOP_IOC_DISCARD_FINI _IO(PLOOPCTLTYPE, 24)
#define PLOOP_IOC_DISCARD_WAIT _IO(PLOOPCTLTYPE, 25)
/* Forgets the free blocks. */
#define PLOOP_IOC_FBDROP _IO(PLOOPCTLTYPE, 26)
/* Forgets free extents of fewer clusters than the argument, which is a number and no pointer. */
#define PLOOP_IOC_FBFILTER _IOR(PLOOPCTLTYPE, 27, unsigned long)
/* The top's file has at most so many sectors; 0: no limit. */
#define PLOOP_IOC_MAX_DELTA_SIZE _IOW(PLOOPCTLTYPE, 28, __u64)

#endif /* _PLOOP_IF_H_ */
