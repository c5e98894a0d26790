//! From the model to XML, byte for byte as the classic writes it.

use std::fmt::Write;
use std::path::Path;

use crate::bail;
use crate::error::Result;

use super::model::{Descriptor, ImageMode, Layout, ReverseMerge};

/// Text of the element Temporary of a snapshot that a merge has begun to change. Of that element other programs read only
/// whether it is there.
pub(super) const SPOILED: &str = "merging";

impl Descriptor {
    /// The file's content.
    pub fn to_xml(&self) -> Result<String> {
        let mut out = Out { text: String::from("<?xml version=\"1.0\"?>\n"), depth: 0 };
        let root = match self.layout {
            Layout::Parallels => "Parallels_disk_image",
            Layout::Virtuozzo => "Virtuozzo_disk_image",
        };
        out.open(root);
        out.open("Disk_Parameters");
        out.leaf("Disk_size", self.size_sectors);
        if self.max_delta_size != 0 {
            out.leaf("Max_delta_size", self.max_delta_size);
        }
        out.leaf("Cylinders", self.cylinders);
        out.leaf("Heads", self.heads);
        let tracks = u64::from(self.cylinders) * u64::from(self.heads);
        out.leaf("Sectors", self.size_sectors.checked_div(tracks).unwrap_or(0));
        out.leaf("Padding", 0);
        out.close("Disk_Parameters");
        out.open("StorageData");
        out.open("Storage");
        out.leaf("Start", 0);
        out.leaf("End", self.size_sectors);
        out.leaf("Blocksize", self.blocksize.sectors());
        if self.mode == ImageMode::Preallocated {
            out.leaf("Preallocated", 1);
        }
        for image in &self.images {
            out.open("Image");
            out.leaf("GUID", image.guid);
            out.leaf("Type", if self.mode == ImageMode::Raw { "Plain" } else { "Compressed" });
            out.leaf("File", self.stored_name(&image.file)?);
            out.close("Image");
        }
        out.close("Storage");
        out.close("StorageData");
        out.open("Snapshots");
        out.leaf("TopGUID", self.top);
        for snapshot in &self.snapshots {
            out.open("Shot");
            out.leaf("GUID", snapshot.guid);
            out.leaf("ParentGUID", snapshot.parent);
            match (snapshot.temporary, snapshot.reverse_merge) {
                (_, Some(ReverseMerge::Zeroing)) => out.empty("TemporaryZero"),
                (_, Some(ReverseMerge::Swapped)) => out.empty("TemporaryZeroSwap"),
                (true, None) if snapshot.spoiled => out.leaf("Temporary", SPOILED),
                (true, None) => out.empty("Temporary"),
                (false, None) => {}
            }
            out.close("Shot");
        }
        out.close("Snapshots");
        out.close(root);
        Ok(out.text)
    }

    /// An image's path as stored: relative if it lies below the descriptor's folder.
    fn stored_name<'a>(&self, file: &'a Path) -> Result<&'a str> {
        let Some(path) = file.to_str() else {
            bail!(Param, "image path {}: must be UTF-8 to be stored in a descriptor", file.display());
        };
        if let Some(c) = path.chars().find(|c| !is_xml_char(*c)) {
            bail!(Param, "image path {}: XML cannot have the character {c:?}", file.display());
        }
        let inside = self.dir.to_str().and_then(|dir| path.strip_prefix(dir)).and_then(|p| match self.dir.parent() {
            None => Some(p),
            Some(_) => p.strip_prefix('/'),
        });
        Ok(inside.filter(|p| !p.is_empty()).unwrap_or(path))
    }
}

fn is_xml_char(c: char) -> bool {
    // A parser would return other line ends.
    matches!(c, '\t' | ' '..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..)
}

struct Out {
    text: String,
    depth: usize,
}

impl Out {
    fn indent(&mut self) {
        for _ in 0..self.depth {
            self.text.push_str("  ");
        }
    }

    fn open(&mut self, name: &str) {
        self.indent();
        self.text.push('<');
        self.text.push_str(name);
        self.text.push_str(">\n");
        self.depth += 1;
    }

    fn close(&mut self, name: &str) {
        self.depth = self.depth.saturating_sub(1);
        self.indent();
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push_str(">\n");
    }

    fn empty(&mut self, name: &str) {
        self.indent();
        self.text.push('<');
        self.text.push_str(name);
        self.text.push_str("/>\n");
    }

    fn leaf(&mut self, name: &str, value: impl std::fmt::Display) {
        self.indent();
        self.text.push('<');
        self.text.push_str(name);
        self.text.push('>');
        escape(&value.to_string(), &mut self.text);
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push_str(">\n");
    }
}

/// Text as the classic's XML library writes it without an encoding: all but ASCII as references.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if c.is_ascii() => out.push(c),
            c => {
                // Writing to a string cannot fail.
                let _ = write!(out, "&#x{:X};", u32::from(c));
            }
        }
    }
}
