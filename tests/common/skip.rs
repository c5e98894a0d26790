//! What a skipped test is: a failure where all of them are wanted (`PLOOP_TEST=ci` and `full`), elsewhere a line that shows.

use std::io::Write;
use std::path::Path;

use super::{Counts, counts};

/// Says that the current test is skipped, and why; the test returns after it. Fails where no test may be skipped.
#[track_caller]
pub fn skip(why: &str) {
    skip_as(&super::test_name(), why);
}

/// The same for a test that knows its name: the body of a skipped test may run in a thread of another name.
#[track_caller]
pub fn skip_as(test: &str, why: &str) {
    let strict = counts() != Counts::Usual;
    assert!(!strict, "{test}: skipped, which PLOOP_TEST=ci and full forbid: {why}");
    say(test, why);
}

/// The same for what depends on the file system that holds the scratch folder: it never fails.
pub fn skip_on_this_file_system(why: &str) {
    say(&super::test_name(), why);
}

/// capi-tests/tools/runner.py reads these lines. The harness would keep what the print macros write to itself.
fn say(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIP: {test}: {why}");
}

/// What devices need that is missing here.
pub fn no_devices() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("device tests need root".into());
    }
    let missing = ["/dev/fuse", "/dev/loop-control"].into_iter().find(|node| !Path::new(node).exists())?;
    Some(format!("there is no {missing}"))
}

/// True where devices can be had; else the test is skipped.
#[track_caller]
pub fn devices() -> bool {
    devices_for(&super::test_name())
}

#[track_caller]
pub fn devices_for(test: &str) -> bool {
    no_devices().inspect(|why| skip_as(test, why)).is_none()
}

/// True where a program is installed; else the test is skipped.
#[track_caller]
pub fn program(name: &str) -> bool {
    let installed = match name.contains('/') {
        true => Path::new(name).exists(),
        false => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(name).exists())
        }
    };
    if !installed {
        skip(&format!("{name} is not installed"));
    }
    installed
}
