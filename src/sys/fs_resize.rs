//! Making mounted file systems larger. Each call gets an open folder of the file system, so that no name and no mount namespace
//! matters.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

/// ext4 rounds sizes down to pages.
const PAGE: u64 = 4096;

/// `struct xfs_fsop_geom_v1`.
#[repr(C)]
#[derive(Default)]
pub struct XfsGeometry {
    block: u32,
    rt_extent: u32,
    group_blocks: u32,
    groups: u32,
    log_blocks: u32,
    sector: u32,
    inode: u32,
    inode_percent: u32,
    data_blocks: u64,
    rest: [u64; 9],
}

/// `struct xfs_growfs_data`.
#[repr(C)]
pub struct XfsGrow {
    blocks: u64,
    inode_percent: u32,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
pub struct BtrfsArgs {
    fd: i64,
    name: [u8; 4088],
}

const _: () = assert!(size_of::<XfsGeometry>() == 112 && size_of::<XfsGrow>() == 16 && size_of::<BtrfsArgs>() == 4096);

nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
nix::ioctl_read!(xfs_geometry, b'X', 100, XfsGeometry);
nix::ioctl_write_ptr!(xfs_grow, b'X', 110, XfsGrow);
nix::ioctl_write_ptr!(btrfs_resize, 0x94, 3, BtrfsArgs);

/// Makes the file system that `folder` lies on as large as its device, of so many bytes. Its name; none: it is no ext, xfs
/// or btrfs, and nothing was done.
pub fn grow(folder: &File, bytes: u64) -> io::Result<Option<&'static str>> {
    let stat = fstatfs(folder)?;
    let fd = folder.as_raw_fd();
    match stat.filesystem_type() {
        EXT4_SUPER_MAGIC => {
            let blocks = bytes / PAGE * PAGE / stat.block_size().max(1) as u64;
            // SAFETY: the descriptor is open; EXT4_IOC_RESIZE_FS reads one u64.
            unsafe { ext4_resize(fd, &blocks) }?;
            Ok(Some("ext4"))
        }
        XFS_SUPER_MAGIC => {
            let mut now = XfsGeometry::default();
            // SAFETY: the descriptor is open; XFS_IOC_FSGEOMETRY_V1 fills one `struct xfs_fsop_geom_v1` (112 bytes, layout
            // asserted above).
            unsafe { xfs_geometry(fd, &mut now) }?;
            let blocks = bytes / u64::from(now.block.max(1));
            if blocks > now.data_blocks {
                let wanted = XfsGrow { blocks, inode_percent: now.inode_percent };
                // SAFETY: the descriptor is open; XFS_IOC_FSGROWFSDATA reads one `struct xfs_growfs_data` (16 bytes, layout
                // asserted above).
                unsafe { xfs_grow(fd, &wanted) }?;
            }
            Ok(Some("xfs"))
        }
        BTRFS_SUPER_MAGIC => {
            let mut args = BtrfsArgs { fd: 0, name: [0; 4088] };
            args.name[..3].copy_from_slice(b"max");
            // SAFETY: the descriptor is open; BTRFS_IOC_RESIZE reads one `struct btrfs_ioctl_vol_args` (4096 bytes, layout
            // asserted above), whose text ends with a 0.
            unsafe { btrfs_resize(fd, &args) }?;
            Ok(Some("btrfs"))
        }
        _ => Ok(None),
    }
}
