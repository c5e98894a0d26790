//! Faults that a test puts into the order of an operation's steps, to show that the crash tests find them.

use std::cell::Cell;

thread_local! {
    static NOW: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Whether this thread's test has put in this fault.
pub fn is(name: &str) -> bool {
    NOW.get() == Some(name)
}

/// Puts a fault in, or takes it out.
pub fn set(name: Option<&'static str>) {
    NOW.set(name);
}
