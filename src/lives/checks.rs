//! The program that uses the device of a life, and what the images must hold.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::life::{CLUSTERS, Life};
use super::model::{BLOCK, Model};
use super::world::World;
use crate::descriptor::Descriptor;
use crate::format::guid::Guid;
use crate::image::target::read_table;
use crate::ops::testkit::small;
use crate::server::transport::Op;
use crate::sys::host;
use crate::testing::rng::Rng;

impl Life<'_> {
    /// What the images hold is what the model has.
    pub(super) fn verify(&mut self, when: &str) {
        let d = self.descriptor();
        if let Err(e) = d.check_tree() {
            self.fail(format!("{when}: {e}"));
        }
        let top = read_disk(&d, &d.top);
        let mut model = self.model.lock().expect("a lock");
        let wrong = model.check_now(&top).or_else(|| {
            model.snapshots().into_iter().find_map(|(guid, content)| match d.snapshot(&guid) {
                Some(s) if s.temporary => None,
                Some(_) => content.differs(&read_disk(&d, &guid)).map(|w| format!("snapshot {guid}: {w}")),
                None => Some(format!("snapshot {guid} is gone")),
            })
        });
        drop(model);
        if let Some(wrong) = wrong {
            self.fail(format!("{when}: {wrong}"));
        }
    }
}

/// Writes, reads and flushes until it is to stop.
pub(super) fn app(world: &Arc<World>, model: &Arc<Mutex<Model>>, stop: &AtomicBool, backing: &str, seed: u64) {
    let mut rng = Rng::new(seed);
    // Mostly there is something in every cluster, so that merges have work.
    let mut filled = if rng.below(3) == 0 { usize::MAX } else { 0 };
    while !stop.load(Ordering::Acquire) {
        let blocks = model.lock().expect("a lock").blocks();
        let filling = filled < blocks;
        let block = if filling { filled } else { rng.index(blocks) };
        filled = filled.saturating_add(small().bytes() as usize / BLOCK);
        let offset = (block * BLOCK) as u64;
        let error = match if filling { 0 } else { rng.weighted(&[5, 4, 1]) } {
            0 => {
                let value = model.lock().expect("a lock").begin_write(block);
                let bytes = vec![value; BLOCK];
                let done = world.devices.submit(backing, Op::Write { offset, len: BLOCK as u32 }, bytes);
                model.lock().expect("a lock").end_write(block, value, done.is_ok());
                done.err().map(|e| format!("write of block {block}: {e}"))
            }
            1 => match world.devices.submit(backing, Op::Read { offset, len: BLOCK as u32 }, Vec::new()) {
                Ok(bytes) => {
                    let wrong = model.lock().expect("a lock").check_block(block, &bytes);
                    if let Some(wrong) = wrong {
                        world.fail(format!("read: {wrong}"));
                        return;
                    }
                    None
                }
                Err(e) => Some(format!("read of block {block}: {e}")),
            },
            _ => {
                let mark = model.lock().expect("a lock").begin_flush();
                let done = world.devices.submit(backing, Op::Flush, Vec::new());
                model.lock().expect("a lock").end_flush(mark, done.is_ok());
                done.err().map(|e| format!("flush: {e}"))
            }
        };
        if let Some(error) = error {
            model.lock().expect("a lock").error.get_or_insert(error);
            return;
        }
        if filling {
            continue;
        }
        host::sleep(Duration::from_micros(rng.pick(&[0, 200, 5_000, 50_000, 200_000])));
    }
}

/// The content of a snapshot, block by block, read from the images alone.
fn read_disk(d: &Descriptor, guid: &Guid) -> Vec<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let size = d.blocksize.bytes();
    let per = size as usize / BLOCK;
    let mut blocks = vec![vec![0; BLOCK]; CLUSTERS as usize * per];
    let mut seen = BTreeMap::new();
    for image in d.chain(guid).unwrap_or_default().into_iter().rev() {
        let Ok(file) = fs::File::open(&image.file) else { continue };
        let places: Vec<(u32, u64)> = match d.is_raw(image) {
            true => (0..CLUSTERS as u32).map(|c| (c, u64::from(c) * size)).collect(),
            false => match read_table(&file, &image.file) {
                Ok((_, table)) => table.entries.iter().map(|(c, p)| (*c, u64::from(*p) * size)).collect(),
                Err(_) => continue,
            },
        };
        for (cluster, at) in places {
            if seen.insert(cluster, ()).is_some() {
                continue;
            }
            for i in 0..per {
                let block = &mut blocks[cluster as usize * per + i];
                let _ = file.read_exact_at(block, at + (i * BLOCK) as u64);
            }
        }
    }
    blocks
}
