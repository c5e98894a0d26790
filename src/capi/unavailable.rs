//! What functions say that this release does not have. They are exported so that programs link and start; a call changes
//! nothing, fails and says so.

/// The last error of a call.
pub(super) fn text(name: &str) -> String {
    format!("{name}() is not available in version {} of this library; nothing was changed", env!("CARGO_PKG_VERSION"))
}
