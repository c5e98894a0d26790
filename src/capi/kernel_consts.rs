//! The numbers of ploop_if.h (the interface of kernels with ploop) and ploop1_image.h (the image header), and the flags
//! of `ploop_check`, which no header declares.

/// Defines each constant and, for the comparison with the classic's values, a list of all.
macro_rules! constants {
    ($($name:ident = $value:expr;)*) => {
        $(#[allow(non_upper_case_globals, missing_docs)] pub const $name: i64 = $value;)*
        /// Every constant of this file by name.
        pub const ALL: &[(&str, i64)] = &[$((stringify!($name), $name)),*];
    };
}

const fn ioctl(direction: i64, size: i64, number: i64) -> i64 {
    direction << 30 | size << 16 | PLOOPCTLTYPE << 8 | number
}
/// An ioctl without argument.
const fn io(number: i64) -> i64 {
    ioctl(0, 0, number)
}
/// An ioctl that the kernel reads an argument of `size` bytes for.
const fn iow(number: i64, size: i64) -> i64 {
    ioctl(1, size, number)
}
/// An ioctl that the kernel writes `size` bytes for.
const fn ior(number: i64, size: i64) -> i64 {
    ioctl(2, size, number)
}

constants! {
    PLOOP_FMT_ERROR = -1;
    PLOOP_FMT_UNDEFINED = 0;
    PLOOP_FMT_V1 = 1;
    PLOOP_FMT_V2 = 2;

    PLOOP_MNTN_OFF = 0;
    PLOOP_MNTN_BALLOON = 1;
    PLOOP_MNTN_FBLOADED = 2;
    PLOOP_MNTN_SNAPSHOT = 3;
    PLOOP_MNTN_TRACK = 4;
    PLOOP_MNTN_DISCARD = 5;
    PLOOP_MNTN_NOFAST = 256;
    PLOOP_MNTN_MERGE = 257;
    PLOOP_MNTN_GROW = 258;
    PLOOP_MNTN_RELOC = 259;

    PLOOP_FMT_RAW = 1;
    PLOOP_FMT_PLOOP1 = 2;
    PLOOP_FMT_RDONLY = 1;
    PLOOP_FMT_FLAGS = PLOOP_FMT_RDONLY;
    PLOOP_FMT_PREALLOCATED = 2;
    PLOOP_FLAG_COOKIE = 4;
    PLOOP_FLAG_CLUBLKS = 8;
    PLOOP_FLAG_FS_SYNC = 0x1000_0000;
    PLOOP_COOKIE_SIZE = 64;

    PLOOP_IO_AUTO = 0;
    PLOOP_IO_DIRECT = 1;
    PLOOP_IO_NFS = 2;
    PLOOP_IO_RESERVED = 3;
    PLOOP_IO_KAIO = 4;

    PLOOP_MAP_OFFSET = 16;
    PLOOP_ZERO_INDEX = 0xffff_ffff;

    PLOOPCTLTYPE = b'P' as i64;
    PLOOP_IOC_ADD_DELTA = iow(0, 24);
    PLOOP_IOC_CLEAR = io(1);
    PLOOP_IOC_STOP = io(2);
    PLOOP_IOC_START = io(3);
    PLOOP_IOC_SNAPSHOT = iow(4, 24);
    PLOOP_IOC_DEL_DELTA = iow(5, 4);
    PLOOP_IOC_TRACK_INIT = ior(6, 16);
    PLOOP_IOC_TRACK_STOP = io(7);
    PLOOP_IOC_TRACK_ABORT = io(8);
    PLOOP_IOC_TRACK_SETPOS = iow(9, 8);
    PLOOP_IOC_TRACK_READ = ior(10, 16);
    PLOOP_IOC_SYNC = io(11);
    PLOOP_IOC_MERGE = io(12);
    PLOOP_IOC_REPLACE_DELTA = iow(13, 24);
    PLOOP_IOC_TRUNCATE = iow(14, 16);
    PLOOP_IOC_UPDATE_INDEX = iow(16, 8);
    PLOOP_IOC_GROW = iow(17, 24);
    PLOOP_IOC_FBGET = iow(18, 16);
    PLOOP_IOC_BALLOON = iow(19, 16);
    PLOOP_IOC_FREEBLKS = iow(20, 16);
    PLOOP_IOC_RELOCBLKS = iow(21, 16);
    PLOOP_IOC_GETDEVICE = iow(22, 8);
    PLOOP_IOC_DISCARD_INIT = io(23);
    PLOOP_IOC_DISCARD_FINI = io(24);
    PLOOP_IOC_DISCARD_WAIT = io(25);
    PLOOP_IOC_FBDROP = io(26);
    PLOOP_IOC_FBFILTER = ior(27, 8);
    PLOOP_IOC_MAX_DELTA_SIZE = iow(28, 8);

    PLOOP_EVENT_ABORTED = 1;
    PLOOP_EVENT_STOPPED = 2;
    PLOOP_EVENT_ENOSPC = 3;

    PRL_IMAGE_COMPRESSED = 2;
    SIGNATURE_DISK_IN_USE = 0x746f_6e59;
    CIF_NoFlags = 0;
    CIF_Empty = 1;
    CIF_FmtVersionConvert = 2;
    CIF_Invalid = 0xffff_ffff;
    PLOOP1_SECTOR_LOG = 9;
    PLOOP1_DEF_CLUSTER_LOG = 11;
    SECTOR_SIZE = 1 << PLOOP1_SECTOR_LOG;
    DEF_CLUSTER = SECTOR_SIZE << PLOOP1_DEF_CLUSTER_LOG;
    DEFAULT_HEADS_COUNT = 16;
    DEFAULT_SECTORS_COUNT = 63;

    CHECK_FORCE = 0x01;
    CHECK_HARDFORCE = 0x02;
    CHECK_DROPINUSE = 0x04;
    CHECK_DETAILED = 0x08;
    CHECK_REPAIR_SPARSE = 0x10;
    CHECK_READONLY = 0x20;
    CHECK_TALKATIVE = 0x40;
    CHECK_RAW = 0x80;
}
