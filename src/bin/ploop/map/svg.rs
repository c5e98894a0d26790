//! A map as a page: an SVG that browsers show, with a title on each mark.

use std::fmt::Write;

use ploop::ops::map::{Mapped, Parts};
use ploop::ops::map_page::MARK;

/// Marks of the disk in a line, and how many lines.
const LINE: usize = 96;
const LINES: usize = 24;
pub const PARTS: Parts = Parts { disk: LINE * LINES, file: LINE };

/// Side of a mark, with the space around it.
const MARK_SIZE: usize = 10;
const LEFT: usize = 20;
const WIDTH: usize = LINE * MARK_SIZE + 2 * LEFT;
/// Height of a line of text.
const TEXT: usize = 18;
const EMPTY: &str = "#e8e8e8";
const COLOURS: [&str; 8] = ["#3465a4", "#f57900", "#4e9a06", "#cc0000", "#75507b", "#c4a000", "#06989a", "#8f5902"];

fn colour(level: usize) -> &'static str {
    COLOURS.get(level % COLOURS.len()).copied().unwrap_or(EMPTY)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML has no way to write these.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

struct Page {
    out: String,
    y: usize,
}

impl Page {
    fn text(&mut self, weight: &str, text: &str) {
        self.y += TEXT;
        let y = self.y;
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "<text x=\"{LEFT}\" y=\"{y}\" font-weight=\"{weight}\">{}</text>", escaped(text));
    }

    /// A mark whose colour is as strong as it is full.
    fn mark(&mut self, column: usize, colour: &str, (used, all): (u64, u64), title: &str) {
        let (x, y, side) = (LEFT + column * MARK_SIZE, self.y, MARK_SIZE - 1);
        let share = if all == 0 { 0.0 } else { (used as f64 / all as f64).clamp(0.0, 1.0) };
        let (fill, opacity) = if used == 0 { (EMPTY, 1.0) } else { (colour, 0.25 + 0.75 * share) };
        let _ = writeln!(
            self.out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\" fill-opacity=\"{opacity:.2}\">\
             <title>{}</title></rect>",
            escaped(title)
        );
    }
}

/// The whole page.
pub fn page(name: &str, mapped: &Mapped) -> String {
    let map = &mapped.map;
    let mib = |clusters: u64| clusters.saturating_mul(map.cluster_bytes) >> 20;
    let mut page = Page { out: String::new(), y: LEFT };
    page.text("bold", name);
    let device = mapped.device.as_ref().map(|d| format!(", runs as {}", d.display())).unwrap_or_default();
    page.text(
        "normal",
        &format!(
            "{} MiB, {} clusters of {} KiB{device}; allocated {} MiB, shadowed {} MiB, free in the files {} MiB",
            mib(map.clusters),
            map.clusters,
            map.cluster_bytes >> 10,
            mib(map.allocated()),
            mib(map.shadowed()),
            mib(map.free())
        ),
    );
    page.text(
        "normal",
        &match (&mapped.compact.bytes, &mapped.compact.why_not) {
            (Some(n), _) => format!("ploop compact would give about {} MiB back", n >> 20),
            (None, why) => format!("what ploop compact would give back: {}", why.as_deref().unwrap_or("not known")),
        },
    );
    page.text("bold", "The disk");
    page.y += MARK_SIZE;
    let mut first = 0;
    for line in map.parts.chunks(LINE) {
        for (column, part) in line.iter().enumerate() {
            let from = part.level.map(|l| format!(", most of level {l}")).unwrap_or_default();
            let title = format!(
                "clusters {first} to {}: {} of {} have a place{from}",
                (first + part.clusters).saturating_sub(1),
                part.allocated,
                part.clusters
            );
            page.mark(column, part.level.map_or(EMPTY, colour), (part.allocated, part.clusters), &title);
            first += part.clusters;
        }
        page.y += MARK_SIZE;
    }
    for (level, file) in map.levels.iter().zip(&mapped.files).rev() {
        page.text("bold", &format!("Level {}: {}", level.level, file.display()));
        page.text(
            "normal",
            &format!(
                "{} clusters, {} visible, {} shadowed, {} free; {} extents, {:.1} clusters on average{}",
                level.allocated,
                level.visible,
                level.shadowed,
                level.free,
                level.extents,
                level.mean_run,
                if level.damage.is_empty() { "" } else { "; DAMAGED" }
            ),
        );
        page.y += MARK_SIZE;
        let all = (level.file_clusters / level.file_parts.len().max(1) as u64).max(1);
        for (column, used) in level.file_parts.iter().enumerate() {
            page.mark(
                column,
                colour(level.level),
                (*used, all),
                &format!("{used} clusters of this part of the file are in use"),
            );
        }
        page.y += MARK_SIZE;
    }
    let height = page.y + LEFT;
    format!(
        "{MARK}<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
        page.out
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_page() {
        assert_eq!(escaped("a<b>&\"\u{1}\n"), "a&lt;b&gt;&amp;&quot;\u{fffd}\u{fffd}");
    }
}
