//! The library's own state of a disk object of C callers.

use std::path::PathBuf;

/// The object that `runtime` points to.
pub struct State {
    /// Absolute path of the descriptor.
    pub(super) descriptor: PathBuf,
    pub(super) component: Option<String>,
    /// A call panicked: the object may be half changed, and further calls refuse it.
    pub(super) broken: bool,
}
