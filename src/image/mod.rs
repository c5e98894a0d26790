//! One image file: opening, making, checking and completing it.

#![forbid(unsafe_code)]

pub mod allocated;
pub mod check;
pub mod compact;
pub mod complete;
pub mod content;
pub mod create;
pub mod fill;
pub mod grow;
pub mod live;
pub mod lock;
pub mod map;
pub mod merge;
pub mod open;
pub mod same;
pub mod scan;
pub mod table;
pub mod target;
pub mod version;

#[cfg(test)]
pub mod breach;
#[cfg(test)]
mod placement_tests;
#[cfg(test)]
mod tests;
