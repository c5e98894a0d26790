//! Requests cut at cluster borders: each piece becomes part of a file operation, a cluster operation, or waits.

use std::ops::Range;

use super::api::{Action, BAT_PAGE, Buf, Errno, Event, LevelConfig, OpId, ReqId, RequestKind, Shared};
use super::background::BackgroundOp;
use super::breach::{Breach, breaks};
use super::map::{MapEntry, Page};
use super::request::Fragment;
use super::{Engine, IO, Op};
use crate::format::bat::{self, clusters_of, page_of};

/// Neighbouring pieces that stand together in one file become one operation.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub level: u8,
    pub file_off: u64,
    pub len: u64,
    /// Offset in the request's buffer.
    pub at: u64,
    pub first: u32,
    pub count: u32,
}

/// Read, write or zeroing of allocated clusters, in flight.
#[derive(Clone, Copy)]
pub(super) struct Io {
    req: ReqId,
    kind: RequestKind,
    extent: Extent,
    /// It is half of a write to both files of a merge.
    pair: Option<u32>,
}

impl Io {
    /// The action for the caller; emitted once more after ENOSPC.
    pub(super) fn action(&self, op: OpId) -> Action {
        let Extent { level, file_off, len, at, .. } = self.extent;
        let buf = Buf::Request { req: self.req, off: at };
        match self.kind {
            RequestKind::Read => Action::Read { op, level, file_off, len, to: buf },
            RequestKind::Write => Action::Write { op, level, file_off, len, from: buf },
            _ => Action::ZeroRange { op, level, file_off, len },
        }
    }

    pub(super) fn is_write(&self) -> bool {
        self.kind == RequestKind::Write
    }

    /// Of a write to both files of a merge.
    pub(super) fn is_half(&self) -> bool {
        self.pair.is_some()
    }

    pub(super) fn level(&self) -> u8 {
        self.extent.level
    }

    /// The bytes of the top's file that it writes.
    pub(super) fn written(&self, top: u8) -> Option<Range<u64>> {
        let Extent { level, file_off, len, .. } = self.extent;
        (level == top && self.kind != RequestKind::Read).then(|| file_off..file_off + len)
    }

    pub(super) fn clusters(&self) -> Range<u32> {
        self.extent.first..self.extent.first + self.extent.count
    }
}

impl<S: Shared> Engine<S> {
    /// Works on a segment as far as possible. The operations that it starts take over its pending count.
    pub(super) fn process(&mut self, fragment: Fragment, out: &mut Vec<Action>) {
        let Some(req) = self.reqs.get(&fragment.req) else { return };
        let (kind, base) = (req.kind, req.offset);
        let shift = self.config.cluster_shift;
        let end = fragment.off + fragment.len;
        let mut off = fragment.off;
        let mut extent = None;
        while off < end {
            let cluster = (off >> shift) as u32;
            let Some(entry) = self.map.get(cluster) else {
                let stop = end.min(clusters_of(page_of(cluster)).end << shift);
                self.wait_for_page(cluster, Fragment { req: fragment.req, off, len: stop - off }, out);
                off = stop;
                continue;
            };
            let stop = end.min((u64::from(cluster) + 1) << shift);
            let piece = Fragment { req: fragment.req, off, len: stop - off };
            match kind {
                RequestKind::Read => self.read_piece(piece, cluster, entry, off - base, &mut extent, out),
                RequestKind::Write => self.write_piece(piece, cluster, entry, off - base, &mut extent, out),
                _ => self.zero_piece(piece, cluster, entry, &mut extent, out),
            }
            off = stop;
        }
        self.issue(fragment.req, extent.take(), None, out);
        self.part_done(fragment.req, Ok(()), out);
    }

    /// The segment waits in a queue; that counts as pending.
    pub(super) fn add_pending(&mut self, req: ReqId) {
        if let Some(r) = self.reqs.get_mut(&req) {
            r.pending += 1;
        }
    }

    fn read_piece(
        &mut self,
        piece: Fragment,
        cluster: u32,
        entry: MapEntry,
        at: u64,
        extent: &mut Option<Extent>,
        out: &mut Vec<Action>,
    ) {
        if entry.is(MapEntry::LOCKED) && self.cluster_op_blocks_reads(cluster) {
            self.wait_for_cluster_op(cluster, piece);
            return;
        }
        let within = piece.off & ((1 << self.config.cluster_shift) - 1);
        let Some((level, host_cluster)) = entry.location() else {
            out.push(Action::ZeroFill { req: piece.req, off: at, len: piece.len });
            return;
        };
        let file_off = self.file_off(host_cluster) + within;
        let len = piece.len.min(self.readable(level, file_off));
        if len < piece.len {
            out.push(Action::ZeroFill { req: piece.req, off: at + len, len: piece.len - len });
        }
        if len > 0 {
            self.extend(piece.req, extent, Extent { level, file_off, len, at, first: cluster, count: 1 }, out);
        }
    }

    /// Bytes from `file_off` on that a level's file has; beyond a raw base all is zero.
    pub(super) fn readable(&self, level: u8, file_off: u64) -> u64 {
        match self.config.levels.get(usize::from(level)) {
            Some(LevelConfig::Raw { bytes }) => bytes.saturating_sub(file_off),
            _ => u64::MAX,
        }
    }

    fn write_piece(
        &mut self,
        piece: Fragment,
        cluster: u32,
        entry: MapEntry,
        at: u64,
        extent: &mut Option<Extent>,
        out: &mut Vec<Action>,
    ) {
        if entry.is(MapEntry::LOCKED) {
            self.wait_for_cluster_op(cluster, piece);
            return;
        }
        let within = piece.off & ((1 << self.config.cluster_shift) - 1);
        let host_cluster = match entry.location() {
            Some((level, host_cluster)) if level == self.top => Some(host_cluster),
            _ => self.allocate(piece, cluster, entry, out),
        };
        if let Some(host_cluster) = host_cluster {
            if self.write_both(piece, cluster, host_cluster, at, extent, out) {
                return;
            }
            let file_off = self.file_off(host_cluster) + within;
            let next = Extent { level: self.top, file_off, len: piece.len, at, first: cluster, count: 1 };
            self.extend(piece.req, extent, next, out);
        }
    }

    /// The range of one cluster is to read as zero.
    fn zero_piece(
        &mut self,
        piece: Fragment,
        cluster: u32,
        entry: MapEntry,
        extent: &mut Option<Extent>,
        out: &mut Vec<Action>,
    ) {
        if entry.is(MapEntry::LOCKED) {
            self.wait_for_cluster_op(cluster, piece);
            if self.is_waiting_for_space(cluster) {
                self.refuse_zeroings(cluster, out);
            }
            self.refuse_starved_zeroings(out);
            return;
        }
        let Some((level, host_cluster)) = entry.location() else { return };
        let start = u64::from(cluster) << self.config.cluster_shift;
        let end = (start + (1 << self.config.cluster_shift)).min(self.config.device_bytes);
        let whole = piece.off == start && piece.off + piece.len == end;
        if level != self.top {
            // A lower level has the cluster: a zeroed cluster in the top hides it.
            self.allocate_zero(piece, cluster, entry, whole, out);
        } else if whole
            && self.may_unmap(entry)
            && !self.raw_top
            && !self.is_waiting_for_space(cluster)
            && (!self.merges_top() || breaks(Breach::MergeUnmapped))
        {
            self.unmap(piece, cluster, entry, host_cluster);
        } else if !self.write_both(piece, cluster, host_cluster, 0, extent, out) {
            let file_off = self.file_off(host_cluster) + (piece.off - start);
            let next = Extent { level, file_off, len: piece.len, at: 0, first: cluster, count: 1 };
            self.extend(piece.req, extent, next, out);
        }
    }

    /// Without the top's entry the cluster reads as zero.
    fn may_unmap(&self, entry: MapEntry) -> bool {
        !entry.is(MapEntry::LOWER) || breaks(Breach::UnmapOverLower)
    }

    /// Drops the top's entry of a cluster that no lower level has. The host cluster stays in use until that is durable.
    fn unmap(&mut self, piece: Fragment, cluster: u32, entry: MapEntry, host_cluster: u32) {
        if entry.in_flight() > 0 && !breaks(Breach::ReuseBeforeDrained) {
            self.drain(cluster, piece);
        } else if !self.pending.has_slot_for(cluster) {
            self.wait_for_slot(piece);
        } else if let Ok(freed) = self.pending.set(cluster, 0, true, host_cluster, None) {
            self.map.set_location(cluster, None);
            self.map.mark(cluster, MapEntry::PENDING, true);
            if let Some(p) = freed {
                self.space.give(p);
            }
            self.drop_if_unchanged(cluster);
        }
    }

    /// Drops a change whose value is already on disk.
    fn drop_if_unchanged(&mut self, cluster: u32) {
        let none = self.pending.get(cluster).is_some_and(|d| d.current == d.durable && d.writing.is_none());
        if none {
            self.pending.forget(cluster);
            self.map.mark(cluster, MapEntry::PENDING, false);
        }
    }

    pub(super) fn wait_for_slot(&mut self, piece: Fragment) {
        self.add_pending(piece.req);
        self.slot_wait.push(piece);
    }

    /// Adds to the extent, or issues it and begins another.
    fn extend(&mut self, req: ReqId, extent: &mut Option<Extent>, next: Extent, out: &mut Vec<Action>) {
        self.map.enter(next.first);
        match extent {
            Some(r)
                if r.level == next.level && r.file_off + r.len == next.file_off && r.first + r.count == next.first =>
            {
                r.len += next.len;
                r.count += 1;
            }
            _ => {
                let full = extent.replace(next);
                self.issue(req, full, None, out);
            }
        }
    }

    pub(super) fn issue(&mut self, req: ReqId, extent: Option<Extent>, pair: Option<u32>, out: &mut Vec<Action>) {
        let (Some(extent), Some(kind)) = (extent, self.kind(req)) else { return };
        self.add_pending(req);
        let io = Io { req, kind, extent, pair };
        let op = self.start(Op::Io(io));
        out.push(io.action(op));
    }

    pub(super) fn io_done(&mut self, io: Io, mut result: Result<(), Errno>, out: &mut Vec<Action>) {
        // A failed write is ready, too: its request fails, and the content of the new host cluster is zeroes or new
        // bytes. If the entry were kept back, its slot in the shared table would never become free.
        let wrote = io.kind != RequestKind::Read && io.extent.level == self.top;
        for cluster in io.clusters() {
            let entry = self.map.leave(cluster);
            if wrote && entry.is(MapEntry::PENDING) {
                self.pending.set_ready(cluster);
            }
            if entry.is(MapEntry::LOCKED) && entry.in_flight() == 0 {
                self.drained(cluster, out);
            }
        }
        if let Some(pair) = io.pair {
            result = self.half_done(pair, io.extent.level, result, out);
        }
        self.part_done(io.req, result, out);
    }

    fn wait_for_page(&mut self, cluster: u32, fragment: Fragment, out: &mut Vec<Action>) {
        self.add_pending(fragment.req);
        let page = page_of(cluster);
        if self.map.loading(page).is_none() {
            self.load(page, out);
        }
        match self.map.loading(page) {
            Some(l) => l.waiters.push(fragment),
            // Loaded without a read: handled next, before another page can evict this one.
            None => self.ready.push_front(fragment),
        }
    }

    /// Begins to fill a page. A page that needs no reads is loaded at once.
    pub(super) fn load(&mut self, page: u32, out: &mut Vec<Action>) {
        let clusters = clusters_of(page);
        let mut content = Page::new();
        let mut reads = Vec::new();
        for (level, config) in self.config.levels.iter().enumerate() {
            match *config {
                LevelConfig::Raw { bytes } => {
                    let end = bytes.div_ceil(1 << self.config.cluster_shift).min(clusters.end);
                    for c in clusters.start..end {
                        let entry = content.entry(c as u32);
                        entry.set_location(Some((level as u8, c as u32)));
                        entry.mark(MapEntry::LOWER, (level as u8) < self.top);
                    }
                }
                LevelConfig::Ploop { clusters: n, .. } if clusters.start < u64::from(n) => reads.push(level as u8),
                LevelConfig::Ploop { .. } => {}
            }
        }
        self.map.begin(page, content, reads.len() as u32);
        if reads.is_empty() {
            self.page_complete(page, out);
        }
        for level in reads {
            let op = self.start(Op::Bat { page, level });
            out.push(Action::ReadBat { op, level, page, len: BAT_PAGE as u32 });
        }
    }

    pub(super) fn bat_read(&mut self, op: OpId, result: Result<&[u8], Errno>, out: &mut Vec<Action>) {
        match self.ops.get(op.0) {
            Some(&Op::Bat { page, level }) => {
                self.ops.remove(op.0);
                self.page_part(page, level, result, out);
            }
            Some(&Op::Background(BackgroundOp::SourcePage { level, page })) => {
                self.ops.remove(op.0);
                self.source_page_read(level, page, result, out);
            }
            Some(&Op::Background(BackgroundOp::TargetPage { page })) => {
                self.ops.remove(op.0);
                self.target_page_read(page, result, out);
            }
            // A `BatRead` for anything else is a fault of the caller; the operation counts as failed.
            _ => self.step_other(op, out),
        }
    }

    fn step_other(&mut self, op: OpId, out: &mut Vec<Action>) {
        self.step(Event::Done { op, result: Err(IO) }, out);
    }

    /// One level's BAT page was read: the highest level that has a cluster is used, whatever the order of the reads.
    pub(super) fn page_part(&mut self, page: u32, level: u8, bytes: Result<&[u8], Errno>, out: &mut Vec<Action>) {
        let bytes = bytes.and_then(|b| if b.len() == BAT_PAGE { Ok(b) } else { Err(IO) });
        let parsed = bytes.and_then(|b| self.lay_over(page, level, b));
        let Some(loading) = self.map.loading(page) else { return };
        if let Err(errno) = parsed {
            loading.error.get_or_insert(errno);
        }
        loading.left -= 1;
        if loading.left > 0 {
            return;
        }
        let failed = loading.error;
        self.page_complete(page, out);
        if let Some(errno) = failed {
            self.cycle_page_failed(page, out);
            self.merge_page_failed(page, errno, out);
        }
    }

    fn lay_over(&mut self, page: u32, level: u8, bytes: &[u8]) -> Result<(), Errno> {
        let Some(&LevelConfig::Ploop { v1, clusters, first_data, file_clusters }) =
            self.config.levels.get(usize::from(level))
        else {
            return Err(IO);
        };
        let top = level == self.top;
        let writable_top = top && self.config.writable;
        // The target of a merge has grown since the chain was opened.
        let grown = self.target_end(level).filter(|_| !breaks(Breach::StaleTargetEnd));
        let limit = if writable_top { u32::MAX } else { grown.unwrap_or(file_clusters) };
        let unit = bat::Unit::of(v1, self.config.cluster_shift);
        let range = clusters_of(page);
        let Some(loading) = self.map.loading(page) else { return Err(IO) };
        debug_assert_eq!(bytes.len(), BAT_PAGE);
        for c in range.start..range.end.min(u64::from(clusters)) {
            let raw = bat::load(bytes, bat::index_of(c as u32));
            let host_cluster = unit.decode_within(raw, first_data, limit).ok_or(IO)?;
            if host_cluster == 0 {
                continue;
            }
            let entry = loading.page.entry(c as u32);
            match entry.location() {
                Some((have, _)) if have > level => {}
                _ => entry.set_location(Some((level, host_cluster))),
            }
            if !top {
                entry.mark(MapEntry::LOWER, true);
            }
        }
        Ok(())
    }

    /// All parts are read: applies the changes that are not durable yet.
    fn page_complete(&mut self, page: u32, out: &mut Vec<Action>) {
        let range = clusters_of(page);
        let top = self.top;
        if let Some(loading) = self.map.loading(page) {
            for (cluster, change) in self.pending.in_range(range) {
                if breaks(Breach::DropCarried) {
                    continue;
                }
                let entry = loading.page.entry(cluster);
                match entry.location() {
                    _ if change.current != 0 => entry.set_location(Some((top, change.current))),
                    Some((level, _)) if level == top => entry.set_location(None),
                    _ => {}
                }
                entry.mark(MapEntry::PENDING, true);
                loading.page.pin();
            }
        }
        let (waiters, error) = self.map.finish(page);
        match error {
            None => self.ready.extend(waiters),
            Some(errno) => waiters.into_iter().for_each(|fragment| self.part_done(fragment.req, Err(errno), out)),
        }
    }
}
