//! Giving space back: what moves, when the file is cut, and how it ends before its time.

use super::*;
use crate::testing::rng::Rng;
use crate::testing::seed;

const DISK: u64 = 4096;
const DATA: [(u32, u8); 6] = [(0, 1), (1, 2), (2, 3), (1007, 4), (1008, 5), (2049, 6)];
const GAP: u32 = 10;

/// An image whose six clusters stand behind a gap of ten.
fn behind_a_gap(bounces: u16, map_pages: usize) -> Rig {
    let (level, mut file) = image(DISK as u32, &DATA);
    file.splice(CLUSTER as usize..CLUSTER as usize, vec![0xEE; (u64::from(GAP) * CLUSTER) as usize]);
    for (i, (cluster, _)) in DATA.iter().enumerate() {
        let at = 64 + 4 * *cluster as usize;
        file[at..at + 4].copy_from_slice(&(i as u32 + 1 + GAP).to_le_bytes());
    }
    let mut config = rig(vec![(level, file.clone())], DISK).engine.config;
    config.alloc.free.push(1..1 + GAP);
    config.bounces = bounces;
    config.map_pages = map_pages;
    let mut r = over(config, vec![file]);
    r.bounces = vec![vec![0xEE; 8192]; usize::from(bounces)];
    r
}

fn begin(r: &mut Rig) {
    r.event(Event::GiveBack(GiveBackConfig::default()));
}

fn clusters(r: &Rig) -> u64 {
    r.files[0].len() as u64 / CLUSTER
}

#[test]
fn clusters_move_and_the_file_is_cut_after_the_bat_is_durable() {
    let mut r = behind_a_gap(2, 4);
    begin(&mut r);
    r.run();
    let given = GivenBack { moved: 6, before: 17 * CLUSTER, after: 7 * CLUSTER };
    assert_eq!(r.given, Some(Ok(given)));
    assert_eq!(clusters(&r), 7);
    let cut = r.log.iter().position(|l| *l == "cut").unwrap();
    assert_eq!(r.log[cut - 3..=cut], ["bat", "bat", "sync", "cut"], "{:?}", r.log);
    for (cluster, byte) in DATA {
        assert_eq!(r.read(u64::from(cluster) * CLUSTER, 512), [byte; 512]);
    }
    r.write(100 * CLUSTER, 512, 9);
    assert_eq!(r.read(100 * CLUSTER + 512, 512), [0; 512], "new clusters read as zero");
    // Nothing more to do.
    r.event(Event::Close);
    r.run();
    assert_eq!(r.closed, Some(Ok(())));
}

#[test]
fn under_load_no_byte_is_lost_and_the_file_is_packed() {
    for seed in seed::each(1..=100) {
        let mut rng = Rng::new(seed);
        let mut r = behind_a_gap(1 + rng.below(3) as u16, 1 + rng.below(4) as usize);
        begin(&mut r);
        let mut want: HashMap<u64, u8> = HashMap::new();
        for _ in 0..20 {
            let cluster = [0, 1, 2, 1007, 1008, 2049, 7, 8][rng.below(8) as usize];
            let byte = rng.below(200) as u8;
            r.submit(RequestKind::Write, cluster * CLUSTER, 512, byte);
            want.insert(cluster, byte);
            for _ in 0..rng.below(6) {
                if !r.queue.is_empty() {
                    // Writes to the same sector must not overtake each other here.
                    r.any(0);
                }
            }
        }
        r.run();
        assert!(matches!(r.given, Some(Ok(_))), "seed {seed}: {:?}", r.given);
        assert!(r.replies.values().all(Result::is_ok), "seed {seed}");
        begin(&mut r);
        r.run();
        let used = 6 + [7, 8].iter().filter(|c| want.contains_key(c)).count() as u64;
        assert_eq!(clusters(&r), 1 + used, "seed {seed}");
        for (cluster, byte) in DATA {
            let last = r.read(u64::from(cluster) * CLUSTER + CLUSTER - 512, 512);
            assert!(last.iter().all(|b| *b == byte), "seed {seed}: cluster {cluster}");
        }
        for (cluster, byte) in want {
            assert_eq!(r.read(cluster * CLUSTER, 512), [byte; 512], "seed {seed}: cluster {cluster}");
        }
    }
}

#[test]
fn what_was_unmapped_is_given_back() {
    let data: Vec<(u32, u8)> = (0..8).map(|c| (c, c as u8 + 1)).collect();
    let mut r = rig(vec![image(10, &data)], 10);
    for cluster in [0, 1, 2, 5, 6] {
        r.submit(RequestKind::Zero, cluster * CLUSTER, CLUSTER, 0);
    }
    r.run();
    begin(&mut r);
    r.run();
    assert_eq!(r.given, Some(Ok(GivenBack { moved: 3, before: 9 * CLUSTER, after: 4 * CLUSTER })));
    assert_eq!([r.read(3 * CLUSTER, 512)[0], r.read(7 * CLUSTER, 512)[0], r.read(CLUSTER, 512)[0]], [4, 8, 0]);
}

#[test]
fn the_rate_is_kept_from_tick_to_tick() {
    let mut r = behind_a_gap(4, 4);
    r.event(Event::GiveBack(GiveBackConfig { per_tick: 2, per_busy_tick: 0 }));
    let mut seen = Vec::new();
    for _ in 0..4 {
        r.run();
        seen.push(r.engine.status().background_copied);
        r.event(Event::Tick);
    }
    assert_eq!(seen, [2, 4, 6, 6]);
    assert!(matches!(r.given, Some(Ok(_))));
}

#[test]
fn one_that_was_cancelled_or_refused_leaves_a_running_engine() {
    let mut r = behind_a_gap(2, 4);
    begin(&mut r);
    begin(&mut r);
    assert_eq!(r.given, Some(Err(BUSY)));
    for _ in 0..3 {
        r.one();
    }
    r.event(Event::Background(BackgroundControl::Cancel));
    assert_eq!(r.given, Some(Err(CANCELED)));
    // The copies of the first may still be in flight.
    begin(&mut r);
    r.run();
    assert!(matches!(r.given, Some(Ok(_))), "{:?}", r.given);
    assert_eq!(clusters(&r), 7);
    let (level, file) = (LevelConfig::Raw { bytes: CLUSTER }, vec![0; CLUSTER as usize]);
    let mut r = rig(vec![(level, file)], 1);
    begin(&mut r);
    assert_eq!(r.given, Some(Err(INVALID)));
}

#[test]
fn a_cut_that_fails_leaves_the_space_free_and_its_content_unknown() {
    let mut r = behind_a_gap(2, 4);
    begin(&mut r);
    while !matches!(r.queue.front(), Some(Action::Truncate { .. })) {
        assert!(r.one());
    }
    let Some(Action::Truncate { op, .. }) = r.queue.pop_front() else { unreachable!() };
    // A write that comes while the file is being cut waits for the end of that.
    let write = r.submit(RequestKind::Write, 50 * CLUSTER, 512, 7);
    r.run();
    assert_eq!(r.replies.get(&write), None);
    r.event(Event::Done { op, result: Err(5) });
    r.run();
    assert_eq!((r.given, r.replies[&write]), (Some(Err(5)), Ok(())));
    assert_eq!(clusters(&r), 17);
    assert_eq!(r.read(50 * CLUSTER + 512, 512), [0; 512]);
}
