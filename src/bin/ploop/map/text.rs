//! A map on a terminal, or as plain text.

use std::ffi::{OsStr, OsString};

use ploop::ops::map::{Mapped, Part, Parts};

use crate::{Fail, result};

const WIDTH: usize = 80;
/// The picture of the disk has at most so many lines.
const LINES: usize = 8;
/// Marks of the picture of a file.
const FILE: usize = 16;
/// Of the number before a line, and of the borders.
const MARGIN: usize = 14;

/// What it is drawn on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    columns: usize,
    /// Blocks instead of digits.
    blocks: bool,
    colour: bool,
}

impl Paper {
    /// `columns`: of the terminal; none: the output is read by a program. The variables are those of the environment.
    pub fn of(columns: Option<usize>, variable: impl Fn(&'static str) -> Option<OsString>) -> Paper {
        let set = |name| variable(name).filter(|v| !v.is_empty());
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default();
        let locale = locale.to_string_lossy().to_ascii_uppercase();
        let terminal = columns.is_some();
        Paper {
            columns: columns.unwrap_or(WIDTH).clamp(MARGIN + FILE, 400),
            blocks: terminal && (locale.contains("UTF-8") || locale.contains("UTF8")),
            colour: terminal && set("NO_COLOR").is_none() && set("TERM").is_some_and(|t| t != OsStr::new("dumb")),
        }
    }

    fn width(&self) -> usize {
        self.columns - MARGIN
    }

    pub fn parts(&self) -> Parts {
        Parts { disk: self.width() * LINES, file: FILE }
    }

    /// How full a part is.
    fn mark(&self, used: u64, all: u64) -> char {
        const BLOCKS: [char; 5] = ['·', '░', '▒', '▓', '█'];
        let (used, all) = (used.min(all), all.max(1));
        match (used, self.blocks) {
            (0, true) => BLOCKS[0],
            (0, false) => '.',
            (n, true) if n == all => BLOCKS[4],
            (n, false) if n == all => '#',
            (n, true) => BLOCKS.get(1 + (u128::from(n) * 3 / u128::from(all)) as usize).copied().unwrap_or('▓'),
            (n, false) => {
                char::from_digit((u128::from(n) * 10 / u128::from(all)).clamp(1, 9) as u32, 10).unwrap_or('9')
            }
        }
    }

    /// In the colour of a level, if there are colours.
    fn in_colour(&self, text: &str, level: Option<usize>) -> String {
        // Blue, yellow, cyan, magenta, green, red.
        const COLOURS: [u8; 6] = [34, 33, 36, 35, 32, 31];
        match level.filter(|_| self.colour).and_then(|l| COLOURS.get(l % COLOURS.len())) {
            Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }

    fn line(&self, parts: &[Part]) -> String {
        parts.iter().map(|p| self.in_colour(&self.mark(p.allocated, p.clusters).to_string(), p.level)).collect()
    }
}

/// Bytes in words.
fn bytes(n: u64) -> String {
    match n {
        n if n >= 10 << 30 => format!("{} GiB", n >> 30),
        n if n >= 10 << 20 => format!("{} MiB", n >> 20),
        n => format!("{} KiB", n >> 10),
    }
}

/// Prints a map.
pub fn show(name: &str, mapped: &Mapped, paper: &Paper) -> Result<(), Fail> {
    for line in lines(name, mapped, paper) {
        result(line)?;
    }
    Ok(())
}

fn lines(name: &str, mapped: &Mapped, paper: &Paper) -> Vec<String> {
    let map = &mapped.map;
    let size = |clusters: u64| bytes(clusters.saturating_mul(map.cluster_bytes));
    let of = |n: usize| if n == 1 { "1 image".to_owned() } else { format!("{n} images") };
    let runs = mapped.device.as_ref().map(|d| format!(", runs as {}", d.display())).unwrap_or_default();
    let mut out = vec![format!(
        "{name}: {}, {} clusters of {}, {}{runs}",
        size(map.clusters),
        map.clusters,
        bytes(map.cluster_bytes),
        of(map.levels.len())
    )];
    let key = match paper.blocks {
        true => "a darker mark: more of it has a place; ·: nothing",
        false => "1 to 9: so many tenths of it have a place; #: all; .: nothing",
    };
    let per = map.clusters.div_ceil(map.parts.len().max(1) as u64);
    let colours = if paper.colour { "; the colour is that of the level" } else { "" };
    out.push(format!("\nThe disk, {} a mark ({key}{colours}):", size(per)));
    let mut first = 0;
    for parts in map.parts.chunks(paper.width()) {
        out.push(format!("{:>11} |{}|", size(first), paper.line(parts)));
        first += parts.iter().map(|p| p.clusters).sum::<u64>();
    }
    out.push(format!(
        "\n{:>5} {:>10} {:>10} {:>10} {:>10} {:>9} {:>8}",
        "level", "clusters", "visible", "shadowed", "free", "extents", "mean run"
    ));
    for (level, file) in map.levels.iter().zip(&mapped.files).rev() {
        out.push(format!(
            "{} {:>10} {:>10} {:>10} {:>10} {:>9} {:>8.1}",
            paper.in_colour(&format!("{:>5}", level.level), Some(level.level)),
            level.allocated,
            level.visible,
            level.shadowed,
            level.free,
            level.extents,
            level.mean_run
        ));
        let part = (level.file_clusters / level.file_parts.len().max(1) as u64).max(1);
        let marks: String = level.file_parts.iter().map(|n| paper.mark(*n, part)).collect();
        out.push(format!("      |{}| {}", paper.in_colour(&marks, Some(level.level)), file.display()));
    }
    out.push(String::new());
    out.push(format!("allocated  {} of {}", size(map.allocated()), size(map.clusters)));
    if map.shadowed() > 0 {
        out.push(format!("shadowed   {}: a level above has them, too; merging gives them back", size(map.shadowed())));
    }
    out.push(format!("free       {} in the files", size(map.free())));
    out.push(match (&mapped.compact.bytes, &mapped.compact.why_not) {
        (Some(n), _) => format!("compact    would give about {} back", bytes(*n)),
        (None, why) => format!("compact    not known: {}", why.as_deref().unwrap_or("no estimate")),
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paper(columns: Option<usize>, variables: &[(&'static str, &str)]) -> Paper {
        Paper::of(columns, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
    }

    #[test]
    fn blocks_and_colours_where_the_terminal_has_them() {
        let utf = ("LANG", "en_US.UTF-8");
        let term = ("TERM", "xterm");
        assert_eq!(paper(Some(100), &[utf, term]), Paper { columns: 100, blocks: true, colour: true });
        assert_eq!(
            paper(Some(100), &[utf, term, ("NO_COLOR", "1")]),
            Paper { columns: 100, blocks: true, colour: false }
        );
        assert!(paper(Some(100), &[utf, term, ("NO_COLOR", "")]).colour);
        assert_eq!(paper(Some(5), &[("TERM", "dumb")]), Paper { columns: 30, blocks: false, colour: false });
        assert!(!paper(Some(100), &[("LC_ALL", "C"), utf, term]).blocks);
        assert_eq!(paper(None, &[utf, term]), Paper { columns: 80, blocks: false, colour: false });
    }

    #[test]
    fn marks() {
        let plain = paper(None, &[]);
        let marks: String = [0, 1, 19, 20, 99, 100, 150].iter().map(|n| plain.mark(*n, 100)).collect();
        assert_eq!(marks, ".1129##");
        assert_eq!(plain.mark(5, 0), '.');
        let blocks = paper(Some(80), &[("LANG", "C.UTF-8")]);
        let marks: String = [0, 1, 33, 34, 66, 67, 99, 100].iter().map(|n| blocks.mark(*n, 100)).collect();
        assert_eq!(marks, "·░░▒▒▓▓█");
        let colour = Paper { colour: true, ..blocks };
        assert_eq!(colour.in_colour("x", Some(7)), "\x1b[33mx\x1b[0m");
        assert_eq!((colour.in_colour("x", None), blocks.in_colour("x", Some(0))), ("x".into(), "x".into()));
    }
}
