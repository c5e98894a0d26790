//! Rules that a test can break, one at a time: the simulation proves something only if it finds each breach.
//!
//! Only a build of the tests has the switch. Everywhere else [`breaks`] is `false` at compile time.

/// A clause of the rules that the engine does not keep while the switch is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Breach {
    /// A BAT page has entries whose first data write has not ended.
    EntryWithoutData,
    /// A BAT page has the entries at the time of its write, not those when its data sync began.
    LateContent,
    /// A flush joins the cycle that is running when it arrives.
    JoinRunning,
    /// A cycle writes its BAT pages without the data sync.
    SkipDataSync,
    /// A cycle ends with its BAT pages written, not synced.
    SkipFinalSync,
    /// A host cluster is free as soon as its cluster is unmapped, while the durable BAT names it.
    ReuseBeforeClear,
    /// A host cluster is free while a BAT page that names it is on its way to the disk.
    ReuseWhileWritten,
    /// A cluster is unmapped while operations are in flight on its host cluster.
    ReuseBeforeDrained,
    /// A cluster is published when the first chunk of its copy is there.
    HalfBuilt,
    /// The old content of a free host cluster counts as zeroes.
    TrustOldBytes,
    /// A cluster that a lower level has is unmapped by a zeroing.
    UnmapOverLower,
    /// Closing reports success after a failed flush, so that the in-use mark is cleared.
    CloseAsClean,
    /// A failed sync counts as done.
    SwallowSync,
    /// A failed write of a BAT page counts as done.
    SwallowBatWrite,
    /// A failed cycle fails its own flushes; later flushes begin new cycles.
    ForgetFailure,
    /// A worker that takes over does not apply the carried updates to the BAT that it reads.
    DropCarried,
    /// A change leaves the shared table when its cycle begins, not when it is durable.
    SlotFreedEarly,
    /// A change is not recorded in the shared table.
    SlotNotStored,
    /// Syncs are issued without a record.
    NoSyncRecord,
    /// Zeroings wait for space.
    HoldZeroings,
    /// EDQUOT counts as any other error.
    QuotaIsFinal,
    /// A sync or BAT write that finds no space counts as failed.
    MetadataSpaceIsFinal,
    /// A sync or BAT write that finds no space counts as done.
    MetadataSpaceIsSuccess,
    /// A flush fails for want of space though it may wait.
    FlushDoesNotWait,
    /// A merge copies a cluster while writes are in flight on it.
    MergeUndrained,
    /// Writes to a cluster that a merge has copied go to the top alone.
    MergeUnmirrored,
    /// Two writes to the same sectors go to both files of a merge in any order.
    MergeCrossed,
    /// A cluster that a merge has copied is unmapped.
    MergeUnmapped,
    /// A cluster that is allocated in the top behind a merge's cursor is not copied.
    MergeMissed,
    /// An error of the target is ignored.
    MergeSwallow,
    /// The target's BAT pages are written without the sync of its data.
    TargetEntryBeforeData,
    /// A BAT page of the target has the entry of a cluster whose copy ended after the data sync had begun.
    LateTargetEntry,
    /// A page of the target's BAT with changes is dropped from memory.
    EvictChangedPage,
    /// A merge records its progress before that is durable.
    ProgressBeforeSync,
    /// A cluster that is allocated in the top behind a merge's cursor is not named in the shared table.
    RevisitNotRecorded,
    /// Entries of the target are checked against the length that its file had when the merge began.
    StaleTargetEnd,
    /// The last changes of a merge's target are not published when the engine closes.
    UnpublishedEnd,
    /// Of several sources that have a cluster the lowest one is copied.
    LowerSourceWins,
    /// A cluster is moved while writes are in flight on it.
    RelocateUndrained,
    /// Reads of a cluster begin at its old place while it is moved.
    MoveUnderReads,
    /// The file is cut before the entries of the clusters that were moved are durable.
    CutUnpublished,
    /// Clusters behind a cut are given out while the file is being cut.
    AllocateInCut,
    /// The file grows while it is being cut.
    GrowDuringCut,
    /// A cut that failed counts as done.
    SwallowCut,
    /// The next worker goes on with a merge although the outcome of the target's last sync is unknown.
    TrustTargetAfterKill,
    /// A merge that was given up leaves its progress in the shared table; the next worker with the same work goes on
    /// from it.
    KeepProgressOfFailed,
    /// A cluster counts as written when that begins, not when it has ended.
    TrackIssued,
    /// Pages of the BAT are not tracked.
    TrackNoTable,
    /// A cluster that an entry comes to name is not tracked.
    TrackNotNamed,
    /// A worker that takes over tracks only what it writes itself.
    TrackForgotten,
}

/// All breaches.
#[cfg(test)]
#[allow(dead_code)] // for the simulation, which is another crate
pub const ALL: &[Breach] = &[
    Breach::EntryWithoutData,
    Breach::LateContent,
    Breach::JoinRunning,
    Breach::SkipDataSync,
    Breach::SkipFinalSync,
    Breach::ReuseBeforeClear,
    Breach::ReuseWhileWritten,
    Breach::ReuseBeforeDrained,
    Breach::HalfBuilt,
    Breach::TrustOldBytes,
    Breach::UnmapOverLower,
    Breach::CloseAsClean,
    Breach::SwallowSync,
    Breach::SwallowBatWrite,
    Breach::ForgetFailure,
    Breach::DropCarried,
    Breach::SlotFreedEarly,
    Breach::SlotNotStored,
    Breach::NoSyncRecord,
    Breach::HoldZeroings,
    Breach::QuotaIsFinal,
    Breach::MetadataSpaceIsFinal,
    Breach::MetadataSpaceIsSuccess,
    Breach::FlushDoesNotWait,
    Breach::MergeUndrained,
    Breach::MergeUnmirrored,
    Breach::MergeCrossed,
    Breach::MergeUnmapped,
    Breach::MergeMissed,
    Breach::MergeSwallow,
    Breach::TargetEntryBeforeData,
    Breach::LateTargetEntry,
    Breach::EvictChangedPage,
    Breach::ProgressBeforeSync,
    Breach::RevisitNotRecorded,
    Breach::StaleTargetEnd,
    Breach::UnpublishedEnd,
    Breach::LowerSourceWins,
    Breach::RelocateUndrained,
    Breach::MoveUnderReads,
    Breach::CutUnpublished,
    Breach::AllocateInCut,
    Breach::GrowDuringCut,
    Breach::SwallowCut,
    Breach::TrustTargetAfterKill,
    Breach::KeepProgressOfFailed,
    Breach::TrackIssued,
    Breach::TrackNoTable,
    Breach::TrackNotNamed,
    Breach::TrackForgotten,
];

#[cfg(test)]
thread_local! {
    static ON: std::cell::Cell<Option<Breach>> = const { std::cell::Cell::new(None) };
}

/// From now on engines of this thread break this rule.
#[cfg(test)]
#[allow(dead_code)] // for the simulation, which is another crate
pub fn set(breach: Option<Breach>) {
    ON.set(breach);
}

/// Is this rule broken on purpose?
#[cfg(test)]
pub fn breaks(rule: Breach) -> bool {
    ON.get() == Some(rule)
}

/// No rule is broken on purpose.
#[cfg(not(test))]
#[inline(always)]
pub const fn breaks(_: Breach) -> bool {
    false
}
