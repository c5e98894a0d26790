//! Cancellation of the operation that runs in a thread, see [`crate::sys::cancel`]; a cancellation is logged.

use crate::sys::cancel;

pub use crate::sys::cancel::{Child, clear, register_child, request, requested};

/// An operation that can be cancelled, from [`begin`] until it is dropped, in the thread that began it.
#[must_use = "the operation ends when this is dropped"]
pub struct Operation(Option<cancel::Operation>);

/// Starts an operation of this thread, with no request pending. Inside another operation of the thread it changes nothing.
pub fn begin() -> Operation {
    Operation(Some(cancel::begin()))
}

impl Operation {
    /// Ends the operation. `done`: it did what it was asked for, so a request to stop, if there was one, came too late.
    pub fn end(mut self, done: bool) {
        if self.0.take().is_some_and(cancel::Operation::end) {
            super::log_cancel(done);
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if self.0.take().is_some_and(cancel::Operation::end) {
            super::log_cancel(false);
        }
    }
}
