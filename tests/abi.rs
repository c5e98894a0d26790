//! The C ABI against the golden tables in `tests/abi/`: layouts and numbers of the classic 1.15, and the committed header
//! against the one made from the sources.

#[path = "abi/manual.rs"]
mod manual;

use ploop::Kind;
use ploop::capi::consts::*;
use ploop::capi::dynload::ploop_functions;
use ploop::capi::kernel_consts;
use ploop::capi::types::*;
use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;

const LAYOUT: &str = include_str!("abi/libploop.so.1.layout.tsv");
const CONSTANTS: &str = include_str!("abi/libploop.so.1.constants.tsv");
const GENERATED: &str = include_str!(concat!(env!("OUT_DIR"), "/libploop.h"));
const GENERATED_TABLE: &str = include_str!(concat!(env!("OUT_DIR"), "/dynload.h"));

const GENERATED_NEWER: &str = include_str!(concat!(env!("OUT_DIR"), "/libploop_vz.h"));

/// Structs of the table that another header declares (or none), and that the library does not have as C types.
const ELSEWHERE: [&str; 17] = [
    "ploop_ctl_chunk",
    "ploop_ctl",
    "ploop_ctl_delta",
    "ploop_truncate_ctl",
    "reloc_map",
    "ploop_index_update_ctl",
    "ploop_freeblks_ctl_extent",
    "ploop_freeblks_ctl",
    "ploop_relocblks_ctl_extent",
    "ploop_relocblks_ctl",
    "ploop_balloon_ctl",
    "ploop_getdevice_ctl",
    "ploop_track_extent",
    "ploop_pvd_header",
    "CHSData",
    "merge_info",
    "struct", // the table's title
];

/// Size of the field that a function returns a reference to; the function is never called.
fn field_size<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Rows of the table as this library has them: (struct, field) -> (offset, size).
macro_rules! layout {
    ($($name:ident { $($field:ident),* $(,)? })*) => {{
        let mut rows: BTreeMap<(&str, &str), (usize, usize)> = BTreeMap::new();
        $(
            let name = stringify!($name);
            $(rows.insert(
                (name, stringify!($field)),
                (offset_of!($name, $field), field_size(|s: &$name| &s.$field)),
            );)*
            rows.insert((name, "__sizeof__"), (0, size_of::<$name>()));
            rows.insert((name, "__alignof__"), (0, align_of::<$name>()));
        )*
        rows
    }};
}

#[test]
fn structs_have_the_classic_layout() {
    let ours = layout! {
        ploop_mount_param {
            device, ro, flags, unused1, fstype, target, guid, quota, mount_data, blocksize, fsck, fsck_rc, dummy,
        }
        ploop_create_param {
            size, mode, image, fstype, without_partition, blocksize, fsblocksize, fmt_version, flags, dummy,
        }
        ploop_replace_param { file, guid, level, cur_file, flags, dummy }
        ploop_image_data { guid, file }
        ploop_snapshot_data { guid, parent_guid, temporary }
        ploop_disk_images_data {
            size, heads, cylinders, sectors, mode, nimages, images, top_guid, nsnapshots, snapshots, runtime, blocksize,
            max_delta_size, dummy,
        }
        ploop_resize_param { size, offline_resize, mntns_pid, dummy }
        ploop_snapshot_param { guid, snap_dir, dummy }
        ploop_tsnapshot_param { guid, component_name, target, device, snap_dir, dummy }
        ploop_snapshot_switch_param { guid, guid_old, flags, dummy }
        ploop_merge_param { unused1, merge_all, guid, guid2, new_delta, dummy }
        ploop_discard_param { minlen_b, to_free, automount, stop, defrag, dummy }
        ploop_info { fs_bsize, fs_blocks, fs_bfree, fs_inodes, fs_ifree }
        ploop_spec { size, blocksize, fmt_version, dummy }
        ploop_discard_stat { data_size, ploop_size, image_size, balloon_size }
        ploop_copy_send_param { device, ofd, flush_cmd, feedback_fd, dummy }
        ploop_copy_receive_param { file, ifd, feedback_fd, dummy }
        ploop_copy_param { ofd, dummy }
        ploop_copy_stat { xferred_total, xferred }
        ploop_functions {
            read_disk_descr, set_component_name, free_diskdescriptor, get_base_delta_uuid, get_top_delta_fname,
            store_diskdescriptor, find_dev, get_dev_by_mnt, get_mnt_by_dev, get_dev, get_partition_by_mnt,
            create_image, mount_image, mount_snapshot, umount, umount_image, resize_image, convert_image,
            get_info_by_descr, create_snapshot, merge_snapshot, switch_snapshot, delete_snapshot, delete_top_delta,
            find_top_delta_name_and_format, find_parent_by_guid, uuid_generate, get_last_error, set_log_file,
            set_log_level, set_verbose_level, cancel_operation, send, receive, discard_get_stat, discard,
            switch_snapshot_ex, complete_running_operation, is_large_disk_supported, get_spec, get_devs, free_array,
            replace_image, open_dd, close_dd, create_temporary_snapshot, is_mounted, copy_send, copy_receive,
            get_max_size, create_dd, set_max_delta_size, get_base_delta_fname, padding,
        }
    };
    let mut golden = BTreeMap::new();
    for line in LAYOUT.lines() {
        let column: Vec<&str> = line.split('\t').collect();
        if !ELSEWHERE.contains(&column[0]) {
            let number = |i: usize| column[i].parse().unwrap_or_else(|e| panic!("{line}: {e}"));
            golden.insert((column[0], column[1]), (number(2), number(3)));
        }
    }
    assert_eq!(golden.len(), 197, "rows of libploop.h and dynload.h in the table");
    assert_eq!(ours, golden);
}

/// (name) -> (value, header) of the golden table.
fn golden_constants() -> BTreeMap<&'static str, (i64, &'static str)> {
    let mut golden = BTreeMap::new();
    for line in CONSTANTS.lines().skip(1) {
        let column: Vec<&str> = line.split('\t').collect();
        golden.insert(column[0], (column[1].parse().unwrap_or_else(|e| panic!("{line}: {e}")), column[3]));
    }
    golden
}

macro_rules! values {
    ($($name:expr),* $(,)?) => {
        BTreeMap::from([$((stringify!($name).rsplit("::").next().unwrap_or_default().trim(), $name as i64)),*])
    };
}

#[test]
fn constants_have_the_classic_values() {
    use ploop_create_flags::*;
    use ploop_image_mode::*;
    use ploop_replace_flags::*;
    use ploop_sysexit::*;
    let mut ours = values![
        PLOOP_EXPANDED_MODE,
        PLOOP_EXPANDED_PREALLOCATED_MODE,
        PLOOP_RAW_MODE,
        PLOOP_CREATE_NOLAZY,
        PLOOP_REPLACE_KEEP_NAME,
        PLOOP_SNAP_SKIP_TOPDELTA_DESTROY,
        PLOOP_SNAP_SKIP_TOPDELTA_CREATE,
        PLOOP_LOG_NOCONSOLE,
        PLOOP_LOG_NOSTDOUT,
        PLOOP_LOG_TIMESTAMPS,
        SYSEXIT_CREAT,
        SYSEXIT_DEVICE,
        SYSEXIT_DEVIOC,
        SYSEXIT_OPEN,
        SYSEXIT_MALLOC,
        SYSEXIT_READ,
        SYSEXIT_WRITE,
        SYSEXIT_RESERVED_8,
        SYSEXIT_SYSFS,
        SYSEXIT_RESERVED_10,
        SYSEXIT_PLOOPFMT,
        SYSEXIT_SYS,
        SYSEXIT_PROTOCOL,
        SYSEXIT_LOOP,
        SYSEXIT_FSTAT,
        SYSEXIT_FSYNC,
        SYSEXIT_EBUSY,
        SYSEXIT_FLOCK,
        SYSEXIT_FTRUNCATE,
        SYSEXIT_FALLOCATE,
        SYSEXIT_MOUNT,
        SYSEXIT_UMOUNT,
        SYSEXIT_LOCK,
        SYSEXIT_MKFS,
        SYSEXIT_RESERVED_25,
        SYSEXIT_RESIZE_FS,
        SYSEXIT_MKDIR,
        SYSEXIT_RENAME,
        SYSEXIT_ABORT,
        SYSEXIT_RELOC,
        SYSEXIT_RESERVED_31,
        SYSEXIT_RESERVED_32,
        SYSEXIT_CHANGE_GPT,
        SYSEXIT_RESERVED_34,
        SYSEXIT_UNLINK,
        SYSEXIT_MKNOD,
        SYSEXIT_PLOOPINUSE,
        SYSEXIT_PARAM,
        SYSEXIT_DISKDESCR,
        SYSEXIT_DEV_NOT_MOUNTED,
        SYSEXIT_FSCK,
        SYSEXIT_RESERVED_42,
        SYSEXIT_NOSNAP,
    ];
    ours.extend(kernel_consts::ALL.iter().copied());
    let golden: BTreeMap<&str, i64> = golden_constants().into_iter().map(|(n, (v, _))| (n, v)).collect();
    assert_eq!(ours, golden);
}

#[test]
fn error_kinds_are_the_exit_codes() {
    for (name, (value, _)) in golden_constants().iter().filter(|(n, _)| n.starts_with("SYSEXIT_")) {
        let kind = Kind::from_code(*value as i32);
        assert_eq!(kind.is_none(), name.contains("RESERVED"), "{name}");
        if let Some(kind) = kind {
            assert_eq!(kind.code(), *value as i32, "{name}");
        }
    }
}

/// A committed header against the one that build.rs made.
fn is_the_generated_one(name: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include").join(name);
    if std::env::var_os("PLOOP_UPDATE_HEADER").is_some() {
        std::fs::write(&path, generated).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if committed != generated {
        let line = committed.lines().zip(generated.lines()).position(|(a, b)| a != b);
        let line = line.unwrap_or(committed.lines().count().min(generated.lines().count()));
        panic!(
            "{} differs from src/capi at line {}:\n  committed: {}\n  generated: {}\nrefresh it with: \
             PLOOP_UPDATE_HEADER=1 cargo test --test abi",
            path.display(),
            line + 1,
            committed.lines().nth(line).unwrap_or("(end)"),
            generated.lines().nth(line).unwrap_or("(end)"),
        );
    }
}

#[test]
fn the_committed_headers_are_the_generated_ones() {
    is_the_generated_one("ploop/libploop.h", GENERATED);
    is_the_generated_one("ploop/dynload.h", GENERATED_TABLE);
    is_the_generated_one("vz/libploop_vz.h", GENERATED_NEWER);
}

/// Functions that a header declares, each with the line before it.
fn declarations(header: &str) -> Vec<(&str, &str)> {
    let lines: Vec<&str> = header.lines().collect();
    let is_function = |line: &str| line.ends_with(");") && line.starts_with(|c: char| c.is_ascii_alphabetic());
    lines.windows(2).filter(|w| is_function(w[1])).map(|w| (w[1], w[0])).collect()
}

#[test]
fn each_declared_function_has_a_comment() {
    let declared: Vec<_> = declarations(GENERATED).into_iter().chain(declarations(GENERATED_TABLE)).collect();
    assert_eq!(declared.len(), 54, "functions of libploop.h and dynload.h");
    let declared = declared.into_iter().chain(declarations(GENERATED_NEWER));
    for (function, before) in declared {
        assert!(before.trim_end().ends_with("*/"), "no comment before: {function}");
    }
}

#[test]
fn the_manual_page_is_that_of_the_headers() {
    let path = manual::path();
    let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (head, committed, tail) = manual::split(&page);
    let made = manual::made(GENERATED, GENERATED_TABLE);
    if std::env::var_os("PLOOP_UPDATE_HEADER").is_some() {
        std::fs::write(&path, format!("{head}{made}{tail}")).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    } else if let Some((a, b)) = committed.lines().zip(made.lines()).find(|(a, b)| a != b) {
        panic!(
            "{} has:\n  {a}\nthe headers:\n  {b}\nrefresh it with: PLOOP_UPDATE_HEADER=1 cargo test --test abi",
            path.display()
        );
    } else {
        assert!(
            committed == made,
            "{} is too short or too long: PLOOP_UPDATE_HEADER=1 cargo test --test abi",
            path.display()
        );
    }
    // Whatever the headers look like to the code that makes the page: each exported function that they declare is there.
    let undeclared = include_str!("../capi-tests/symbols/undeclared");
    for name in include_str!("abi/libploop.so.1.symbols").lines().filter(|n| undeclared.lines().all(|u| u != *n)) {
        let heading = |l: &str| l.starts_with(".B ") && l.contains(&format!("{name}("));
        assert!(made.lines().any(heading), "libploop(3) has nothing on {name}()");
    }
}
