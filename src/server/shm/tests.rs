use super::*;
use std::os::fd::AsFd;

fn key(unique: u64) -> RequestKey {
    RequestKey::new(unique, 16, 4096, 512)
}

#[test]
fn a_successor_finds_what_was_left() {
    let fd = create().unwrap();
    let a = Shm::map(fd.as_fd()).unwrap();
    assert!(a.carried().is_empty());
    a.store(7, 5 << 32 | 9);
    a.store(SLOTS - 1, 6 << 32);
    a.set_sync_state(SyncState::Running);
    a.publish(&Status { no_space: true, writes: 11, allocated: 3, ..Status::default() });
    drop(a);
    let b = Shm::map(fd.as_fd()).unwrap();
    assert_eq!(b.carried(), [(7, 5, 9), (SLOTS - 1, 6, 0)]);
    assert_eq!(b.sync_state(), SyncState::Running);
    assert!(!b.failed());
    assert_eq!(b.status(), Status { no_space: true, writes: 11, allocated: 3, ..Status::default() });
    b.set_sync_state(SyncState::Failed);
    assert!(Shm::map(fd.as_fd()).unwrap().failed());
}

#[test]
fn other_layouts_are_left_alone() {
    let fd = shared_words::create(c"other", WORDS).unwrap();
    assert_eq!(Shm::map(fd.as_fd()).unwrap_err().kind(), Kind::Protocol);
    let fd = shared_words::create(c"other", 8).unwrap();
    assert_eq!(Shm::map(fd.as_fd()).unwrap_err().kind(), Kind::Malloc);
}

#[test]
fn a_new_device_takes_over_the_changes_alone() {
    let fd = create().unwrap();
    let shm = Shm::map(fd.as_fd()).unwrap();
    let origin = Origin { top: FileId { dev: 1, ino: 2 }, chain: 3, boot: 4 };
    shm.set_origin(origin);
    shm.store(7, 5 << 32 | 9);
    shm.set_failed();
    for _ in 0..MAX_WORKER_EXITS {
        shm.mark(0, Some(key(40)));
        shm.count_marked_requests();
    }
    shm.set_switched(8);
    shm.begin_background(8);
    shm.set_progress(3, 5);
    shm.begin_close();
    shm.begin_device();
    assert!(!shm.is_poisoned(key(40)) && !shm.is_closing());
    assert_eq!((shm.switched(), shm.progress(3)), (0, 0));
    assert_eq!((shm.carried(), shm.failed(), shm.origin()), (vec![(7, 5, 9)], true, origin));
}

#[test]
fn three_strikes_and_out() {
    let fd = create().unwrap();
    let (guilty, innocent) = (key(40), key(42));
    for death in 1..=3 {
        let shm = Shm::map(fd.as_fd()).unwrap();
        shm.mark(1, Some(innocent));
        shm.mark(1, None);
        shm.mark(0, Some(guilty));
        assert!(shm.is_request_marked());
        shm.count_marked_requests();
        assert!(!shm.is_request_marked());
        assert_eq!(shm.is_poisoned(key(40)), death == 3);
        assert!(!shm.is_poisoned(innocent));
    }
    let shm = Shm::map(fd.as_fd()).unwrap();
    shm.clear_poison(guilty);
    assert!(!shm.is_poisoned(guilty));
}

#[test]
fn a_panic_without_a_name_makes_no_request_suspect() {
    let fd = create().unwrap();
    let shm = Shm::map(fd.as_fd()).unwrap();
    for _ in 0..5 {
        shm.set_panicked();
        shm.count_marked_requests();
        assert!((1..=300).all(|unique| !shm.is_poisoned(key(unique))));
        assert!(shm.take_panicked() && !shm.take_panicked());
    }
}

#[test]
fn the_limit_of_the_file_is_the_devices_own() {
    let fd = create().unwrap();
    let shm = Shm::map(fd.as_fd()).unwrap();
    assert_eq!(shm.file_limit(), 0);
    shm.set_file_limit(4096);
    // Seen by the worker, and by its successor.
    assert_eq!(Shm::map(fd.as_fd()).unwrap().file_limit(), 4096);
    shm.begin_device();
    assert_eq!(shm.file_limit(), 0);
}
