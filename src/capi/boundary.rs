//! The frame around every exported function: an operation that can be cancelled, panics caught, errors reported and
//! turned into the classic's numbers.

use crate::error::{Error, Kind, Result};
use crate::report;
use std::any::Any;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `body` as an operation of this thread; an error has been reported already and is returned as its code.
fn run<R>(name: &str, body: impl FnOnce() -> Result<R>) -> Result<R, Kind> {
    let operation = report::cancel::begin();
    // A panic may leave a disk object half changed. The object is then marked unusable (`handle::Disk`).
    let guarded = || {
        inject(name);
        body()
    };
    let error = match catch_unwind(AssertUnwindSafe(guarded)) {
        Ok(Ok(value)) => {
            operation.end(true);
            return Ok(value);
        }
        Ok(Err(error)) => error,
        Err(panic) => Error::new(
            Kind::Abort,
            format!(
                "{name}: internal error: {}; a disk object it was called with is unusable now",
                panic_text(&*panic)
            ),
        ),
    };
    report::error(&error);
    Err(error.kind())
}

/// 0 on success, else a SYSEXIT code.
pub fn call(name: &str, body: impl FnOnce() -> Result<()>) -> c_int {
    match run(name, body) {
        Ok(()) => 0,
        Err(kind) => kind.code(),
    }
}

/// 0 found, 1 not found, -1 error; SYSEXIT_LOCK when the descriptor could not be locked.
pub fn three_way(name: &str, body: impl FnOnce() -> Result<bool>) -> c_int {
    match run(name, body) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(Kind::Lock) => Kind::Lock.code(),
        Err(_) => -1,
    }
}

/// 1 yes, 0 no, -1 error.
pub fn yes_no(name: &str, body: impl FnOnce() -> Result<bool>) -> c_int {
    match run(name, body) {
        Ok(yes) => yes.into(),
        Err(_) => -1,
    }
}

/// 0 on success, -1 on error.
pub fn minus_one(name: &str, body: impl FnOnce() -> Result<()>) -> c_int {
    match run(name, body) {
        Ok(()) => 0,
        Err(_) => -1,
    }
}

/// The result of `body`; `otherwise` on error.
pub fn or<R>(name: &str, otherwise: R, body: impl FnOnce() -> Result<R>) -> R {
    run(name, body).unwrap_or(otherwise)
}

/// For functions without a result: an error is only reported.
pub fn void(name: &str, body: impl FnOnce() -> Result<()>) {
    let _ = run(name, body);
}

/// For tests of callers: a debug build panics in the function that `$PLOOP_PANIC_IN` names, or with `*` in each.
#[cfg(debug_assertions)]
fn inject(name: &str) {
    if std::env::var_os("PLOOP_PANIC_IN").is_some_and(|wanted| wanted == name || wanted == "*") {
        panic!("injected into {name}");
    }
}

#[cfg(not(debug_assertions))]
fn inject(_name: &str) {}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panic without a message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bail;

    #[test]
    fn each_convention() {
        assert_eq!(call("f", || Ok(())), 0);
        assert_eq!(call("f", || bail!(NoSnap, "no snapshot {}", 7)), 43);
        assert_eq!(report::last_error(), "no snapshot 7");
        assert_eq!(three_way("f", || Ok(true)), 0);
        assert_eq!(three_way("f", || Ok(false)), 1);
        assert_eq!(three_way("f", || bail!(Sys, "x")), -1);
        assert_eq!(three_way("f", || bail!(Lock, "x")), 23);
        assert_eq!(yes_no("f", || Ok(true)), 1);
        assert_eq!(yes_no("f", || Ok(false)), 0);
        assert_eq!(yes_no("f", || bail!(Lock, "x")), -1);
        assert_eq!(minus_one("f", || bail!(Open, "x")), -1);
    }

    #[test]
    fn a_panic_stays_inside() {
        assert_eq!(call("ploop_f", || panic!("boom {}", 1)), 29);
        let text = report::last_error();
        assert!(text.contains("ploop_f") && text.contains("boom 1"), "{text}");
        assert_eq!(three_way("ploop_f", || panic!("static")), -1);
    }

    #[test]
    fn a_stale_request_to_cancel_is_forgotten() {
        report::cancel::request();
        let seen = |expected| {
            call("f", || {
                assert_eq!(report::cancel::requested(), expected);
                report::cancel::request();
                assert!(report::cancel::requested());
                Ok(())
            })
        };
        assert_eq!(seen(false), 0);
        assert_eq!(seen(false), 0);
    }
}
