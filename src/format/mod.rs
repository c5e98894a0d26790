//! Bytes only: header, BAT, GPT, geometry, limits, GUIDs. No files, no clocks.

#![forbid(unsafe_code)]

pub mod balloon_piece;
pub mod bat;
pub mod geometry;
pub mod gpt;
pub mod guid;
pub mod header;
pub mod limits;
pub mod maintenance;
pub mod mbr;
pub mod version;

#[cfg(test)]
mod tests;
