//! What a receiver has of an interrupted try: the list that `ploop receive --kept` prints and `ploop send --kept` reads.
//!
//! It is text: a line [`FIRST`], a line `file NAME` for each file, and below it a line `NUMBER SUM` for each block that is no
//! hole. The sender believes none of it: a block that has the sum of its own it names instead of sending it, and the receiver
//! then looks whether its file has these bytes.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::sys::fiemap;

use super::on_disk::OnDisk;
use super::stream::{BLOCK, Sum, block_sum};
use super::{names, stream};

pub const FIRST: &str = "ploop kept 1";
/// Longer than any line.
const MAX_LINE: u64 = 300;
/// More blocks than this are not taken for resuming: 16 TiB.
const MAX_BLOCKS: usize = 1 << 24;

/// The blocks of one file, by number.
pub type Blocks = HashMap<u64, Sum>;

/// By the names of the files.
#[derive(Debug, Default)]
pub struct Kept(HashMap<String, Blocks>);

impl Kept {
    /// Reads a list. `Protocol`: it is none, or damaged.
    pub fn read(input: impl Read) -> Result<Kept> {
        let mut input = BufReader::new(input);
        let mut kept = Kept::default();
        let (mut number, mut all) = (0u64, 0);
        let mut file: Option<&mut Blocks> = None;
        while let Some(line) = next_line(&mut input)? {
            number += 1;
            if number == 1 {
                if line != FIRST {
                    bail!(Protocol, "line 1 is {line:?}, a list of ploop receive --kept begins with {FIRST:?}");
                }
            } else if let Some(name) = line.strip_prefix("file ") {
                names::check(name)?;
                if kept.0.len() >= stream::MAX_FILES as usize {
                    bail!(Protocol, "line {number}: more than {} files", stream::MAX_FILES);
                }
                file = Some(kept.0.entry(name.to_owned()).or_default());
            } else {
                let Some((blocks, (block, sum))) = file.as_mut().zip(block_of(&line)) else {
                    bail!(Protocol, "line {number} is {line:?}, the number of a block and its sum are wanted");
                };
                all += 1;
                if all > MAX_BLOCKS {
                    bail!(Protocol, "the list has more than {MAX_BLOCKS} blocks");
                }
                blocks.insert(block, sum);
            }
        }
        if number == 0 {
            bail!(Protocol, "the list is empty, one of ploop receive --kept begins with {FIRST:?}");
        }
        Ok(kept)
    }

    pub fn load(path: &Path) -> Result<Kept> {
        let shown = path.display();
        let file = File::open(path).ctx(Kind::Open, || format!("cannot open {shown}"))?;
        Kept::read(file).map_err(|e| e.context(format!("{shown}, the list of what the receiver has kept")))
    }

    /// What is kept of a file, once.
    pub fn take(&mut self, name: &str) -> Blocks {
        self.0.remove(name).unwrap_or_default()
    }
}

fn next_line(input: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    input.take(MAX_LINE).read_until(b'\n', &mut line).ctx(Kind::Read, || "cannot read the list")?;
    if line.is_empty() {
        return Ok(None);
    }
    match line.strip_suffix(b"\n").map(|line| String::from_utf8(line.to_vec())) {
        Some(Ok(line)) => Ok(Some(line)),
        _ => bail!(
            Protocol,
            "the list has a line that is not text, too long, or cut: {:?}",
            line.escape_ascii().to_string()
        ),
    }
}

fn block_of(line: &str) -> Option<(u64, Sum)> {
    let (number, hex) = line.split_once(' ')?;
    let number = number.parse().ok().filter(|n| *n <= i64::MAX as u64 / BLOCK)?;
    let hex = hex.as_bytes();
    let mut sum = Sum::default();
    if hex.len() != 2 * sum.len() {
        return None;
    }
    for (byte, digits) in sum.iter_mut().zip(hex.chunks(2)) {
        let [high, low] = [*digits.first()?, *digits.last()?].map(|d| char::from(d).to_digit(16));
        *byte = u8::try_from(high? * 16 + low?).ok()?;
    }
    Some((number, sum))
}

/// Writes the lines of one file. Only what is on its disk counts.
pub fn write_file(out: &mut dyn Write, name: &str, file: &File) -> Result<()> {
    let shown = || format!("cannot list {name}");
    writeln!(out, "file {name}").ctx(Kind::Write, shown)?;
    let len = file.metadata().ctx(Kind::Fstat, shown)?.len();
    let mut next = 0;
    let mut disk = OnDisk::of(file).ctx(Kind::Open, shown)?;
    let mut blocks = |start: u64, end: u64| {
        for block in next.max(start / BLOCK)..end.div_ceil(BLOCK) {
            if report::cancel::requested() {
                return Err(std::io::Error::other("cancelled"));
            }
            let sum: String = block_sum(disk.block(block)?).iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(out, "{block} {sum}")?;
            next = block + 1;
        }
        Ok(())
    };
    fiemap::each_data(file, 0, len, &mut blocks).ctx(Kind::Read, shown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("f")).unwrap();
        file.write_all_at(&[1; 100], BLOCK + 5).unwrap();
        file.write_all_at(&[2; 10], 9 * BLOCK).unwrap();
        let mut list = format!("{FIRST}\n").into_bytes();
        write_file(&mut list, "a b", &file).unwrap();
        let mut kept = Kept::read(&list[..]).unwrap();
        assert!(kept.take("other").is_empty());
        let blocks = kept.take("a b");
        let mut whole = vec![0; BLOCK as usize];
        whole[5..105].fill(1);
        assert_eq!(blocks.get(&1), Some(&block_sum(&whole)));
        assert_eq!(blocks.get(&9), Some(&block_sum(&[2; 10])));
        assert!(!blocks.contains_key(&4) || blocks.len() == 10, "{} blocks", blocks.len());
        assert!(kept.take("a b").is_empty());
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let sum = "0f".repeat(32);
        Kept::read(format!("{FIRST}\nfile a\n3 {sum}\n").as_bytes()).unwrap();
        let long = "x".repeat(400);
        for text in [
            "".to_owned(),
            "ploop kept 2\n".into(),
            format!("{FIRST}\n3 {sum}\n"),
            format!("{FIRST}\nfile ../a\n"),
            format!("{FIRST}\nfile a\n-3 {sum}\n"),
            format!("{FIRST}\nfile a\n3 {sum}0\n"),
            format!("{FIRST}\nfile a\n3 {}\n", "zz".repeat(32)),
            format!("{FIRST}\nfile a\n99999999999999999 {sum}\n"),
            format!("{FIRST}\nfile a\n3 {sum}"),
            format!("{FIRST}\n{long}\n"),
        ] {
            assert_eq!(Kept::read(text.as_bytes()).unwrap_err().kind(), Kind::Protocol, "{text:?}");
        }
    }
}
