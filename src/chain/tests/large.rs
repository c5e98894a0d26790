//! Large tables and large clusters.

use super::*;

/// A large table: in full runs the largest, 2 GiB for 16 TiB of the smallest clusters; else a sixteenth of that.
#[test]
fn a_large_table() {
    use crate::descriptor::ImageMode;
    use crate::image::content::Piece;
    use crate::image::create::{Params, build};
    let d = dir();
    let p = d.path().join("a");
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let part = if std::env::var("PLOOP_TEST").as_deref() == Ok("full") { 1 } else { 16 };
    let sectors = crate::format::limits::MAX_FS_SECTORS / part;
    let first = 65536 / part as u32 + 1;
    let params = Params { version: Version::V2, cluster, sectors, mode: ImageMode::Expanded };
    let data = [1u8; 4096];
    let pieces: Vec<_> = (0..64).map(|i| Piece::bytes(i * sectors * 8, &data)).collect();
    let t = std::time::Instant::now();
    build(&p, &params, &pieces, &mut |_, _| Ok(())).unwrap();
    println!("made in {:?}", t.elapsed());
    let t = std::time::Instant::now();
    let chain = open(&[level(&p, true)], &writable()).unwrap();
    println!("opened in {:?}", t.elapsed());
    assert_eq!(chain.alloc.end, first + 64);
    assert_eq!(chain.alloc.free, []);
}

#[test]
fn large_clusters_are_allocated_one_by_one() {
    let d = dir();
    let cluster = ClusterSize::from_sectors(131_072).unwrap();
    let p = Maker { cluster, clusters: 2, ..Maker::default() }.make(&d.path().join("a"));
    let chain = open(&[level(&p, true)], &OpenOptions_ { ahead: 4096, ..writable() }).unwrap();
    assert_eq!(chain.alloc.ahead, 1);
}
