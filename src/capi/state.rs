//! What the library itself knows of a disk object of C callers.

use std::path::PathBuf;

/// What is behind `runtime`.
pub struct State {
    /// Absolute path of the descriptor.
    pub(super) descriptor: PathBuf,
    pub(super) component: Option<String>,
    /// A call panicked: what the object holds cannot be trusted.
    pub(super) broken: bool,
}
