//! Publishing: copies become durable in the target.
//!
//! The steps are: sync the data, write the changed BAT pages, sync again, record the progress. The pages are written
//! with the content that they had when the first sync began.

use super::{BATCH, CHANGED_PAGES, PAGES_AT_ONCE, Phase};
use crate::engine::Engine;
use crate::engine::api::{Action, Errno, SYNC_WORD, Shared};
use crate::engine::background::{BackgroundOp, BackgroundState, Work};
use crate::engine::breach::{Breach, breaks};

impl<S: Shared> Engine<S> {
    /// Begins to publish what was copied, where that is due.
    pub(in crate::engine::background) fn advance_publish(&mut self, out: &mut Vec<Action>) {
        let closing = self.closing && self.is_quiet();
        let Some(b) = self.background.as_mut().filter(|b| !b.has_failed()) else { return };
        let state = b.state;
        let (complete, cursor) = match &b.work {
            Work::MergeTop(m) => (m.has_settled() && b.copying == 0, m.safe_cursor()),
            Work::MergeFrozen(m) => (m.is_complete() && b.copying == 0, m.safe_cursor()),
            Work::GiveBack(_) => return,
        };
        let Some(target) = b.target.as_mut().filter(|t| t.phase == Phase::Idle) else { return };
        let finishes = complete && state == BackgroundState::Running;
        let last = !breaks(Breach::UnpublishedEnd)
            && complete
            && state == BackgroundState::Done
            && closing
            && !target.final_done;
        let due = std::mem::take(&mut target.due);
        let full = target.unpublished >= BATCH || target.changed_pages >= CHANGED_PAGES;
        if !(finishes || last || full || due) {
            return;
        }
        target.cursor = cursor;
        if let Work::MergeTop(merge) = &mut b.work {
            merge.begin_publish();
        }
        let nothing_new = target.unpublished == 0 && target.changed_pages == 0;
        if nothing_new && !last && !finishes {
            // All before it is durable already.
            self.record_progress();
            return;
        }
        target.final_running = last;
        target.unpublished = 0;
        target.changed_pages = 0;
        for (number, page) in target.pages.iter_mut().filter(|(_, p)| p.changed) {
            page.changed = false;
            page.publishing = true;
            target.writing.push((*number, page.bytes.clone()));
        }
        target.phase = Phase::DataSync;
        if breaks(Breach::ProgressBeforeSync) {
            self.record_progress();
        }
        if breaks(Breach::TargetEntryBeforeData) {
            self.target_synced(Ok(()), out);
            return;
        }
        self.sync_target(out);
    }

    fn sync_target(&mut self, out: &mut Vec<Action>) {
        let Some(level) = self.target().map(|t| t.level) else { return };
        if !breaks(Breach::ProgressBeforeSync) {
            self.pending.shared.set_progress(SYNC_WORD, 1);
        }
        let op = self.start_background_op(BackgroundOp::Sync);
        out.push(Action::Sync { op, level });
    }

    pub(in crate::engine::background) fn target_synced(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        if self.background.as_ref().is_none_or(|b| b.has_failed()) {
            return;
        }
        if let Err(errno) = result
            && !breaks(Breach::MergeSwallow)
        {
            self.abort_background(errno, out);
            return;
        }
        let Some(target) = self.target() else { return };
        if target.phase == Phase::DataSync && !target.writing.is_empty() {
            target.phase = Phase::Pages;
            self.write_target_pages(out);
        } else {
            self.published(out);
        }
    }

    fn write_target_pages(&mut self, out: &mut Vec<Action>) {
        while let Some(target) = self.target().filter(|t| t.in_flight < PAGES_AT_ONCE) {
            let Some((page, data)) = target.writing.pop() else { return };
            target.in_flight += 1;
            let level = target.level;
            let op = self.start_background_op(BackgroundOp::WritePage { page });
            out.push(Action::WriteBat { op, level, page, data });
        }
    }

    pub(in crate::engine::background) fn target_page_written(
        &mut self,
        page: u32,
        result: Result<(), Errno>,
        out: &mut Vec<Action>,
    ) {
        let failed = self.background.as_ref().is_none_or(|b| b.has_failed());
        let Some(target) = self.target() else { return };
        target.in_flight = target.in_flight.saturating_sub(1);
        if failed {
            return;
        }
        if let Some(page) = target.pages.get_mut(&page) {
            page.publishing = false;
        }
        if let Err(errno) = result
            && !breaks(Breach::MergeSwallow)
        {
            self.abort_background(errno, out);
            return;
        }
        self.write_target_pages(out);
        if let Some(target) = self.target().filter(|t| t.in_flight == 0 && t.writing.is_empty()) {
            target.phase = Phase::FinalSync;
            self.sync_target(out);
        }
    }

    /// What was copied before the publishing began is durable, and so are the entries that name it.
    fn published(&mut self, out: &mut Vec<Action>) {
        let Some(target) = self.target() else { return };
        target.phase = Phase::Idle;
        target.final_done |= std::mem::take(&mut target.final_running);
        let doubtful = target.doubtful;
        self.record_progress();
        if !doubtful {
            self.pending.shared.set_progress(SYNC_WORD, 0);
        }
        let Some(b) = &mut self.background else { return };
        let quiet = b.target.as_ref().is_none_or(|t| t.unpublished == 0 && t.changed_pages == 0) && b.copying == 0;
        let complete = match &b.work {
            Work::MergeTop(merge) => merge.has_settled(),
            Work::MergeFrozen(merge) => merge.is_complete(),
            Work::GiveBack(_) => false,
        };
        if quiet && complete {
            // Everything has been written anew.
            self.pending.shared.set_progress(SYNC_WORD, 0);
            self.background_done(out);
        } else {
            self.advance_publish(out);
        }
    }

    /// Records the cursor from which the next worker goes on: where this publishing began.
    fn record_progress(&mut self) {
        let Some(b) = &mut self.background else { return };
        let Some(target) = &mut b.target else { return };
        match &mut b.work {
            Work::MergeTop(merge) => merge.end_publish(target.cursor, &self.pending.shared),
            _ if target.recorded != target.cursor => self.pending.shared.set_progress(0, target.cursor),
            _ => {}
        }
        target.recorded = target.cursor;
    }
}
