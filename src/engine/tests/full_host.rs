//! A full host, or a quota that is used up: what flushes do without space.

use super::*;

const FULL: [Errno; 2] = [28, 122];

/// An image of ten clusters with one changed entry.
fn changed() -> Rig {
    let mut r = rig(vec![image(10, &[])], 10);
    r.write(5 * CLUSTER, 512, 1);
    r
}

fn tick(r: &mut Rig) {
    r.event(Event::Tick);
    r.run();
}

#[test]
fn a_quota_that_is_used_up_holds_writes_as_a_full_file_system_does() {
    let mut r = rig(vec![image(10, &[])], 10);
    let write = r.submit(RequestKind::Write, 0, 512, 1);
    assert!(matches!(r.queue[0], Action::ReadBat { .. }) && r.one());
    let Some(Action::Fallocate { op, .. }) = r.queue.pop_front() else { panic!("no space is asked for") };
    r.event(Event::Done { op, result: Err(122) });
    let Some(Action::Fallocate { op, len: CLUSTER, .. }) = r.queue.pop_front() else { panic!("no smaller step") };
    r.event(Event::Done { op, result: Err(122) });
    r.run();
    assert_eq!(r.replies.get(&write), None);
    assert!(r.engine.status().no_space);
    tick(&mut r);
    assert_eq!(r.replies[&write], Ok(()));
}

#[test]
fn a_bat_write_or_sync_without_space_is_repeated_until_there_is_some() {
    for errno in FULL {
        for sync in [false, true] {
            let mut r = changed();
            let full = if sync { &mut r.sync_error } else { &mut r.bat_error };
            *full = Some(errno);
            let flush = r.submit(RequestKind::Flush, 0, 0, 0);
            r.run();
            for _ in 0..3 {
                tick(&mut r);
                let status = r.engine.status();
                assert!(status.no_space && !status.failed);
                assert_eq!(r.replies.get(&flush), None);
            }
            assert_eq!(r.read(5 * CLUSTER, 512), [1; 512], "reads go on");
            // Not in the page that waits.
            r.write(7 * CLUSTER, 512, 2);
            (r.sync_error, r.bat_error) = (None, None);
            tick(&mut r);
            assert_eq!(r.replies[&flush], Ok(()));
            assert!(!r.engine.status().no_space);
            assert_eq!((r.entry(5), r.entry(7)), (1, 0));
            assert_eq!(r.flush(), Ok(()));
            assert_eq!(r.entry(7), 2);
        }
    }
}

#[test]
fn a_flush_that_may_not_wait_fails_and_a_later_one_succeeds() {
    for by_command in [false, true] {
        let mut r = changed();
        r.bat_error = Some(28);
        r.engine.set_enospc_limit((!by_command).then_some(3));
        let flush = r.submit(RequestKind::Flush, 0, 0, 0);
        r.run();
        for _ in 0..2 {
            tick(&mut r);
            assert_eq!(r.replies.get(&flush), None);
        }
        r.event(if by_command { Event::WaitForSpace(false) } else { Event::Tick });
        r.run();
        assert_eq!(r.replies[&flush], Err(28));
        let next = r.submit(RequestKind::Flush, 0, 0, 0);
        tick(&mut r);
        assert_eq!(r.replies[&next], Err(28));
        assert!(!r.engine.is_failed());
        r.bat_error = None;
        tick(&mut r);
        assert_eq!(r.flush(), Ok(()));
        assert_eq!(r.entry(5), 1);
    }
}

#[test]
fn closing_waits_for_space_unless_the_device_is_being_stopped() {
    for stop in [false, true] {
        let mut r = changed();
        r.bat_error = Some(28);
        r.event(Event::Close);
        r.run();
        tick(&mut r);
        assert_eq!(r.closed, None);
        if stop {
            r.event(Event::WaitForSpace(false));
            r.run();
            assert_eq!(r.closed, Some(Err(5)), "the image stays marked");
            assert!(r.engine.is_failed());
        } else {
            r.bat_error = None;
            tick(&mut r);
            assert_eq!(r.closed, Some(Ok(())));
            assert_eq!(r.entry(5), 1);
        }
    }
}

#[test]
fn zeroings_do_not_wait_for_a_slot_of_a_flush_without_space() {
    let mut r = rig(vec![image(100, &[(30, 9)]), image(100, &[])], 100);
    r.bat_error = Some(28);
    for c in 0..16 {
        r.submit(RequestKind::Write, c * CLUSTER, 512, 1);
    }
    r.submit(RequestKind::Flush, 0, 0, 0);
    r.run();
    let write = r.submit(RequestKind::Write, 20 * CLUSTER, 512, 1);
    let zero = r.submit(RequestKind::Zero, 30 * CLUSTER, CLUSTER, 0);
    let unmapped = r.submit(RequestKind::Zero, 50 * CLUSTER, CLUSTER, 0);
    r.run();
    assert_eq!(r.replies[&unmapped], Ok(()));
    assert_eq!(r.engine.status().dirty, 16);
    assert_eq!(r.replies.get(&write), None);
    assert_eq!(r.replies[&zero], Err(28));
    assert_eq!(r.read(30 * CLUSTER, 512), [9; 512]);
    r.bat_error = None;
    tick(&mut r);
    assert_eq!(r.replies[&write], Ok(()));
}

#[test]
fn a_limit_of_the_file_fails_writes_that_need_more_and_can_be_lifted() {
    let mut r = rig(vec![image(10, &[])], 10);
    r.write(0, 512, 1);
    // The header's cluster and two others, whatever was to be allocated ahead.
    r.engine.pending.shared.2.store(3 * CLUSTER / 512, Relaxed);
    let end = |r: &Rig| r.files[0].len() as u64 / CLUSTER;
    let mut results = Vec::new();
    for cluster in 1..5 {
        let write = r.submit(RequestKind::Write, cluster * CLUSTER, 512, 1);
        r.run();
        results.push(r.replies[&write]);
    }
    assert_eq!(results, [Ok(()), Err(TOO_BIG), Err(TOO_BIG), Err(TOO_BIG)]);
    let clusters = end(&r);
    // A cluster that was discarded is free when that is durable: a write waits for it.
    let discarded = r.submit(RequestKind::Zero, CLUSTER, CLUSTER, 0);
    r.run();
    let write = r.submit(RequestKind::Write, 6 * CLUSTER, 512, 4);
    r.run();
    assert_eq!((r.replies[&discarded], r.replies[&write]), (Ok(()), Ok(())));
    assert_eq!(end(&r), clusters);
    assert!(!r.engine.status().no_space);
    // What is there is written, and read.
    r.write(0, 512, 2);
    assert_eq!(r.read(0, 512), vec![2; 512]);
    r.engine.pending.shared.2.store(0, Relaxed);
    (5..10).for_each(|cluster| r.write(cluster * CLUSTER, 512, 3));
    assert!(end(&r) > clusters);
}
