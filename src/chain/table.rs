//! Scans of the BATs of a chain. An entry that is not sound fails the opening, before anything is written.

use std::collections::HashMap;
use std::path::Path;

use crate::bail;
use crate::engine::api::{Carried, PageSet};
use crate::error::{Error, Result};
use crate::format::bat;
use crate::format::header::Header;
use crate::image::scan::{Found, Problem, Scan, Visitor, describe, scan};

use super::LevelFile;

/// Refuses entries that endanger data; accepts harmless ones.
struct Strict<'a> {
    header: &'a Header,
    file_len: u64,
    /// Clusters may lie behind the end of the file: what is read of them is an error.
    may_be_cut: bool,
    /// Clusters whose entries on disk are wanted.
    wanted: HashMap<u32, u32>,
}

impl Visitor for Strict<'_> {
    fn entry(&mut self, cluster: u32, host_cluster: u32) {
        if !self.wanted.is_empty()
            && let Some(durable) = self.wanted.get_mut(&cluster)
        {
            *durable = host_cluster;
        }
    }

    fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
        // Left by a shrunk disk or an older program. It is never read, and its cluster is not allocated while it is
        // there.
        if problem == Problem::BeyondDisk || (problem == Problem::BeyondFile && self.may_be_cut) {
            return Ok(());
        }
        bail!(Format, "{}", describe(self.header, self.file_len, found, problem))
    }
}

impl<'a> Strict<'a> {
    fn new(header: &'a Header, file_len: u64) -> Strict<'a> {
        Strict { header, file_len, may_be_cut: false, wanted: HashMap::new() }
    }
}

/// Scans one image.
pub fn scan_level(level: &LevelFile, header: &Header, file_len: u64) -> Result<Scan> {
    let mut visitor = Strict::new(header, file_len);
    scan(&level.file, header, file_len, &mut visitor).map_err(|e| name_it(e, &level.name))
}

/// Scans one image of which the user wants to read what is there.
pub fn scan_what_is_there(level: &LevelFile, header: &Header, file_len: u64) -> Result<Scan> {
    let mut visitor = Strict { may_be_cut: true, ..Strict::new(header, file_len) };
    scan(&level.file, header, file_len, &mut visitor).map_err(|e| name_it(e, &level.name))
}

/// Slots behind the disk that have an entry: a larger disk would make clusters of them.
pub fn slots_beyond(level: &LevelFile, header: &Header, file_len: u64) -> Result<Vec<u64>> {
    struct Beyond(Vec<u64>);
    impl Visitor for Beyond {
        fn entry(&mut self, _cluster: u32, _host_cluster: u32) {}

        fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
            if problem == Problem::BeyondDisk {
                self.0.push(found.cluster);
            }
            Ok(())
        }
    }
    let mut visitor = Beyond(Vec::new());
    scan(&level.file, header, file_len, &mut visitor).map_err(|e| name_it(e, &level.name))?;
    Ok(visitor.0)
}

/// Notes the pages of an image's BAT that have entries. `top`: entries may lie beyond the length that the file had.
pub fn scan_pages(level: &LevelFile, header: &Header, file_len: u64, top: bool, pages: &mut PageSet) -> Result<()> {
    struct Pages<'a> {
        strict: Strict<'a>,
        pages: &'a mut PageSet,
        top: bool,
    }
    impl Visitor for Pages<'_> {
        fn entry(&mut self, cluster: u32, _host_cluster: u32) {
            self.pages.insert(bat::page_of(cluster));
        }

        fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
            if self.top && found.cluster < u64::from(self.strict.header.clusters()) {
                // The engine reports it when it reads the page.
                self.pages.insert(bat::page_of(found.cluster as u32));
                return Ok(());
            }
            self.strict.problem(found, problem)
        }
    }
    let mut visitor = Pages { strict: Strict::new(header, file_len), pages, top };
    scan(&level.file, header, file_len, &mut visitor).map(drop).map_err(|e| name_it(e, &level.name))
}

/// Scans the top at a takeover and applies the carried changes. The clusters of the entry on disk and of the carried
/// one both count as allocated: after a power cut the entry on disk can be the valid one.
pub fn scan_carried(
    level: &LevelFile,
    header: &Header,
    file_len: u64,
    carried: &[(usize, u32, u32)],
) -> Result<(Scan, Vec<Carried>)> {
    let wanted = carried.iter().map(|&(_, cluster, _)| (cluster, 0)).collect();
    let mut visitor = Strict { wanted, ..Strict::new(header, file_len) };
    let mut found = scan(&level.file, header, file_len, &mut visitor).map_err(|e| name_it(e, &level.name))?;
    let file_clusters = file_len / header.cluster.bytes();
    let mut out = Vec::with_capacity(carried.len());
    for &(slot, cluster, host_cluster) in carried {
        if cluster >= header.clusters() {
            bail!(
                Protocol,
                "slot {slot} of the shared table names cluster {cluster}: image {} has {}",
                level.name.display(),
                header.clusters()
            );
        }
        let durable = visitor.wanted.get(&cluster).copied().unwrap_or(0);
        if host_cluster != 0 {
            if host_cluster < header.first_data() || u64::from(host_cluster) >= file_clusters {
                bail!(
                    Protocol,
                    "slot {slot} of the shared table puts cluster {cluster} at host cluster {host_cluster}: image {} has \
                     data at {} to {file_clusters}",
                    level.name.display(),
                    header.first_data()
                );
            }
            if host_cluster != durable && !found.used.insert(host_cluster) {
                bail!(
                    Protocol,
                    "slot {slot} of the shared table puts cluster {cluster} of image {} at host cluster {host_cluster}, \
                     which another cluster has",
                    level.name.display()
                );
            }
            found.end = found.end.max(host_cluster + 1);
        }
        out.push(Carried { slot, cluster, host_cluster, durable });
    }
    Ok((found, out))
}

fn name_it(e: Error, name: &Path) -> Error {
    e.context(format_args!("image {}", name.display()))
}
