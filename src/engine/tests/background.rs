//! Background work while requests come: in any order of operations the target ends with the content of the chain.

use super::super::BackgroundState;
use super::*;
use crate::testing::{rng::Rng, seed};

const CLUSTERS: u64 = 2050;

/// What a chain of files reads as at a sector.
fn sector(levels: &[LevelConfig], files: &[Vec<u8>], cluster: u64, within: u64) -> Vec<u8> {
    for (config, file) in levels.iter().zip(files).rev() {
        let at = match config {
            LevelConfig::Raw { bytes } => {
                let at = cluster * CLUSTER + within;
                if at < *bytes { Some(at) } else { None }
            }
            LevelConfig::Ploop { v1, .. } => {
                let slot = 64 + 4 * cluster as usize;
                let entry = u64::from(u32::from_le_bytes(file[slot..slot + 4].try_into().unwrap()));
                let unit = if *v1 { 512 } else { CLUSTER };
                (entry != 0).then_some(entry * unit + within)
            }
        };
        if let Some(at) = at {
            return file[at as usize..at as usize + 512].to_vec();
        }
    }
    vec![0; 512]
}

/// Clusters that the tests use: neighbours, and some on other pages.
fn some_cluster(rng: &mut Rng) -> u64 {
    [0, 1, 2, 3, 4, 5, 1007, 1008, 1009, 2031, 2032, 2049][rng.below(12) as usize]
}

fn start(seed: u64, rng: &mut Rng, raw: bool) -> Rig {
    let mut levels = vec![];
    if raw {
        let bytes = CLUSTERS * CLUSTER;
        levels.push((LevelConfig::Raw { bytes }, vec![0; bytes as usize]));
    } else {
        levels.push(image(CLUSTERS as u32, &[(0, 1), (3, 2), (1008, 3)]));
        levels.push(image(CLUSTERS as u32, &[(1, 4), (3, 5), (2032, 6)]));
    }
    let data: Vec<(u32, u8)> = (0..rng.below(8)).map(|i| (some_cluster(rng) as u32, i as u8 + 100)).collect();
    let mut once = std::collections::BTreeMap::new();
    once.extend(data);
    levels.push(image(CLUSTERS as u32, &once.into_iter().collect::<Vec<_>>()));
    let mut config = rig(levels.clone(), CLUSTERS).engine.config;
    let target = levels.len() - 2;
    let end = (levels[target].1.len() as u64 / CLUSTER) as u32;
    let alloc = AllocConfig { end, free: vec![], ahead: 1 + rng.below(3) as u32, limit: u32::MAX };
    let work = BackgroundWork::MergeTop { target: TargetConfig { level: target as u8, alloc }, pages: PageSet::all(3) };
    config.background = Some(BackgroundConfig { work });
    config.bounces = 1 + rng.below(3) as u16;
    config.map_pages = 1 + rng.below(4) as usize;
    let bounces = usize::from(config.bounces);
    let mut r = over(config, levels.into_iter().map(|(_, file)| file).collect());
    r.bounces = vec![vec![0xEE; 8192]; bounces];
    r.next = seed as u32 % 7;
    r
}

/// Random requests, many at the same time and overlapping, their operations carried out in any order.
fn drive(r: &mut Rig, rng: &mut Rng, requests: u64) {
    for n in 0..requests {
        let cluster = some_cluster(rng);
        let sectors = CLUSTER / 512;
        let (first, count) = match rng.below(4) {
            0 => (0, sectors),
            _ => {
                let first = rng.below(sectors);
                (first, 1 + rng.below(sectors - first))
            }
        };
        let kind = [RequestKind::Write, RequestKind::Write, RequestKind::Read, RequestKind::Zero, RequestKind::Flush]
            [rng.below(5) as usize];
        let len = if kind == RequestKind::Flush { 0 } else { count * 512 };
        r.submit(kind, cluster * CLUSTER + first * 512, len, n as u8);
        for _ in 0..rng.below(8) {
            if !r.queue.is_empty() {
                let at = rng.below(r.queue.len() as u64) as usize;
                r.any(at);
            }
        }
    }
}

fn settle(r: &mut Rig, rng: &mut Rng) {
    while !r.queue.is_empty() {
        let at = rng.below(r.queue.len() as u64) as usize;
        r.any(at);
    }
}

/// The chain up to `target` reads as the whole chain.
fn compare(seed: u64, levels: &[LevelConfig], files: &[Vec<u8>], target: usize) {
    for cluster in [0, 1, 2, 3, 4, 5, 6, 1007, 1008, 1009, 2031, 2032, 2049] {
        for within in (0..CLUSTER).step_by(512) {
            let before = sector(levels, files, cluster, within);
            let after = sector(&levels[..=target], &files[..=target], cluster, within);
            assert!(before == after, "seed {seed}: cluster {cluster}, byte {within}: {} and {}", before[0], after[0]);
        }
    }
}

#[test]
fn the_target_ends_with_what_the_chain_has() {
    let mut agreed_early = 0;
    for seed in seed::each(1..=300) {
        let mut rng = Rng::new(seed);
        let mut r = start(seed, &mut rng, seed % 5 == 0);
        drive(&mut r, &mut rng, 60);
        agreed_early += u32::from(r.merged == Some(Ok(())));
        settle(&mut r, &mut rng);
        assert_eq!(r.merged, Some(Ok(())), "seed {seed}");
        assert_eq!(r.engine.background_state(), Some(BackgroundState::Done));
        drive(&mut r, &mut rng, 60);
        r.event(Event::Close);
        settle(&mut r, &mut rng);
        assert_eq!(r.closed, Some(Ok(())), "seed {seed}");
        assert!(r.replies.values().all(Result::is_ok));
        let target = r.files.len() - 2;
        compare(seed, &r.engine.config.levels, &r.files, target);
    }
    let replayed = seed::asked(None).is_some();
    assert!(replayed || agreed_early > 20, "the merge mostly runs under load: {agreed_early} of 300 ended in it");
}

#[test]
fn closing_ends_a_merge_and_spoils_nothing() {
    for seed in seed::each(1..=100) {
        let mut rng = Rng::new(seed);
        let mut r = start(seed, &mut rng, false);
        drive(&mut r, &mut rng, 5);
        let agreed = r.merged.is_some();
        r.event(Event::Close);
        settle(&mut r, &mut rng);
        assert_eq!(r.closed, Some(Ok(())), "seed {seed}");
        assert_eq!(r.merged, Some(if agreed { Ok(()) } else { Err(CANCELED) }), "seed {seed}");
    }
}

#[test]
fn no_space_for_the_target_ends_the_merge_alone() {
    let mut rng = Rng::new(77);
    let mut r = start(1, &mut rng, false);
    r.no_space = true;
    for c in 10..14 {
        r.submit(RequestKind::Read, c * CLUSTER, 512, 0);
    }
    settle(&mut r, &mut rng);
    r.no_space = false;
    let top = r.files.len() - 1;
    let has_new = r.files[top].len() as u64 > CLUSTER;
    if has_new {
        assert_eq!(r.merged, Some(Err(NO_SPACE)));
    }
    drive(&mut r, &mut rng, 40);
    settle(&mut r, &mut rng);
    assert!(r.replies.values().all(Result::is_ok));
    r.event(Event::Close);
    r.run();
    assert_eq!(r.closed, Some(Ok(())));
}

#[test]
fn a_target_with_too_few_entries_is_refused() {
    let mut r = rig(vec![image(5, &[]), image(10, &[(3, 1)])], 10);
    let mut config = r.engine.config.clone();
    let target = TargetConfig { level: 0, alloc: AllocConfig { end: 1, ahead: 1, limit: 9, ..Default::default() } };
    config.background = Some(BackgroundConfig { work: BackgroundWork::MergeTop { target, pages: PageSet::all(1) } });
    r = over(config, r.files);
    r.event(Event::Tick);
    assert_eq!(r.merged, Some(Err(TOO_BIG)));
    r.write(3 * CLUSTER, 512, 9);
}

/// Levels 0 to 2 are frozen and merged into level 0, while the top is written to.
fn frozen(seed: u64, rng: &mut Rng, raw: bool) -> Rig {
    let mut levels = vec![match raw {
        true => (LevelConfig::Raw { bytes: CLUSTERS * CLUSTER }, vec![3; (CLUSTERS * CLUSTER) as usize]),
        false => image(CLUSTERS as u32, &[(0, 1), (3, 2), (1008, 3)]),
    }];
    levels.push(image(CLUSTERS as u32, &[(1, 4), (2, 40), (3, 5), (4, 41), (1007, 7), (2032, 6)]));
    levels.push(image(CLUSTERS as u32, &[(4, 8), (5, 9), (1007, 10), (1008, 11), (2049, 12)]));
    levels.push(image(CLUSTERS as u32, &[(5, 13)]));
    let mut config = rig(levels.clone(), CLUSTERS).engine.config;
    let end = (levels[0].1.len() as u64 / CLUSTER) as u32;
    let end = if raw { 0 } else { end };
    let alloc = AllocConfig { end, free: vec![], ahead: 1 + rng.below(3) as u32, limit: u32::MAX };
    let target = TargetConfig { level: 0, alloc };
    let work = BackgroundWork::MergeFrozen { high: 2, target, pages: PageSet::all(3) };
    config.background = Some(BackgroundConfig { work });
    config.bounces = 1 + rng.below(3) as u16;
    config.bounce_bytes = [8192, 32768, 131072][rng.below(3) as usize];
    config.map_pages = 1 + rng.below(4) as usize;
    let (bounces, bytes) = (usize::from(config.bounces), config.bounce_bytes as usize);
    let mut r = over(config, levels.into_iter().map(|(_, file)| file).collect());
    r.bounces = vec![vec![0xEE; bytes]; bounces];
    r.shares = rng.below(2) == 0;
    r.next = seed as u32 % 7;
    r
}

#[test]
fn frozen_levels_are_merged_while_the_top_is_written() {
    for seed in seed::each(1..=200) {
        let mut rng = Rng::new(seed);
        let mut r = frozen(seed, &mut rng, seed % 5 == 0);
        let before = r.files[..3].to_vec();
        let levels = r.engine.config.levels.clone();
        drive(&mut r, &mut rng, 40);
        settle(&mut r, &mut rng);
        assert_eq!(r.merged, Some(Ok(())), "seed {seed}");
        assert!(r.replies.values().all(Result::is_ok), "seed {seed}");
        for cluster in [0, 1, 2, 3, 4, 5, 6, 1007, 1008, 1009, 2031, 2032, 2049] {
            let was = sector(&levels[..3], &before, cluster, 512);
            let is = sector(&levels[..1], &r.files[..1], cluster, 512);
            assert!(was == is, "seed {seed}: cluster {cluster}: {} and {}", was[0], is[0]);
        }
        r.event(Event::Close);
        settle(&mut r, &mut rng);
        assert_eq!(r.closed, Some(Ok(())), "seed {seed}");
    }
}

#[test]
fn frozen_levels_of_a_read_only_device_are_merged() {
    let mut rng = Rng::new(5);
    let mut r = frozen(5, &mut rng, false);
    let mut config = r.engine.config.clone();
    config.writable = false;
    config.levels.pop();
    r.files.pop();
    r = over(config, std::mem::take(&mut r.files));
    r.bounces = vec![vec![0xEE; 131072]; 4];
    r.event(Event::Tick);
    r.run();
    assert_eq!(r.merged, Some(Ok(())));
    compare(5, &r.engine.config.levels.clone(), &r.files, 0);
}

#[test]
fn a_paused_merge_goes_on_and_a_cancelled_one_ends() {
    let mut rng = Rng::new(9);
    let mut r = frozen(9, &mut rng, false);
    r.event(Event::Background(BackgroundControl::Pause));
    r.event(Event::Tick);
    r.run();
    assert_eq!(r.merged, None);
    r.event(Event::Background(BackgroundControl::Resume));
    r.run();
    assert_eq!(r.merged, Some(Ok(())));
    let mut r = frozen(10, &mut rng, false);
    r.event(Event::Tick);
    r.event(Event::Background(BackgroundControl::Cancel));
    assert_eq!(r.merged, Some(Err(CANCELED)));
    r.run();
    r.write(9 * CLUSTER, 512, 1);
    r.event(Event::Close);
    r.run();
    assert_eq!(r.closed, Some(Ok(())));
}
