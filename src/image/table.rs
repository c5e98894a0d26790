//! Changing entries of an image's BAT in place.

use std::fs::File;
use std::io;

use crate::format::bat;
use crate::sys::aligned::{AlignedBuf, read_exact, write_all};

/// Pages are written in stretches of up to so many bytes.
const STRETCH: u64 = 1 << 20;
const PAGE: u64 = bat::PAGE_BYTES as u64;

/// Writes entries given as (cluster, value), ascending by cluster. Neighbouring pages go in one write, everything else
/// in them stays as it is. Does not sync.
pub fn write_entries(file: &File, entries: &[(u32, u32)]) -> io::Result<()> {
    let mut rest = entries;
    let mut buf = None;
    while let Some(&(first, _)) = rest.first() {
        let start = u64::from(bat::page_of(first)) * PAGE;
        // All that follows without a page left out, as far as the buffer goes.
        let mut end = start + PAGE;
        let mut count = 0;
        for &(cluster, _) in rest {
            let page = u64::from(bat::page_of(cluster)) * PAGE;
            if page > end || page + PAGE > start + STRETCH {
                break;
            }
            end = end.max(page + PAGE);
            count += 1;
        }
        let (now, later) = rest.split_at(count);
        let buf = buf.get_or_insert_with(|| AlignedBuf::new(STRETCH as usize));
        let bytes = &mut buf[..(end - start) as usize];
        read_exact(file, bytes, start)?;
        for &(cluster, entry) in now {
            let at = (bat::entry_offset(cluster) - start) as usize;
            if let Some(bytes) = bytes.get_mut(at..at + 4) {
                bytes.copy_from_slice(&entry.to_le_bytes());
            }
        }
        write_all(file, bytes, start)?;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn entries_land_and_neighbours_stay() {
        let file = tempfile::tempfile().unwrap();
        let len = 3 << 20;
        file.write_all_at(&vec![0xee; len], 0).unwrap();
        let clusters = [0, 1, 1007, 1008, 2032, 300_000, 301_000, 600_000];
        let entries: Vec<(u32, u32)> = clusters.iter().map(|c| (*c, c + 5)).collect();
        write_entries(&file, &entries).unwrap();
        let mut got = vec![0; len];
        file.read_exact_at(&mut got, 0).unwrap();
        let mut want = vec![0xee; len];
        for c in clusters {
            let at = 64 + 4 * c as usize;
            want[at..at + 4].copy_from_slice(&(c + 5).to_le_bytes());
        }
        assert!(got == want);
    }
}
