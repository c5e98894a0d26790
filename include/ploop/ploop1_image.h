/*
 * The header of an image in the format ploop1, the first 64 bytes of its file, and what computes its members. On disk all
 * numbers are little-endian.
 */

#ifndef _PLOOP1_IMAGE_H_
#define _PLOOP1_IMAGE_H_

#include <string.h>
#include <linux/types.h>
#include "ploop_if.h"

/* ploop_pvd_header.m_Type. */
#define PRL_IMAGE_COMPRESSED 2

/* ploop_pvd_header.m_DiskInUse of an image that is open for writing, or was not closed: check it before it is used. */
#define SIGNATURE_DISK_IN_USE 0x746F6E59

/* ploop_pvd_header.m_Sig, without a NUL. */
#define SIGNATURE_STRUCTURED_DISK_V1 "WithoutFreeSpace"
#define SIGNATURE_STRUCTURED_DISK_V2 "WithouFreSpacExt"

/* ploop_pvd_header.m_Flags. */
#define CIF_NoFlags 0x00000000
#define CIF_Empty 0x00000001             /* no cluster was written; not to be relied on */
#define CIF_FmtVersionConvert 0x00000002 /* a conversion of the format version was interrupted */
#define CIF_Invalid 0xffffffff

#define PLOOP1_SECTOR_LOG 9
#define SECTOR_SIZE (1 << PLOOP1_SECTOR_LOG)
#define PLOOP1_DEF_CLUSTER_LOG 11 /* of a cluster's sectors */
#define DEF_CLUSTER (1 << (PLOOP1_DEF_CLUSTER_LOG + PLOOP1_SECTOR_LOG)) /* bytes */

#define DEFAULT_HEADS_COUNT 16
#define DEFAULT_SECTORS_COUNT 63

struct ploop_pvd_header {
    __u8 m_Sig[16];    /* signature of the version */
    __u32 m_Type;      /* PRL_IMAGE_COMPRESSED */
    __u32 m_Heads;
    __u32 m_Cylinders;
    __u32 m_Sectors;   /* of a cluster */
    __u32 m_Size;      /* of the disk in clusters, the entries of the table */
    union {            /* of the disk in sectors */
        struct {
            __u32 m_SizeInSectors_v1;
            __u32 Unused;
        } __attribute__((packed));
        __u64 m_SizeInSectors_v2;
    } __attribute__((packed));
    __u32 m_DiskInUse;
    __u32 m_FirstBlockOffset; /* of the first cluster with data in the file, in sectors */
    __u32 m_Flags;
    __u8 m_Reserved[8];
} __attribute__((packed));

/* Geometry, of which no program makes use any more. */
struct CHSData {
    __u32 Sectors; /* per track */
    __u32 Heads;
    __u32 Cylinders;
};

/* Divides n in place; its value is the remainder. */
#define ploop_do_div(n, base) \
    __extension__({ \
        __u32 __ploop_rem = (__u32)((__u64)(n) % (__u32)(base)); \
        (n) = (__u64)(n) / (__u32)(base); \
        __ploop_rem; \
    })

/* The largest of 63, 32, 16, 8 that divides uiSize, else 0xffffffff. */
static __inline__ __u32 CalcSectors(const __u64 uiSize)
{
    if (uiSize % 63 == 0)
        return 63;
    if (uiSize % 32 == 0)
        return 32;
    if (uiSize % 16 == 0)
        return 16;
    return uiSize % 8 == 0 ? 8 : 0xffffffffU;
}

/* The largest of 16, 8, 4, 2 that divides uiSize, else 0xffffffff. */
static __inline__ __u32 CalcHeads(const __u64 uiSize)
{
    if (uiSize % 16 == 0)
        return 16;
    if (uiSize % 8 == 0)
        return 8;
    if (uiSize % 4 == 0)
        return 4;
    return uiSize % 2 == 0 ? 2 : 0xffffffffU;
}

/* Geometry with DEFAULT_HEADS_COUNT and DEFAULT_SECTORS_COUNT; From: sectors of the disk. */
static __inline__ void ConvertToCHSLow(__u64 From, struct CHSData *chs)
{
    chs->Sectors = DEFAULT_SECTORS_COUNT;
    chs->Heads = DEFAULT_HEADS_COUNT;
    chs->Cylinders = (__u32)(From / (DEFAULT_HEADS_COUNT * DEFAULT_SECTORS_COUNT));
}

/* Geometry with one sector a cylinder. */
static __inline__ void ConvertToPureLBA(__u64 From, struct CHSData *chs)
{
    chs->Sectors = 1;
    chs->Heads = 1;
    chs->Cylinders = (__u32)From;
}

/* Geometry as headers and descriptors have it. */
static __inline__ void ConvertToCHS(__u64 From, struct CHSData *chs)
{
    __u32 sectors, heads;

    if (From > 1024 * DEFAULT_HEADS_COUNT * DEFAULT_SECTORS_COUNT && From < 16777216) {
        ConvertToCHSLow(From, chs);
        return;
    }
    sectors = CalcSectors(From);
    if (sectors == 0xffffffffU) {
        ConvertToPureLBA(From, chs);
        return;
    }
    heads = CalcHeads(From / sectors);
    if (heads == 0xffffffffU) {
        ConvertToPureLBA(From, chs);
        return;
    }
    chs->Sectors = sectors;
    chs->Heads = heads;
    chs->Cylinders = (__u32)(From / sectors / heads);
}

/* Bytes of header and table of an image of m_Size clusters, in whole sectors. */
static __inline__ __u32 GetHeaderSize(__u32 m_Size)
{
    return (__u32)((sizeof(struct ploop_pvd_header) + (__u64)m_Size * sizeof(__u32) + SECTOR_SIZE - 1) / SECTOR_SIZE *
                   SECTOR_SIZE);
}

/* The signature (16 bytes) of a format version; NULL: there is no such version. */
static __inline__ char *ploop1_signature(int version)
{
    switch (version) {
    case PLOOP_FMT_V1:
        return (char *)SIGNATURE_STRUCTURED_DISK_V1;
    case PLOOP_FMT_V2:
        return (char *)SIGNATURE_STRUCTURED_DISK_V2;
    }
    return NULL;
}

/* PLOOP_FMT_V1 or PLOOP_FMT_V2; PLOOP_FMT_ERROR: not the header of an image. */
static __inline__ int ploop1_version(struct ploop_pvd_header *vh)
{
    if (memcmp(vh->m_Sig, SIGNATURE_STRUCTURED_DISK_V1, sizeof(vh->m_Sig)) == 0)
        return PLOOP_FMT_V1;
    if (memcmp(vh->m_Sig, SIGNATURE_STRUCTURED_DISK_V2, sizeof(vh->m_Sig)) == 0)
        return PLOOP_FMT_V2;
    return PLOOP_FMT_ERROR;
}

/* Stores the disk's size; another version than 1 and 2: nothing. */
static __inline__ void put_SizeInSectors(__u64 SizeInSectors, struct ploop_pvd_header *vh, int version)
{
    if (version == PLOOP_FMT_V1)
        vh->m_SizeInSectors_v1 = (__u32)SizeInSectors;
    else if (version == PLOOP_FMT_V2)
        vh->m_SizeInSectors_v2 = SizeInSectors;
}

/* The disk's size in sectors; 0: not the header of an image. */
static __inline__ __u64 get_SizeInSectors(struct ploop_pvd_header *vh)
{
    switch (ploop1_version(vh)) {
    case PLOOP_FMT_V1:
        return vh->m_SizeInSectors_v1;
    case PLOOP_FMT_V2:
        return vh->m_SizeInSectors_v2;
    }
    return 0;
}

/*
 * Fills the header of an image for a disk of bdsize sectors, rounded up to whole clusters of blocksize sectors. The caller
 * has set, or sets, m_DiskInUse, m_Flags and m_Reserved. Its value: bytes of header and table in whole clusters; 0: there is
 * no such version, and nothing was changed.
 */
static __inline__ __u32 generate_pvd_header(struct ploop_pvd_header *vh, __u64 bdsize, __u32 blocksize, int version)
{
    const char *signature = ploop1_signature(version);
    struct CHSData chs;
    __u64 size, clusters, bytes = (__u64)blocksize * SECTOR_SIZE;
    __u32 header;

    if (!signature || !blocksize)
        return 0;
    clusters = (bdsize + blocksize - 1) / blocksize;
    size = clusters * blocksize;
    header = (__u32)((GetHeaderSize((__u32)clusters) + bytes - 1) / bytes * bytes);
    ConvertToCHS(size, &chs);
    memcpy(vh->m_Sig, signature, sizeof(vh->m_Sig));
    vh->m_Type = PRL_IMAGE_COMPRESSED;
    vh->m_Heads = chs.Heads;
    vh->m_Cylinders = chs.Cylinders;
    vh->m_Sectors = blocksize;
    vh->m_Size = (__u32)clusters;
    vh->m_FirstBlockOffset = header / SECTOR_SIZE;
    put_SizeInSectors(size, vh, version);
    return header;
}

#endif /* _PLOOP1_IMAGE_H_ */
