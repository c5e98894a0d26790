//! The library's own state of a disk object of C callers.

use crate::descriptor::Descriptor;
use std::path::PathBuf;

/// The object that `runtime` points to.
pub struct State {
    /// Absolute path of the descriptor.
    pub(super) descriptor: PathBuf,
    pub(super) component: Option<String>,
    /// What the visible fields were filled from: it has more than they show.
    pub(super) read: Option<Descriptor>,
    /// A call panicked: the object may be half changed, and further calls refuse it.
    pub(super) broken: bool,
}
